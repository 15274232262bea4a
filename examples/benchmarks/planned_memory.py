"""Peak memory of training steps as ``ember-mlx plan`` predicts it, beside what was measured.

    python examples/benchmarks/planned_memory.py --measured RESULT.json --out planned_memory.md

RESULT.json is of mlx_training_memory.py, of two_checkouts.py (the second checkout counts), or of streaming_memory.py:
of that, streamed steps phase by phase, then the ordinary ones. Needs no GPU: the file says what was run, and on which
backend. Left out are rows without the guard, which `train` has always, and steps that are not those of `train`.
"""

import argparse
import math
import statistics
from dataclasses import replace
from pathlib import Path

import streaming_rows
from training_memory_rows import ROW, config_of, read_report, words_of

from ember_mlx.finetune import options
from ember_mlx.planner import Plan, plan, read_architecture, run_of

TARGET = 0.10
WAYS = {"a streamed": ("streamed",), "an ordinary": ("ordinary", "ordinary-checkpointed")}  # as train steps


def planned(row: str, backend: str) -> Plan:
    of = ROW.fullmatch(row).groupdict()
    model = read_architecture(config_of(row), of["model"])
    # Of each row of --max-seq-length tokens, the last is only predicted.
    words = ["--batch-size", of["batch_size"], "--max-seq-length", str(int(of["length"]) + 1), *words_of(row)]
    run = run_of(options.parse(words), model)
    return plan(model, run, backend)


def planned_recipe(row: str, backend: str) -> Plan:
    model = read_architecture(streaming_rows.config_of(row), row)
    args = options.parse([*streaming_rows.words_of(row), *streaming_rows.streaming_words_of(row)])
    run = run_of(args | {"optimizer_config": streaming_rows.optimizer_config_of(row)}, model)
    found = plan(model, run, backend)
    return replace(found, peak=max(found.phases.values(), default=found.peak))  # of the step: it was not validated


def compare_recipes(report: dict, ways: tuple[str, ...]) -> list[tuple[str, Plan, dict]]:
    """Of each measured row that is stepped in one of these ways: its name, its plan, and what was measured."""
    backend = report["machine"]["backend"]
    rows = {row: result for row, result in report["rows"].items() if "peak_memory" in result}
    return [
        (row, planned_recipe(row, backend), result)
        for row, result in rows.items()
        if streaming_rows.parts_of(row)["way"] in ways
    ]


def table_of_recipes(compared, kind, machine) -> str:
    """As Markdown, with how many rows are within the target; the phases of those that have them."""
    errors = [predicted.peak / result["peak_memory"] - 1 for _, predicted, result in compared]
    names = list(compared[0][1].phases)
    lines = [
        f"# Peak of {kind} step, predicted and measured: {machine['device']}, MLX {machine['versions']['mlx']}",
        "",
        f"{_summary(errors)}. Whole steps, in MB of 10^6 bytes{'; then the errors phase by phase' if names else ''}.",
        "",
        f"| {' | '.join(['model/batch x tokens/recipe/way', 'predicted, MB', 'measured, MB', 'error', *names])} |",
        f"| --- | ---: | ---: | ---: |{' ---: |' * len(names)}",
    ]
    for (row, predicted, result), error in zip(compared, errors, strict=True):
        phases = [
            f"{predicted.phases[name] / result['phases'][name]['peak'] - 1:+.1%}" if name in predicted.phases else ""
            for name in names
        ]
        peaks = [f"{predicted.peak / 1e6:.1f}", f"{result['peak_memory'] / 1e6:.1f}"]
        lines.append(f"| {' | '.join([row, *peaks, f'{error:+.1%}', *phases])} |")
    return "\n".join(lines)


def _summary(errors):
    within = sum(abs(error) <= TARGET for error in errors)
    root = math.sqrt(statistics.mean(error**2 for error in errors))
    return f"{within} of {len(errors)} rows within {TARGET:.0%}; root mean square of the error {root:.1%}"


def compare(report: dict) -> list[tuple[str, Plan, int]]:
    """Of each measured row: its name, its plan, and the measured peak in bytes."""
    backend = report["machine"]["backend"]
    rows = {row: result.get("after", result) for row, result in report["rows"].items()}
    rows = {row: result["peak_memory"] for row, result in rows.items() if "peak_memory" in result}
    guarded = {row: peak for row, peak in rows.items() if (of := ROW.fullmatch(row)) and not of["unguarded"]}
    return [(row, planned(row, backend), peak) for row, peak in guarded.items()]


def table(compared, machine) -> str:
    """As Markdown, with how many rows are within the target."""
    errors = [predicted.peak / measured - 1 for _, predicted, measured in compared]
    lines = [
        f"# Peak memory, predicted and measured: {machine['device']}, MLX {machine['versions']['mlx']}",
        "",
        f"{_summary(errors)}. bfloat16, "
        "AdamW on the body, LoRA in all layers. 1 GB = 10^9 bytes. What the peak is made of is predicted too: all that "
        "is there at the worst moment, with what the GPU has not let go of yet.",
        "",
        "| model/tying/type/batch x tokens/tables | predicted, GB | measured, GB | error | at the peak, GB |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for (row, predicted, measured), error in zip(compared, errors, strict=True):
        parts = ", ".join(f"{role} {size / 1e9:.1f}" for role, size in predicted.at_peak.items() if size > 0.05e9)
        lines.append(f"| {row} | {predicted.peak / 1e9:.2f} | {measured / 1e9:.2f} | {error:+.1%} | {parts} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, required=True, help="the JSON file of what was measured")
    parser.add_argument("--out", type=Path, help="a Markdown file to write the table to")
    args = parser.parse_args()
    report = read_report(args.measured)
    if all(streaming_rows.ROW.fullmatch(row) for row in report["rows"]):
        compared = {kind: compare_recipes(report, ways) for kind, ways in WAYS.items()}
        tables = [table_of_recipes(rows, kind, report["machine"]) for kind, rows in compared.items() if rows]
    else:
        rows = compare(report)
        tables = [table(rows, report["machine"])] if rows else []
    if not tables or report["machine"].get("smoke"):
        raise SystemExit(f"{args.measured}: must have rows that were measured, with the guard and without --smoke")
    text = "\n\n".join(tables)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
