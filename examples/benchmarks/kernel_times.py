"""The kernels of ``ember_mlx`` in several cuts, each checked against float64 and then timed, on MLX's CUDA backend.

    python examples/benchmarks/kernel_times.py --out $OUT/kernel_times.json
    python examples/benchmarks/kernel_times.py --out $OUT/sinkgd.json --only SinkGD --seconds 90

Whole compiled steps of one matrix against MLX's compiled AdamW, and Ember's statistics of tables of 131,072 rows as a
share of the memory floor: what a kernel must read and write, at the bandwidth of a large copy in the same run. Times of
steps and of means are medians of samples on the host's clock. ``kernel`` is the time of the kernels alone, from CUPTI
by way of PyTorch's profiler, where it is there: without MLX's own operations and the gaps between them.

MLX takes seconds to compile a kernel, so the checks run first, in ``--processes`` at a time, and leave their kernels on
disk: each process in a folder of its own, since MLX does not write them whole at once. Only what is timed is checked.
The package's own kernels come first, then the cuts. What ``--seconds`` does not allow is left out. On an H200 30 checks
took 60 seconds in 12 processes, and a row about 4.
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
from functools import partial
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
ADAM = "ember_mlx.optimizers.adam_kernel"
CUTS = {
    STATISTICS: {
        "package": {},
        "128 of 4": {"ROWS": 128, "AT_ONCE": 4},
        "64 of 8": {"ROWS": 64, "AT_ONCE": 8},
        "256 of 8": {"ROWS": 256, "AT_ONCE": 8},
    },
    FLASH: {"package": {}, "4 weights": {"VECTOR": 4}},
    ADAM_MINI: {"package": {}, "512 threads": {"CUDA_THREADS": 512, "CUDA_THREADS_INT8": 512}},
    # Bands of the checked matrix are as high as those of the one that is timed.
    SINKHORN: {
        "package": {"LEAST_ROWS": 32},
        "3 rows ahead": {"LEAST_ROWS": 32, "MOST_AHEAD": 3},
        "2 ahead of 2 rows": {"LEAST_ROWS": 32, "MOST_AHEAD": 2},
        "16 rows": {"LEAST_ROWS": 16, "MOST_ROWS": 16},
        "read twice": {"LEAST_ROWS": 32, "REGISTERS": 0},
    },
    ADAM: {"package": {}, "4 weights": {"MOST_AT_ONCE": 4}},
}
# Name, kernel, class and options, dtypes.
STEPS = [
    ("SinkGD 2 passes", SINKHORN, "SinkGD", {"passes": 2}, ("bfloat16", "float32")),
    ("FlashAdamW", FLASH, "FlashAdamW", {}, ("bfloat16", "float32")),
    ("FlashAdamW bf16+int8", FLASH, "FlashAdamW", {"weights": "bf16+int8"}, ("bfloat16",)),
    ("AdamMini", ADAM_MINI, "AdamMini", {}, ("bfloat16", "float32")),
    ("AdamMini int8", ADAM_MINI, "AdamMini", {"momentum": "int8"}, ("bfloat16", "float32")),
]
ROUNDED = ("AdamW rounded", ADAM, "StochasticRounding", {}, ("bfloat16",))
# Of the steps that are rounded stochastically, and of AdamW beside them: a large matrix and one of a small model, with
# gradients that lie as the weight does and ones that come out of a matrix product, transposed.
PLACES = [(shape, transposed) for shape in (SHAPE, (3072, 1024)) for transposed in (False, True)]


def made(class_name, options):
    """An optimizer of the package, or MLX's AdamW for None."""
    import mlx.optimizers

    from ember_mlx import optimizers
    from ember_mlx.optimizers.rounded import StochasticRounding

    adamw = mlx.optimizers.AdamW(LEARNING_RATE, bias_correction=True)
    if class_name is None:
        return adamw
    if class_name == "StochasticRounding":
        return StochasticRounding(adamw)
    return getattr(optimizers, class_name)(LEARNING_RATE, **options)


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


def check_rounded(cut, dtype):
    """Whether every bit is as that of plain operations."""
    import mlx.core as mx

    from ember_mlx.optimizers import adam_kernel

    dtype = getattr(mx, dtype)
    with Cut(ADAM, cut):
        found = adam_kernel.differences(dtype, dtype, dtype)
    return {"right": found is None} | ({"failed": found} if found else {})


def check_step(step, cut, dtype):
    """Two steps against the float64 oracle: the error in units in the last place, or of the learning rate; and codes.

    Weights in float32 may be off by 1e-4 of a step, others by half a unit of what they are stored in.
    """
    import mlx.core as mx

    from ember_mlx.optimizers.split_weights import join
    from ember_mlx.parity import body_oracles, oracle_flash_float64

    _, module, class_name, options, _ = step
    with Cut(module, cut):
        optimizer = made(class_name, options)
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
        return {STATISTICS: check_statistics, ADAM: check_rounded}.get(job[0], check_step)(*job[1:])
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


