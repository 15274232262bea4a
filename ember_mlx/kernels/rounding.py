"""Ember's update of a 16-bit table with stochastic rounding: one kernel, written once for Metal and CUDA.

MLX does not fuse a reading of float32 bits as integers (``view``) with the operations around it, and the hash is too
deep for one fused kernel: as plain operations the float32 values and the random bits become two tables each. Here they
live in registers. A threadgroup takes a tile of ``ROWS`` by ``COLUMNS``. Its threads lie side by side along the
columns, ``VECTOR`` columns each, and walk down the rows with what is of a column alone. Where rows do not begin at
addresses that allow ``VECTOR`` elements at once, a thread takes them one by one, with few registers: the threads that
fit on a GPU at a time, and so its speed, depend on the most that any path of the text needs.

The gradient of an untied LM head comes out of MLX's matrix product as a transposed view, the rows of a column side by
side. Such a tile is read along the rows and turned in threadgroup memory.
"""

import mlx.core as mx

from ember_mlx.kernels.metal_and_cuda import BYTES_AT_ONCE, MOST_THREADS, Text, kernel, launch_of, scalars
from ember_mlx.kernels.stochastic_rounding import (
    DROPPED_BITS,
    bit_keys,
    random_bits,
    round_stochastically,
    table_seed,
)

__all__ = ["COLUMNS", "FUNCTIONS", "TEXT", "TILE_BYTES", "differences", "launch", "update_table"]

COLUMNS = 128  # of a tile
TILE_BYTES = 128  # of a tile's column: what lies side by side in a transposed gradient

# The body of the kernel, in Metal's words.
SOURCE = """
    constexpr int ACROSS = COLUMNS / VECTOR, DOWN = THREADS / ACROSS;
    const int thread_index = thread_position_in_threadgroup.x;
    const int64_t columns = w_shape[1], tiles = (columns + COLUMNS - 1) / COLUMNS;
    const int64_t group = threadgroup_position_in_grid.x;
    const int64_t first_row = group / tiles * ROWS, first_column = group % tiles * COLUMNS;
    const int rows = w_shape[0] - first_row < ROWS ? w_shape[0] - first_row : ROWS;
    const int64_t g_row = g_strides[0], g_column = g_strides[1], w_row = w_strides[0], w_column = w_strides[1];
    threadgroup G turned[COLUMNS][ROWS + 1];  // one more, or the columns of a row would be in few memory banks

    const bool transposed = g_row == 1 && g_column != 1;
    if (transposed) {
        for (int k = thread_index * VECTOR; k < COLUMNS * ROWS; k += THREADS * VECTOR) {
            const int column = k / ROWS, i = k % ROWS;
            const int64_t left = first_column + column < columns ? rows - i : 0;
            float x[VECTOR];
            read_as_float<VECTOR>(g + (first_row + i) + (first_column + column) * g_column, 1, left, x);
            #pragma unroll
            for (int v = 0; v < VECTOR; v++) turned[column][i + v] = static_cast<G>(x[v]);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const int across = thread_index % ACROSS * VECTOR;
    const int64_t j = first_column + across, left = columns - j;
    // As read_together and write_together need it in all rows of the tile. MLX has allocated new_w, so it begins right.
    const bool together = left >= VECTOR && columns % VECTOR == 0 && w_column == 1 && w_row % VECTOR == 0
        && aligned<VECTOR>(w + first_row * w_row + j)
        && (transposed || (g_column == 1 && g_row % VECTOR == 0 && aligned<VECTOR>(g + first_row * g_row + j)));
    const float rate = learning_rate[0], decay = kept[0], least = eps[0];
    float b_j[VECTOR];
    uint32_t key_j[VECTOR];
    #pragma unroll
    for (int v = 0; v < VECTOR; v++) {
        b_j[v] = v < left ? b[j + v] : 0;
        key_j[v] = v < left ? column_keys[j + v] : 0;
    }
    for (int i = thread_index / ACROSS; i < rows; i += DOWN) {
        const int64_t row = first_row + i;
        const float a_i = a[row];
        const uint32_t key_i = row_keys[row];
        if (together) {
            float x[VECTOR], y[VECTOR];
            read_together<VECTOR>(w + row * w_row + j, y);
            if (transposed) {
                #pragma unroll
                for (int v = 0; v < VECTOR; v++) x[v] = static_cast<float>(turned[across + v][i]);
            } else {
                read_together<VECTOR>(g + row * g_row + j, x);
            }
            #pragma unroll
            for (int v = 0; v < VECTOR; v++)
                y[v] = updated<DROPPED_BITS>(y[v], x[v], a_i, b_j[v], key_i ^ key_j[v], rate, decay, least);
            write_together<VECTOR, W>(new_w + row * columns + j, y);
        } else {
            #pragma unroll 1
            for (int v = 0; v < VECTOR && v < left; v++) {
                // Values, not places: Metal has these in two address spaces.
                const G x = transposed ? static_cast<G>(turned[across + v][i])
                                       : static_cast<G>(g[row * g_row + (j + v) * g_column]);
                const float y = updated<DROPPED_BITS>(
                    static_cast<float>(w[row * w_row + (j + v) * w_column]), static_cast<float>(x),
                    a_i, b[j + v], key_i ^ column_keys[j + v], rate, decay, least
                );
                new_w[row * columns + j + v] = static_cast<W>(y);
            }
        }
    }
"""

