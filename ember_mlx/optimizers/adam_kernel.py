"""A whole step of Adam on a 16-bit weight that is rounded stochastically: one kernel, for Metal and CUDA.

A model has hundreds of weights, and to hand a kernel to a GPU takes longer than a small weight needs. As plain
operations there are three kernels and one that rounds, and the new weight is a float32 array between two of them.

MLX gives the outputs of such a kernel memory of their own: nothing is updated in place.
"""

import math

import mlx.core as mx

from ember_mlx.kernels.metal_and_cuda import BYTES_AT_ONCE, MOST_THREADS, Text, flag, kernel, launch_of, scalars
from ember_mlx.kernels.rounding import FUNCTIONS
from ember_mlx.kernels.stochastic_rounding import (
    DROPPED_BITS,
    bit_keys,
    random_bits,
    round_stochastically,
    table_seed,
)

__all__ = ["TEXT", "differences", "step_weight"]

MOST_AT_ONCE = 8  # elements of a thread; of four bytes 4

# The body of the kernel, in Metal's words.
SOURCE = """
    const int64_t columns = sizes[1], size = sizes[0] * columns;
    const int64_t thread_index = threadgroup_position_in_grid.x * THREADS + thread_position_in_threadgroup.x;
    const int64_t first = thread_index * VECTOR, left = size - first;
    const float kept1 = betas[0], taken1 = betas[1], kept2 = betas[2], taken2 = betas[3], eps = betas[4];
    const float rate = learning_rate[0], kept = decay[0], scale = correction[0];
    const bool steps = !SELECTS || finite[0];
    const uint32_t step_key = mix(seed[0] ^ mix(t[0]));
    int64_t row = quotient_of(first, columns), column = first - row * columns;
    uint32_t row_key = mix(step_key ^ static_cast<uint32_t>(row));

    // All reads are under way before the first is waited for.
    const bool together = left >= VECTOR && aligned<VECTOR>(w + first) && aligned<VECTOR>(g + first)
        && aligned<VECTOR>(m + first) && aligned<VECTOR>(v + first);
    float y[VECTOR], x[VECTOR], mean[VECTOR], square[VECTOR];
    if (together) {
        read_together<VECTOR>(w + first, y);
        read_together<VECTOR>(g + first, x);
        read_together<VECTOR>(m + first, mean);
        read_together<VECTOR>(v + first, square);
    } else {
        read_one_by_one<VECTOR>(w + first, 1, left, y);
        read_one_by_one<VECTOR>(g + first, 1, left, x);
        read_one_by_one<VECTOR>(m + first, 1, left, mean);
        read_one_by_one<VECTOR>(v + first, 1, left, square);
    }
    uint32_t random[VECTOR];
    if (column + VECTOR <= columns) {
        #pragma unroll
        for (int i = 0; i < VECTOR; i++) random[i] = mix(row_key ^ mix(static_cast<uint32_t>(column) + i));
    } else {
        #pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            random[i] = mix(row_key ^ mix(static_cast<uint32_t>(column)));
            if (++column == columns) {
                column = 0;
                row_key = mix(step_key ^ static_cast<uint32_t>(++row));
            }
        }
    }
    #pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        if (!steps) continue;
        mean[i] = kept1 * mean[i] + taken1 * x[i];
        square[i] = kept2 * square[i] + taken2 * (x[i] * x[i]);
        const float stepped = y[i] * kept - rate * mean[i] / (sqrt(square[i]) * scale + eps);
        y[i] = round_stochastically<DROPPED_BITS>(y[i] - (y[i] - stepped), random[i]);
        if (BFLOAT16) {
            mean[i] = bfloat16_of(mean[i]);
            square[i] = bfloat16_of(square[i]);
        }
    }
    if (left >= VECTOR) {
        write_together<VECTOR, W>(new_w + first, y);
        write_together<VECTOR, M>(new_m + first, mean);
        write_together<VECTOR, M>(new_v + first, square);
    } else {
        for (int i = 0; i < left; i++) {
            new_w[first + i] = static_cast<W>(y[i]);
            new_m[first + i] = static_cast<M>(mean[i]);
            new_v[first + i] = static_cast<M>(square[i]);
        }
    }
"""

TO_NEAREST = """
FUNCTION float bfloat16_of(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) >= 0x7f800000u) return value;  // infinity or NaN
    return float_of((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}
"""

TEXT = Text(
    name="ember_adam_with_stochastic_rounding",
    inputs=("w", "g", "m", "v", "sizes", "seed", "t", "betas", "learning_rate", "decay", "correction", "finite"),
    outputs=("new_w", "new_m", "new_v"),
    source=SOURCE,
    functions=FUNCTIONS + TO_NEAREST,
    in_rows=True,
)


