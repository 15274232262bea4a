"""The report as one HTML page: pictures embedded, nothing to load from anywhere, light and dark."""

import base64
from html import escape

from ember_mlx.geometry.sampling import MEMORY_SHARE
from ember_mlx.geometry.verdict import MATRICES, NO, PARTLY, UNKNOWN, YES
from ember_mlx.plots.style import THEMES
from ember_mlx.shared.units import format_bytes

MARKS = {YES: "✓", PARTLY: "~", NO: "✗", UNKNOWN: "?"}
TITLES = {
    YES: "Ember suits",
    PARTLY: "Ember may suit: compare first",
    NO: "Ember does not suit",
    UNKNOWN: "Not enough to tell",
}
SECTIONS = {
    "second-moment": (
        "Is one number a row and one a feature enough?",
        "Ember divides by a second moment of rank one, outer(r, c) / mean(c). For the sampled rows and columns Adam's "
        "dense second moment was kept beside it, over the same steps. 1 is no difference. A dense moment is itself "
        "made of few squares and so noisy: the grey bars show what that noise alone would make, were the true moment "
        "exactly of rank one and the gradients normal. What counts is by how much the lines are wider than the bars.",
    ),
    "successive-gradients": (
        "Would a first moment have something to average?",
        "The cosine between one gradient of a row and the next. Near 0, the last gradients foretell nothing of the "
        "next one. In a head and in a tied table every row has a gradient in every step, also when its token is not in "
        "the batch: those all push the row away from much the same average hidden state, so they can be alike.",
    ),
    "paths": (
        "Is a token's path a ray?",
        "The share of a row's path, seen from where it began, that lies on the best line. A random walk has a high "
        "share, too, 81 % with many moves and more with few; so each row is compared with random walks of its own "
        "moves. This tells something of the model; Ember does not rest on it.",
    ),
    "steps": (
        "How far does one update move a row?",
        "An update should move a row by about one learning rate (root mean square over the row). A row whose token was "
        "not seen for long has a small second moment and takes a larger step, up to about "
        "sqrt((1 - beta2^t) / (1 - beta2)) learning rates: sqrt(t) in the beginning of a run, and 31.6 in a long one "
        "with beta2 = 0.999.",
    ),
}


