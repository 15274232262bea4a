"""Is it worth training the token tables? The same run with other tables or another table optimizer, loss and memory.

    python examples/benchmarks/train_tables.py --out RESULT.json --models FOLDER... --data FOLDER \\
        --types lora full --vary "--train-tables none" "--train-tables auto" -- --iters 200 --learning-rate 1e-3

Each row is a fresh process; what stands after `--` goes to every run, and each of --vary to one. The JSON file holds
the losses in nats a token, peak memory and optimizer state in bytes, with machine, versions and every option. A run
that fails leaves its error in the place of these, and the exit code is 1.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from benchmarking import in_fresh_process, machine, write


def run_row(arguments):
    """One run in this process; returns what is to be recorded of it."""
    import mlx.core as mx

    from ember_mlx.finetune import options
    from ember_mlx.finetune.run import run

    args = options.parse(arguments)
    start = time.perf_counter()
    result = run(args)
    return {
        "device": str(mx.default_device()),
        "seed": args.seed,
        "loss_before": round(result.loss_before, 4),
        "loss_after": round(result.loss_after, 4),
        "peak_memory": result.peak_memory,
        "table_state": result.table_state_bytes,
        "state": sum(line.state_bytes for line in result.trained),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=["lora", "full"])
    parser.add_argument("--vary", nargs="+", required=True, metavar="OPTIONS")
    parser.add_argument("common", nargs=argparse.REMAINDER, help="-- and options for every run")
    args = parser.parse_args()
    common = [word for word in args.common if word != "--"]

    here = in_fresh_process(machine)
    report = {"machine": here, "versions": here.pop("versions"), "data": args.data.name, "common": " ".join(common)}
    report["rows"] = []
    for model in args.models:
        for fine_tune_type in args.types:
            for varied in args.vary:
                with tempfile.TemporaryDirectory() as folder:
                    words = ["--model", model, "--data", args.data, "--adapter-path", Path(folder) / "adapters"]
                    words += ["--fine-tune-type", fine_tune_type, *varied.split(), *common]
                    # A process of its own: peak memory and random state are the process's.
                    result = in_fresh_process(run_row, [str(word) for word in words])
                report["rows"].append({"model": model.name, "type": fine_tune_type, "varied": varied} | result)
                write(args.out, report)
    print_table(report["rows"])
    return 1 if any("error" in row for row in report["rows"]) else 0


def print_table(rows):
    print(f"\n{'model':24}{'type':6}{'varied':44}{'before':>8}{'after':>8}{'peak MB':>9}{'table state':>13}{'s':>7}")
    for row in rows:
        if "error" in row:
            numbers = f"  {row['error']}"
        else:
            numbers = f"{row['loss_before']:8.3f}{row['loss_after']:8.3f}{row['peak_memory'] / 1e6:9.0f}"
            numbers += f"{row['table_state']:13,}{row['seconds']:7.0f}"
        print(f"{row['model']:24}{row['type']:6}{row['varied']:44}{numbers}")


if __name__ == "__main__":
    sys.exit(main())
