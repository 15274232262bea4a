"""Every table and picture of the quality benchmark, from the JSON lines in ``results``.

python examples/benchmarks/quality/draw.py            # writes tables.md and pictures/ beside this file
"""

import argparse
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from plan import ADAMW, BASELINE, EMBER, IN_BF16, SETTINGS, TUNING_SEED, Run, tuned_rates
from run import loss_of, read_results
from table_rules import TABLE_RULES

from ember_mlx.plot_style import DASHES, MARKERS, save_light_and_dark

HERE = Path(__file__).parent
# Quantiles of Student's t for a 95 % interval, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
WORDS = {name: words for name, (_, _, words) in TABLE_RULES.items()}
WORDS |= {
    "ember | adamw": "Ember on the embedding, AdamW on the head",
    "adamw | ember": "AdamW on the embedding, Ember on the head",
}
RIVALS = (BASELINE, "adamw-b1=0", "adafactor", "rows", "columns", "sgd", "frozen")
PICTURED = ("ember", "ember-growing", "adafactor", "adamw-b1=0", "rows", "ember-clip3")
BETA2 = {"ember-0.95": 0.95, "ember-0.99": 0.99, "ember": 0.999, "ember-0.9999": 0.9999}
AGES = [str(2**i) for i in range(11)] + ["never"]


@dataclass(frozen=True)
class Reported:
    """The runs of one optimizer in one setting at its best rate, seed -> result, tuning seed left out."""

    rate: int | None  # None: the search was not finished, or there is nothing to tune
    by_seed: dict

    def losses(self):
        return [loss_of(result) for result in self.by_seed.values()]


class Results:
    """All results, by setting and optimizer."""

    def __init__(self, lines):
        self.by_run = {Run(**line["run"]).key(): line for line in lines}
        self.losses = {key: loss_of(line) for key, line in self.by_run.items()}
        self.settings = [name for name in SETTINGS if any(key[0] == name for key in self.by_run)]

    def reported(self, setting, optimizer):
        body, rate = self.rates(setting, optimizer)
        by_seed = {}
        for key, line in self.by_run.items():
            run = Run(*key)
            same = (run.setting, run.optimizer, run.body_rate, run.probe) == (setting, optimizer, body, False)
            if same and run.seed != TUNING_SEED and ("|" in optimizer or run.rate == rate):
                by_seed[run.seed] = line
        return Reported(
            rate if optimizer in TABLE_RULES and optimizer != "frozen" else None, dict(sorted(by_seed.items()))
        )

    def rates(self, setting, optimizer):
        if "|" in optimizer:
            return tuned_rates(setting, BASELINE, self.losses)[0], None
        return tuned_rates(setting, optimizer, self.losses)

    def body(self, setting):
        """The body's rate; while it is being searched for, that of the best tuning run so far."""
        found = self.rates(setting, BASELINE)[0]
        if found is None:
            runs = (runs[0] for optimizer in TABLE_RULES if (runs := self._tuning_runs(setting, optimizer)))
            found = min(runs, key=lambda pair: pair[0])[1].body_rate
        return found

    def tuning(self, setting, optimizer, body=None):
        """rate -> validation loss of the tuning seed, at the body's best rate or another."""
        body = self.body(setting) if body is None else body
        runs = self._tuning_runs(setting, optimizer)
        return dict(sorted((run.rate, loss) for loss, run in runs if run.body_rate == body))

    def _tuning_runs(self, setting, optimizer):
        """(loss, run), the best first."""
        runs = ((loss, Run(*key)) for key, loss in self.losses.items() if key[:2] == (setting, optimizer))
        return sorted(
            ((loss, run) for loss, run in runs if run.seed == TUNING_SEED and not run.probe),
            key=lambda pair: (pair[0], pair[1].rate),
        )

    def best_of(self, setting, family):
        """Of several rules, the one whose tuning run at its best rate is the best; None while there is none."""
        tuned = [(min(self.tuning(setting, rule).values()), rule) for rule in family
                 if self.reported(setting, rule).by_seed]  # fmt: skip
        return min(tuned)[1] if tuned else None

    def probe(self, setting, optimizer):
        found = [line["probe"] for key, line in self.by_run.items() if key[:2] == (setting, optimizer) and key[-1]]
        return found[-1] if found else None


def against(theirs: Reported, baseline: Reported):
    """Mean of the differences to the baseline over the seeds that both have, half its 95 % interval, and how many."""
    seeds = [seed for seed in theirs.by_seed if seed in baseline.by_seed]
    pairs = [loss_of(theirs.by_seed[seed]) - loss_of(baseline.by_seed[seed]) for seed in seeds]
    if not pairs or not all(map(math.isfinite, pairs)):
        return math.nan, math.nan, len(pairs)
    half = T95[len(pairs) - 1] * stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
    return mean(pairs), half, len(pairs)