def html(found: dict, drawn: dict) -> str:
    """The page.

    Args:
        found (dict): The report.
        drawn (dict): Name of each picture -> its two PNG files, light and dark.
    """
    judged, run = found["verdict"], found["run"]
    findings = "".join(
        f"<tr><td class=mark>{MARKS[one['answer']]}</td><td><b>{escape(one['claim'])}: {escape(one['answer'])}.</b><br>"
        f"{escape(one['words'])}</td></tr>"
        for one in judged["findings"]
    )
    sections = "".join(
        f"<h2>{escape(title)}</h2><p>{escape(words)}</p>{_picture(title, drawn.get(name))}"
        for name, (title, words) in SECTIONS.items()
    )
    tables = "".join(_table(table) for table in found["tables"])
    summary = (
        f"{run['updates']} updates at a table learning rate of {run['table_learning_rate']:.3g}; "
        f"{run['loss_name'].lower()} {_number(run['loss_before'])} before, {_number(run['loss_after'])} after, "
        "in nats a token."
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Token geometry: {escape(TITLES[judged["suits"]])}</title>
<style>
{_style()}
</style>
</head>
<body>
<p class=small>Is Ember the right thing for {escape(run["model"])} on {escape(run["data"])}?</p>
<h1>{escape(TITLES[judged["suits"]])}</h1>
<p class=lead>{escape(judged["words"])}</p>
<p class=small>{summary}</p>
<table>{findings}</table>
{sections}
{tables}
<h2>What was measured</h2>
{_measured(found)}
</body>
</html>
"""


def _style():
    rules = """\
body {{ background: {background}; color: {text}; }}
td, th {{ border-color: {grid}; }}
code {{ background: {grid}55; }}"""
    light, dark = (
        rules.format(background=theme.background, text=theme.text, grid=theme.grid)
        for theme in (THEMES["light"], THEMES["dark"])
    )
    return f"""\
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ margin: 0; }} h2 {{ margin-top: 2.5rem; }}
.lead {{ font-size: 1.2rem; margin-top: .5rem; }} .small {{ font-size: .9rem; }}
img {{ width: 100%; max-width: 50rem; height: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: .95rem; }}
td, th {{ text-align: left; padding: .35rem .6rem; border-bottom: 1px solid; vertical-align: top; }}
td.n, th.n {{ text-align: right; white-space: nowrap; }}
.mark {{ font-size: 1.4rem; width: 1.5rem; line-height: 1.2; }}
code {{ overflow-wrap: anywhere; padding: 0 .2rem; }}
{light}
@media (prefers-color-scheme: dark) {{
{dark}
}}"""


def _picture(title, files):
    if not files:
        return "<p><i>Nothing was seen often enough: train longer.</i></p>"
    light, dark = (base64.b64encode(file.read_bytes()).decode() for file in files)
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">'
        f'<img alt="{escape(title)}" src="data:image/png;base64,{light}"></picture>'
    )


def _table(table):
    """The rows that moved most, in all and in one step."""
    moved, steps, classes = [], [], []
    for row in table["rows_moved_most"]:
        size = [f"{row['learning_rates']:.1f}", f"{row['of_its_size']:.1%}"]
        moved.append([_code(row["text"]), row["class"], f"{row['in_the_text']:,}", *size])
    for row in table["largest_steps"]:
        when = [f"{row['update']:,}", _last_seen(row["last_seen"])]
        steps.append([_code(row["text"]), row["class"], *when, f"{row['learning_rates']:.1f}"])
    for name, one in table["rows_moved"].items():
        rates, sizes = one["learning_rates"], one["of_their_size"]
        if rates["count"]:
            classes.append([name, f"{rates['count']:,}", f"{rates['median']:.1f}", f"{sizes['median']:.2%}"])
    return (
        f"<h2>Which rows moved: {escape(table['path'])}</h2>"
        f"<p>{escape(_shape(table))} In learning rates and of the row's own size, root mean squares over the row; all "
        "rows were looked at.</p>"
        + _rows(
            ["tokens", "rows", "moved by, learning rates (median)", "of their size (median)"], classes, numbers_from=1
        )
        + "<h3>Moved most in all</h3>"
        + _rows(
            ["token", "class", "times in the text", "moved by, learning rates", "of its size"], moved, numbers_from=2
        )
        + "<h3>Largest steps</h3>"
        + _rows(
            ["token", "class", "update", "last seen, in updates", "moved by, learning rates"], steps, numbers_from=2
        )
    )


def _last_seen(gap):
    return gap if not gap[0].isdigit() else f"{gap} before"


def _shape(table):
    rows, columns = table["shape"]
    return f"{table['role'].capitalize()}, {rows:,} x {columns:,} {table['dtype']}."


def _measured(found):
    memory, peak, cost = found["cost"]["memory"], found["cost"]["peak_memory"], found["cost"]
    clock, cpu = cost["extra_time"]["clock"], cost["extra_time"]["cpu"]
    share = memory["share_of_tables"]
    small = " (the tables are so small that the least sample takes more than 5 %)" if share > MEMORY_SHARE else ""
    tokens, tables = [], ""
    for name, one in found["tokens"].items():
        tokens.append([name, f"{one['tokens']:,}", f"{one['share_of_text']:.1%}", f"{one['seen']:,}"])
    for table in found["tables"]:
        one = table["measured"]
        tables += (
            f"<li>{escape(table['path'])}: gradients of {one['rows']} rows with all columns, and of {one['columns']} "
            f"columns in {one['rows_of_the_columns']} rows; paths of {one['rows_followed']} rows; in each step the "
            f"moves of {one['tokens_of_a_batch']} tokens.</li>"
        )
    kind = MATRICES[found["hidden"]["kind"]]
    hidden = ", ".join(f"{one['rows']} of {one['path']}" for one in found["hidden"]["matrices"]) or "none trains here"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    peaks = f"{format_bytes(peak['with'])} with, {format_bytes(peak['without'])} without"
    return (
        f"<ul>{tables}<li>Rows of {kind}: {escape(hidden)}.</li>"
        f"<li>Memory: {format_bytes(memory['total'])}, {share:.1%} of the tables{small}. Peak of the first steps: "
        f"{peaks} measuring.</li>"
        f"<li>Time: {clock:+.0%} a step by the clock, {cpu:+.0%} of CPU time, by the quickest of "
        f"{cost['timed_updates']} updates with measuring and without; "
        f"{cost['seconds_between_steps']:.1f} s between the steps in all.</li></ul>"
        "<p>Classes of tokens: the frequent ones make up the first half of the training text, the middle ones the next "
        "40 %, the rare ones the last 10 %.</p>"
        "<p>The bounds of the verdict have reasons, but they were set with three runs in view, and none that fails.</p>"
        + _rows(["tokens", "how many", "share of the text", "were in a batch"], tokens, numbers_from=1)
        + f"<p class=small><code>{escape(found['command'])}</code><br>{escape(versions)}; "
        f"{escape(found['machine']['gpu'] or found['machine']['processor'])}, {escape(found['date'])}. The numbers are "
        "in geometry.json beside this page.</p>"
    )


def _rows(head, rows, numbers_from):
    def cells(row, tag):
        return "".join(f"<{tag}{' class=n' if i >= numbers_from else ''}>{cell}</{tag}>" for i, cell in enumerate(row))

    return f"<table><tr>{cells(head, 'th')}</tr>" + "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows) + "</table>"


def _code(text):
    return f"<code>{escape(text)}</code>"


def _number(value):
    return "unknown" if value is None else f"{value:.3f}"
