"""Every table and picture of the quality benchmark, from the JSON lines in ``results``.

python examples/benchmarks/quality/draw.py            # writes tables.md and pictures/ beside this file
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from plan import SETTINGS, TUNING_SEED, Run, best_rate, tuned_rates
from run import loss_of, read_results
from table_rules import TABLE_RULES

from ember_mlx.plot_style import save_light_and_dark

HERE = Path(__file__).parent
# Quantiles of Student's t for a 95 % interval, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
BASELINE = "adamw"
WORDS = {name: words for name, (_, _, words) in TABLE_RULES.items()}
WORDS |= {
    "ember | adamw": "Ember on the embedding, AdamW on the head",
    "adamw | ember": "AdamW on the embedding, Ember on the head",
}
PICTURED = ("ember", "adafactor", "rows", "columns", "sgd", "frozen")
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
        return Reported(rate if optimizer in TABLE_RULES else None, dict(sorted(by_seed.items())))

    def rates(self, setting, optimizer):
        if "|" in optimizer:
            return tuned_rates(setting, BASELINE, self.losses)[0], None
        return tuned_rates(setting, optimizer, self.losses)

    def tuning(self, setting, optimizer):
        """rate -> validation loss of the tuning seed, at the body's best rate."""
        body, _ = self.rates(setting, optimizer)
        keys = map(lambda key: Run(*key), self.losses)
        return {
            run.rate: self.losses[run.key()]
            for run in sorted(keys, key=lambda run: run.rate)
            if (run.setting, run.optimizer, run.body_rate, run.seed) == (setting, optimizer, body, TUNING_SEED)
        }

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
        interval = "" if optimizer == BASELINE or not count else f"{difference:+.4f} ± {half:.4f}"
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
    """Markdown: Ember against each rival, setting by setting."""
    rivals = [BASELINE, *PICTURED[1:]]
    lines = ["| Ember minus | " + " | ".join(WORDS[r].partition(",")[0] for r in rivals) + " |"]
    lines.append("| --- " * (len(rivals) + 1) + "|")
    for setting in results.settings:
        ember, cells = results.reported(setting, "ember"), []
        for rival in rivals:
            difference, half, count = against(ember, results.reported(setting, rival))
            cells.append(f"{difference:+.4f} ± {half:.4f}" if count else "")
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def in_words(setting):
    s = SETTINGS[setting]
    tables = "tied" if s.shape.tied else "untied"
    what = "pretraining" if s.start is None else f"fine-tuning of {s.start}"
    return f"{what} on {s.data}, {tables}, {s.batch} x {s.length} tokens a step, {s.steps} steps"


def write_tables(results, path):
    parts = ["# Tables of the quality benchmark\n\nWritten by draw.py from results/*.jsonl; do not edit.\n"]
    parts.append(
        "Loss in nats a token; mean ± standard deviation over seeds. Differences are paired by seed: mean ± half of "
        "the 95 % interval of Student's t. Negative is better.\n"
    )
    parts.append(f"## Ember against its rivals\n\n{verdicts(results)}\n")
    for setting in results.settings:
        table = table_of(results, setting)
        if table:
            body, _ = tuned_rates(setting, BASELINE, results.losses)
            parts.append(f"## {setting}\n\n{in_words(setting)}; body at {rate_in_words(body)}.\n\n{table}\n")
        open_searches = [
            WORDS[o] for o in TABLE_RULES
            if o != "frozen" and (tuning := results.tuning(setting, o)) and best_rate(tuning, 0)[0] is None
        ]  # fmt: skip
        if open_searches:
            parts.append(f"Search for the learning rate not finished: {', '.join(open_searches)}.\n")
    seconds = sum(line["seconds"] for line in results.by_run.values())
    machines = sorted({f"{line['gpu']}, PyTorch {line['torch']}" for line in results.by_run.values()})
    parts.append(f"{len(results.by_run)} runs, {seconds / 60:.0f} minutes of one GPU in all ({'; '.join(machines)}).\n")
    path.write_text("\n".join(parts))


def draw_differences(results, figure, theme):
    """Every rival's distance to AdamW, one row a setting; the worst ones are cut off and said in words."""
    axes = figure.subplots()
    shown = [s for s in results.settings if results.reported(s, BASELINE).by_seed]
    limit = 0.3
    for i, optimizer in enumerate(PICTURED[:-1]):
        points = [
            (against(results.reported(s, optimizer), results.reported(s, BASELINE)), y) for y, s in enumerate(shown)
        ]
        points = [(d, half, y) for (d, half, _), y in points if math.isfinite(d)]
        if points:
            x, half, y = zip(*points, strict=True)
            axes.errorbar(
                [min(v, limit) for v in x], [v + 0.12 * (i - 2) for v in y],
                xerr=[0 if math.isnan(h) else h for h in half],
                linestyle="none", marker="os^DvPX"[i], label=WORDS[optimizer], markevery=1, capsize=2, linewidth=1.2,
            )  # fmt: skip
    axes.axvline(0, color=theme.text, linewidth=1, linestyle="-", marker="")
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_yticks(range(len(shown)), shown)
    axes.invert_yaxis()
    axes.set_xlabel("validation loss minus that of AdamW on the tables, nats (left is better; linear within ±0.01)")
    _legend(figure, axes)