def rate_in_words(rate):
    return "" if rate is None else f"{10 ** (rate / 2):.2g}"


def table_of(results, setting):
    """A markdown table of one setting: losses, differences to AdamW and learning rates, best first."""
    rows = []
    baseline = results.reported(setting, BASELINE)
    for optimizer in WORDS:
        reported = results.reported(setting, optimizer)
        losses = reported.losses()
        if not losses:
            continue
        difference, half, count = against(reported, baseline)
        deviation = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
        interval = "" if optimizer == BASELINE else in_interval(difference, half, count)
        order = 0.0 if optimizer == BASELINE else difference if count else mean(losses)
        rows.append((order, optimizer, f"{mean(losses):.4f}{deviation}", len(losses), interval, reported.rate))
    lines = [
        "| on the tables | validation loss | runs | minus AdamW, 95 % interval | learning rate |",
        "| --- | --- | --- | --- | --- |",
    ]
    for _, optimizer, loss, count, interval, rate in sorted(rows):
        lines.append(f"| {WORDS[optimizer]} | {loss} | {count} | {interval} | {rate_in_words(rate)} |")
    return "\n".join(lines) if rows else ""


def verdicts(results):
    """Markdown: Ember with its defaults against each rival, and the best Ember against the best AdamW, by setting."""
    names = [WORDS[rival].partition(",")[0] for rival in RIVALS]
    lines = [f"| Ember minus | {' | '.join(names)} | best: Ember minus AdamW |"]
    lines.append("| --- " * (len(RIVALS) + 2) + "|")
    for setting in results.settings:
        if not (ember := results.reported(setting, "ember")).by_seed:
            continue
        cells = [in_interval(*against(ember, results.reported(setting, rival))) for rival in RIVALS]
        ours, theirs = results.best_of(setting, EMBER), results.best_of(setting, ADAMW)
        best = theirs and against(results.reported(setting, ours), results.reported(setting, theirs))
        cells.append(f"{in_interval(*best)} ({ours} minus {theirs})" if best else "")
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else "No runs are reported yet: those below are of the tuning seed."


def bf16_verdicts(results):
    """Markdown: what tables in bfloat16 cost with either rounding, by setting; empty while no such run is reported."""
    lines = [f"| {' | '.join(['minus the same with tables in float32', *(WORDS[rule] for rule in IN_BF16)])} |"]
    lines.append("| --- " * (len(IN_BF16) + 1) + "|")
    for setting in results.settings:
        pairs = ((rule, rule.partition("-bf16")[0]) for rule in IN_BF16)
        cells = [in_interval(*against(*(results.reported(setting, rule) for rule in pair))) for pair in pairs]
        if any(cells):
            lines.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def in_interval(difference, half, count):
    """A paired difference in words; one pair alone has no interval."""
    if not count:
        return ""
    return f"{difference:+.4f}" if math.isnan(half) else f"{difference:+.4f} ± {half:.4f}"


