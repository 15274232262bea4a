"""The step of SinkGD on a 16-bit weight that is rounded stochastically: one kernel, for Metal and CUDA.

As plain operations there are two, and the new weight is a float32 matrix between them. Here a thread takes a square
block of ``VECTOR`` rows and columns. So it reads several neighbours at once where gradients lie in rows, and also where
they lie in columns, as they come out of MLX's matrix product: registers turn the block.

MLX gives the output of such a kernel memory of its own: nothing is updated in place.
"""

import math

import mlx.core as mx

from ember_mlx.kernels.metal_and_cuda import BYTES_AT_ONCE, SIMDGROUP, Text, flag, kernel, launch_of, scalars
from ember_mlx.kernels.rounding import FUNCTIONS
from ember_mlx.kernels.stochastic_rounding import (
    DROPPED_BITS,
    bit_keys,
    random_bits,
    round_stochastically,
    table_seed,
)

__all__ = ["TEXT", "differences", "launch", "update_matrix"]

# Blocks of a simdgroup, one below the other and side by side: 64 bytes of columns and 128 of rows. Its threadgroup has
# several simdgroups side by side.
DOWN, SIMDGROUPS = 4, 4

# The body of the kernel, in Metal's words.
SOURCE = """
    constexpr int ACROSS = SIMDGROUP / DOWN;
    const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
    const int height = g_shape[1], columns = g_shape[2];
    const int64_t row_step = g_strides[1], column_step = g_strides[2];
    const uint32_t tiles = (columns + SIMDGROUPS * ACROSS * VECTOR - 1) / (SIMDGROUPS * ACROSS * VECTOR);
    const uint32_t bands = (height + DOWN * VECTOR - 1) / (DOWN * VECTOR);
    const uint32_t group = threadgroup_position_in_grid.x, band = group / tiles, matrix = band / bands;
    const int i = (band % bands * DOWN + lane / ACROSS) * VECTOR, rows = height - i;
    const int j = ((group % tiles * SIMDGROUPS + simdgroup) * ACROSS + lane % ACROSS) * VECTOR, left = columns - j;
    const int64_t first_row = static_cast<int64_t>(matrix) * height + i, at = first_row * columns + j;
    const int64_t g_at = matrix * g_strides[0] + i * row_step + j * column_step;
    const bool along_rows = column_step == 1;
    const int64_t g_step = along_rows ? row_step : column_step;
    // Of blocks at the edge, and of gradients that lie in another way, elements are read one by one.
    const bool together = rows >= VECTOR && left >= VECTOR && columns % VECTOR == 0 && aligned<VECTOR>(w)
        && (along_rows || row_step == 1) && g_step % VECTOR == 0 && aligned<VECTOR>(g + g_at);
    const float rate = learning_rate[0], kept = decay[0];
    const bool steps = !SELECTS || finite[0];
    const uint32_t step_key = mix(seed[0] ^ mix(t[0]));
    float of_column[VECTOR];
    uint32_t column_keys[VECTOR];
    #pragma unroll
    for (int v = 0; v < VECTOR; v++) {
        of_column[v] = v < left ? b[static_cast<int64_t>(matrix) * columns + j + v] : 0.0f;
        column_keys[v] = mix(static_cast<uint32_t>(j + v));
    }
    if (together) {
        float x[VECTOR][VECTOR];
        AsItIs<G, VECTOR> read[VECTOR];
        AsItIs<W, VECTOR> old[VECTOR];
        #pragma unroll
        for (int k = 0; k < VECTOR; k++) read[k] = read_as_it_is<VECTOR, G>(g + g_at + k * g_step);
        #pragma unroll
        for (int k = 0; k < VECTOR; k++) old[k] = read_as_it_is<VECTOR, W>(w + at + static_cast<int64_t>(k) * columns);
        if (along_rows) {
            #pragma unroll
            for (int k = 0; k < VECTOR; k++) widen(read[k], x[k]);
        } else {
            #pragma unroll
            for (int k = 0; k < VECTOR; k++) {
                float column[VECTOR];
                widen(read[k], column);
                #pragma unroll
                for (int v = 0; v < VECTOR; v++) x[v][k] = column[v];
            }
        }
        #pragma unroll
        for (int k = 0; k < VECTOR; k++) {
            const float of_row = a[first_row + k];
            const uint32_t row_key = mix(step_key ^ static_cast<uint32_t>(first_row + k));
            float y[VECTOR];
            widen(old[k], y);
            #pragma unroll
            for (int v = 0; v < VECTOR; v++)
                if (steps) y[v] = stepped<DROPPED_BITS>(
                    y[v], of_row, x[k][v], of_column[v], rate, kept, row_key ^ column_keys[v]
                );
            write_together<VECTOR, W>(new_w + at + static_cast<int64_t>(k) * columns, y);
        }
    } else {
        #pragma unroll 1
        for (int k = 0; k < VECTOR && k < rows; k++) {
            const float of_row = a[first_row + k];
            const uint32_t row_key = mix(step_key ^ static_cast<uint32_t>(first_row + k));
            #pragma unroll
            for (int v = 0; v < VECTOR; v++) {
                if (v >= left) continue;
                const int64_t here = at + static_cast<int64_t>(k) * columns + v;
                const float x = static_cast<float>(g[g_at + k * row_step + v * column_step]);
                const float y = static_cast<float>(w[here]);
                new_w[here] = static_cast<W>(steps ? stepped<DROPPED_BITS>(
                    y, of_row, x, of_column[v], rate, kept, row_key ^ column_keys[v]
                ) : y);
            }
        }
    }
"""

