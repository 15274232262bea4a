"""The steps of AdamMini and SinkGD in Triton: every large array is read as often as it must be, and none is made.

Row means and column sums come from the first kernel of ``triton_kernels``. No atomics: the same input gives the same
bits. All arithmetic is float32.
"""

import torch

from cuda_ref import triton_kernels
from cuda_ref.optimizers import adam_mini, sinkgd
from cuda_ref.optimizers.companded import GROUP
from cuda_ref.triton_kernels import MOST_STATISTICS_PROGRAMS, STATISTICS_ROWS_PER_PROGRAM, UPDATE_ROWS_PER_PROGRAM

if triton_kernels.available():
    import triton
    import triton.language as tl

    from cuda_ref.triton_kernels import _load, _row_means_and_column_sums, _rows_of, _tile

__all__ = ["adam_mini_step", "sinkgd_step"]

GROUPS_PER_PROGRAM = 64


def adam_mini_step(w, g, m, v, t, learning_rate, beta1, beta2, eps, weight_decay):
    """As ``adam_mini_step`` of ``cuda_ref.optimizers.adam_mini``; weights that are not contiguous go its way."""
    if not (w.is_contiguous() and g.is_contiguous()):
        return adam_mini.adam_mini_step(w, g, m, v, t, learning_rate, beta1, beta2, eps, weight_decay)
    return adam_mini.adam_mini_step(
        w, g, m, v, t, learning_rate, beta1, beta2, eps, weight_decay, means=_mean_squares, update=_update_flat
    )


def sinkgd_step(w, g, learning_rate, passes, eps, weight_decay):
    """As ``sinkgd_step`` of ``cuda_ref.optimizers.sinkgd``."""
    return sinkgd.sinkgd_step(w, g, learning_rate, passes, eps, weight_decay, norms=_norms, update=_update_matrix)


def _mean_squares(g):
    """As ``mean_squares`` of ``cuda_ref.optimizers.ember``."""
    rows, columns = g.shape
    row_means = torch.zeros(rows, dtype=torch.float32, device=g.device)
    programs, rows_per_program = _programs(rows)
    column_sums = torch.empty((programs, columns), dtype=torch.float32, device=g.device)
    with torch.cuda.device_of(g):
        _row_means_and_column_sums[(programs,)](
            g, *g.stride(), row_means, None, column_sums, rows, columns, 1.0,
            FORGET_IS_TENSOR=False, ROWS_PER_PROGRAM=rows_per_program, **_tile(columns, elements=16384, warps=4),
        )  # fmt: skip
    return row_means, column_sums.sum(dim=0) / rows


def _update_flat(w, g, m, rates, beta1, decay):
    """The weights and the momentum, overwritten, in groups of 32: the momentum may be codes and scales."""
    codes, scales = m if isinstance(m, tuple) else (m, None)
    decay = torch.as_tensor(decay, dtype=torch.float32, device=w.device)
    with torch.cuda.device_of(w):
        _update_groups[(triton.cdiv(w.numel(), GROUP * GROUPS_PER_PROGRAM),)](
            w, g, codes, scales, rates, decay, w.numel(), w.shape[1], int(len(rates) > 1), int(rates.shape[1] > 1),
            1.0 - beta1, GROUP=GROUP, GROUPS=GROUPS_PER_PROGRAM,
        )  # fmt: skip


def _norms(g, eps):
    """(a, b) -> the next a, and the norms of the columns of g times it, reading ``g`` once."""
    matrices = g.reshape(-1, *g.shape[-2:])
    rows, columns = g.shape[-2:]
    programs, rows_per_program = _programs(rows)
    sums = torch.empty((len(matrices), programs, columns), dtype=torch.float32, device=g.device)

    def rows_then_columns(a, b):
        a_new = torch.empty_like(a)
        parts = zip(matrices, *(x.reshape(-1, x.shape[-1]) for x in (a, b, a_new)), sums, strict=True)
        with torch.cuda.device_of(g):
            for matrix, a_of, b_of, new_of, sums_of in parts:
                _sinkhorn_pass[(programs,)](
                    matrix, *matrix.stride(), a_of, b_of, new_of, sums_of, rows, columns, columns**0.5, float(eps),
                    ROWS_PER_PROGRAM=rows_per_program, **_tile(columns, elements=16384, warps=4),
                )  # fmt: skip
        return a_new, torch.sqrt(sums.sum(dim=1)).reshape(b.shape)

    return rows_then_columns


