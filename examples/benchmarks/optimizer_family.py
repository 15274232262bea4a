"""One step of each optimizer of the family on one matrix: time, peak and state, in MLX or in PyTorch.

    python examples/benchmarks/optimizer_family.py --out examples/benchmarks/results/optimizer_family_mlx_MACHINE.json
    python examples/benchmarks/optimizer_family.py --framework torch --out ...

The baseline is MLX's AdamW, compiled, or PyTorch's, fused on a GPU. A step of MLX is compiled as mlx-lm compiles its
own, with the state for inputs and outputs. All rows run in one process, the most telling ones first, each within
``--limit`` seconds: MLX's CUDA backend takes seconds to compile a new kernel. A row is a warm-up, then the median over
samples of several steps each, as many as its limit allows.

The peak is that of a step above what lay there before it, weights, gradient and state, in tables of the weights' dtype.
`peak_tables` has the new table and state in it, since the caller holds the old ones: less than `new_tables`, those
alone, it cannot be. Where nobody holds the old ones, they may be written over: `peak_tables_in_place`. PyTorch always
writes in place. Bytes a weight compare across dtypes: `peak_bytes_a_weight`.
"""

import argparse
import gc
import signal
import statistics
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarking import SEED, CompiledStep, at_least_one, in_fresh_process, machine, median_seconds, write

SHAPE, SHAPE_ON_CPU = (4096, 12288), (1024, 1024)
DTYPES = ("bfloat16", "float32")
STEPS_PER_SAMPLE = 10
BASELINE = "AdamW"
# Class and options of each; a class of `ember_mlx.optimizers` and of `cuda_ref.optimizers` has the same name.
FAMILY = {
    "AdamMini": ("AdamMini", {}),
    "AdamMini int8": ("AdamMini", {"momentum": "int8"}),
    "FlashAdamW bf16+int8": ("FlashAdamW", {"weights": "bf16+int8"}),
    "SinkGD 2 passes": ("SinkGD", {"passes": 2}),
    "FlashAdamW": ("FlashAdamW", {}),
    "FlashLion bf16+int8": ("FlashLion", {"weights": "bf16+int8"}),
    "SAGE": ("SAGE", {}),
    "SinkGD": ("SinkGD", {}),
    "AdamMini split": ("AdamMini", {}),
}


# What is printed of a row: its key, title and width.
COLUMNS = {
    "dtype": ("dtype", 9),
    "optimizer": ("optimizer", 20),
    "milliseconds": ("ms", 9),
    "of_adamw": ("of AdamW", 9),
    "state_bytes_a_weight": ("state B", 8),
    "new_tables": ("new", 7),
    "peak_tables": ("peak", 7),
    "peak_tables_in_place": ("in place", 8),
}


class OutOfTime(Exception):
    """A row has used up its limit."""


def measure_mlx(name, shape, dtype, repeats, limit):
    """A row: the optimizer of MLX on a matrix (m, n) of that dtype."""
    import mlx.core as mx
    import mlx.optimizers
    from mlx.utils import tree_flatten

    from ember_mlx import optimizers

    deadline = time.monotonic() + limit
    mx.random.seed(SEED)
    dtype = getattr(mx, dtype)
    weight = (mx.random.normal(shape) * 0.02).astype(dtype)
    gradient = mx.random.normal(shape).astype(dtype)
    class_name, options = FAMILY.get(name, (None, {}))
    if name == BASELINE:
        optimizer = mlx.optimizers.AdamW(1e-3, bias_correction=True)
    else:
        optimizer = getattr(optimizers, class_name)(1e-3, **options)
    if name.endswith("split"):
        optimizer = optimizers.SplitWeights(optimizer)
    step = CompiledStep(optimizer, weight, gradient)
    del weight
    in_place, with_new = step.peak(), step.peak(lambda step: tree_flatten(step.state))
    state_bytes = sum(array.nbytes for _, array in tree_flatten(optimizer.state) if array.ndim)
    table = step.table.weight
    return _row(partial(step.take, STEPS_PER_SAMPLE), repeats, deadline, state_bytes, table.size) | {
        "new_tables": round(1 + state_bytes / table.nbytes, 4),
        "peak_tables": with_new,
        "peak_tables_in_place": in_place,
        "peak_bytes_a_weight": round(with_new * table.itemsize, 4),
    }