STEPPED = """
template <int DROPPED>
FUNCTION float stepped(float w, float a, float g, float b, float rate, float kept, uint32_t key) {
    const float moved = kept * w - rate * (a * g * b);
    return round_stochastically<DROPPED>(w - (w - moved), mix(key));
}
"""

TEXT = Text(
    name="ember_sinkgd_with_stochastic_rounding",
    inputs=("w", "g", "a", "b", "seed", "t", "learning_rate", "decay", "finite"),
    outputs=("new_w",),
    source=SOURCE,
    functions=FUNCTIONS + STEPPED,
)


def update_matrix(
    w: mx.array,
    g: mx.array,
    a: mx.array,
    b: mx.array,
    seed: mx.array,
    t: mx.array,
    *,
    learning_rate: float | mx.array,
    decay: float | mx.array,
    finite: mx.array | None = None,
) -> mx.array:
    """New ``w`` on the GPU that is MLX's default device: ``decay * w - learning_rate * a g b``, computed in float32.

    Args:
        w (array): The matrices, (E, m, n), bfloat16 or float16.
        g (array): Their gradients, float32, bfloat16 or float16. However they lie in memory, they are not copied;
            fastest are contiguous ones and their transposes.
        a, b (array): Factors of the rows, (E, m), and of the columns, (E, n), float32.
        seed, t (array): Of the weight and of this step, uint32: they key the random bits, by all axes but the last, and
            that one.
        learning_rate, decay (float or array): Of the step, and what a weight is multiplied by.
        finite (array, optional): A bool. Where it is False, the new ``w`` is ``w``, whatever ``g`` holds.
    """
    arrays = [mx.contiguous(w), g, mx.contiguous(a), mx.contiguous(b), seed.reshape(1), t.reshape(1)]
    return kernel(TEXT)(
        inputs=[*arrays, *scalars(learning_rate, decay), flag(finite)], **launch(w, g, finite is not None)
    )[0]


def launch(w: mx.array, g: mx.array, selects: bool) -> dict:
    """What the kernel is called with: its constants, the size of its grid, and its output."""
    matrices, height, columns = w.shape
    vector = BYTES_AT_ONCE // max(w.itemsize, g.itemsize)
    across = SIMDGROUPS * SIMDGROUP // DOWN * vector
    groups = matrices * -(-height // (DOWN * vector)) * -(-columns // across)
    constants = {
        "SELECTS": int(selects),
        "W": w.dtype,
        "G": g.dtype,
        "VECTOR": vector,
        "DOWN": DOWN,
        "SIMDGROUPS": SIMDGROUPS,
        "SIMDGROUP": SIMDGROUP,
        "DROPPED_BITS": DROPPED_BITS[w.dtype],
    }
    return launch_of(constants, groups, SIMDGROUPS * SIMDGROUP, [w.shape], [w.dtype])


def differences(w_dtype: mx.Dtype, g_dtype: mx.Dtype) -> str | None:
    """Where the kernel differs from plain operations in matrices of those dtypes, in words, or None.

    All factors are powers of two, so every bit must agree: of other numbers a GPU may round a sum of products once
    where plain operations round twice. There is more than one threadgroup, the last incomplete, in both directions.
    Blocks are whole, and read at once, or end inside; gradients lie in memory as most do, and then transposed. By one
    that is not finite nothing may change.
    """
    seed, t, rates = table_seed(0, 1), mx.array(3, mx.uint32), {"learning_rate": 0.25, "decay": 0.5}
    for shape in ((2, 40, SIMDGROUP * SIMDGROUPS * 2 + 16), (2, 35, 21)):
        w, g = (mx.random.normal(shape, key=mx.random.key(number)) for number in range(2))
        w, g = (w * 2 ** mx.linspace(-24, 12, shape[2])).astype(w_dtype), g.astype(g_dtype)
        a, b = (2.0 ** (mx.arange(2 * length) % 5 - 2).reshape(2, length) for length in shape[1:])
        wide = w.astype(mx.float32)
        moved = 0.5 * wide - 0.25 * (a[..., None] * g.astype(mx.float32) * b[:, None])
        bits = random_bits(*bit_keys(seed, t, 2 * shape[1], shape[2])).reshape(shape)
        expected = round_stochastically(wide - (wide - moved), bits, w_dtype)
        for way, gradient in {"": g, "transposed ": mx.contiguous(g.swapaxes(1, 2)).swapaxes(1, 2)}.items():
            left = update_matrix(w, gradient * math.nan, a, b, seed, t, **rates, finite=mx.array(False))
            found = [update_matrix(w, gradient, a, b, seed, t, **rates, finite=each) for each in (None, mx.array(True))]
            for each, right in zip((*found, left), (expected, expected, w), strict=True):
                wrong = (each != right).sum().item()
                if wrong:
                    values = f"{wrong} of the {w.size} values of {w_dtype} matrices of {shape}"
                    return f"{values} differ, by {way}{g_dtype} gradients{' that are not finite' * (each is left)}"
    return None