def time_step(step, cut, dtype, place, samples):
    """A row: a compiled step of one matrix; no kernel may fall back."""
    import mlx.core as mx

    _, module, class_name, options, _ = step
    (shape, transposed), dtype = place, getattr(mx, dtype)
    weight = (mx.random.normal(shape, key=mx.random.key(1)) * 0.02).astype(dtype)
    gradient = mx.random.normal(shape[::-1] if transposed else shape, key=mx.random.key(2)).astype(dtype)
    mx.eval(gradient)
    with ExitStack() as stack:
        if module:
            stack.enter_context(Cut(module, cut))
        optimizer = made(class_name, options)
        gradient = gradient.T if transposed else gradient
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
        return f"{row['name']:<38} {row['dtype']:<9} {row['cut']:<18} WRONG {row['check']}"
    top = "; ".join(f"{name[:40]} {each}" for name, each in list(row.get("kernels", {}).items())[:3])
    figures = [f"{row.get(key, ''):>7}" for key in ("milliseconds", "of_adamw", "of_floor", "kernel_of_floor")]
    peaks = [f"{row.get(key, ''):>7}" for key in ("peak_tables", "in_place")]
    return f"{row['name']:<38} {row['dtype']:<9} {row['cut']:<18} {' '.join(figures + peaks)}  {top}"


def planned(args):
    """What is timed, in that order: name, dtype, cut, a function of samples and bandwidth, and the check of it."""
    own, cuts = [], []
    adamw = (BASELINE, None, None, {}, None)

    def step_row(step, cut, dtype, place=PLACES[0]):
        (rows, columns), transposed = place
        where = "" if place == PLACES[0] else f", {rows}x{columns}{' transposed' if transposed else ''}"
        check = step[1] and ((ADAM, cut, dtype) if step[1] == ADAM else (step[1], step, cut, dtype))
        return step[0] + where, dtype, cut, lambda n, _: time_step(step, cut, dtype, place, n), check

    for dtype in ("bfloat16", "float32"):
        own.append(step_row(adamw, "", dtype))
        own += [step_row(step, "package", dtype) for step in STEPS if dtype in step[4]]
        cuts += [step_row(step, cut, dtype) for step in STEPS if dtype in step[4] for cut in list(CUTS[step[1]])[1:]]
        for place in PLACES if dtype in ROUNDED[4] else ():
            own += [step_row(adamw, "", dtype, place)] if place != PLACES[0] else []
            own.append(step_row(ROUNDED, "package", dtype, place))
            cuts += [step_row(ROUNDED, cut, dtype, place) for cut in list(CUTS[ADAM])[1:]]
    for width in args.widths:
        for dtype in ("bfloat16", "float32"):
            for cut in CUTS[STATISTICS]:
                time_it = partial(time_statistics, cut, dtype, width)
                row = (f"statistics {width}", dtype, cut, time_it, (STATISTICS, cut, dtype))
                if cut == "package":
                    own.append(row)
                elif width in args.tuned:
                    cuts.append(row)
    cuts.sort(key=lambda row: not row[0].startswith("SinkGD"))
    rows = own if args.only_package else own + cuts
    kept = [row for row in rows if row[2] and row[0].startswith(tuple(args.only))]
    compared = {like(*row[:2]) for row in kept}
    return [row for row in rows if row in kept or (not row[2] and like(*row[:2]) in compared)]


def like(name, dtype):
    """What rows that are compared have in common: the dtype, and the matrix."""
    return dtype, *name.split(", ")[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--processes", type=int, default=16, help="checks at a time")
    parser.add_argument("--only-package", action="store_true", help="no other cuts than those of the package")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="only rows whose names begin so")
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS, help="of the tables of statistics")
    parser.add_argument("--tuned", type=int, nargs="*", default=(576, 3072), help="widths of all cuts")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    report = {"machine": in_fresh_process(machine), "rows": []}
    write(args.out, report)

    jobs = planned(args)
    checks = list(dict.fromkeys(check for *_, check in jobs if check))
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

    warnings.simplefilter("error", RuntimeWarning)
    os.environ["MLX_PTX_CACHE_DIR"] = folder
    bandwidth = copy_bandwidth()
    report["machine"]["copy_bytes_per_second"] = round(bandwidth)
    baseline = {}
    for number, (name, dtype, cut, time_it, check) in enumerate(jobs):
        if time.monotonic() > end:
            print(f"out of time: {len(jobs) - number} rows left out")
            break
        row = {"name": name, "cut": cut, "dtype": dtype, "check": said[repr(check)] if check else {"right": True}}
        if row["check"]["right"]:
            row |= time_it(args.samples, bandwidth)
            if "peak_tables" in row:
                milliseconds = baseline.setdefault(like(name, dtype), row["milliseconds"])  # AdamW comes first
                row["of_adamw"] = round(row["milliseconds"] / milliseconds, 3)
        report["rows"].append(row)
        write(args.out, report)
    print(f"copy: {bandwidth / 1e12:.3f} TB/s")
    titles = " ".join(f"{title:>7}" for title in ("ms", "/AdamW", "floor", "kernel", "peak", "inplace"))
    print(f"{'':<38} {'':<9} {'cut':<18} {titles}  kernels, microseconds")
    for row in report["rows"]:
        print(shown(row))


if __name__ == "__main__":
    main()
