"""One pass of Sinkhorn's normalization by factors: norms of the rows, then sums of squares down the columns.

As plain operations a pass needs the squares of the gradient as a float32 matrix. Here it is read twice, by one text. Of
the rows, weighted by the column factors ``b``, a simdgroup takes two at a time, and ``a`` is made of their norms. Of
the columns, weighted by the new ``a``, a thread takes ``VECTOR``, down 128 rows. The columns go from the last rows to
the first, since the last are still in the cache. Gradients may lie in memory in any way; transposed ones, whose columns
lie side by side, are read along their columns. All sums are float32, in an order that the text fixes, without atomics:
the same input gives the same bits.
"""

import math
from typing import Any

import mlx.core as mx

from ember_mlx.kernels.metal_and_cuda import BYTES_AT_ONCE, MOST_THREADS, SIMDGROUP, Text, kernel

__all__ = ["differences", "launch", "rows_then_columns"]

# Rows of a threadgroup: where it sums rows, and where it sums columns. Sums down 128 rows take 2 / 128 of a matrix of
# 16 bits. Of transposed gradients 16 rows are 32 bytes, the least that a GPU reads.
ROWS, ROWS_OF_COLUMNS = 16, 128
THREADS_OF_ROWS, THREADS_OF_COLUMNS = MOST_THREADS, 128
PAIR = 2  # rows that a simdgroup takes at once, with what is of a column
AT_ONCE, AT_ONCE_OF_COLUMNS = 4, 8  # reads of a thread that are under way at a time

FUNCTIONS = """
template <int N>
FUNCTION void add_squares(thread const float* x, float weight, thread float* sums) {
    #pragma unroll
    for (int v = 0; v < N; v++) sums[v] += (x[v] * weight) * (x[v] * weight);
}

template <int N>
FUNCTION float weighted_squares(thread const float* x, thread const float* weight) {
    float sum = 0;
    #pragma unroll
    for (int v = 0; v < N; v++) sum += (x[v] * weight[v]) * (x[v] * weight[v]);
    return sum;
}
"""

