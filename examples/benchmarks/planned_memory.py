"""Peak memory of training steps as ``ember-mlx plan`` predicts it, beside what mlx_training_memory.py measured.

    python examples/benchmarks/planned_memory.py --measured RESULT.json --out planned_memory.md

Needs no GPU: RESULT.json says what was run, and on which backend. Rows without the guard, which `train` has always, are
left out.
"""

import argparse
import math
import statistics
from pathlib import Path

from training_memory_rows import ROW, config_of, read_report, words_of

from ember_mlx.finetune import options
from ember_mlx.planner import Plan, plan, read_architecture, run_of

TARGET = 0.10


def planned(row: str, backend: str) -> Plan:
    of = ROW.fullmatch(row).groupdict()
    model = read_architecture(config_of(row), of["model"])
    # Of each row of --max-seq-length tokens, the last is only predicted.
    words = ["--batch-size", of["batch_size"], "--max-seq-length", str(int(of["length"]) + 1), *words_of(row)]
    run = run_of(options.parse(words), model)
    return plan(model, run, backend)


def compare(report: dict) -> list[tuple[str, Plan, int]]:
    """Of each measured row: its name, its plan, and the measured peak in bytes."""
    backend = report["machine"]["backend"]
    rows = {row: result["peak_memory"] for row, result in report["rows"].items() if "peak_memory" in result}
    guarded = {row: peak for row, peak in rows.items() if (of := ROW.fullmatch(row)) and not of["unguarded"]}
    return [(row, planned(row, backend), peak) for row, peak in guarded.items()]


def table(compared, machine) -> str:
    """As Markdown, with how many rows are within the target."""
    errors = [predicted.peak / measured - 1 for _, predicted, measured in compared]
    within = sum(abs(error) <= TARGET for error in errors)
    root = math.sqrt(statistics.mean(error**2 for error in errors))
    lines = [
        f"# Peak memory, predicted and measured: {machine['device']}, MLX {machine['versions']['mlx']}",
        "",
        f"{within} of {len(errors)} rows within {TARGET:.0%}; root mean square of the error {root:.1%}. bfloat16, "
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
    parser.add_argument("--measured", type=Path, required=True, help="the JSON file of mlx_training_memory.py")
    parser.add_argument("--out", type=Path, help="a Markdown file to write the table to")
    args = parser.parse_args()
    report = read_report(args.measured)
    compared = compare(report)
    if not compared or report["machine"].get("smoke"):
        raise SystemExit(f"{args.measured}: must have rows that were measured, with the guard and without --smoke")
    text = table(compared, report["machine"])
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
