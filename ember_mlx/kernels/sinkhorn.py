"""One pass of Sinkhorn's normalization by factors: row norms, row factors, and column sums with these, in one kernel.

As plain operations a pass needs the squares of the gradient as a float32 matrix. Here a threadgroup takes ``ROWS`` rows
of a matrix and reads them twice, the second time from the cache: first for the norms of the rows, weighted by the
column factors ``b``, which give the new row factors ``a``; then for its sums of squares down the columns, weighted by
those. The layout of the threads is that of ``statistics``, for contiguous gradients and transposed ones. All sums are
float32, in an order that the text fixes, without atomics: the same input gives the same bits.
"""

import math
from typing import Any

import mlx.core as mx

from ember_mlx.kernels.metal_and_cuda import BYTES_AT_ONCE, MOST_THREADS, SIMDGROUP, Text, kernel

__all__ = ["differences", "rows_then_columns"]

ROWS = 64  # of a threadgroup, a multiple of 32; the column sums take 2 / ROWS of a matrix of 16 bits

# The body of the kernel, in Metal's words.
SOURCE = """
    constexpr int DOWN = ROWS / SIMDGROUP;
    const int thread_index = thread_position_in_threadgroup.x;
    const int threads = threads_per_threadgroup.x, simdgroups = threads / SIMDGROUP;
    const int simdgroup = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
    const int64_t height = g_shape[1], columns = g_shape[2], row_step = g_strides[1], column_step = g_strides[2];
    const int64_t groups = (height + ROWS - 1) / ROWS, group = threadgroup_position_in_grid.x;
    const int64_t matrix = group / groups, first = (group % groups) * ROWS;
    const int64_t corner = matrix * g_strides[0] + first * row_step;
    const int rows = height - first < ROWS ? height - first : ROWS;
    const bool along_rows = row_step != 1 || column_step == 1;
    threadgroup float row_sums[ROWS][MOST_SIMDGROUPS];
    threadgroup float factors[ROWS];

    if (along_rows) {
        for (int64_t start = 0; start < columns; start += threads * VECTOR) {
            const int64_t j = start + thread_index * VECTOR;
            float weights[VECTOR];
            read_as_float<VECTOR>(b + matrix * columns + j, 1, columns - j, weights);
            for (int i = 0; i < rows; i++) {
                float x[VECTOR], sum = 0;
                read_as_float<VECTOR>(g + corner + i * row_step + j * column_step, column_step, columns - j, x);
                #pragma unroll
                for (int v = 0; v < VECTOR; v++) sum += (x[v] * weights[v]) * (x[v] * weights[v]);
                #pragma unroll
                for (int distance = 16; distance > 0; distance /= 2) sum += simd_shuffle_xor(sum, distance);
                if (lane == 0) row_sums[i][simdgroup] = start == 0 ? sum : row_sums[i][simdgroup] + sum;
            }
        }
    } else {
        // A simdgroup takes a column at a time, and a lane DOWN rows of it.
        const int i = lane * DOWN;
        float sums[DOWN] = {};
        for (int64_t j = simdgroup; j < columns; j += simdgroups) {
            const float weight = b[matrix * columns + j];
            float x[DOWN];
            read_as_float<DOWN>(g + corner + i + j * column_step, 1, rows - i, x);
            #pragma unroll
            for (int v = 0; v < DOWN; v++) sums[v] += (x[v] * weight) * (x[v] * weight);
        }
        for (int v = 0; v < DOWN; v++) row_sums[i + v][simdgroup] = sums[v];
    }

    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = thread_index; i < ROWS; i += threads) {
        factors[i] = 0;
        if (i < rows) {
            float sum = 0;
            for (int k = 0; k < simdgroups; k++) sum += row_sums[i][k];
            const float norm = sqrt(sum), before = a[matrix * height + first + i];
            const float wanted = sqrt(static_cast<float>(columns));
            factors[i] = norm == 0 ? 0.0f : before * wanted / (before * norm + eps[0]);
            new_a[matrix * height + first + i] = factors[i];
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    if (along_rows) {
        for (int64_t start = 0; start < columns; start += threads * VECTOR) {
            const int64_t j = start + thread_index * VECTOR;
            float sums[VECTOR] = {};
            for (int i = 0; i < rows; i++) {
                float x[VECTOR];
                read_as_float<VECTOR>(g + corner + i * row_step + j * column_step, column_step, columns - j, x);
                #pragma unroll
                for (int v = 0; v < VECTOR; v++) sums[v] += (x[v] * factors[i]) * (x[v] * factors[i]);
            }
            #pragma unroll
            for (int v = 0; v < VECTOR; v++)
                if (j + v < columns) column_sums[group * columns + j + v] = sums[v];
        }
    } else {
        const int i = lane * DOWN;
        for (int64_t j = simdgroup; j < columns; j += simdgroups) {
            float x[DOWN], sum = 0;
            read_as_float<DOWN>(g + corner + i + j * column_step, 1, rows - i, x);
            #pragma unroll
            for (int v = 0; v < DOWN; v++) sum += (x[v] * factors[i + v]) * (x[v] * factors[i + v]);
            #pragma unroll
            for (int distance = 16; distance > 0; distance /= 2) sum += simd_shuffle_xor(sum, distance);
            if (lane == 0) column_sums[group * columns + j] = sum;
        }
    }
"""