# The body of the kernel, in Metal's words.
SOURCE = """
    const int thread_index = thread_position_in_threadgroup.x, threads = threads_per_threadgroup.x;
    const int simdgroup = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
    const int simdgroups = threads / SIMDGROUP;
    const int64_t height = g_shape[1], columns = g_shape[2], row_step = g_strides[1], column_step = g_strides[2];
    const int64_t groups = (height + ROWS - 1) / ROWS, width = OF_COLUMNS ? threads * VECTOR : columns;
    const int64_t tiles = (columns + width - 1) / width, last = g_shape[0] * groups * tiles - 1;
    // From the last to the first: what the sums of rows have read last is still in the cache.
    const int64_t tile = OF_COLUMNS ? last - threadgroup_position_in_grid.x : threadgroup_position_in_grid.x;
    const int64_t group = tile / tiles, matrix = group / groups, first = (group % groups) * ROWS;
    const int64_t left_column = (tile % tiles) * width, corner = matrix * g_strides[0] + first * row_step;
    const int rows = height - first < ROWS ? height - first : ROWS;
    const bool along_rows = row_step != 1 || column_step == 1;
    // Decided once: several reads are then under way before the first is waited for.
    const bool together = column_step == 1 && columns % VECTOR == 0 && row_step % VECTOR == 0
        && g_strides[0] % VECTOR == 0 && aligned<VECTOR>(g) && aligned<VECTOR>(weights);
    // Of columns that lie side by side in memory, a simdgroup takes so many, with so many lanes each.
    constexpr int CHUNKS = ROWS / VECTOR, SIDE_BY_SIDE = SIMDGROUP / CHUNKS;
    const int down = lane % CHUNKS * VECTOR;

    threadgroup float row_sums[ROWS][MOST_SIMDGROUPS];

    if (OF_COLUMNS) {
        if (along_rows) {
            const int64_t j = left_column + thread_index * VECTOR;
            float sums[VECTOR] = {};
            if (together && j < columns) {
                #pragma unroll AT_ONCE
                for (int i = 0; i < rows; i++) {
                    float x[VECTOR];
                    read_together<VECTOR>(g + corner + i * row_step + j, x);
                    add_squares<VECTOR>(x, weights[matrix * height + first + i], sums);
                }
            } else {
                for (int i = 0; i < rows; i++) {
                    float x[VECTOR];
                    read_one_by_one<VECTOR>(g + corner + i * row_step + j * column_step, column_step, columns - j, x);
                    add_squares<VECTOR>(x, weights[matrix * height + first + i], sums);
                }
            }
            #pragma unroll
            for (int v = 0; v < VECTOR; v++)
                if (j + v < columns) sums_of_lines[group * columns + j + v] = sums[v];
        } else {
            float weight[VECTOR];
            read_as_float<VECTOR>(weights + matrix * height + first + down, 1, rows - down, weight);
            for (int k = simdgroup * SIDE_BY_SIDE; k < width; k += simdgroups * SIDE_BY_SIDE) {
                const int64_t j = left_column + k + lane / CHUNKS;
                float x[VECTOR], sum = 0;
                read_as_float<VECTOR>(g + corner + down + j * column_step, 1, j < columns ? rows - down : 0, x);
                #pragma unroll
                for (int v = 0; v < VECTOR; v++) sum += (x[v] * weight[v]) * (x[v] * weight[v]);
                #pragma unroll
                for (int distance = CHUNKS / 2; distance > 0; distance /= 2) sum += simd_shuffle_xor(sum, distance);
                if (down == 0 && j < columns) sums_of_lines[group * columns + j] = sum;
            }
        }
    } else {
        if (along_rows) {
            for (int i = simdgroup * PAIR; i < rows; i += simdgroups * PAIR) {
                float sums[PAIR] = {};
                if (together) {
                    for (int64_t start = 0; start < columns; start += AT_ONCE * SIMDGROUP * VECTOR) {
                        float x[AT_ONCE][PAIR][VECTOR] = {};
                        #pragma unroll
                        for (int k = 0; k < AT_ONCE; k++) {
                            const int64_t j = start + (k * SIMDGROUP + lane) * VECTOR;
                            #pragma unroll
                            for (int l = 0; l < PAIR; l++) {
                                const int64_t at = corner + (i + l < rows ? i + l : i) * row_step + j;
                                if (j < columns) read_together<VECTOR>(g + at, x[k][l]);
                            }
                        }
                        simdgroup_barrier(mem_flags::mem_none);  // no read is put off until after it
                        #pragma unroll
                        for (int k = 0; k < AT_ONCE; k++) {
                            const int64_t j = start + (k * SIMDGROUP + lane) * VECTOR;
                            float weight[VECTOR] = {};
                            if (j < columns) read_together<VECTOR>(weights + matrix * columns + j, weight);
                            #pragma unroll
                            for (int l = 0; l < PAIR; l++) sums[l] += weighted_squares<VECTOR>(x[k][l], weight);
                        }
                    }
                } else {
                    for (int64_t j = lane; j < columns; j += SIMDGROUP) {
                        const float weight = weights[matrix * columns + j];
                        #pragma unroll
                        for (int k = 0; k < PAIR; k++) {
                            const int64_t at = corner + (i + k < rows ? i + k : i) * row_step + j * column_step;
                            const float weighted = static_cast<float>(g[at]) * weight;
                            sums[k] += weighted * weighted;
                        }
                    }
                }
                #pragma unroll
                for (int k = 0; k < PAIR; k++) {
                    #pragma unroll
                    for (int distance = 16; distance > 0; distance /= 2) sums[k] += simd_shuffle_xor(sums[k], distance);
                    if (lane == 0 && i + k < rows) row_sums[i + k][0] = sums[k];
                }
            }
        } else {
            float sums[VECTOR] = {};
            for (int64_t start = simdgroup * SIDE_BY_SIDE; start < columns; start += simdgroups * SIDE_BY_SIDE) {
                const int64_t j = start + lane / CHUNKS;
                const float weight = j < columns ? weights[matrix * columns + j] : 0.0f;
                float x[VECTOR];
                read_as_float<VECTOR>(g + corner + down + j * column_step, 1, j < columns ? rows - down : 0, x);
                #pragma unroll
                for (int v = 0; v < VECTOR; v++) sums[v] += (x[v] * weight) * (x[v] * weight);
            }
            #pragma unroll
            for (int v = 0; v < VECTOR; v++) {
                #pragma unroll
                for (int distance = CHUNKS; distance < SIMDGROUP; distance *= 2)
                    sums[v] += simd_shuffle_xor(sums[v], distance);
                if (lane < CHUNKS) row_sums[down + v][simdgroup] = sums[v];
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int i = thread_index; i < rows; i += threads) {
            float sum = 0;
            for (int k = 0; k < (along_rows ? 1 : simdgroups); k++) sum += row_sums[i][k];
            const int64_t row = matrix * height + first + i;
            const float norm = sqrt(sum), factor = before[row], wanted = sqrt(static_cast<float>(columns));
            sums_of_lines[row] = norm == 0 ? 0.0f : factor * wanted / (factor * norm + eps[0]);
        }
    }
"""

