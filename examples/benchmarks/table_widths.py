"""Widths that are no power of two: how to cut a table into tiles, and how close each cut comes to the floor.

    python examples/benchmarks/table_widths.py --out $OUT/table_widths.json

On a CUDA GPU with PyTorch and Triton it times the two large kernels of ``cuda_ref.triton_kernels`` apart, in each of
several cuts (`statistics_cuts`, `update_cuts`), then whole steps with the cuts of the package, float16 with stochastic
rounding too. Each cut is first compared with float64 on fresh random numbers. Those of MLX: ``kernel_times.py``.

Two tables take turns, so that nothing is found in the L2 cache but what the kernel before has left there. The floor of
a kernel is what it must read and write at the bandwidth of a large copy, measured in the same run. Times are medians
of CUDA events. What ``--seconds`` does not allow is left out.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from benchmarking import SEED, machine, write

from cuda_ref import triton_kernels

WIDTHS = (576, 640, 896, 1024, 1152, 1536, 2560, 3072, 3584)
TUNED = (1152, 576, 3584, 1024, 2560)  # widths at which the cuts are compared, in this order
ROWS = 131_072
DTYPES = ("bfloat16", "float32")
CHECKED_ROWS = 1_000  # of the table that is compared with float64
# float16 is rounded stochastically where cuts are compared. The interpreter cuts off to bfloat16 where a GPU rounds.
ALLOWED_UNITS = {"float32": 20, "bfloat16": 0.51 if torch.cuda.is_available() else 1, "float16": 1.01}


def cut(rows, columns, warps, per_program=None):
    tile = {"ROWS": rows, "COLUMNS": columns, "num_warps": warps}
    return tile if per_program is None else tile | {"ROWS_PER_PROGRAM": per_program}


def padded(columns, elements):
    """A whole row, padded to a power of two: as it was before."""
    width = 1 << (columns - 1).bit_length()
    return max(1, elements // width), width


def statistics_cuts(columns, itemsize):
    """By name, the tiles of the first kernel to try for a width; ``PER_PROGRAM`` is for those of `_walk_down`."""
    divisor = columns & -columns
    cuts = {"package": triton_kernels.statistics_tile(columns, itemsize)}
    for width in (64, 128, 256, 512):
        for elements, warps in ((8192, 4), (16384, 4), (16384, 8)):
            if width <= divisor and 64 <= elements // width <= 256:
                cuts[f"across {elements // width}x{width} w{warps}"] = cut(elements // width, width, warps)
    rows, width = padded(columns, 16384)
    cuts[f"down {rows}x{width} w4 (before)"] = cut(rows, width, 4, 128) | {"REST": 0}
    main = 1 << (columns.bit_length() - 1)
    if main != columns:
        rest = 1 << (columns - main - 1).bit_length()
        for elements, warps in ((8192, 4), (16384, 4), (16384, 8)):
            rows = max(1, elements // main)
            cuts[f"down {rows}x({main}+{rest}) w{warps}"] = cut(rows, main, warps, 128) | {"REST": rest}
    return cuts


def update_cuts(columns, itemsize):
    """By name, the tiles of the last kernel to try for a width."""
    divisor = columns & -columns
    cuts = {"package": triton_kernels.update_tile(columns, itemsize)}
    for width in (64, 128, 256, 512):
        for elements, warps in ((2048, 8), (4096, 8), (4096, 16), (8192, 16)):
            for per_program in (32, 128):
                rows = elements // width
                if width <= divisor and rows <= per_program:
                    cuts[f"{rows}x{width} of {per_program} w{warps}"] = cut(rows, width, warps, per_program)
    rows, width = padded(columns, 4096 if columns <= 2048 else 8192)
    cuts[f"{rows}x{width} of 32 w16 (before)"] = cut(rows, width, min(32, 16 * max(1, width // 8192)), 32)
    return cuts


if triton_kernels.triton is not None:
    import triton
    import triton.language as tl

    @triton.jit
    def _walk_down(
        g, g_row, g_column, r, row_mean, column_sums, rows, columns, beta2, forget,
        BETA2_IS_TENSOR: tl.constexpr, ROWS_PER_PROGRAM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
        REST: tl.constexpr,
    ):  # fmt: skip
        """The first kernel cut otherwise: whole rows at once, of one power of two, or of two."""
        program = tl.program_id(0)
        j = tl.arange(0, COLUMNS).to(tl.int64)
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        if REST > 0:
            k = (COLUMNS + tl.arange(0, REST)).to(tl.int64)
            rest_sums = tl.zeros((ROWS, REST), tl.float32)
        for tile in range(0, ROWS_PER_PROGRAM, ROWS):
            i, inside = triton_kernels._rows_of(program, tile, rows, ROWS_PER_PROGRAM, ROWS)
            x = triton_kernels._load(g, i, g_row, j, g_column, inside, columns)
            squares = x * x
            sums += squares
            total = tl.sum(squares, 1)
            if REST > 0:
                y = triton_kernels._load(g, i, g_row, k, g_column, inside, columns)
                rest_sums += y * y
                total += tl.sum(y * y, 1)
            moment = tl.load(r + i, mask=inside, other=0)
            moment = triton_kernels._running_mean(moment, total / columns, beta2, forget, BETA2_IS_TENSOR)
            tl.store(r + i, moment, mask=inside)
        tl.store(column_sums + program.to(tl.int64) * columns + j, tl.sum(sums, 0), mask=j < columns)
        if REST > 0:
            place = column_sums + program.to(tl.int64) * columns + k
            tl.store(place, tl.sum(rest_sums, 0), mask=k < columns)


# --- the kernels apart ---------------------------------------------------------------------------------------------


class Table:
    """A table with its gradient and state, and the launches of the two large kernels on it."""

    def __init__(self, rows, columns, dtype, device, seed):
        generator = torch.Generator(device).manual_seed(seed)
        self.w, self.g = (
            torch.randn(rows, columns, device=device, generator=generator).mul_(scale).to(getattr(torch, dtype))
            for scale in (0.02, 1.0)
        )
        self.r, self.c = torch.rand(rows, device=device), torch.rand(columns, device=device)
        self.t = torch.full((), 3.0, device=device)
        self.column_sums = torch.empty(rows // 16 + 1, columns, device=device)
        self.seed = torch.tensor(5, dtype=torch.int32, device=device)

    def statistics(self, tile):
        rows, columns = self.g.shape
        kernel = _walk_down if "REST" in tile else triton_kernels._row_means_and_column_sums
        per_program = tile.get("ROWS_PER_PROGRAM", tile["ROWS"])
        programs = -(-rows // per_program)
        kernel[(programs,)](
            self.g, *self.g.stride(), self.r, None, self.column_sums, rows, columns, 0.999, 0.001,
            BETA2_IS_TENSOR=False, **tile,
        )  # fmt: skip
        return self.r, self.column_sums[:programs]

    def update(self, tile):
        stochastic = self.w.dtype == torch.float16
        rows, columns = self.g.shape
        dropped = triton_kernels.DROPPED_BITS.get(self.w.dtype)
        triton_kernels._update_table[(-(-rows // tile["ROWS_PER_PROGRAM"]),)](
            self.w, *self.w.stride(), self.g, *self.g.stride(), self.r, None, self.c, self.t, None,
            self.seed if stochastic else None, rows, columns, 1e-3, -1e-3, 1e-8, 0.0, 0.0, 0.0, 0,
            LEARNING_RATE_IS_TENSOR=False, DROPPED_BITS=dropped if stochastic else None,
            ALL_COLUMNS=1 << (columns - 1).bit_length(), **tile,
        )  # fmt: skip
        return self.w


def statistics_error(tile, columns, dtype, device):
    """The largest relative error of the first kernel against float64."""
    table = Table(CHECKED_ROWS, columns, dtype, device, SEED + 1)
    before = table.r.double()
    squares = table.g.double().square()
    r, column_sums = table.statistics(tile)
    expected = before * 0.999 + squares.mean(1) * 0.001
    of_rows = ((r.double() - expected).abs() / expected).max()
    expected = squares.sum(0)
    of_columns = ((column_sums.double().sum(0) - expected).abs() / expected).max()
    return max(of_rows.item(), of_columns.item())


def update_error(tile, columns, dtype, device):
    """The largest error of the last kernel against float64, in units in the last place of 0.02 in that dtype."""
    table = Table(CHECKED_ROWS, columns, dtype, device, SEED + 2)
    w, g, r, c = (tensor.double() for tensor in (table.w, table.g, table.r, table.c))
    correction = 1 - torch.exp(torch.tensor(-3e-3, dtype=torch.float64)).item()
    expected = w - 1e-3 * g / ((r[:, None] * c / (c.mean() * correction)).sqrt() + 1e-8)
    error = (table.update(tile).double() - expected).abs()
    unit = torch.finfo(table.w.dtype).eps * expected.abs().clamp(min=0.02)
    return (error / unit).max().item()


def milliseconds(function, repeats):
    """The median time of ``function(number)`` on the GPU, for numbers 0, 1, 0, 1, ..."""
    if not torch.cuda.is_available():  # the interpreter: every line is tried, the time means nothing
        start = time.perf_counter()
        function(0)
        return (time.perf_counter() - start) * 1e3
    events = []
    for number in range(4):
        function(number % 2)
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)  # about 10 ms, while the queue is filled
    for number in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function(number % 2)
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def copy_bandwidth(repeats):
    """Bytes a second that a large copy reads and writes in PyTorch."""
    source = torch.randint(-128, 128, (2**31,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda number: target.copy_(source), repeats) * 1e3


def compare_cuts(columns, dtype, rows, bandwidth, repeats, device):
    """Rows of results of both kernels for one width and dtype: every cut that is right, with its time."""
    found = []
    tables = [Table(rows, columns, dtype, device, SEED + number) for number in range(2)]
    size, itemsize = tables[0].w.nbytes, tables[0].w.itemsize
    for kernel, cuts, error_of, passes, allowed in (
        ("statistics", statistics_cuts(columns, itemsize), statistics_error, 1, 1e-5),
        ("update", update_cuts(columns, itemsize), update_error, 3, ALLOWED_UNITS[dtype]),
    ):
        for name, tile in cuts.items():
            about = {"kernel": kernel, "columns": columns, "dtype": dtype, "cut": name}
            try:
                error = error_of(tile, columns, dtype, device)
                if not error <= allowed:
                    found.append(about | {"wrong": error})
                    continue
                taken = milliseconds(lambda number, k=kernel, t=tile: getattr(tables[number], k)(t), repeats)
                floor = passes * size / bandwidth * 1e3
                about |= {"error": float(f"{error:.3g}")}
                about |= {"milliseconds": round(taken, 4), "of_floor": round(floor / taken, 3)}
            except Exception as error:  # a cut may need more registers or shared memory than there are
                about |= {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
            found.append(about)
    return found


def whole_step(columns, dtype, rows, bandwidth, repeats, device, stochastic=False):
    """One step by the cuts of the package; of float16 to nearest or stochastically."""
    tables = [Table(rows, columns, dtype, device, SEED + number) for number in range(2)]

    def step(number):
        table = tables[number]
        options = {"learning_rate": 1e-3, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
        options |= {"seed": table.seed} if stochastic else {}
        triton_kernels.ember_step(table.w, table.g, table.r, table.c, table.t, **options)

    about = {"kernel": "step", "columns": columns, "dtype": dtype, "stochastic": stochastic}
    taken = milliseconds(step, repeats)
    floor = 4 * tables[0].w.nbytes / bandwidth * 1e3
    return about | {"milliseconds": round(taken, 4), "of_floor": round(floor / taken, 3)}


# --- what is run and shown -----------------------------------------------------------------------------------------


def best(rows):
    """The fastest three cuts of each kernel, width and dtype, and the package's and the one before, as lines."""
    groups = {}
    for row in rows:
        if "cut" in row and "milliseconds" in row:
            groups.setdefault((row["kernel"], row["columns"], row["dtype"]), []).append(row)
    for (kernel, columns, dtype), group in groups.items():
        ranked = sorted(group, key=lambda row: row["milliseconds"])
        shown = ranked[:3] + [row for row in ranked[3:] if row["cut"] == "package" or "before" in row["cut"]]
        cuts = "; ".join(f"{row['cut']} {row['of_floor']:.2f}" for row in shown)
        yield f"{kernel:<15} {columns:>5} {dtype:<9} {cuts}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--tuned", type=int, nargs="*", default=[], help=f"compare cuts at these, such as {TUNED}")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not triton_kernels.available(torch.device("cpu")):
        parser.exit(2, "table_widths.py: error: no CUDA device; TRITON_INTERPRET=1 tries all lines without times\n")
    bandwidth = copy_bandwidth(args.repeats) if device == "cuda" else 1.0
    report = {"machine": machine(device) | {"copy_bytes_per_second": round(bandwidth)}, "rows": []}
    rows = report["rows"]

    def done(new):
        rows.extend(new)
        write(args.out, report)
        for row in new:
            if row["kernel"] == "step" or "wrong" in row or "failed" in row:
                print(row, flush=True)
        print(*best(new), sep="\n", end="\n" if any("cut" in row for row in new) else "", flush=True)
        return time.monotonic() > end

    common = args.rows, bandwidth, args.repeats, device
    steps = [(columns, dtype, False) for columns in args.widths for dtype in args.dtypes]
    steps += [(columns, "float16", way) for columns in (1024, 1152) for way in (False, True)]
    jobs = [lambda c=c, d=d, s=s: [whole_step(c, d, *common, stochastic=s)] for c, d, s in steps]
    jobs += [lambda c=c, d=d: compare_cuts(c, d, *common) for c in args.tuned for d in (*args.dtypes, "float16")]
    for number, job in enumerate(jobs):
        if done(job()):
            print(f"out of time: {len(jobs) - number - 1} of {len(jobs)} parts left out")
            break
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