def step_weight(
    w: mx.array,
    g: mx.array,
    m: mx.array,
    v: mx.array,
    seed: mx.array,
    t: mx.array,
    *,
    learning_rate: mx.array,
    decay: float | mx.array,
    correction: float | mx.array,
    betas: tuple[float, float],
    eps: float,
    finite: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """One step on the GPU that is MLX's default device, computed in float32; new ``w``, ``m`` and ``v``.

    Args:
        w (array): The weight, bfloat16 or float16, of any shape.
        g (array): Its gradient, float32, bfloat16 or float16; a transposed one is copied.
        m, v (array): First and second moment, both bfloat16 or both float32, rounded to nearest.
        seed, t (array): Of the weight and of this step, uint32: they key the random bits, by all axes but the last, and
            that one.
        learning_rate (array): Over 1 - beta1^t with bias correction.
        decay (float or array): What a weight is multiplied by.
        correction (float or array): What the root of ``v`` is multiplied by: 1, or 1 / sqrt(1 - beta2^t).
        betas, eps: As of ``mlx.optimizers.Adam``.
        finite (array, optional): A bool. Where it is False, all three are what they were, whatever ``g`` holds.
    """
    columns = w.shape[-1] if w.ndim else 1
    sizes = mx.array([w.size // columns, columns], mx.uint32)
    numbers = mx.array([betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps], mx.float32)
    rates = [*scalars(learning_rate, decay, correction), flag(finite)]
    arrays = mx.atleast_1d(w, g, m, v)  # one without axes is no pointer in Metal's signature
    inputs = [*arrays, sizes, seed.reshape(1), t.reshape(1), numbers, *rates]
    return tuple(kernel(TEXT)(inputs=inputs, **launch(w, g, m, finite is not None)))


def launch(w: mx.array, g: mx.array, m: mx.array, selects: bool) -> dict:
    """What the kernel is called with: its constants, the size of its grid, and its outputs."""
    vector = min(MOST_AT_ONCE, BYTES_AT_ONCE // max(w.itemsize, g.itemsize, m.itemsize))
    constants = {
        "SELECTS": int(selects),
        "W": w.dtype,
        "M": m.dtype,
        "BFLOAT16": int(m.dtype == mx.bfloat16),
        "VECTOR": vector,
        "THREADS": MOST_THREADS,
        "DROPPED_BITS": DROPPED_BITS[w.dtype],
    }
    groups = -(-w.size // (vector * MOST_THREADS))
    return launch_of(constants, groups, MOST_THREADS, [w.shape] * 3, [w.dtype, m.dtype, m.dtype])


def differences(w_dtype: mx.Dtype, g_dtype: mx.Dtype, m_dtype: mx.Dtype) -> str | None:
    """Where the kernel differs from plain operations in weights of those dtypes, in words, or None.

    All products are by powers of two, and squares are exact, so every bit must agree: of other numbers a GPU may round
    a sum of products once where plain operations round twice. Rows end inside a thread's elements and between two. Of
    a gradient that is not finite nothing may change.
    """
    seed, t = table_seed(0, 1), mx.array(3, mx.uint32)
    options = {"learning_rate": mx.array(0.5), "decay": 0.5, "correction": 2.0, "betas": (0.5, 0.5), "eps": 1.0}
    for shape in ((9, 2 * MOST_THREADS), (5, 301), (7,)):
        w, g, m, v = (mx.random.normal(shape, key=mx.random.key(number)) for number in range(4))
        w, g, m, v = w.astype(w_dtype), mx.round(8 * g).astype(g_dtype), m.astype(m_dtype), mx.abs(v).astype(m_dtype)
        wide_w, wide_g, wide_m, wide_v = (array.astype(mx.float32) for array in (w, g, m, v))
        new_m, new_v = 0.5 * wide_m + 0.5 * wide_g, 0.5 * wide_v + 0.5 * mx.square(wide_g)
        stepped = wide_w * 0.5 - 0.5 * new_m / (mx.sqrt(new_v) * 2 + 1)
        random = random_bits(*bit_keys(seed, t, w.size // shape[-1], shape[-1])).reshape(shape)
        expected = round_stochastically(wide_w - (wide_w - stepped), random, w_dtype), new_m, new_v
        ways = {"": (None, g, expected), " by one that is finite": (mx.array(True), g, expected)}
        ways[" by one that is not"] = mx.array(False), g * math.nan, (w, m, v)
        for way, (finite, gradient, right) in ways.items():
            found = step_weight(w, gradient, m, v, seed, t, **options, finite=finite)
            for name, a, b in zip(("weight", "m", "v"), found, right, strict=True):
                wrong = (a != b.astype(a.dtype)).sum().item()
                if wrong:
                    values = f"{wrong} of the {a.size} values of {name} of {shape}"
                    return f"{values} differ, in {w_dtype} and {m_dtype}{way}"
    return None