# As in stochastic_rounding.py, number by number.
FUNCTIONS = """
FUNCTION uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

// Where 32 bits suffice, they are divided several times as fast.
FUNCTION int64_t quotient_of(int64_t a, int64_t b) {
    const int64_t largest = 0xffffffffu;
    if (a > largest || b > largest) return a / b;
    return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

template <int DROPPED>
FUNCTION float round_stochastically(float value, uint32_t random) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
    if (magnitude >= 0x7f800000u) return value;  // infinity or NaN
    if (DROPPED == 13 && magnitude < 0x38800000u) {  // below 2^-14 float16 has numbers 2^-24 apart
        constexpr float apart = 1.0f / (1 << 24);  // Metal is C++14, which has no 0x1p-24f
        const float scaled = value / apart, lower = floor(scaled);
        return (lower + (scaled - lower > (random >> 8) * apart ? 1.0f : 0.0f)) * apart;
    }
    constexpr uint32_t largest = DROPPED == 13 ? 0x477fe000u : 0x7f7f0000u;  // what is finite stays finite
    const uint32_t rounded = ((magnitude + (random >> (32 - DROPPED))) >> DROPPED) << DROPPED;
    return float_of((bits & 0x80000000u) | (rounded < largest ? rounded : largest));
}

template <int DROPPED>
FUNCTION float updated(float w, float g, float a, float b, uint32_t key, float learning_rate, float kept, float eps) {
    return round_stochastically<DROPPED>(kept * w - learning_rate * (g / (a * b + eps)), mix(key));
}
"""

TEXT = Text(
    name="ember_update_with_stochastic_rounding",
    inputs=("w", "g", "a", "b", "row_keys", "column_keys", "learning_rate", "kept", "eps"),
    outputs=("new_w",),
    source=SOURCE,
    functions=FUNCTIONS,
)


def update_table(
    w: mx.array,  # (V, D)
    g: mx.array,  # (V, D)
    a: mx.array,  # (V,) float32
    b: mx.array,  # (D,) float32
    learning_rate: float | mx.array,
    eps: float,
    weight_decay: float | mx.array,
    keys: tuple[mx.array, mx.array],  # (V,) and (D,) uint32
) -> mx.array:
    """As ``update_table`` of ``ember_mlx.optimizers.ember``, for tables (V, D) on the GPU, however they lie in memory.

    Args:
        w (array): In bfloat16 or float16, the dtype of the new table.
        g (array): Its gradient, in float32, bfloat16 or float16.
        keys (tuple): What ``bit_keys`` gives.
    """
    numbers = scalars(learning_rate, 1 - learning_rate * weight_decay, eps)
    (new_w,) = kernel(TEXT)(inputs=[w, g, a, b, *keys, *numbers], **launch(w, g))
    return new_w


def launch(w: mx.array, g: mx.array) -> dict:
    """What the kernel is called with for ``w`` and ``g``: its constants, the size of its grid, and its output."""
    vector = BYTES_AT_ONCE // max(w.itemsize, g.itemsize)
    rows = TILE_BYTES // g.itemsize
    tiles = -(-w.shape[0] // rows) * -(-w.shape[1] // COLUMNS)
    constants = {
        "W": w.dtype,
        "G": g.dtype,
        "VECTOR": vector,
        "ROWS": rows,
        "COLUMNS": COLUMNS,
        "THREADS": MOST_THREADS,
        "DROPPED_BITS": DROPPED_BITS[w.dtype],
    }
    return launch_of(constants, tiles, MOST_THREADS, [w.shape], [w.dtype])


def differences(w_dtype: mx.Dtype, g_dtype: mx.Dtype) -> str | None:
    """Where the kernel differs from plain operations on awkward tables of those dtypes, in words, or None.

    By factors that are powers of two and a learning rate of 1 the value to be rounded is one difference, so every bit
    must agree. Of other numbers a GPU may round a sum of products once where plain operations round twice. There is
    more than one tile, the last incomplete, with rows that can be read ``VECTOR`` elements at once and rows that
    cannot, and a gradient that lies as that of an untied LM head.
    """
    rows = TILE_BYTES // g_dtype.size + 3
    for columns in (COLUMNS + 40, COLUMNS + 37):
        shape = (rows, columns)
        scale = 2 ** mx.linspace(-24, 12, columns)
        w, g = (
            (mx.random.normal(shape, key=mx.random.key(number)) * scale).astype(dtype)
            for number, dtype in enumerate((w_dtype, g_dtype))
        )
        a, b = (mx.array([2.0 ** (i % 3) for i in range(length)]) for length in shape)
        keys = bit_keys(table_seed(0, 0), mx.array(1), *shape)
        new = w.astype(mx.float32) - g.astype(mx.float32) / (a[:, None] * b)
        expected = round_stochastically(new, random_bits(*keys), w_dtype)
        for way, gradient in {"": g, "transposed ": mx.contiguous(g.T).T}.items():
            found = update_table(w, gradient, a, b, 1.0, 2.0**-126, 0.0, keys)
            wrong = (found != expected).sum().item()
            if wrong:
                values = f"{wrong} of the {g.size} values of a table of {shape}"
                return f"{values} are rounded otherwise to {w_dtype}, by a {way}{g_dtype} gradient"
    return None
