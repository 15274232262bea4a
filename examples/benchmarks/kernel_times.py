"""The kernels of ``ember_mlx`` in several cuts, each checked against float64 and then timed, on MLX's CUDA backend.

    python examples/benchmarks/kernel_times.py --out $OUT/kernel_times.json

Whole compiled steps of one matrix against MLX's compiled AdamW, and Ember's statistics of tables of 131,072 rows as a
share of the memory floor: what a kernel must read and write, at the bandwidth of a large copy in the same run. Times of
steps and of means are medians of samples on the host's clock. ``kernel`` is the time of the kernels alone, from CUPTI
by way of PyTorch's profiler, where it is there: without MLX's own operations and the gaps between them.

MLX takes seconds to compile a kernel, so the checks run first, in ``--processes`` at a time, and leave their kernels on
disk: each process in a folder of its own, since MLX does not write them whole at once. What ``--seconds`` does not
allow is left out.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import statistics
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
from benchmarking import SEED, CompiledStep, in_fresh_process, machine, write

SHAPE, CHECKED = (4096, 12288), (192, 12288)
ROWS, CHECKED_ROWS = 131_072, 1_003
WIDTHS = (576, 640, 896, 1024, 1152, 1536, 2560, 3072, 3584)
LEARNING_RATE = 1e-3
BASELINE = "AdamW"

# By kernel: the module, and by cut the constants in it. The first is the package's.
STATISTICS = "ember_mlx.kernels.statistics"
SINKHORN = "ember_mlx.kernels.sinkhorn"
FLASH = "ember_mlx.optimizers.flash_kernel"
ADAM_MINI = "ember_mlx.optimizers.adam_mini_kernel"
CUTS = {
    STATISTICS: {
        "package": {},
        "128 of 4": {"ROWS": 128, "AT_ONCE": 4},
        "64 of 8": {"ROWS": 64, "AT_ONCE": 8},
        "256 of 8": {"ROWS": 256, "AT_ONCE": 8},
    },
    FLASH: {"package": {}, "4 weights": {"VECTOR": 4}},
    ADAM_MINI: {"package": {}, "512 threads": {"CUDA_THREADS": 512, "CUDA_THREADS_INT8": 512}},
    SINKHORN: {
        "package": {},
        "a row": {"PAIR": 1},
        "8 rows": {"ROWS": 8, "THREADS_OF_ROWS": 128},
        "64 rows of columns": {"ROWS_OF_COLUMNS": 64},
    },
}
# Name, kernel, class and options, dtypes.
STEPS = [
    ("FlashAdamW", FLASH, "FlashAdamW", {}, ("bfloat16", "float32")),
    ("FlashAdamW bf16+int8", FLASH, "FlashAdamW", {"weights": "bf16+int8"}, ("bfloat16",)),
    ("AdamMini", ADAM_MINI, "AdamMini", {}, ("bfloat16", "float32")),
    ("AdamMini int8", ADAM_MINI, "AdamMini", {"momentum": "int8"}, ("bfloat16", "float32")),
    ("SinkGD 2 passes", SINKHORN, "SinkGD", {"passes": 2}, ("bfloat16", "float32")),
]


class Cut:
    """A context in which a kernel's module has the constants of a cut."""

    def __init__(self, module, name):
        self.patches = [mock.patch(f"{module}.{key}", value) for key, value in CUTS[module][name].items()]

    def __enter__(self):
        self.stack = ExitStack()
        for patch in self.patches:
            self.stack.enter_context(patch)

    def __exit__(self, *_):
        self.stack.close()


# --- checks --------------------------------------------------------------------------------------------------------


def as_float64(array):
    import mlx.core as mx

    return np.array(array.astype(mx.float32)).astype(np.float64)


