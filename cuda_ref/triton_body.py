"""What AdamMini, SinkGD and SAGE do to whole weights, in Triton: arrays are read as often as must be, and none is made.

AdamMini reads a gradient for the means of its rows, and again with the weight. SinkGD reads it once a pass, SAGE once
for its statistics, and both once more with the weight. No atomics: the same input gives the same bits. All arithmetic
is float32.
"""

from collections.abc import Callable

import torch

from cuda_ref import flash_triton, triton_kernels
from cuda_ref.optimizers.companded import GROUP
from cuda_ref.triton_kernels import device_of, launchable, log_of, shares, statistics_tile, update_tile
from ember_mlx.shared.float_formats import SMALLEST_NORMAL

if triton_kernels.available():
    import triton
    import triton.language as tl

    # Triton finds what a kernel calls among the globals of its file.
    _load, _rows_of = triton_kernels._load, triton_kernels._rows_of
    _one_minus_exp, _running_mean = triton_kernels._one_minus_exp, triton_kernels._running_mean
    _decoded_momentum, _momentum_codes = flash_triton._decoded_momentum, flash_triton._momentum_codes
    _largest_of = flash_triton._largest_of

__all__ = [
    "mean_magnitudes",
    "norms",
    "rates_of_blocks",
    "rescaled",
    "row_mean_squares",
    "update_flat",
    "update_matrix",
    "update_parameter",
]

# Of AdamMini. Elements of a tile whose rows are averaged, and how many of a row one program takes at most.
TILE, LONGEST_PIECE = 4096, 32768
FLAT_GROUPS, CODED_GROUPS = 64, 32  # of its update, a program: with float32 momentum, and with codes
BLOCKS_PER_PROGRAM = 512
# Of a Sinkhorn pass, which takes whole rows. As many programs as an H100 or H200 runs at once, of 132 multiprocessors;
# but each leaves a sum of every column, so it takes 8 rows at least. Rows to come wait in 64 KiB of shared memory.
PASS_TILE, PASS_THREAD_ELEMENTS, FEWEST_PASS_ROWS, MULTIPROCESSORS = 4096, 32, 8, 132
MOST_STAGES, PASS_BUFFER = 3, 65536
UPDATE_TILE = {"ROWS": 8, "COLUMNS": 512}


