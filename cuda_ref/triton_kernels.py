"""Ember's step in Triton: no table-sized scratch, where plain operations make float32 copies of the gradient.

Three kernels. The first reads the gradient once: each program takes consecutive rows, finishes their ``r`` and leaves
its sums of squares of the columns; the second adds these up, in order, into ``c``; the third reads gradient and table
and writes the table. No atomics: the same input gives the same bits. All arithmetic is float32.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a Mac, or a CPU build of PyTorch
    triton = None

from cuda_ref.optimizers.stochastic_rounding import DROPPED_BITS
from cuda_ref.sharding import RowShards

__all__ = ["available", "device_of", "ember_step", "launchable", "log_of", "shares", "statistics_tile", "update_tile"]

COLUMN_TILE = {"ROWS": 1024, "COLUMNS": 16, "num_warps": 8}  # of the second kernel


def available(device: torch.device | None = None) -> bool:
    """Whether Triton is installed and runs there: on a GPU, or anywhere if TRITON_INTERPRET=1 was set on its import."""
    if triton is None or device is None or device.type == "cuda":
        return triton is not None
    return not isinstance(tl.sum, triton.JITFunction)


def device_of(x: torch.Tensor) -> AbstractContextManager:
    """For Triton, which launches on the current device; a compiled step sets that itself."""
    return nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(x)


def launchable(number: float | torch.Tensor, device: torch.device) -> float | torch.Tensor:
    """A number as kernels take it: an integer 1 or a NumPy number would make another kernel, or none."""
    return number.to(device) if isinstance(number, torch.Tensor) else float(number)


def shares(beta: float) -> tuple[float, float]:
    """What the old mean weighs in a running one, and what the new value; floats also of a NumPy number."""
    return float(beta), 1.0 - float(beta)


def log_of(beta: float) -> float:
    """Of which a kernel makes the bias correction of any step."""
    return math.log(beta) if beta > 0 else -math.inf


def ember_step(
    w: torch.Tensor,  # (V, D)
    g: torch.Tensor,  # (V, D)
    r: torch.Tensor,  # (V,) float32
    c: torch.Tensor,  # (D,) float32
    t: torch.Tensor,  # ()
    *,
    learning_rate: float | torch.Tensor,
    beta2: float | torch.Tensor,
    eps: float,
    weight_decay: float,
    q: torch.Tensor | None = None,
    row_clip: float | None = None,
    row_floor: float | None = None,
    seed: torch.Tensor | None = None,
    shards: RowShards | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``ember_step`` of ``cuda_ref.optimizers.ember``, except that ``w``, ``r`` and ``c`` are overwritten."""
    rows, columns = w.shape
    scheduled = isinstance(beta2, torch.Tensor)
    beta2, forget = (beta2, 0.0) if scheduled else shares(beta2)
    log_beta2 = 0.0 if scheduled else log_of(beta2)
    row_mean = None if row_clip is None else torch.empty_like(r)
    seed = seed if w.dtype in DROPPED_BITS else None
    tile_of_statistics, tile_of_update = (cut(columns, g.itemsize) for cut in (statistics_tile, update_tile))
    programs = triton.cdiv(rows, tile_of_statistics["ROWS"])
    column_sums = torch.empty((programs, columns), dtype=torch.float32, device=w.device)
    column_grid = (triton.cdiv(columns, COLUMN_TILE["COLUMNS"]),)
    eps, weight_decay = float(eps), float(weight_decay)
    learning_rate = launchable(learning_rate, w.device)

    with device_of(w):
        if rows:
            _row_means_and_column_sums[(programs,)](
                g, *g.stride(), r, row_mean, column_sums, rows, columns, beta2, forget,
                BETA2_IS_TENSOR=scheduled, **tile_of_statistics,
            )  # fmt: skip
        if shards is None:
            _column_means[column_grid](
                column_sums, c, programs, rows, columns, beta2, forget, BETA2_IS_TENSOR=scheduled, **COLUMN_TILE
            )
        else:
            mean = torch.zeros_like(c)
            _column_means[column_grid](
                column_sums, mean, programs, rows, columns, 0.0, 1.0, BETA2_IS_TENSOR=False, **COLUMN_TILE
            )
            mean = shards.mean_over_all_rows(mean)[None]
            _column_means[column_grid](mean, c, 1, 1, columns, beta2, forget, BETA2_IS_TENSOR=scheduled, **COLUMN_TILE)
        if rows:
            _update_table[(triton.cdiv(rows, tile_of_update["ROWS_PER_PROGRAM"]),)](
                w, *w.stride(), g, *g.stride(), r, row_mean, c, t, q, seed, rows, columns,
                learning_rate, log_beta2, eps, weight_decay,
                0.0 if row_clip is None else float(row_clip), 0.0 if row_floor is None else float(row_floor),
                0 if shards is None else shards.first_row,
                LEARNING_RATE_IS_TENSOR=isinstance(learning_rate, torch.Tensor),
                DROPPED_BITS=None if seed is None else DROPPED_BITS[w.dtype],
                ALL_COLUMNS=triton.next_power_of_2(columns), **tile_of_update,
            )  # fmt: skip
    return w, r, c