def check_statistics(cut, dtype):
    """The largest relative error of both means against float64, of widths that are read in both ways."""
    import mlx.core as mx

    from ember_mlx.kernels import statistics as kernel

    worst = 0.0
    with Cut(STATISTICS, cut):
        for columns in (576, 3584, 577):
            g = mx.random.normal((CHECKED_ROWS, columns), key=mx.random.key(SEED)).astype(getattr(mx, dtype))
            squares = as_float64(g) ** 2
            for axis, mean in enumerate(kernel.mean_squares(g)):
                worst = max(worst, np.max(np.abs(as_float64(mean) / squares.mean(axis=1 - axis) - 1)))
    return {"error": float(worst), "right": bool(worst < 1e-5)}


def check_step(step, cut, dtype):
    """Two steps against the float64 oracle: the error in units in the last place, or of the learning rate; and codes.

    Weights in float32 may be off by 1e-4 of a step, others by half a unit of what they are stored in.
    """
    import mlx.core as mx

    from ember_mlx import optimizers
    from ember_mlx.optimizers.split_weights import join
    from ember_mlx.parity import body_oracles, oracle_flash_float64

    _, module, class_name, options, _ = step
    with Cut(module, cut):
        optimizer = getattr(optimizers, class_name)(LEARNING_RATE, **options)
        w = (mx.random.normal(CHECKED, key=mx.random.key(1)) * 0.02).astype(getattr(mx, dtype))
        optimizer.init({"w": w})
        oracle = {
            "FlashAdamW": lambda: oracle_flash_float64.FlashOracle(CHECKED),
            "AdamMini": lambda: body_oracles.AdamMiniOracle(CHECKED, momentum=options.get("momentum", "float32")),
            "SinkGD": lambda: body_oracles.SinkGDOracle(CHECKED, options.get("passes")),
        }[class_name]()
        errors, flipped = [], []
        for number in range(2):
            scale = 10 ** mx.random.uniform(-4, 1, (CHECKED[0], 1), key=mx.random.key(10 + number))
            g = (mx.random.normal(CHECKED, key=mx.random.key(20 + number)) * scale).astype(w.dtype)
            state = optimizer.state["w"]
            exact = as_float64(join(w, state["rest"]) if "rest" in state else w)
            if oracle.quantized:
                oracle.load({key: np.array(array) for key, array in state.items()})
            w = optimizer.apply_gradients({"w": g}, {"w": w})["w"]
            expected = exact - oracle.change(as_float64(g), LEARNING_RATE)
            state = optimizer.state["w"]
            found = as_float64(join(w, state["rest"]) if "rest" in state else w)
            if dtype == "float32":
                errors.append(np.max(np.abs(found - expected)) / LEARNING_RATE / 1e-4)
            else:
                unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(expected), 1e-30))) - (14 if "rest" in state else 7))
                # A bfloat16 is off by half a unit at the most, and by what float32 arithmetic adds.
                allowed = (0.5 if "rest" not in state else 1) * unit + 1e-4 * LEARNING_RATE
                errors.append(np.max(np.abs(found - expected) / allowed))
            if oracle.quantized:
                for key, codes in oracle.codes().items():
                    apart = np.abs(np.array(state[key]).astype(int) - np.floor(codes))
                    flipped.append(np.mean(apart > 0) if apart.max() <= 1 else 1.0)
    error, share = float(max(errors)), float(max(flipped, default=0.0))
    return {"error": error, "flipped": share, "right": bool(error <= 1.02 and share <= 0.02)}


def start(folder):
    """A process of checks: MLX looks for its variable when it compiles its first kernel. No kernel may fall back."""
    warnings.simplefilter("error", RuntimeWarning)
    os.environ["MLX_PTX_CACHE_DIR"] = tempfile.mkdtemp(dir=folder)


def checked(job):
    """What a check says, in a process of its own; nothing that goes wrong there ends this one."""
    try:
        return check_statistics(*job[1:]) if job[0] == STATISTICS else check_step(*job[1:])
    except Exception as error:  # a cut may need more registers than there are
        return {"right": False, "failed": " ".join(f"{type(error).__name__}: {error}".split())[:200]}


# --- times ---------------------------------------------------------------------------------------------------------