def measure_torch(name, shape, dtype, repeats, limit):
    """A row: the optimizer of PyTorch on a matrix (m, n) of that dtype, on the GPU where there is one."""
    import torch

    from cuda_ref import optimizers

    deadline = time.monotonic() + limit
    torch.manual_seed(SEED)
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    w = torch.nn.Parameter((torch.randn(shape, device=device) * 0.02).to(getattr(torch, dtype)))
    w.grad = torch.randn(shape, device=device).to(w.dtype)
    class_name, options = FAMILY.get(name, (None, {}))
    if name == BASELINE:
        optimizer = torch.optim.AdamW([w], lr=1e-3, fused=on_gpu)
    else:
        optimizer = getattr(optimizers, class_name)([w], lr=1e-3, **options)
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)

    def steps(count):
        for _ in range(count):
            optimizer.step()
        wait()

    steps(3)
    peak = None
    if on_gpu:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        steps(1)
        peak = round((torch.cuda.max_memory_allocated() - before) / w.nbytes, 4)
    state_bytes = sum(value.nbytes for value in optimizer.state[w].values() if torch.is_tensor(value) and value.ndim)
    row = _row(partial(steps, STEPS_PER_SAMPLE), repeats, deadline, state_bytes, w.numel())
    return row | {"peak_tables": None, "peak_tables_in_place": peak}


def _row(steps, repeats, deadline, state_bytes, size):
    """Time and state; ``steps`` takes STEPS_PER_SAMPLE steps."""
    times = []
    while len(times) < repeats and (not times or time.monotonic() < deadline):
        times.append(median_seconds(steps, 1) / STEPS_PER_SAMPLE)
    return {
        "milliseconds": round(statistics.median(times) * 1e3, 4),
        "samples": len(times),
        "state_bytes_a_weight": round(state_bytes / size, 4),
    }


@contextmanager
def at_most(seconds):
    """Raise OutOfTime in this block after so many seconds, as soon as Python runs again."""

    def stop(*_):
        raise OutOfTime(f"no figure within {seconds} seconds: raise --limit")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def measured(measure, name, shape, dtype, repeats, limit):
    """What ``measure`` returns, or what went wrong, in words; nothing of it is left in memory."""
    try:
        with at_most(2 * limit):
            return measure(name, shape, dtype, repeats, limit)
    except (RuntimeError, ValueError, OutOfTime) as error:
        return {"error": " ".join(str(error).split())[:300]}
    finally:
        gc.collect()


def rows(dtypes, names, framework):
    """(dtype, optimizer) of each row that means something, the baseline of a dtype first."""
    for dtype in dtypes:
        for name in (BASELINE, *names):
            of_bfloat16 = "bf16" in name or "split" in name  # there is no rest of float32 weights
            if not (of_bfloat16 and dtype == "float32") and not ("split" in name and framework == "torch"):
                yield dtype, name


def on_cuda():
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--framework", choices=("mlx", "torch"), default="mlx")
    parser.add_argument("--shape", nargs=2, type=at_least_one, metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--optimizers", nargs="+", choices=tuple(FAMILY), default=tuple(FAMILY))
    parser.add_argument("--repeats", type=at_least_one, default=9)
    parser.add_argument("--limit", type=at_least_one, default=60, help="seconds of a row; it ends by twice as many")
    args = parser.parse_args()

    here = in_fresh_process(machine, in_fresh_process(on_cuda) if args.framework == "torch" else None)
    shape = args.shape or (SHAPE_ON_CPU if here["backend"] == "cpu" else SHAPE)
    measure = {"mlx": measure_mlx, "torch": measure_torch}[args.framework]
    report = {"machine": here | {"framework": args.framework, "repeats": args.repeats}, "rows": []}
    write(args.out, report)
    print(f"{here['device']}, {args.framework}, {shape[0]} x {shape[1]}")
    print(" ".join(f"{title:>{width}}" for title, width in COLUMNS.values()))
    baseline = None
    for dtype, name in rows(args.dtypes, args.optimizers, args.framework):
        row = {"optimizer": name, "shape": shape, "dtype": dtype}
        row |= measured(measure, name, shape, dtype, args.repeats, args.limit)
        report["rows"].append(row)
        if name == BASELINE:
            baseline = row.get("milliseconds")
        if "error" in row:
            print(f"{dtype:>9} {name:>20} {row['error']}", flush=True)
        else:
            row["of_adamw"] = round(row["milliseconds"] / baseline, 3) if baseline else None
            cells = (("" if row.get(key) is None else row[key], width) for key, (_, width) in COLUMNS.items())
            print(" ".join(f"{cell:>{width}}" for cell, width in cells), flush=True)
        write(args.out, report)


if __name__ == "__main__":
    main()
