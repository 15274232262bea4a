"""The four pictures of a report, each in light and dark."""

from pathlib import Path

import numpy as np

from ember_mlx.geometry.recorder import GAPS, NEW, OUTSIDE
from ember_mlx.geometry.sampling import CLASSES
from ember_mlx.geometry.verdict import MATRICES
from ember_mlx.plots.style import MARKERS, save_light_and_dark

__all__ = ["draw_all"]

ROW_HEIGHT, PANEL_HEIGHT, EXTRA_HEIGHT = 0.3, 0.5, 1.8  # inches
LABELS = {"never": "never in the text", "never, columns": "never in the text, columns"}
LEAST = 5  # values, of which quantiles say something


def draw_all(found: dict, folder: Path) -> dict:
    """Draw what was measured.

    Returns:
        A dict, the name of each picture -> its PNG files, light and dark.
    """
    pictures = {
        "second-moment": _second_moment(found),
        "successive-gradients": _successive(found),
        "paths": _paths(found),
        "steps": _steps(found),
    }
    drawn = {}
    for name, (panels, options) in pictures.items():
        panels = [(title, [row for row in rows if row[1]["count"] >= LEAST]) for title, rows in panels]
        panels = [(title, rows) for title, rows in panels if rows]
        if panels:
            height = sum(ROW_HEIGHT * len(rows) + PANEL_HEIGHT for _, rows in panels) + EXTRA_HEIGHT
            drawn[name] = save_light_and_dark(folder / f"{name}.png", _intervals(panels, **options), height=height)
    return drawn


def _intervals(panels, title, label, legend, reference=None, scale="linear", ticks=None, limits=None):
    """A function that draws the median and the 10 % to 90 % interval of each row, one row below the other.

    Args:
        panels: (title, rows) each; a row is (words, summary, what is compared with it or None, colour).
        title, label (str): What the picture is about, and what its x axis shows, with the unit.
        legend (list): (colour, words); None in the place of a colour for what is compared with.
        reference (float): A line of its own.
    """

    def draw(figure, theme):
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        axes = figure.subplots(
            len(panels), 1, sharex=True, squeeze=False, height_ratios=[len(rows) for _, rows in panels]
        )
        for (panel, rows), one in zip(panels, axes[:, 0], strict=True):
            one.set_title(panel)
            for place, (_, summary, compared, colour) in enumerate(rows):
                if compared and compared["count"]:
                    one.barh(place, compared["p90"] - compared["p10"], 0.62, compared["p10"], color=theme.grid)
                    one.vlines(compared["median"], place - 0.31, place + 0.31, color=theme.text, linewidth=1)
                ends = {"color": theme.lines[colour], "linestyle": "-", "marker": "|", "markersize": 9}
                one.plot([summary["p10"], summary["p90"]], [place, place], markevery=1, **ends)
                middle = {"color": theme.lines[colour], "marker": MARKERS[colour], "markersize": 8}
                one.plot([summary["median"]], [place], markevery=1, **middle)
            one.set_yticks(range(len(rows)), [LABELS.get(words, words) for words, *_ in rows])
            one.set_ylim(len(rows) - 0.4, -0.6)
            one.grid(axis="y", visible=False)
            if reference is not None:
                one.axvline(reference, color=theme.text, linewidth=1, linestyle=":", marker="")
        last = axes[-1, 0]
        last.set_xscale(scale)
        if limits:
            last.set_xlim(*limits)
        if ticks:
            last.set_xticks(list(ticks), [f"{tick:g}" for tick in ticks])
            last.minorticks_off()
        last.set_xlabel(label)
        _add_legend(figure, theme, legend)

    return draw


def _add_legend(figure, theme, legend):
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = []
    for colour, words in legend:
        if colour is None:
            handles.append(Patch(color=theme.grid, label=words))
        else:
            handles.append(
                Line2D([], [], color=theme.lines[colour], marker=MARKERS[colour], linestyle="-", label=words)
            )
    figure.legend(handles=handles, loc="outside lower center", ncols=2)


