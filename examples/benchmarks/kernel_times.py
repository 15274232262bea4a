"""The kernels of ``ember_mlx`` in several cuts, each checked against float64 and then timed, on MLX's CUDA backend.

    python examples/benchmarks/kernel_times.py --out $OUT/kernel_times.json
    python examples/benchmarks/kernel_times.py --out $OUT/sinkgd.json --only SinkGD --seconds 90

Whole compiled steps of one matrix against MLX's compiled AdamW, and Ember's statistics of tables of 131,072 rows as a
share of the memory floor: what a kernel must read and write, at the bandwidth of a large copy in the same run. Times of
steps and of means are medians of samples on the host's clock. ``kernel`` is the time of the kernels alone, from CUPTI
by way of PyTorch's profiler, where it is there: without MLX's own operations and the gaps between them.

Each kernel is checked in the process that times it: MLX takes seconds to compile one, and keeps it nowhere else. The
package's own kernels come first, then the cuts. What ``--seconds`` does not allow is left out. ``--smoke`` tries every
line of this file on a machine without a GPU, by small matrices.
"""

import argparse
import re
import time
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarking import CompiledStep, in_fresh_process, machine, median_seconds, write
from kernel_cases import BASELINE, CUTS, PLACES, SIZES, STATISTICS, STEPS, Cut, checked, made, size

WIDTHS = (576, 640, 896, 1024, 1152, 1536, 2560, 3072, 3584)


def median_of(function, calls, samples):
    """Seconds of a call, the median over samples of several; ``function(count)`` waits for all."""
    function(3)  # to warm up
    return median_seconds(partial(function, calls), samples) / calls


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
    from mlx.utils import tree_flatten

    (matrix, transposed), dtype = place, getattr(mx, dtype)
    shape = size(matrix)
    weight = (mx.random.normal(shape, key=mx.random.key(1)) * 0.02).astype(dtype)
    gradient = mx.random.normal(shape[::-1] if transposed else shape, key=mx.random.key(2)).astype(dtype)
    mx.eval(gradient)
    with ExitStack() as stack:
        if step.module:
            stack.enter_context(Cut(step.module, cut))
        optimizer = made(step)
        gradient = gradient.T if transposed else gradient
        compiled = CompiledStep(optimizer, weight, gradient)
        del weight
        in_place = compiled.peak()
        peak = compiled.peak(lambda step: tree_flatten(step.state))
        seconds = median_of(compiled.take, 20, samples)
        kernels = kernels_alone(compiled.take, 5)
    return {"milliseconds": round(seconds * 1e3, 4), "peak_tables": peak, "in_place": in_place, "kernels": kernels}


def time_statistics(cut, dtype, columns, samples, bandwidth):
    """A row: means of squares of several tables in turn, in one compiled function."""
    import mlx.core as mx

    from ember_mlx.kernels import statistics as kernel

    dtype = getattr(mx, dtype)
    tables = [mx.random.normal((size("rows"), columns), key=mx.random.key(number)).astype(dtype) for number in range(4)]
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

    source = mx.random.randint(-(2**30), 2**30, (size("copied"),), key=mx.random.key(0))
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
    """Rows to be, in that order: names, and as functions the ``check`` and, of samples and bandwidth, the ``time``."""
    own, cuts = [], []

    def step_row(step, cut, dtype, place):
        (matrix, transposed), (rows, columns) = place, size(place[0])
        where = "" if matrix == "large" else f", {rows}x{columns}"
        where += ", transposed" if transposed else ""
        against = "AdamW rounded" if step.rounded and step.class_name else "AdamW"
        return {
            "name": step.name + where,
            "against": against + where,
            "dtype": dtype,
            "cut": cut,
            "check": partial(checked, step, cut, dtype, place) if step.module else lambda: {"right": True},
            "time": lambda samples, _: time_step(step, cut, dtype, place, samples),
        }

    for dtype in ("bfloat16", "float32"):
        steps = [step for step in STEPS if dtype in step.dtypes]
        for place in PLACES:
            here = [step for step in steps if step.everywhere or place == PLACES[0]]
            own.append(step_row(BASELINE, "", dtype, place))
            own += [step_row(step, "package", dtype, place) for step in here]
            if place[0] == "large":
                in_cuts = [step for step in here if dtype == step.dtypes[0] or not step.everywhere]
                cuts += [step_row(step, cut, dtype, place) for step in in_cuts for cut in list(CUTS[step.module])[1:]]
    for width in args.widths:
        for dtype in ("bfloat16", "float32"):
            for cut in CUTS[STATISTICS]:
                row = {"name": f"statistics {width}", "against": None, "dtype": dtype, "cut": cut}
                row["check"] = partial(checked, None, cut, dtype, None)
                row["time"] = partial(time_statistics, cut, dtype, width)
                if cut == "package":
                    own.append(row)
                elif width in args.tuned:
                    cuts.append(row)
    cuts.sort(key=lambda row: not row["name"].startswith("SinkGD"))
    rows = own if args.only_package else own + cuts
    kept = [row for row in rows if row["cut"] and row["name"].startswith(tuple(args.only))]
    compared = {(row["against"], row["dtype"]) for row in kept}
    return [row for row in rows if row in kept or (row in own and (row["name"], row["dtype"]) in compared)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="small matrices, and a machine without a GPU")
    parser.add_argument("--only-package", action="store_true", help="no other cuts than those of the package")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="only rows whose names begin so")
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS, help="of the tables of statistics")
    parser.add_argument("--tuned", type=int, nargs="*", default=(576, 3072), help="widths of all cuts")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    report = {"machine": in_fresh_process(machine), "rows": []}
    write(args.out, report)
    if args.smoke:
        args.widths = []
        SIZES.update({name: (small, small) for name, (_, small) in SIZES.items()})

    warnings.simplefilter("error", RuntimeWarning)  # no kernel may fall back
    bandwidth = copy_bandwidth()
    report["machine"]["copy_bytes_per_second"] = round(bandwidth)
    print(f"copy: {bandwidth / 1e12:.3f} TB/s")
    titles = " ".join(f"{title:>7}" for title in ("ms", "/AdamW", "floor", "kernel", "peak", "inplace"))
    print(f"{'':<38} {'':<9} {'cut':<18} {titles}  kernels, microseconds", flush=True)
    compared, rows = {}, planned(args)
    for number, row in enumerate(rows):
        if time.monotonic() > end:
            print(f"out of time: {len(rows) - number} rows left out")
            break
        against, check, time_it = (row.pop(key) for key in ("against", "check", "time"))
        row["check"] = check()
        if row["check"]["right"]:
            row |= time_it(args.samples, bandwidth)
            compared.setdefault((row["name"], row["dtype"]), row.get("milliseconds"))  # the package's cut comes first
            if (against, row["dtype"]) in compared:
                row["of_adamw"] = round(row["milliseconds"] / compared[against, row["dtype"]], 3)
        report["rows"].append(row)
        write(args.out, report)
        print(shown(row), flush=True)


if __name__ == "__main__":
    main()
