"""A step of SinkGD by its factors, each weight read and written once: one kernel for Metal and CUDA.

MLX fuses this step too, but where factors are broadcast it reads the matrices element by element. Here a thread takes
``VECTOR`` columns and walks down a few rows with what is of a column alone.
"""

from typing import Any

import mlx.core as mx

from ember_mlx.kernels.metal_and_cuda import BYTES_AT_ONCE, MOST_THREADS, Text, kernel, scalars

__all__ = ["TEXT", "launch", "update_matrices"]

ROWS, AT_ONCE = 8, 4  # of a threadgroup, and of those that are under way at a time

FUNCTIONS = """
template <int BFLOAT16>
FUNCTION float rounded(float value) {
    const uint32_t bits = bits_of(value);
    if (!BFLOAT16 || (bits & 0x7fffffffu) >= 0x7f800000u) return value;  // infinity or NaN
    return float_of((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}
"""

# The body of the kernel, in Metal's words.
SOURCE = """
    const int64_t height = w_shape[1], columns = w_shape[2], width = THREADS * VECTOR;
    const int64_t tiles = (columns + width - 1) / width, groups = (height + ROWS - 1) / ROWS;
    const int64_t tile = threadgroup_position_in_grid.x, matrix = tile / tiles / groups;
    const int64_t first = tile / tiles % groups * ROWS;
    const int64_t j = tile % tiles * width + thread_position_in_threadgroup.x * VECTOR;
    const int64_t w_row = w_strides[1], w_column = w_strides[2], g_row = g_strides[1], g_column = g_strides[2];
    const int64_t w_at = matrix * w_strides[0] + first * w_row + j * w_column;
    const int64_t g_at = matrix * g_strides[0] + first * g_row + j * g_column, left = columns - j;
    const int rows = height - first < ROWS ? height - first : ROWS;
    const float rate = learning_rate[0], decay = kept[0];
    const bool together = left >= VECTOR && columns % VECTOR == 0 && w_column == 1 && g_column == 1
        && w_row % VECTOR == 0 && g_row % VECTOR == 0 && aligned<VECTOR>(w + w_at) && aligned<VECTOR>(g + g_at);
    // Of matrices that cannot be read so, element by element, with few registers.
    const int64_t new_at = (matrix * height + first) * columns + j;
    if (!together) {
        #pragma unroll 1
        for (int i = 0; i < rows; i++) {
            #pragma unroll 1
            for (int v = 0; v < VECTOR && v < left; v++) {
                const float x = static_cast<float>(g[g_at + i * g_row + v * g_column]);
                const float y = static_cast<float>(w[w_at + i * w_row + v * w_column]);
                const float scaled = a[matrix * height + first + i] * x * b[matrix * columns + j + v];
                new_w[new_at + i * columns + v] = static_cast<W>(rounded<BFLOAT16>(decay * y - rate * scaled));
            }
        }
        return;
    }
    float b_j[VECTOR];
    #pragma unroll
    for (int v = 0; v < VECTOR; v++) b_j[v] = b[matrix * columns + j + v];
    for (int i = 0; i < rows; i += AT_ONCE) {
        float y[AT_ONCE][VECTOR], x[AT_ONCE][VECTOR], a_i[AT_ONCE];
        #pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            const int row = i + k < rows ? i + k : rows - 1;
            a_i[k] = a[matrix * height + first + row];
            read_together<VECTOR>(w + w_at + row * w_row, y[k]);
            read_together<VECTOR>(g + g_at + row * g_row, x[k]);
        }
        #pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            #pragma unroll
            for (int v = 0; v < VECTOR; v++)
                y[k][v] = rounded<BFLOAT16>(decay * y[k][v] - rate * (a_i[k] * x[k][v] * b_j[v]));
            if (i + k < rows) write_together<VECTOR, W>(new_w + new_at + (i + k) * columns, y[k]);
        }
    }
"""

TEXT = Text(
    name="ember_sinkhorn_update",
    inputs=("w", "g", "a", "b", "learning_rate", "kept"),
    outputs=("new_w",),
    source=SOURCE,
    functions=FUNCTIONS,
)


def update_matrices(
    w: mx.array, g: mx.array, a: mx.array, b: mx.array, learning_rate: float | mx.array, kept: float | mx.array
) -> mx.array:
    """The new ``w``, (E, m, n), by a gradient of its shape and factors, (E, m) and (E, n)."""
    inputs = [w, g, mx.contiguous(a), mx.contiguous(b), *scalars(learning_rate, kept)]
    return kernel(TEXT)(inputs=inputs, **launch(w, g))[0]


def launch(w: mx.array, g: mx.array) -> dict[str, Any]:
    """What the kernel is called with: its constants, the size of its grid, and its output."""
    matrices, rows, columns = w.shape
    vector = BYTES_AT_ONCE // max(w.itemsize, g.itemsize)
    tiles = matrices * -(-rows // ROWS) * -(-columns // (MOST_THREADS * vector))
    constants = {
        "W": w.dtype,
        "G": g.dtype,
        "BFLOAT16": int(w.dtype == mx.bfloat16),
        "VECTOR": vector,
        "ROWS": ROWS,
        "AT_ONCE": AT_ONCE,
        "THREADS": MOST_THREADS,
    }
    return {
        "template": list(constants.items()),
        "grid": (tiles * MOST_THREADS, 1, 1),
        "threadgroup": (MOST_THREADS, 1, 1),
        "output_shapes": [w.shape],
        "output_dtypes": [w.dtype],
    }