def _second_moment(found):
    def row(words, errors, colour):
        return words, _steps_of(errors), _steps_of(errors.get("noise")), colour

    panels = []
    for table in found["tables"]:
        rows = [row(name, moment["rows"], 0) for name, moment in table["second_moment"].items()]
        rows += [row(f"{name}, columns", moment["columns"], 1) for name, moment in table["second_moment"].items()]
        panels.append((_title(table), rows))
    legend = [(0, "sampled rows, all columns"), (1, "sampled columns"), (None, "an exact rank one, with noisy squares")]
    options = {
        "title": "How Ember's step differs from that of a dense second moment",
        "label": "Ember's step over that of a dense second moment (median, 10 % to 90 %)",
        "reference": 1,
        "scale": "log",
        "ticks": (0.1, 0.2, 0.5, 1, 2, 5),
        "legend": legend,
    }
    return panels, options


def _steps_of(errors):
    """Log errors of the second moment as factors of a step."""
    if not errors or not errors["count"]:
        return {"count": 0}
    factors = {"p10": "p90", "median": "median", "p90": "p10"}
    return {"count": errors["count"]} | {name: float(np.exp(-errors[other] / 2)) for name, other in factors.items()}


def _successive(found):
    chance = found["tables"][0]["random_cosine"]
    panels = []
    for table in found["tables"]:
        rows = [(name, table["successive_gradients"][name], None, 0) for name in CLASSES]
        # In an embedding the two are the same but for rows that rest.
        rows += [(f"{name}, seen again", table["gradients_when_seen_again"][name], None, 1) for name in CLASSES]
        panels.append((_title(table), rows))
    panels.append((_hidden_title(found), [("rows", found["hidden"]["successive_gradients"], None, 2)]))
    legend = [(0, "from one step to the next"), (1, "from one sighting of the token to the next"), (2, "other rows")]
    options = {
        "title": "Does a row's gradient repeat the one before?",
        "label": f"cosine of successive gradients of a row (median, 10 % to 90 %; chance: ±{chance:.2f})",
        "reference": 0,
        "limits": (-1, 1),
        "legend": legend,
    }
    return panels, options


def _paths(found):
    def row(name, paths, colour):
        return name, _percent(paths["share"]), _percent(paths["walk_share"]), colour

    panels = [(_title(table), [row(name, table["paths"][name], 0) for name in CLASSES]) for table in found["tables"]]
    panels.append((_hidden_title(found), [row("rows", found["hidden"]["paths"], 2)]))
    legend = [(0, "rows of the table"), (2, "other rows"), (None, "random walks with the same moves")]
    options = {
        "title": "Does a token move along one line?",
        "label": "share of the path on one line, in % (median, 10 % to 90 %)",
        "limits": (None, 100.5),
        "legend": legend,
    }
    return panels, options


def _title(table):
    return f"{table['path']} ({table['role']})"


def _hidden_title(found):
    return MATRICES[found["hidden"]["kind"]].removeprefix("the ").capitalize()


def _percent(shares):
    return {name: value if name == "count" else 100 * value for name, value in shares.items()}


def _steps(found):
    panels = [
        (
            _title(table),
            [(_updates(gap), table["steps"][gap], None, 0 if gap in GAPS else 1) for gap in (*GAPS, NEW, OUTSIDE)],
        )
        for table in found["tables"]
    ]
    legend = [(0, "updates since the token was last in a batch"), (1, "never before; and tokens that are not in it")]
    options = {
        "title": "How large are the steps?",
        "label": "what one update moves a row, in learning rates (median, 10 % to 90 %)",
        "reference": 1,
        "scale": "log",
        "ticks": (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
        "legend": legend,
    }
    return panels, options


def _updates(gap):
    return gap + (" update" if gap == "1" else " updates" if gap in GAPS else "")