TEXT = Text(
    name="ember_sinkhorn",
    inputs=("g", "weights", "before", "eps"),
    outputs=("sums_of_lines",),
    source=SOURCE,
    functions=FUNCTIONS,
)


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
    before, least = mx.contiguous(a), mx.array([eps], mx.float32)
    (new_a,) = kernel(TEXT)(inputs=[g, mx.contiguous(b), before, least], **launch(g, of_columns=False))
    (sums,) = kernel(TEXT)(inputs=[g, new_a, before, least], **launch(g, of_columns=True))
    return new_a, sums.reshape(matrices, -1, columns).sum(axis=1)


def launch(g: mx.array, of_columns: bool) -> dict[str, Any]:
    """What the kernel is called with for ``g``: its constants, the size of its grid, and its output."""
    matrices, rows, columns = g.shape
    vector = BYTES_AT_ONCE // g.itemsize
    threads, height, tiles = THREADS_OF_ROWS, ROWS, 1
    if of_columns:
        threads = min(THREADS_OF_COLUMNS, -(-columns // (SIMDGROUP * vector)) * SIMDGROUP)
        height, tiles = ROWS_OF_COLUMNS, -(-columns // (threads * vector))
    groups = matrices * -(-rows // height)
    constants = {
        "T": g.dtype,  # not in the text, but MLX's CUDA backend keeps compiled kernels by their name and these alone
        "OF_COLUMNS": int(of_columns),
        "VECTOR": vector,
        "ROWS": height,
        "AT_ONCE": AT_ONCE_OF_COLUMNS if of_columns else AT_ONCE,
        "PAIR": PAIR,
        "MOST_SIMDGROUPS": MOST_THREADS // SIMDGROUP,
        "SIMDGROUP": SIMDGROUP,
    }
    return {
        "template": list(constants.items()),
        "grid": (groups * tiles * threads, 1, 1),
        "threadgroup": (threads, 1, 1),
        "output_shapes": [(groups, columns) if of_columns else (matrices, rows)],
        "output_dtypes": [mx.float32],
    }


def differences(dtype: mx.Dtype) -> str | None:
    """Where the kernel differs from plain operations on two awkward matrices of that dtype, in words, or None.

    They have more than one threadgroup of rows, more columns than its threads take at once, and odd sizes; or else can
    be read several elements at once. They lie in memory as most gradients do, and then transposed.
    """
    for columns in (MOST_THREADS * BYTES_AT_ONCE // dtype.size + 37, 80):
        shape = (2, ROWS_OF_COLUMNS + 3, columns)
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