def row_mean_squares(g: torch.Tensor) -> tuple[torch.Tensor, None]:
    """As ``mean_squares`` of ``cuda_ref.optimizers.ember``, but of rows alone: no block of AdamMini is a column."""
    rows, columns = g.shape
    width = min(triton.next_power_of_2(columns), TILE)
    pieces = triton.cdiv(columns, LONGEST_PIECE)
    means = torch.empty((rows, pieces), dtype=torch.float32, device=g.device)
    with device_of(g):
        _mean_squares_of_rows[(triton.cdiv(rows, TILE // width), pieces)](
            g, *g.stride(), means, rows, columns, PIECE=LONGEST_PIECE, ROWS=TILE // width, COLUMNS=width
        )
    return means.reshape(rows) if pieces == 1 else means.sum(dim=1), None


def rates_of_blocks(
    v: torch.Tensor,
    squares: torch.Tensor,
    t: torch.Tensor,
    learning_rate: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``rates_of_blocks`` of ``cuda_ref.optimizers.adam_mini``, but ``v`` is overwritten where it is contiguous."""
    v, rates = v.contiguous(), torch.empty_like(squares)
    learning_rate = launchable(learning_rate, v.device)
    with device_of(v):
        _rates_of_blocks[(triton.cdiv(v.numel(), BLOCKS_PER_PROGRAM),)](
            v, squares, rates, t, learning_rate, v.numel(), *shares(beta2), log_of(beta1), log_of(beta2),
            float(eps), RATE_IS_TENSOR=isinstance(learning_rate, torch.Tensor), BLOCKS=BLOCKS_PER_PROGRAM,
        )  # fmt: skip
    return v, rates


def update_flat(
    w: torch.Tensor,
    g: torch.Tensor,
    m: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    rates: torch.Tensor,
    beta1: float,
    decay: float | torch.Tensor,
) -> None:
    """As ``update_in_place`` and ``update_in_pieces`` of ``cuda_ref.optimizers.adam_mini``, of contiguous arrays.

    ``rates`` has one of each row, or one of all.
    """
    codes, scales = m if isinstance(m, tuple) else (m, None)
    decay, columns = launchable(decay, w.device), w.shape[1]
    row_step = rates.expand(len(w), 1).stride(0)  # 0 also where one block is all rows
    per_program = FLAT_GROUPS if scales is None else CODED_GROUPS
    with device_of(w):
        _update_groups[(triton.cdiv(w.numel(), GROUP * per_program),)](
            w, g, codes, scales, rates, decay, w.numel(), columns, columns // GROUP, row_step,
            *shares(beta1), SMALLEST_NORMAL, DECAY_IS_TENSOR=isinstance(decay, torch.Tensor),
            WHOLE_GROUPS=columns % GROUP == 0, GROUP=GROUP, GROUPS=per_program,
        )  # fmt: skip


def norms(g: torch.Tensor, eps: float) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """As ``norms_by_products`` of ``cuda_ref.optimizers.sinkgd``, reading ``g`` once a pass."""
    matrices = g.reshape(-1, *g.shape[-2:])
    rows, columns = g.shape[-2:]
    tile, at_once = _whole_rows(columns, g.itemsize)
    rows_per_program = max(FEWEST_PASS_ROWS, triton.cdiv(rows, at_once * MULTIPROCESSORS))
    programs = triton.cdiv(rows, rows_per_program)
    parts_of_sums = torch.empty((programs, columns), dtype=torch.float32, device=g.device)  # of one matrix at a time

    def one_pass(a, b):
        a_new, sums = torch.empty_like(a), []
        parts = zip(matrices, *(x.reshape(-1, x.shape[-1]) for x in (a, b, a_new)), strict=True)
        with device_of(g):
            for matrix, a_of, b_of, new_of in parts:
                _sinkhorn_pass[(programs,)](
                    matrix, *matrix.stride(), a_of, b_of, new_of, parts_of_sums, rows, columns, columns**0.5,
                    float(eps), ROWS_PER_PROGRAM=rows_per_program, **tile,
                )  # fmt: skip
                sums.append(parts_of_sums.sum(dim=0))
        return a_new, torch.sqrt(torch.stack(sums) if b.ndim > 1 else sums[0]).reshape(b.shape)

    return one_pass


def rescaled(factor: torch.Tensor, norms: torch.Tensor, length: int, eps: float) -> torch.Tensor:
    """As ``rescaled`` of ``cuda_ref.optimizers.sinkgd``."""
    factor, norms = factor.contiguous(), norms.contiguous()
    new = torch.empty_like(norms)
    with device_of(norms):
        _rescaled[(triton.cdiv(norms.numel(), BLOCKS_PER_PROGRAM),)](
            factor, norms, new, norms.numel(), length**0.5, float(eps), BLOCKS=BLOCKS_PER_PROGRAM
        )
    return new


def update_matrix(
    w: torch.Tensor,
    g: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    learning_rate: float | torch.Tensor,
    weight_decay: float | torch.Tensor,
) -> torch.Tensor:
    """As ``update_matrix`` of ``cuda_ref.optimizers.sinkgd``."""
    rows, columns = w.shape[-2:]
    rate, decay = (launchable(number, w.device) for number in (learning_rate, 1 - learning_rate * weight_decay))
    matrices = w.reshape(-1, rows, columns)
    parts = zip(matrices, g.reshape(-1, rows, columns), a.reshape(-1, rows), b.reshape(-1, columns), strict=True)
    # Of one axis: the others of a grid end at 65535.
    programs = triton.cdiv(rows, UPDATE_TILE["ROWS"]) * triton.cdiv(columns, UPDATE_TILE["COLUMNS"])
    with device_of(w):
        for w_of, g_of, a_of, b_of in parts:
            _scale_and_subtract[(programs,)](
                w_of, *w_of.stride(), g_of, *g_of.stride(), a_of, b_of, rate, decay, rows, columns,
                RATE_IS_TENSOR=isinstance(rate, torch.Tensor), **UPDATE_TILE,
            )  # fmt: skip
    if w.ndim > 3 and not w.is_contiguous():  # then its matrices are a copy
        w.copy_(matrices.reshape(w.shape))
    return w


def mean_magnitudes(g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``mean_magnitudes`` of ``cuda_ref.optimizers.sage``."""
    table = torch.atleast_2d(g)
    rows, columns = table.shape
    tile = statistics_tile(columns, g.itemsize)
    programs = triton.cdiv(rows, tile["ROWS"])
    has_gradient = torch.empty((rows, 1), dtype=torch.bool, device=g.device)
    column_sums = torch.empty((programs, columns), dtype=torch.float32, device=g.device)
    with device_of(g):
        _column_sums_of_magnitudes[(programs,)](
            table, *table.stride(), has_gradient, column_sums, rows, columns, **tile
        )
    return column_sums.sum(dim=0) / rows, has_gradient if g.ndim == 2 else has_gradient[0]


def update_parameter(
    w: torch.Tensor,
    g: torch.Tensor,
    m: torch.Tensor,
    h: torch.Tensor,
    moves: torch.Tensor | None,
    learning_rate: float | torch.Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    """As ``update_in_place`` of ``cuda_ref.optimizers.sage``."""
    w, g, m = (torch.atleast_2d(x) for x in (w, g, m))
    rows, columns = w.shape
    rate, decay = (launchable(number, w.device) for number in (learning_rate, 1 - learning_rate * weight_decay))
    tile = update_tile(columns, g.itemsize)
    with device_of(w):
        _damp_and_subtract[(triton.cdiv(rows, tile["ROWS_PER_PROGRAM"]),)](
            w, *w.stride(), g, *g.stride(), m, *m.stride(), h, moves, rate, decay, rows, columns,
            *shares(beta1), *shares(beta2), RATE_IS_TENSOR=isinstance(rate, torch.Tensor), **tile,
        )  # fmt: skip


def _whole_rows(columns, itemsize):
    """The tile of a pass, rows padded to a power of two, and how many of its programs one multiprocessor runs at once.

    A thread holds 32 elements, with their columns' sums and factors: 16 warps of those fill the registers.
    """
    width = triton.next_power_of_2(columns)
    rows = max(1, PASS_TILE // width)
    warps = min(32, max(1, rows * width // (32 * PASS_THREAD_ELEMENTS)))
    stages = min(MOST_STAGES, 1 + PASS_BUFFER // (rows * width * itemsize))
    return {"STAGES": stages, "ROWS": rows, "COLUMNS": width, "num_warps": warps}, max(1, 16 // warps)


if triton_kernels.available():

    @triton.jit
    def _mean_squares_of_rows(
        g, g_row, g_column, means, rows, columns, PIECE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
    ):  # fmt: skip
        i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        piece, pieces = tl.program_id(1), tl.num_programs(1)
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first_column in range(piece * PIECE, tl.minimum(columns, (piece + 1) * PIECE), COLUMNS):
            j = (first_column + tl.arange(0, COLUMNS)).to(tl.int64)
            x = _load(g, i, g_row, j, g_column, i < rows, columns)
            sums += x * x
        tl.store(means + i * pieces + piece, tl.sum(sums, 1) / columns, mask=i < rows)

    @triton.jit
    def _rates_of_blocks(
        v, squares, rates, t, learning_rate, blocks, beta2, forget2, log_beta1, log_beta2, eps,
        RATE_IS_TENSOR: tl.constexpr, BLOCKS: tl.constexpr,
    ):  # fmt: skip
        if RATE_IS_TENSOR:
            learning_rate = tl.load(learning_rate)
        learning_rate, eps = tl.cast(learning_rate, tl.float32), tl.cast(eps, tl.float32)
        step = tl.load(t)
        corrections = (_one_minus_exp(step * tl.cast(log_beta1, tl.float32)),
                       _one_minus_exp(step * tl.cast(log_beta2, tl.float32)))  # fmt: skip
        i = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
        inside = i < blocks
        square = tl.load(squares + i, mask=inside, other=0)
        square = _running_mean(tl.load(v + i, mask=inside, other=0), square, beta2, forget2, False)
        tl.store(v + i, square, mask=inside)
        denominator = tl.sqrt_rn(square / corrections[1]) + eps
        tl.store(rates + i, learning_rate / corrections[0] / denominator, mask=inside)

    @triton.jit
    def _update_groups(
        w, g, m, scales, rates, decay, size, columns, groups_of_row, row_step, beta1, forget1, least,
        DECAY_IS_TENSOR: tl.constexpr, WHOLE_GROUPS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    ):  # fmt: skip
        if DECAY_IS_TENSOR:
            decay = tl.load(decay)
        decay = tl.cast(decay, tl.float32)
        # Backwards: the last rows that were read for their means are the likeliest to be in the cache still.
        group = (tl.num_programs(0) - 1 - tl.program_id(0)) * GROUPS + tl.arange(0, GROUPS)
        at = group.to(tl.int64)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        some = group.to(tl.int64) * GROUP < size
        has_codes = (at >= 0) & some[:, None]
        if WHOLE_GROUPS:  # then a group is of one row
            inside = has_codes
            rate = tl.load(rates + (group // groups_of_row) * row_step, mask=some, other=0)[:, None]
        else:
            inside = at < size
            rate = tl.load(rates + (at // columns) * row_step, mask=inside, other=0)
        if scales is None:
            moment = tl.load(m + at, mask=inside, other=0)
        else:
            scale = tl.load(scales + group, mask=some, other=0)
            moment = _decoded_momentum(tl.load(m + at, mask=has_codes, other=0), scale)
        x = tl.load(g + at, mask=inside, other=0).to(tl.float32)
        moment = _running_mean(moment, x, beta1, forget1, False)
        new = decay * tl.load(w + at, mask=inside, other=0).to(tl.float32) - rate * moment
        tl.store(w + at, new.to(w.dtype.element_ty), mask=inside)
        if scales is None:
            tl.store(m + at, moment, mask=inside)
        else:
            moment = tl.where(inside, moment, 0)
            scale = _largest_of(moment, least)
            tl.store(scales + group, scale, mask=some)
            tl.store(m + at, _momentum_codes(moment, scale), mask=has_codes)

    @triton.jit
    def _sinkhorn_pass(
        g, g_row, g_column, a, b, a_new, column_sums, rows, columns, wanted, eps,
        ROWS_PER_PROGRAM: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0)
        j = tl.arange(0, COLUMNS).to(tl.int64)
        weights = tl.load(b + j, mask=j < columns, other=0)
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for tile in tl.range(0, ROWS_PER_PROGRAM, ROWS, num_stages=STAGES):
            i, inside = _rows_of(program, tile, rows, ROWS_PER_PROGRAM, ROWS)
            x = _load(g, i, g_row, j, g_column, inside, columns)
            weighted = x * weights[None, :]
            norm = tl.sqrt_rn(tl.sum(weighted * weighted, 1))
            factor = _factor(tl.load(a + i, mask=inside, other=0), norm, wanted, eps)
            tl.store(a_new + i, factor, mask=inside)
            x *= tl.where(inside, factor, 0.0)[:, None]
            sums += x * x
        tl.store(column_sums + program.to(tl.int64) * columns + j, tl.sum(sums, 0), mask=j < columns)

    @triton.jit
    def _rescaled(factors, norms, new, size, wanted, eps, BLOCKS: tl.constexpr):
        i = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
        factor, norm = tl.load(factors + i, mask=i < size, other=0), tl.load(norms + i, mask=i < size, other=0)
        tl.store(new + i, _factor(factor, norm, wanted, eps), mask=i < size)

    @triton.jit
    def _factor(before, norm, wanted, eps):
        wanted, eps = tl.cast(wanted, tl.float32), tl.cast(eps, tl.float32)
        return tl.where(norm == 0, 0.0, before * wanted / (before * norm + eps))

    @triton.jit
    def _scale_and_subtract(
        w, w_row, w_column, g, g_row, g_column, a, b, rate, decay, rows, columns,
        RATE_IS_TENSOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        if RATE_IS_TENSOR:
            rate, decay = tl.load(rate), tl.load(decay)
        rate, decay = tl.cast(rate, tl.float32), tl.cast(decay, tl.float32)
        program, across = tl.num_programs(0) - 1 - tl.program_id(0), tl.cdiv(columns, COLUMNS)
        i = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        j = (program % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        inside = i < rows
        row_factor = tl.load(a + i, mask=inside, other=0)
        column_factor = tl.load(b + j, mask=j < columns, other=0)
        x = row_factor[:, None] * _load(g, i, g_row, j, g_column, inside, columns) * column_factor[None, :]
        new = decay * _load(w, i, w_row, j, w_column, inside, columns) - rate * x
        place = w + i[:, None] * w_row + j[None, :] * w_column
        tl.store(place, new.to(w.dtype.element_ty), mask=inside[:, None] & (j < columns)[None, :])

    @triton.jit
    def _column_sums_of_magnitudes(
        g, g_row, g_column, has_gradient, column_sums, rows, columns,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0).to(tl.int64)
        i = program * ROWS + tl.arange(0, ROWS)
        inside = i < rows
        found = tl.zeros((ROWS,), tl.int32)
        for first_column in range(0, columns, COLUMNS):
            j = (first_column + tl.arange(0, COLUMNS)).to(tl.int64)
            x = tl.abs(_load(g, i, g_row, j, g_column, inside, columns))
            tl.store(column_sums + program * columns + j, tl.sum(x, 0), mask=j < columns)
            found += tl.sum((x != 0).to(tl.int32), 1)
        tl.store(has_gradient + i, found > 0, mask=inside)

    @triton.jit
    def _damp_and_subtract(
        w, w_row, w_column, g, g_row, g_column, m, m_row, m_column, h, moves, rate, decay, rows, columns,
        beta1, forget1, beta2, forget2,
        RATE_IS_TENSOR: tl.constexpr, ROWS_PER_PROGRAM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        if RATE_IS_TENSOR:
            rate, decay = tl.load(rate), tl.load(decay)
        rate, decay = tl.cast(rate, tl.float32), tl.cast(decay, tl.float32)
        # Backwards, as in the step of a table: the last rows are the likeliest to be in the cache still.
        program = tl.num_programs(0) - 1 - tl.program_id(0)
        for first_column in range(0, columns, COLUMNS):
            j = (first_column + tl.arange(0, COLUMNS)).to(tl.int64)
            damper = tl.load(h + j, mask=j < columns, other=0)[None, :]
            for tile in range(0, ROWS_PER_PROGRAM, ROWS):
                i, inside = _rows_of(program, tile, rows, ROWS_PER_PROGRAM, ROWS)
                exists = inside[:, None] & (j < columns)[None, :]
                x = _load(g, i, g_row, j, g_column, inside, columns)
                moment = _load(m, i, m_row, j, m_column, inside, columns)
                way = _running_mean(moment, x, beta1, forget1, False)
                sign = tl.where(way == way, (way > 0).to(tl.float32) - (way < 0).to(tl.float32), way)
                new = decay * _load(w, i, w_row, j, w_column, inside, columns) - rate * (sign * damper)
                moves_here = exists
                if moves is not None:
                    moves_here = exists & (tl.load(moves + i, mask=inside, other=0) != 0)[:, None]
                tl.store(w + i[:, None] * w_row + j[None, :] * w_column, new.to(w.dtype.element_ty), mask=moves_here)
                moment = _running_mean(moment, x, beta2, forget2, False)
                tl.store(m + i[:, None] * m_row + j[None, :] * m_column, moment, mask=exists)
