"""Every table and picture of the quality benchmark, from the JSON lines in ``results``.

python examples/benchmarks/quality/draw.py            # writes tables.md and pictures/ beside this file
"""

import argparse
import math
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from figures import PICTURES
from plan import ADAMW, BASELINE, EMBER, IN_BF16, SETTINGS, TUNING_SEED, Run
from reported import WORDS, Results, against
from run import read_results
from table_rules import TABLE_RULES

from ember_mlx.plots.style import save_light_and_dark

HERE = Path(__file__).parent
RIVALS = (BASELINE, "adamw-b1=0", "adafactor", "rows", "columns", "sgd", "frozen")


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
        "| on the tables | best, one seed | learning rate | rates tried | body's rate half a decade lower | higher "
        "| code of the best |",
        "| --- | --- | --- | --- | --- | --- | --- |",
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
        best = results.by_run[Run(setting, optimizer, rate, body, TUNING_SEED).key()]
        cells = f"{tuning[rate]:.4f} | {rate_in_words(rate)} | {tried} | {others} | {best['commit']} |"
        rows.append((tuning[rate], f"| {WORDS[optimizer]} | {cells}"))
    return "\n".join(lines + [row for _, row in sorted(rows)])


def in_words(setting):
    s = SETTINGS[setting]
    tables = "tied" if s.shape.tied else "untied"
    what = "pretraining" if s.start is None else f"fine-tuning of {s.start}"
    if s.shape.lora_layers:
        what += f" by LoRA on the last {s.shape.lora_layers} layers and the tables"
    rate = " at a constant rate" if s.constant else ""
    return f"{what} on {s.data}, {tables}, {s.batch} x {s.length} tokens a step, {s.steps} steps{rate}"


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
        body = (
            "body"
            if results.rates(setting, BASELINE)[0] is not None
            else "the body's rate is not found yet, here it is"
        )
        parts.append(f"## {setting}\n\n{in_words(setting)}; {body} at {rate_in_words(results.body(setting))}.\n")
        if table := table_of(results, setting):
            parts.append(f"{table}\n")
        parts.append(f"Tuning, seed {TUNING_SEED}:\n\n{tuning_table(results, setting)}\n")
    minutes = sum(line["seconds"] or 0 for line in results.by_run.values()) / 60  # None: the GPU was shared
    machines = sorted({f"{line['gpu']}, PyTorch {line['torch']}" for line in results.by_run.values()})
    parts.append(
        f"{len(results.by_run)} runs ({'; '.join(machines)}); those that were timed took {minutes:.0f} minutes "
        "added up; several at a time may have shared a GPU.\n"
    )
    path.write_text("\n".join(parts))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for tables.md and pictures/")
    args = parser.parse_args()
    results = Results(read_results(sorted(args.results.glob("*.jsonl"))))
    if not results.by_run:
        raise SystemExit(f"{args.results}: no results in *.jsonl; run.py makes them")
    (args.out / "pictures").mkdir(parents=True, exist_ok=True)
    write_tables(results, args.out / "tables.md")
    for name, (what, how, width, height) in PICTURES.items():
        if shown := what(results):
            draw = partial(how, results, shown)
            save_light_and_dark(args.out / "pictures" / f"{name}.png", draw, width, height(shown))
    print((args.out / "tables.md").read_text())
    print(f"This is {args.out / 'tables.md'}; the pictures are in {args.out / 'pictures'}")


if __name__ == "__main__":
    main()
