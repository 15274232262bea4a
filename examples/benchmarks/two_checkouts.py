"""Peak and time of training steps in two checkouts of this repository, step by step in turn on one machine.

    git worktree add /tmp/before b40a75c
    python examples/benchmarks/two_checkouts.py --before /tmp/before --after . --out RESULT.json \
        --rows qwen3-0.6b/untied/lora/1x512/ember --variants nearest unguarded

A row is one of `mlx_training_memory.py`. Each checkout measures it with its own copy of that script, in a process of
its own; they take their steps in turn, since the speed of a host changes from minute to minute. Times are medians after
the warm-up, peaks the highest after the first step; `times` is the median of each round's ratio. Variants are of the
second checkout, in further processes: `nearest` rounds the body to nearest, `unguarded` has no guard against NaN,
and `plainest` is both. On a CPU say `--smoke`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarking import at_least_one, in_fresh_process, machine, write

WARM_UP = 3
VARIANTS = {"nearest": "/nearest", "unguarded": "/unguarded", "plainest": "/nearest/unguarded"}  # the row's end
# Run in a checkout: wherever a step begins, tell how long the last took and its peak, then wait for leave to go on.
TAKING_TURNS = """
import json, sys, time
sys.path.insert(0, "examples/benchmarks")
import mlx.core as mx
import mlx_training_memory

to_parent, reset, began = sys.stdout, mx.reset_peak_memory, None
sys.stdout = sys.stderr

def next_step():
    global began
    took = None if began is None else (time.perf_counter() - began, mx.get_peak_memory())
    print(json.dumps(took), file=to_parent, flush=True)
    if not sys.stdin.readline():
        raise SystemExit
    reset()
    began = time.perf_counter()

mx.reset_peak_memory = next_step
mlx_training_memory.measure(sys.argv[1], 0, 10**6, sys.argv[2] == "smoke")
"""


class Checkout:
    """A process that measures ``row`` in that checkout, a step at a time."""

    def __init__(self, folder: Path, row: str, smoke: bool):
        self.folder = folder
        words = [sys.executable, "-c", TAKING_TURNS, row, "smoke" if smoke else "whole"]
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.said, "text": True}
        self.process = subprocess.Popen(words, cwd=folder, **pipes)
        self.steps = []

    def begin(self):
        """Wait until its first step can be taken."""
        self._hear()

    def step(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.steps.append(self._hear())

    def _hear(self):
        told = self.process.stdout.readline()
        if not told:
            self.said.seek(0)
            last = (self.said.read().splitlines() or ["it said nothing"])[-1]
            raise SystemExit(f"{self.folder}: the process that measures {self.process.args[3]} ended: {last}")
        return json.loads(told)

    def result(self):
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        seconds, peaks = zip(*self.steps, strict=True)
        return {
            "peak_memory": max(peaks[1:]),
            "seconds": round(statistics.median(seconds[WARM_UP:]), 4),
            "all_seconds": [round(each, 4) for each in seconds],
            "peaks": peaks,
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout")
    parser.add_argument("--after", type=Path, required=True, help="another")
    parser.add_argument("--rows", nargs="+", required=True, metavar="ROW")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[], help="of the second checkout, too")
    parser.add_argument("--steps", type=at_least_one, default=15)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to try this script where there is no GPU")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    args = parser.parse_args()
    report = {"machine": in_fresh_process(machine) | {"steps": args.steps, "smoke": args.smoke}, "rows": {}}
    for row in args.rows:
        checkouts = {name: Checkout(getattr(args, name), row, args.smoke) for name in ("before", "after")}
        for name in args.variants:
            checkouts[name] = Checkout(args.after, row + VARIANTS[name], args.smoke)
        for checkout in checkouts.values():
            checkout.begin()
        for _ in range(WARM_UP + args.steps):
            for checkout in checkouts.values():
                checkout.step()
        of = report["rows"][row] = {name: checkout.result() for name, checkout in checkouts.items()}
        for result in of.values():
            ratios = map(float.__truediv__, result["all_seconds"], of["before"]["all_seconds"])
            result["times"] = round(statistics.median(list(ratios)[WARM_UP:]), 4)
        write(args.out, report)
        for name, result in of.items():
            peak, seconds = (result[what] / of["before"][what] for what in ("peak_memory", "seconds"))
            print(
                f"{row:40} {name:15} {result['peak_memory'] / 1e9:8.3f} GB, x {peak:.3f}   "
                f"{result['seconds'] * 1e3:8.1f} ms, x {seconds:.3f}, in turn x {result['times']:.3f}", flush=True
            )  # fmt: skip


if __name__ == "__main__":
    main()