def tuning_table(results, setting):
    """A markdown table of the tuning seed: each optimizer's best, where it lies, and with another rate of the body."""
    body = results.body(setting)
    lines = [
        "| on the tables | best, one seed | learning rate | rates tried | body's rate half a decade lower | higher |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    rows = []
    for optimizer in TABLE_RULES:
        tuning = results.tuning(setting, optimizer)
        if not tuning:
            continue
        rate = min(tuning, key=lambda rate: tuning[rate])
        others = [results.tuning(setting, optimizer, body + d).get(rate) for d in (-1, 1)]
        others = " | ".join("" if loss is None else f"{loss:.4f}" for loss in others)
        ended = results.rates(setting, optimizer)[1] is not None
        tried = f"{len(tuning)}" if ended else f"{len(tuning)}, search not ended"
        cells = f"{tuning[rate]:.4f} | {rate_in_words(rate)} | {tried} | {others} |"
        rows.append((tuning[rate], f"| {WORDS[optimizer]} | {cells}"))
    return "\n".join(lines + [row for _, row in sorted(rows)])


def in_words(setting):
    s = SETTINGS[setting]
    tables = "tied" if s.shape.tied else "untied"
    what = "pretraining" if s.start is None else f"fine-tuning of {s.start}"
    if s.shape.lora_layers:
        what += f" by LoRA on the last {s.shape.lora_layers} layers and the tables"
    return f"{what} on {s.data}, {tables}, {s.batch} x {s.length} tokens a step, {s.steps} steps"


def write_tables(results, path):
    parts = ["# Tables of the quality benchmark\n\nWritten by draw.py from results/*.jsonl; do not edit.\n"]
    parts.append(
        "Loss in nats a token; mean ± standard deviation over seeds. Differences are paired by seed: mean ± half of "
        "the 95 % interval of Student's t. Negative is better.\n"
    )
    parts.append(f"## Ember against its rivals\n\n{verdicts(results)}\n")
    if table := bf16_verdicts(results):
        parts.append(f"## Tables in bfloat16\n\n{table}\n")
    for setting in results.settings:
        parts.append(f"## {setting}\n\n{in_words(setting)}; body at {rate_in_words(results.body(setting))}.\n")
        if table := table_of(results, setting):
            parts.append(f"{table}\n")
        parts.append(f"Tuning, seed {TUNING_SEED}:\n\n{tuning_table(results, setting)}\n")
    minutes = sum(line["seconds"] or 0 for line in results.by_run.values()) / 60  # None: the GPU was shared
    machines = sorted({f"{line['gpu']}, PyTorch {line['torch']}" for line in results.by_run.values()})
    parts.append(
        f"{len(results.by_run)} runs ({'; '.join(machines)}); those that were timed took {minutes:.0f} minutes.\n"
    )
    path.write_text("\n".join(parts))


def reported_settings(results):
    return [s for s in results.settings if results.reported(s, BASELINE).by_seed]


def draw_differences(results, shown, figure, theme):
    """Every rival's distance to AdamW, one row a setting; what is worse than ``limit`` is drawn there."""
    axes = figure.subplots()
    limit = 0.3
    for i, optimizer in enumerate(PICTURED):
        points = [
            (against(results.reported(s, optimizer), results.reported(s, BASELINE)), y) for y, s in enumerate(shown)
        ]
        points = [(d, half, y) for (d, half, _), y in points if math.isfinite(d)]
        if points:
            x, half, y = zip(*points, strict=True)
            axes.errorbar(
                [min(v, limit) for v in x], [v + 0.12 * (i - 2.5) for v in y],
                xerr=[0 if math.isnan(h) else h for h in half],
                linestyle="none", marker="os^DvP"[i], label=WORDS[optimizer], markevery=1, capsize=2, linewidth=1.2,
            )  # fmt: skip
    axes.axvline(0, color=theme.text, linewidth=1, linestyle="-", marker="")
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    axes.set_xlabel("validation loss minus that of AdamW on the tables, nats (left is better; linear within ±0.01)")
    _legend(figure, axes)


def tuned_settings(results):
    return [s for s in results.settings if any(len(results.tuning(s, o)) > 1 for o in (*PICTURED, BASELINE))]


def draw_rates(results, shown, figure, theme):
    columns = min(3, len(shown))
    grid = figure.subplots(-(-len(shown) // columns), columns, squeeze=False)
    for axes, setting in zip(grid.flat, shown, strict=False):
        curves = [results.tuning(setting, optimizer) for optimizer in (*PICTURED, BASELINE)]
        losses = sorted(loss for curve in curves for loss in curve.values())
        height = min(0.5, 1.3 * (losses[3 * len(losses) // 4] - losses[0])) or 0.1  # the worst quarter may lie outside
        for i, (optimizer, curve) in enumerate(zip((*PICTURED, BASELINE), curves, strict=True)):
            near = {rate: loss for rate, loss in curve.items() if loss < losses[0] + 3 * height}
            if near:
                _plot(axes, theme, i, [10 ** (rate / 2) for rate in near], list(near.values()), WORDS[optimizer])
        axes.set_xscale("log")
        axes.set_title(setting)
        axes.set_ylim(losses[0] - height / 20, losses[0] + height)
    for axes in list(grid.flat)[len(shown) :]:
        axes.remove()
    figure.supxlabel("learning rate of the tables")
    figure.supylabel("validation loss, nats")
    _legend(figure, *grid.flat)


def pretraining_settings(results):
    return [s for s in reported_settings(results) if SETTINGS[s].start is None]


def draw_deciles(results, shown, figure, theme):
    grid = figure.subplots(1, len(shown), sharey=True, squeeze=False)
    for axes, setting in zip(grid.flat, shown, strict=False):
        baseline = results.reported(setting, BASELINE).by_seed
        for i, optimizer in enumerate(("ember", "adafactor", "ember-0.99", "ember-clip3", "rows", "columns")):
            theirs = results.reported(setting, optimizer).by_seed
            pairs = [(theirs[s]["decile_losses"], baseline[s]["decile_losses"]) for s in theirs if s in baseline]
            if pairs:
                y = [mean(a[d] - b[d] for a, b in pairs) for d in range(10)]
                _plot(axes, theme, i, range(1, 11), y, WORDS[optimizer])
        axes.axhline(0, color=theme.text, linewidth=1, linestyle="-", marker="")
        axes.set_title(setting)
        axes.set_xticks([1, 4, 7, 10])
        axes.set_yscale("symlog", linthresh=0.1)
    figure.supxlabel("tenth of the vocabulary, the most frequent tokens first")
    figure.supylabel("loss minus AdamW's, nats")
    _legend(figure, *grid.flat)


def settings_with_beta2(results):
    """Those with Ember at 0.999, which the others are compared with, and at another."""
    reported = {s: [o for o in BETA2 if results.reported(s, o).by_seed] for s in results.settings}
    return [s for s, rules in reported.items() if "ember" in rules and len(rules) > 1]


def draw_beta2(results, shown, figure, theme):
    axes = figure.subplots()
    for setting in shown:
        points = [
            (b, against(results.reported(setting, o), results.reported(setting, "ember"))) for o, b in BETA2.items()
        ]
        points = [(b, d, half) for b, (d, half, _) in points if math.isfinite(d)]
        x, y, half = zip(*points, strict=True)
        axes.errorbar(
            [1 / (1 - b) for b in x], y, yerr=[0 if math.isnan(h) else h for h in half], label=setting, capsize=2
        )
    axes.set_xscale("log")
    axes.set_xticks([1 / (1 - b) for b in BETA2.values()], [str(b) for b in BETA2.values()])
    axes.set_xlabel("Ember's beta2, each at its own best learning rate")
    axes.set_ylabel("validation loss minus that at 0.999")
    _legend(figure, axes)


def probed_tables(results):
    return [(s, t) for s in results.settings if results.probe(s, "ember") for t in results.probe(s, "ember")]


def draw_row_steps(results, shown, figure, theme):
    grid = figure.subplots(1, len(shown), sharey=True, squeeze=False)
    for axes, (setting, table) in zip(grid.flat, shown, strict=False):
        for i, optimizer in enumerate(("ember", "adamw", "adafactor", "ember-clip3")):
            probe = results.probe(setting, optimizer)
            if probe:
                bins = [b for b in range(len(AGES)) if probe[table]["count"][b]]
                _plot(axes, theme, i, bins, [probe[table]["mean"][b] for b in bins], WORDS[optimizer])
        axes.set_xticks(range(0, len(AGES), 2), AGES[::2])
        axes.set_yscale("log")
        axes.set_title(f"{setting}, {table}")
    figure.supxlabel("steps since the row's token was last in a batch")
    figure.supylabel("mean size of its step, learning rates")
    _legend(figure, *grid.flat)


def _plot(axes, theme, i, x, y, label):
    """The i-th line, which looks the same in every panel, whichever others are missing there."""
    style = {"color": theme.lines[i], "linestyle": DASHES[i], "marker": MARKERS[i]}
    axes.plot(x, y, label=label, markevery=1, **style)


def _legend(figure, *many_axes):
    """One for all axes, above them; what is in several of them is named once."""
    entries = {}
    for axes in many_axes:
        handles, labels = axes.get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True)) | entries
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=3)


PICTURES = {  # name -> (what it shows: of nothing there is no picture, how, inches of width, of height by how much)
    "differences": (reported_settings, draw_differences, 9, lambda shown: 2 + 0.5 * len(shown)),
    "rates": (tuned_settings, draw_rates, 11, lambda shown: 1.5 + 3.2 * -(-len(shown) // 3)),
    "deciles": (pretraining_settings, draw_deciles, 11, lambda shown: 4.5),
    "beta2": (settings_with_beta2, draw_beta2, 8, lambda shown: 4.5),
    "row_steps": (probed_tables, draw_row_steps, 11, lambda shown: 4.5),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for tables.md and pictures/")
    args = parser.parse_args()
    results = Results(read_results(sorted(args.results.glob("*.jsonl"))))
    if not results.by_run:
        raise SystemExit(f"{args.results}: no results in *.jsonl; run.py makes them")
    write_tables(results, args.out / "tables.md")
    (args.out / "pictures").mkdir(parents=True, exist_ok=True)
    for name, (what, how, width, height) in PICTURES.items():
        if shown := what(results):
            draw = partial(how, results, shown)
            save_light_and_dark(args.out / "pictures" / f"{name}.png", draw, width, height(shown))
    print((args.out / "tables.md").read_text())


if __name__ == "__main__":
    main()