def _update_matrix(w, g, a, b, learning_rate, weight_decay):
    """As ``update_matrix`` of ``cuda_ref.optimizers.sinkgd``."""
    rows, columns = w.shape[-2:]
    rate, decay = (
        torch.as_tensor(number, dtype=torch.float32, device=w.device)
        for number in (learning_rate, 1 - learning_rate * weight_decay)
    )
    matrices = zip(
        w.view(-1, rows, columns),
        g.reshape(-1, rows, columns),
        a.reshape(-1, rows),
        b.reshape(-1, columns),
        strict=True,
    )
    with torch.cuda.device_of(w):
        for w_of, g_of, a_of, b_of in matrices:
            _scale_and_subtract[(triton.cdiv(rows, UPDATE_ROWS_PER_PROGRAM),)](
                w_of, *w_of.stride(), g_of, *g_of.stride(), a_of, b_of, rate, decay, rows, columns,
                ROWS_PER_PROGRAM=UPDATE_ROWS_PER_PROGRAM,
                **_tile(columns, elements=4096 if columns <= 2048 else 8192, warps=16),
            )  # fmt: skip
    return w


def _programs(rows):
    """How many programs take the rows, and how many each."""
    rows_per_program = max(STATISTICS_ROWS_PER_PROGRAM, triton.cdiv(rows, MOST_STATISTICS_PROGRAMS))
    return triton.cdiv(rows, rows_per_program), rows_per_program


if triton_kernels.available():

    @triton.jit
    def _update_groups(
        w, g, m, scales, rates, decay, size, columns, row_step, column_step, forget,
        GROUP: tl.constexpr, GROUPS: tl.constexpr,
    ):  # fmt: skip
        forget, decay = tl.cast(forget, tl.float32), tl.load(decay)
        group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
        i = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = i < size
        if scales is None:
            moment = tl.load(m + i, mask=inside, other=0)
        else:
            some = group * GROUP < size
            y = tl.load(m + i, mask=some[:, None], other=0).to(tl.float32) / 127.0
            moment = tl.load(scales + group, mask=some, other=0)[:, None] * y / (2 - tl.abs(y))
        moment += forget * (tl.load(g + i, mask=inside, other=0).to(tl.float32) - moment)
        rate = tl.load(rates + (i // columns) * row_step + (i % columns) * column_step, mask=inside, other=0)
        new = decay * tl.load(w + i, mask=inside, other=0).to(tl.float32) - rate * moment
        tl.store(w + i, new.to(w.dtype.element_ty), mask=inside)
        if scales is None:
            tl.store(m + i, moment, mask=inside)
        else:
            moment = tl.where(inside, moment, 0)
            # A NaN reaches its group: maxima here would leave it out.
            spoiled = tl.sum((moment != moment).to(tl.int32), 1) > 0
            scale = tl.maximum(tl.max(tl.abs(moment), 1), 1.1754943508222875e-38)
            scale = tl.where(spoiled, float("nan"), scale)
            z = moment / scale[:, None]
            code = tl.floor(127.0 * (2 * z / (1 + tl.abs(z))) + 0.5)
            tl.store(m + i, code.to(tl.int8), mask=some[:, None])
            tl.store(scales + group, scale, mask=some)

    @triton.jit
    def _sinkhorn_pass(
        g, g_row, g_column, a, b, a_new, column_sums, rows, columns, wanted, eps,
        ROWS_PER_PROGRAM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        wanted, eps = tl.cast(wanted, tl.float32), tl.cast(eps, tl.float32)
        program = tl.program_id(0)
        j = tl.arange(0, COLUMNS).to(tl.int64)
        weights = tl.load(b + j, mask=j < columns, other=0)
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for tile in range(0, ROWS_PER_PROGRAM, ROWS):
            i, inside = _rows_of(program, tile, rows, ROWS_PER_PROGRAM, ROWS)
            x = _load(g, i, g_row, j, g_column, inside, columns)
            weighted = x * weights[None, :]
            norm = tl.sqrt_rn(tl.sum(weighted * weighted, 1))
            before = tl.load(a + i, mask=inside, other=0)
            factor = tl.where(norm == 0, 0.0, before * wanted / (before * norm + eps))
            tl.store(a_new + i, factor, mask=inside)
            x *= tl.where(inside, factor, 0.0)[:, None]
            sums += x * x
        tl.store(column_sums + program.to(tl.int64) * columns + j, tl.sum(sums, 0), mask=j < columns)

    @triton.jit
    def _scale_and_subtract(
        w, w_row, w_column, g, g_row, g_column, a, b, rate, decay, rows, columns,
        ROWS_PER_PROGRAM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        rate, decay = tl.load(rate), tl.load(decay)
        program = tl.program_id(0)
        j = tl.arange(0, COLUMNS).to(tl.int64)
        column_factor = tl.load(b + j, mask=j < columns, other=0)
        for tile in range(0, ROWS_PER_PROGRAM, ROWS):
            i, inside = _rows_of(program, tile, rows, ROWS_PER_PROGRAM, ROWS)
            row_factor = tl.load(a + i, mask=inside, other=0)
            x = row_factor[:, None] * _load(g, i, g_row, j, g_column, inside, columns) * column_factor[None, :]
            new = decay * _load(w, i, w_row, j, w_column, inside, columns) - rate * x
            place = w + i[:, None] * w_row + j[None, :] * w_column
            tl.store(place, new.to(w.dtype.element_ty), mask=inside[:, None] & (j < columns)[None, :])