def draw_rates(results, figure, theme):
    shown = results.settings
    columns = min(3, len(shown))
    grid = figure.subplots(-(-len(shown) // columns), columns, squeeze=False)
    for axes, setting in zip(grid.flat, shown, strict=False):
        best = min(results.losses[key] for key in results.losses if key[0] == setting)
        for i, optimizer in enumerate(("ember", "adamw", *PICTURED[1:-1])):
            tuning = {r: v for r, v in results.tuning(setting, optimizer).items() if v < best + 1}
            axes.plot(
                [10 ** (r / 2) for r in tuning], list(tuning.values()), color=theme.lines[i % 7], label=WORDS[optimizer]
            )
        axes.set_xscale("log")
        axes.set_title(setting)
        axes.set_ylim(best - 0.02, best + 0.5)
    for axes in list(grid.flat)[len(shown) :]:
        axes.remove()
    figure.supxlabel("learning rate of the tables")
    figure.supylabel("validation loss, nats")
    _legend(figure, grid.flat[0])


def draw_deciles(results, figure, theme):
    shown = [s for s in results.settings if SETTINGS[s].start is None]
    grid = figure.subplots(1, max(1, len(shown)), sharey=True, squeeze=False)
    for axes, setting in zip(grid.flat, shown, strict=False):
        baseline = results.reported(setting, BASELINE).by_seed
        for i, optimizer in enumerate(("ember", "adafactor", "ember-0.99", "ember-clip3", "rows", "columns")):
            theirs = results.reported(setting, optimizer).by_seed
            pairs = [(theirs[s]["decile_losses"], baseline[s]["decile_losses"]) for s in theirs if s in baseline]
            if pairs:
                y = [mean(a[d] - b[d] for a, b in pairs) for d in range(10)]
                axes.plot(range(1, 11), y, color=theme.lines[i], label=WORDS[optimizer])
        axes.axhline(0, color=theme.text, linewidth=1, linestyle="-", marker="")
        axes.set_title(setting)
        axes.set_xticks([1, 4, 7, 10])
        axes.set_yscale("symlog", linthresh=0.1)
    figure.supxlabel("tenth of the vocabulary, the most frequent tokens first")
    figure.supylabel("loss minus AdamW's, nats")
    _legend(figure, grid.flat[0])


def draw_beta2(results, figure, theme):
    axes = figure.subplots()
    for setting in results.settings:
        points = [
            (b, against(results.reported(setting, o), results.reported(setting, "ember"))) for o, b in BETA2.items()
        ]
        points = [(b, d, half) for b, (d, half, _) in points if math.isfinite(d)]
        if len(points) > 1:
            x, y, half = zip(*points, strict=True)
            axes.errorbar(
                [1 / (1 - b) for b in x], y, yerr=[0 if math.isnan(h) else h for h in half], label=setting, capsize=2
            )
    axes.set_xscale("log")
    axes.set_xticks([1 / (1 - b) for b in BETA2.values()], [str(b) for b in BETA2.values()])
    axes.set_xlabel("Ember's beta2, each at its own best learning rate")
    axes.set_ylabel("validation loss minus that at 0.999")
    _legend(figure, axes)


def draw_row_steps(results, figure, theme):
    shown = [(s, t) for s in results.settings if results.probe(s, "ember") for t in results.probe(s, "ember")]
    grid = figure.subplots(1, max(1, len(shown)), sharey=True, squeeze=False)
    for axes, (setting, table) in zip(grid.flat, shown, strict=False):
        for i, optimizer in enumerate(("ember", "adamw", "adafactor", "ember-clip3")):
            probe = results.probe(setting, optimizer)
            if probe:
                bins = [b for b in range(len(AGES)) if probe[table]["count"][b]]
                axes.plot(bins, [probe[table]["mean"][b] for b in bins], color=theme.lines[i], label=WORDS[optimizer])
        axes.set_xticks(range(0, len(AGES), 2), AGES[::2])
        axes.set_yscale("log")
        axes.set_title(f"{setting}, {table}")
    figure.supxlabel("steps since the row's token was last in a batch")
    figure.supylabel("mean size of its step, learning rates")
    _legend(figure, grid.flat[0])


def _legend(figure, axes):
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=3)


PICTURES = {
    "differences": (draw_differences, 9, 5.5),
    "rates": (draw_rates, 11, 6.5),
    "deciles": (draw_deciles, 11, 4.5),
    "beta2": (draw_beta2, 8, 4.5),
    "row_steps": (draw_row_steps, 11, 4.5),
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
    for name, (draw, width, height) in PICTURES.items():
        picture = args.out / "pictures" / f"{name}.png"
        save_light_and_dark(picture, lambda figure, theme, draw=draw: draw(results, figure, theme), width, height)
    print((args.out / "tables.md").read_text())


if __name__ == "__main__":
    main()