TEXT = Text(name="ember_sinkhorn", inputs=("g", "a", "b", "eps"), outputs=("new_a", "column_sums"), source=SOURCE)


def rows_then_columns(g: mx.array, a: mx.array, b: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """The next row factors, (E, m), and the sums of squares down the columns of ``g`` times them, (E, n), float32.

    Args:
        g (array): (E, m, n), on the GPU that is MLX's default device, in float32, bfloat16 or float16. However it lies
            in memory, it is not copied; fastest are contiguous ones and their transposes.
        a (array): The row factors before, (E, m) float32.
        b (array): The column factors, (E, n) float32.
        eps (float): Added to the norms of the rows of ``a * g * b``.
    """
    matrices, _, columns = g.shape
    inputs = [g, mx.contiguous(a), mx.contiguous(b), mx.array([eps], mx.float32)]
    new_a, column_sums = kernel(TEXT)(inputs=inputs, **launch(g))
    return new_a, column_sums.reshape(matrices, -1, columns).sum(axis=1)


def launch(g: mx.array) -> dict[str, Any]:
    """What the kernel is called with for ``g``: its constants, the size of its grid, and its outputs."""
    matrices, rows, columns = g.shape
    vector = BYTES_AT_ONCE // g.itemsize
    threads = min(MOST_THREADS, -(-columns // (SIMDGROUP * vector)) * SIMDGROUP)
    groups = matrices * -(-rows // ROWS)
    constants = {
        "T": g.dtype,  # not in the text, but MLX's CUDA backend keeps compiled kernels by their name and these alone
        "VECTOR": vector,
        "ROWS": ROWS,
        "MOST_SIMDGROUPS": MOST_THREADS // SIMDGROUP,
        "SIMDGROUP": SIMDGROUP,
    }
    return {
        "template": list(constants.items()),
        "grid": (groups * threads, 1, 1),
        "threadgroup": (threads, 1, 1),
        "output_shapes": [(matrices, rows), (groups, columns)],
        "output_dtypes": [mx.float32, mx.float32],
    }


def differences(dtype: mx.Dtype) -> str | None:
    """Where the kernel differs from plain operations on two awkward matrices of that dtype, in words, or None.

    They have more than one threadgroup of rows, more columns than its threads take at once, and odd sizes, and lie in
    memory as most gradients do, and then transposed.
    """
    shape = (2, ROWS + 3, MOST_THREADS * BYTES_AT_ONCE // dtype.size + 37)
    g = mx.random.normal(shape, key=mx.random.key(0)) * mx.linspace(0.1, 2, shape[1])[:, None]
    g = g.astype(dtype)
    a, b = (mx.broadcast_to(mx.linspace(0.5, 3, length), (2, length)) for length in shape[1:])
    for way, matrices in {"": g, "transposed ": mx.contiguous(g.swapaxes(1, 2)).swapaxes(1, 2)}.items():
        norms = mx.sqrt(mx.square(g.astype(mx.float32) * b[:, None]).sum(axis=2))
        factors = a * math.sqrt(shape[2]) / (a * norms + 0.5)
        sums = mx.square(g.astype(mx.float32) * factors[..., None]).sum(axis=1)
        found = rows_then_columns(matrices, a, b, 0.5)
        for name, actual, expected in zip(("row factors", "column sums"), found, (factors, sums), strict=True):
            error = (mx.abs(actual - expected) / expected).max().item()
            if not error < 1e-5:  # a NaN is not
                return f"The {name} of {way}{dtype} matrices of {shape} are off by {error:.1e}"
    return None
