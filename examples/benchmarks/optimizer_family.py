"""One step of each optimizer of the family on one matrix: time, peak and state, in MLX or in PyTorch.

    python examples/benchmarks/optimizer_family.py --out examples/benchmarks/results/optimizer_family_mlx_MACHINE.json
    python examples/benchmarks/optimizer_family.py --framework torch --out ...

The baseline is MLX's AdamW, compiled, or PyTorch's, fused on a GPU. A step of MLX is compiled as mlx-lm compiles its
own, with the state for inputs and outputs. Each row is a fresh process: warm-up, then the median over samples of
several steps each. The peak is that of a step above what lay there before it, weights, gradient and state, in tables of
the weights' dtype. `peak_tables` has the new table and state in it: the caller holds the old ones. Where nobody holds
them, they may be written over: `peak_tables_in_place`. PyTorch always writes in place.
"""

import argparse
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
    "SinkGD": ("SinkGD", {}),
    "SinkGD 2 passes": ("SinkGD", {"passes": 2}),
    "SAGE": ("SAGE", {}),
    "FlashAdamW": ("FlashAdamW", {}),
    "FlashAdamW bf16+int8": ("FlashAdamW", {"weights": "bf16+int8"}),
    "FlashLion bf16+int8": ("FlashLion", {"weights": "bf16+int8"}),
}


def measure_mlx(name, shape, dtype, repeats):
    """A row: the optimizer of MLX on a matrix (m, n) of that dtype."""
    import mlx.core as mx
    import mlx.optimizers
    from mlx.utils import tree_flatten, tree_map

    from ember_mlx import optimizers

    mx.random.seed(SEED)
    dtype = getattr(mx, dtype)
    weight = (mx.random.normal(shape) * 0.02).astype(dtype)
    gradient = mx.random.normal(shape).astype(dtype)
    class_name, options = FAMILY.get(name, (None, {}))
    if name == BASELINE:
        optimizer = mlx.optimizers.AdamW(1e-3, bias_correction=True)
    else:
        optimizer = getattr(optimizers, class_name)(1e-3, **options)
    step = CompiledStep(optimizer, weight, gradient)
    del weight
    in_place, with_new = step.peak(), step.peak(lambda step: tree_map(lambda array: array, step.state))
    seconds = median_seconds(partial(step.take, STEPS_PER_SAMPLE), repeats) / STEPS_PER_SAMPLE
    state_bytes = sum(array.nbytes for _, array in tree_flatten(optimizer.state) if array.ndim)
    return _row(seconds, state_bytes, step.table.weight.size) | {
        "peak_tables": with_new,
        "peak_tables_in_place": in_place,
    }


def measure_torch(name, shape, dtype, repeats):
    """A row: the optimizer of PyTorch on a matrix (m, n) of that dtype, on the GPU where there is one."""
    import torch

    from cuda_ref import optimizers

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
    seconds = median_seconds(partial(steps, STEPS_PER_SAMPLE), repeats) / STEPS_PER_SAMPLE
    state_bytes = sum(value.nbytes for value in optimizer.state[w].values() if torch.is_tensor(value) and value.ndim)
    return _row(seconds, state_bytes, w.numel()) | {"peak_tables": None, "peak_tables_in_place": peak}


def _row(seconds, state_bytes, size):
    return {"milliseconds": round(seconds * 1e3, 4), "state_bytes_a_weight": round(state_bytes / size, 4)}


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
    args = parser.parse_args()

    here = in_fresh_process(machine, in_fresh_process(on_cuda) if args.framework == "torch" else None)
    shape = args.shape or (SHAPE_ON_CPU if here["backend"] == "cpu" else SHAPE)
    measure = {"mlx": measure_mlx, "torch": measure_torch}[args.framework]
    report = {"machine": here | {"framework": args.framework, "repeats": args.repeats}, "rows": []}
    write(args.out, report)
    print(f"{here['device']}, {args.framework}, {shape[0]} x {shape[1]}")
    print(f"{'dtype':>9}  {'optimizer':<20} {'ms':>9} {'of AdamW':>9} {'state B':>8} {'peak':>7} in place")
    for dtype in args.dtypes:
        baseline = None
        for name in (BASELINE, *args.optimizers):
            if dtype == "float32" and "bf16" in name:  # there is no rest of float32 weights
                continue
            row = {"optimizer": name, "shape": shape, "dtype": dtype}
            row |= in_fresh_process(measure, name, shape, dtype, args.repeats)
            report["rows"].append(row)
            if "error" in row:
                print(f"{dtype:>9}  {name:<20} {row['error']}", flush=True)
            else:
                baseline = row["milliseconds"] if name == BASELINE else baseline
                row["of_adamw"] = round(row["milliseconds"] / baseline, 3) if baseline else None
                cells = (row[key] if row[key] is not None else "" for key in ("peak_tables", "peak_tables_in_place"))
                peak, in_place = cells
                print(
                    f"{dtype:>9}  {name:<20} {row['milliseconds']:>9.3f} {row['of_adamw'] or '':>9} "
                    f"{row['state_bytes_a_weight']:>8.3f} {peak:>7} {in_place:>8}",
                    flush=True,
                )
            write(args.out, report)


if __name__ == "__main__":
    main()
