"""Peak and time of training steps in two checkouts of this repository, step by step in turn on one machine.

    git worktree add /tmp/before b40a75c
    python examples/benchmarks/two_checkouts.py --before /tmp/before --after . --out RESULT.json \
        --rows qwen3-0.6b/untied/lora/1x512/ember

A row is one of `mlx_training_memory.py`. Each checkout measures it with its own copy of that script, in a process of
its own; the two take their steps alternately, since the speed of a host changes from minute to minute. Times are
medians after the warm-up, peaks the highest after the first step. On a CPU say `--smoke`.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarking import at_least_one, in_fresh_process, machine, write

WARM_UP = 3
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
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process = subprocess.Popen(words, cwd=folder, **pipes)
        self.steps = []
        self._hear()

    def step(self):
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.steps.append(self._hear())

    def _hear(self):
        told = self.process.stdout.readline()
        if not told:
            raise SystemExit(f"{self.folder}: the process that measures {self.process.args[-2]} ended")
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
    parser.add_argument("--steps", type=at_least_one, default=15)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to try this script where there is no GPU")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    args = parser.parse_args()
    report = {"machine": in_fresh_process(machine) | {"steps": args.steps, "smoke": args.smoke}, "rows": {}}
    for row in args.rows:
        checkouts = {name: Checkout(getattr(args, name), row, args.smoke) for name in ("before", "after")}
        for _ in range(WARM_UP + args.steps):
            for checkout in checkouts.values():
                checkout.step()
        of = report["rows"][row] = {name: checkout.result() for name, checkout in checkouts.items()}
        write(args.out, report)
        for what, unit in (("peak_memory", 1e9), ("seconds", 1e-3)):
            before, after = (of[name][what] / unit for name in ("before", "after"))
            print(f"{row:48} {what:12} {before:9.3f} -> {after:9.3f}  x {after / before:.3f}", flush=True)


if __name__ == "__main__":
    main()