if triton is not None:

    @triton.jit
    def _row_means_and_column_sums(
        g, g_row, g_column, r, row_mean, column_sums, rows, columns, beta2, forget,
        BETA2_IS_TENSOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        i = program * ROWS + tl.arange(0, ROWS)
        inside = i < rows
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first_column in range(0, columns, COLUMNS):
            j = (first_column + tl.arange(0, COLUMNS)).to(tl.int64)
            x = _load(g, i, g_row, j, g_column, inside, columns)
            squares = x * x
            sums += squares
            tl.store(column_sums + program * columns + j, tl.sum(squares, 0), mask=j < columns)
        mean = tl.sum(sums, 1) / columns
        moment = tl.load(r + i, mask=inside, other=0)
        tl.store(r + i, _running_mean(moment, mean, beta2, forget, BETA2_IS_TENSOR), mask=inside)
        if row_mean is not None:
            tl.store(row_mean + i, mean, mask=inside)

    @triton.jit
    def _column_means(
        column_sums, c, programs, rows, columns, beta2, forget,
        BETA2_IS_TENSOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, programs, ROWS):
            i = first + tl.arange(0, ROWS).to(tl.int64)
            sums += _load(column_sums, i, columns, j, 1, i < programs, columns)
        moment = tl.load(c + j, mask=j < columns, other=0)
        moment = _running_mean(moment, tl.sum(sums, 0) / rows, beta2, forget, BETA2_IS_TENSOR)
        tl.store(c + j, moment, mask=j < columns)

    @triton.jit
    def _running_mean(moment, x, beta2, forget, BETA2_IS_TENSOR: tl.constexpr):
        """As ``update_second_moment`` of ``cuda_ref.optimizers.ember``; ``forget`` is 1 - beta2 of a plain number."""
        if BETA2_IS_TENSOR:
            beta2 = tl.load(beta2)
            forget = 1 - beta2
        beta2, forget = tl.cast(beta2, tl.float32), tl.cast(forget, tl.float32)  # torch.compile passes 64 bits
        return beta2 * moment + forget * x if beta2 < 0.5 else moment + forget * (x - moment)

    @triton.jit
    def _update_table(
        w, w_row, w_column, g, g_row, g_column, r, row_mean, c, t, q, seed, rows, columns,
        learning_rate, log_beta2, eps, weight_decay, row_clip, row_floor, first_row,
        LEARNING_RATE_IS_TENSOR: tl.constexpr, DROPPED_BITS: tl.constexpr, ALL_COLUMNS: tl.constexpr,
        ROWS_PER_PROGRAM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        # Backwards: the last rows that the first kernel read are the likeliest to be in the cache still.
        program = tl.num_programs(0) - 1 - tl.program_id(0)
        if LEARNING_RATE_IS_TENSOR:
            learning_rate = tl.load(learning_rate)
        learning_rate, log_beta2 = tl.cast(learning_rate, tl.float32), tl.cast(log_beta2, tl.float32)
        eps, weight_decay = tl.cast(eps, tl.float32), tl.cast(weight_decay, tl.float32)
        row_clip, row_floor = tl.cast(row_clip, tl.float32), tl.cast(row_floor, tl.float32)
        all_columns = tl.arange(0, ALL_COLUMNS)
        s = tl.sum(tl.load(c + all_columns, mask=all_columns < columns, other=0)) / columns
        s = tl.maximum(s, 1e-30, propagate_nan=tl.PropagateNan.ALL)
        correction = _one_minus_exp(tl.load(t) * log_beta2) if q is None else tl.load(q)
        scale, quietest = s * correction, row_floor / tl.sqrt_rn(correction)
        if seed is not None:
            step_key = _mix(tl.load(seed).to(tl.uint32, bitcast=True) ^ _mix(tl.load(t).to(tl.uint32)))
        decay = 1 - learning_rate * weight_decay
        for first_column in range(0, columns, COLUMNS):
            j = (first_column + tl.arange(0, COLUMNS)).to(tl.int64)
            b = tl.sqrt_rn(tl.load(c + j, mask=j < columns, other=0))
            if seed is not None:
                column_keys = _mix(j.to(tl.uint32))
            for tile in range(0, ROWS_PER_PROGRAM, ROWS):
                i, inside = _rows_of(program, tile, rows, ROWS_PER_PROGRAM, ROWS)
                a = tl.sqrt_rn(tl.load(r + i, mask=inside, other=0) / scale)
                a = tl.maximum(a, quietest, propagate_nan=tl.PropagateNan.ALL)
                if row_mean is not None:
                    least = tl.sqrt_rn(tl.load(row_mean + i, mask=inside, other=0) / s) / row_clip
                    a = tl.maximum(a, least, propagate_nan=tl.PropagateNan.ALL)
                update = _load(g, i, g_row, j, g_column, inside, columns) / (a[:, None] * b[None, :] + eps)
                new = decay * _load(w, i, w_row, j, w_column, inside, columns) - learning_rate * update
                if seed is not None:
                    row_keys = _mix(step_key ^ (i + first_row).to(tl.uint32))
                    new = _round_stochastically(new, _mix(row_keys[:, None] ^ column_keys[None, :]), DROPPED_BITS)
                place = w + i[:, None] * w_row + j[None, :] * w_column
                tl.store(place, new.to(w.dtype.element_ty), mask=inside[:, None] & (j < columns)[None, :])

    @triton.jit
    def _mix(x):
        """As ``mix`` of ``cuda_ref.optimizers.stochastic_rounding``, of uint32."""
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        return x ^ (x >> 16)

    @triton.jit
    def _round_stochastically(values, random, DROPPED_BITS: tl.constexpr):
        """As ``round_stochastically`` of ``cuda_ref.optimizers.stochastic_rounding``, still float32."""
        largest = 65504.0 if DROPPED_BITS == 13 else 3.3895313892515355e38
        clamped = tl.minimum(tl.maximum(values, -largest), largest)
        bits = clamped.to(tl.uint32, bitcast=True)
        kept = (bits + (random >> (32 - DROPPED_BITS))) >> DROPPED_BITS
        rounded = (kept << DROPPED_BITS).to(tl.float32, bitcast=True)
        if DROPPED_BITS == 13:
            scaled = values * 16777216.0
            lower = tl.floor(scaled)
            up = (scaled - lower) > (random >> 8).to(tl.float32) * 5.9604644775390625e-08
            small = (lower + up.to(tl.float32)) * 5.9604644775390625e-08
            rounded = tl.where(tl.abs(values) < 6.103515625e-05, small, rounded)
        return tl.where(tl.abs(values) < float("inf"), rounded, values)  # infinity and NaN stay

    @triton.jit
    def _rows_of(program, tile, rows, ROWS_PER_PROGRAM: tl.constexpr, ROWS: tl.constexpr):
        """The rows of one tile, 64-bit since a table may have more than 2^31 elements, and which of them exist."""
        within = tile + tl.arange(0, ROWS)
        i = program.to(tl.int64) * ROWS_PER_PROGRAM + within
        return i, (within < ROWS_PER_PROGRAM) & (i < rows)

    @triton.jit
    def _load(table, i, row_stride, j, column_stride, inside, columns):
        place = table + i[:, None] * row_stride + j[None, :] * column_stride
        return tl.load(place, mask=inside[:, None] & (j < columns)[None, :], other=0).to(tl.float32)

    @triton.jit
    def _one_minus_exp(x):
        """1 - exp(x) for x <= 0: near 0 by its series, which loses no digits there."""
        series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
        return tl.where(x > -0.5, series, 1 - tl.exp(x))


def statistics_tile(columns: int, itemsize: int = 4) -> dict[str, int]:
    """How the first kernel is cut, as measured on an H100 (examples/benchmarks/table_widths.py)."""
    width = _tile_columns(columns)
    return {"ROWS": 256 if width == 64 and itemsize == 2 else 128, "COLUMNS": width, "num_warps": 4}


def update_tile(columns: int, itemsize: int = 4) -> dict[str, int]:
    """How the last kernel is cut, likewise."""
    width = _tile_columns(columns)
    if width == 64 and itemsize == 4:
        return {"ROWS_PER_PROGRAM": 128, "ROWS": 64, "COLUMNS": width, "num_warps": 16}
    return {"ROWS_PER_PROGRAM": 32, "ROWS": 32, "COLUMNS": width, "num_warps": width // 8}


def _tile_columns(columns: int) -> int:
    """The larger of 64 and 128 that divides ``columns``, so that no thread of a tile is without work."""
    return 128 if columns % 128 == 0 else 64