def median_of(function, calls, samples, warm=3):
    """Seconds of a call, the median over samples of several; ``function(count)`` waits for all."""
    function(warm)
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        function(calls)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def kernels_alone(function, calls):
    """Microseconds a call of each kernel on the GPU, by name, the longest first; empty where nothing is recorded."""
    try:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            function(calls)
        found = {}
        for event in profiled.key_averages():
            microseconds = getattr(event, "device_time_total", 0) / calls
            if microseconds > 0.3:
                own = re.search(r"(ember_[a-z_]+)_[0-9a-f]{12}_(.*)", event.key)
                name = " ".join(own.groups()) if own else event.key.split("<")[0].split("(")[0][-32:]
                found[name] = round(found.get(name, 0) + microseconds, 1)
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))
    except Exception as error:  # no PyTorch, no CUPTI: times on the host's clock are what there is
        return {"failed": 0.0, f"{type(error).__name__}: {error}"[:60]: 0.0}


def time_step(step, cut, dtype, samples):
    """A row: a compiled step of one matrix; no kernel may fall back."""
    import mlx.core as mx
    import mlx.optimizers

    from ember_mlx import optimizers

    _, module, class_name, options, _ = step or (BASELINE, None, None, {}, None)
    dtype = getattr(mx, dtype)
    weight = (mx.random.normal(SHAPE, key=mx.random.key(1)) * 0.02).astype(dtype)
    gradient = mx.random.normal(SHAPE, key=mx.random.key(2)).astype(dtype)
    with ExitStack() as stack:
        if step:
            stack.enter_context(Cut(module, cut))
            optimizer = getattr(optimizers, class_name)(LEARNING_RATE, **options)
        else:
            optimizer = mlx.optimizers.AdamW(LEARNING_RATE, bias_correction=True)
        compiled = CompiledStep(optimizer, weight, gradient)
        del weight
        in_place = compiled.peak()
        peak = compiled.peak(lambda step: [array for array in _leaves(step.state)])
        seconds = median_of(compiled.take, 20, samples)
        kernels = kernels_alone(compiled.take, 5)
    return {"milliseconds": round(seconds * 1e3, 4), "peak_tables": peak, "in_place": in_place, "kernels": kernels}


def _leaves(tree):
    from mlx.utils import tree_flatten

    return [array for _, array in tree_flatten(tree)]


def time_statistics(cut, dtype, columns, samples, bandwidth):
    """A row: means of squares of several tables in turn, in one compiled function."""
    import mlx.core as mx

    from ember_mlx.kernels import statistics as kernel

    dtype = getattr(mx, dtype)
    tables = [mx.random.normal((ROWS, columns), key=mx.random.key(number)).astype(dtype) for number in range(4)]
    mx.eval(tables)
    with Cut(STATISTICS, cut):
        means = mx.compile(lambda *tables: [mean for table in tables for mean in kernel.mean_squares(table)])

        def take(count):
            for _ in range(count):
                mx.async_eval(means(*tables))
            mx.synchronize()

        seconds = median_of(take, 5, samples) / len(tables)
        kernels = {name: round(each / len(tables), 1) for name, each in kernels_alone(take, 3).items()}
    floor = tables[0].nbytes / bandwidth
    row = {"milliseconds": round(seconds * 1e3, 4), "of_floor": round(floor / seconds, 3), "kernels": kernels}
    alone = [each for name, each in kernels.items() if "ember_statistics" in name]
    return row | ({"kernel_of_floor": round(floor * 1e6 / alone[0], 3)} if alone else {})


def copy_bandwidth():
    """Bytes a second that a large copy reads and writes in MLX."""
    import mlx.core as mx

    source = mx.random.randint(-(2**30), 2**30, (2**29,), key=mx.random.key(0))
    mx.eval(source)

    def take(count):
        for _ in range(count):
            mx.async_eval(source + 1)
        mx.synchronize()

    return 2 * source.nbytes / median_of(take, 10, 5)


