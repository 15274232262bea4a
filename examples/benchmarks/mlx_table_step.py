"""One optimizer step on one table in MLX, on the backend that is there: time beside the floor, and scratch memory.

    python examples/benchmarks/mlx_table_step.py --out examples/benchmarks/results/mlx_table_step_MACHINE.json

The floor is four passes over the table (the gradient read twice, the weights read and written) at the bandwidth of a
large copy, measured in the same run. A step is compiled as mlx-lm compiles its own, with the state for inputs and
outputs. Each row is a fresh process: warm-up, then the median over samples of several steps each.

Scratch is the peak of a step above what was there before it, weights, gradient and state, in tables of the weights'
dtype. `scratch_tables` has the new table in it: the caller holds the old one and the gradient. Where nobody holds them,
as in mlx-lm's step, MLX may write the new table over one of them: `scratch_tables_in_place`.
"""

import argparse
import hashlib
from functools import partial
from pathlib import Path

from benchmarking import SEED, CompiledStep, at_least_one, backend, in_fresh_process, machine, median_seconds, write

SHAPES = [(151_936, 1024), (128_256, 4096), (50_257, 768)]
SHAPES_ON_CPU = [(4096, 256)]
DTYPES = ("bfloat16", "float32")
STEPS_PER_SAMPLE = 10
COPIED_BYTES = {"cpu": 2**26, "metal": 2**30, "cuda": 2**31}
OPTIMIZERS = ("Ember", "Ember, stochastic rounding", "Ember, plain operations", "Adam", "AdamW", "Adafactor", "SGD")


def make_optimizer(name):
    import mlx.optimizers as optim

    from ember_mlx import Ember

    return {
        "Ember": lambda: Ember(1e-3),
        "Ember, stochastic rounding": lambda: Ember(1e-3, rounding="stochastic"),
        "Ember, plain operations": lambda: Ember(1e-3),
        "Adam": lambda: optim.Adam(1e-3, bias_correction=True),
        "AdamW": lambda: optim.AdamW(1e-3, bias_correction=True),
        "Adafactor": lambda: optim.Adafactor(1e-3, relative_step=False, scale_parameter=False),
        "SGD": lambda: optim.SGD(1e-3),
    }[name]()


def copy_bandwidth(repeats):
    """Bytes a second that a large copy reads and writes."""
    import mlx.core as mx

    source = mx.zeros(COPIED_BYTES[backend()] // 4, mx.int32)
    mx.eval(source)

    def copies():
        for _ in range(STEPS_PER_SAMPLE):
            mx.async_eval(source + 1)
        mx.synchronize()

    median_seconds(copies, 2)
    return 2 * source.nbytes * STEPS_PER_SAMPLE / median_seconds(copies, repeats)


def measure(name, shape, dtype, repeats):
    """A row: the optimizer on a table (V, D) of that dtype."""
    import mlx.core as mx
    import numpy as np
    from mlx.utils import tree_flatten

    mx.random.seed(SEED)
    dtype = getattr(mx, dtype)
    weight = (mx.random.normal(shape) * 0.02).astype(dtype)
    gradient = (mx.random.normal(shape) * mx.random.uniform(shape=(shape[0], 1))).astype(dtype)
    optimizer = make_optimizer(name)
    step = CompiledStep(optimizer, weight, gradient)
    del weight
    table = step.table
    bits = table.weight.view(mx.uint16 if dtype.size == 2 else mx.uint32)
    digest = hashlib.sha256(np.array(bits)).hexdigest()[:16]
    del bits

    in_place, with_new_table = step.peak(), step.peak(lambda step: step.table.weight)
    seconds = median_seconds(partial(step.take, STEPS_PER_SAMPLE), repeats) / STEPS_PER_SAMPLE
    return {
        "milliseconds": round(seconds * 1e3, 4),
        "scratch_tables": with_new_table,
        "scratch_tables_in_place": in_place,
        "state_bytes": sum(array.nbytes for _, array in tree_flatten(optimizer.state) if array.ndim),
        "table_bytes": table.weight.nbytes,
        "bits_after_three_steps": digest,
    }


def shape_of(text):
    rows, _, columns = text.lower().partition("x")
    if not columns:
        raise argparse.ArgumentTypeError(f"{text!r} must be rows x columns, such as 4096x256")
    return at_least_one(rows), at_least_one(columns)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--shapes", nargs="+", type=shape_of, metavar="VxD", help="default: three real ones, on a GPU")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    parser.add_argument("--repeats", type=at_least_one, default=9)
    args = parser.parse_args()

    here = in_fresh_process(machine)
    shapes = args.shapes or (SHAPES_ON_CPU if here["backend"] == "cpu" else SHAPES)
    bandwidth = in_fresh_process(copy_bandwidth, args.repeats)
    if isinstance(bandwidth, dict):
        raise SystemExit(f"{here['device']}: a large copy failed: {bandwidth['error']}")
    print(f"{here['device']}: a copy moves {bandwidth / 1e9:.1f} GB/s")
    head = f"{'table':>16} {'dtype':>9}  {'optimizer':<26} {'ms':>9} {'of Adam':>8} {'of floor':>8} {'scratch':>8}"
    print(f"{head} in place")
    report = {"machine": here | {"copy_bytes_per_second": round(bandwidth), "repeats": args.repeats}, "rows": []}
    write(args.out, report)
    for shape in shapes:
        for dtype in args.dtypes:
            adam = None
            # Adam first, which the others are compared with; on a CPU Ember has no kernel, float32 is not rounded.
            for name in sorted(args.optimizers, key=lambda name: name != "Adam"):
                if (name == "Ember" and here["backend"] == "cpu") or ("stochastic" in name and dtype == "float32"):
                    continue
                switch = {"EMBER_MLX_KERNELS": "off" if name == "Ember, plain operations" else "on"}
                row = in_fresh_process(measure, name, shape, dtype, args.repeats, environment=switch)
                row = {"optimizer": name, "shape": shape, "dtype": dtype} | row
                report["rows"].append(row)
                if "error" in row:
                    print(f"{shape[0]:>9} x {shape[1]:<4} {dtype:>9}  {name:<26} {row['error']}", flush=True)
                else:
                    adam = row["milliseconds"] if name == "Adam" else adam
                    floor = 4 * row["table_bytes"] / bandwidth * 1e3
                    row["of_adam"] = round(row["milliseconds"] / adam, 3) if adam else None
                    row["speed_of_floor"] = round(floor / row["milliseconds"], 3)
                    print(
                        f"{shape[0]:>9} x {shape[1]:<4} {dtype:>9}  {name:<26} {row['milliseconds']:>9.3f} "
                        f"{row['of_adam'] or '':>8} {row['speed_of_floor']:>8} {row['scratch_tables']:>8.3f} "
                        f"{row['scratch_tables_in_place']:>8.3f}",
                        flush=True,
                    )
                write(args.out, report)
    if not report["rows"]:
        raise SystemExit("Nothing to measure: 'Ember' has a kernel on a GPU only, and float32 is not rounded by chance")


if __name__ == "__main__":
    main()