def shown(row):
    """A row as a line of the table."""
    if not row.get("check", {}).get("right", True):
        return f"{row['name']:<22} {row['dtype']:<9} {row['cut']:<34} WRONG {row['check']}"
    top = "; ".join(f"{name[:40]} {each}" for name, each in list(row.get("kernels", {}).items())[:3])
    figures = [f"{row.get(key, ''):>7}" for key in ("milliseconds", "of_adamw", "of_floor", "kernel_of_floor")]
    peaks = [f"{row.get(key, ''):>7}" for key in ("peak_tables", "in_place")]
    return f"{row['name']:<22} {row['dtype']:<9} {row['cut']:<34} {' '.join(figures + peaks)}  {top}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--processes", type=int, default=16, help="checks at a time")
    parser.add_argument("--only-package", action="store_true", help="no cuts but those of the package")
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS, help="of the tables of statistics")
    parser.add_argument("--tuned", type=int, nargs="*", default=(576, 3072), help="widths of all cuts")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    report = {"machine": in_fresh_process(machine), "rows": []}
    write(args.out, report)

    cuts = {module: list(named)[: 1 if args.only_package else None] for module, named in CUTS.items()}
    checks = [(step[1], step, cut, dtype) for step in STEPS for cut in cuts[step[1]] for dtype in step[4]]
    checks += [(STATISTICS, cut, dtype) for cut in cuts[STATISTICS] for dtype in ("bfloat16", "float32")]
    folder = tempfile.mkdtemp()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.processes, context, initializer=start, initargs=(folder,)) as pool:
        said = dict(zip([repr(job) for job in checks], pool.map(checked, checks), strict=True))
    for compiled in Path(folder).glob("*/*"):
        shutil.copy(compiled, folder)
    report["checks"] = said
    print(f"{sum(check['right'] for check in said.values())} of {len(said)} checks passed", flush=True)
    for job, check in said.items():
        if not check["right"]:
            print("WRONG", job[:120], check, flush=True)

    jobs = []
    for dtype in ("bfloat16", "float32"):
        jobs += [("step", None, "", dtype)]
        jobs += [("step", step, cut, dtype) for step in STEPS for cut in cuts[step[1]] if dtype in step[4]]
    jobs += [
        ("means", cut, dtype, width)
        for width in args.widths
        for dtype in ("bfloat16", "float32")
        for cut in cuts[STATISTICS]
        if cut == "package" or width in args.tuned
    ]
    # What the package does comes first.
    jobs.sort(key=lambda job: "package" not in job and job[1] is not None)
    warnings.simplefilter("error", RuntimeWarning)
    os.environ["MLX_PTX_CACHE_DIR"] = folder
    bandwidth = copy_bandwidth()
    report["machine"]["copy_bytes_per_second"] = round(bandwidth)
    baseline = {}
    for number, (kind, what, cut, dtype_or_width) in enumerate(jobs):
        if time.monotonic() > end:
            print(f"out of time: {len(jobs) - number} rows left out")
            break
        if kind == "means":
            row = {"name": f"statistics {dtype_or_width}", "cut": what, "dtype": cut}
            check = said[repr((STATISTICS, what, cut))]
            if check["right"]:
                row |= time_statistics(what, cut, dtype_or_width, args.samples, bandwidth)
        else:
            row = {"name": what[0] if what else BASELINE, "cut": cut, "dtype": dtype_or_width}
            check = said[repr((what[1], what, cut, dtype_or_width))] if what else {"right": True}
            if check["right"]:
                row |= time_step(what, cut, dtype_or_width, args.samples)
                baseline.setdefault(dtype_or_width, row["milliseconds"])  # AdamW comes first
                row["of_adamw"] = round(row["milliseconds"] / baseline[dtype_or_width], 3)
        row["check"] = check
        report["rows"].append(row)
        write(args.out, report)
    print(f"copy: {bandwidth / 1e12:.3f} TB/s")
    titles = " ".join(f"{title:>7}" for title in ("ms", "/AdamW", "floor", "kernel", "peak", "inplace"))
    print(f"{'':<22} {'':<9} {'cut':<34} {titles}  kernels, microseconds")
    for row in report["rows"]:
        print(shown(row))


if __name__ == "__main__":
    main()
