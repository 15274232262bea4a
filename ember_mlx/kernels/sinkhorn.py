"""The factors of Sinkhorn's normalization: norms of rows, weighted by the factors of the columns, and the other way.

As plain operations they need the squares of the gradient as a float32 matrix. Here a launch makes the factors of all
lines, rows or columns. It reads the gradient once, and takes no memory but theirs.

Gradients come out of MLX's matrix product transposed. Where one lies is known to the kernel alone, so one text reads
in both ways. Of a line whose elements lie side by side, a simdgroup makes the sum. Where the lines do, a threadgroup
takes a tile of them, all the way down. All sums are float32, in an order that the text fixes, without atomics: the
same input gives the same bits.
"""

import math
from typing import Any

import mlx.core as mx

from ember_mlx.kernels.metal_and_cuda import BYTES_AT_ONCE, MOST_THREADS, SIMDGROUP, Text, kernel, launch_of

__all__ = ["TEXT", "differences", "factors", "launch"]

AT_ONCE = 2  # lines of a simdgroup
ACROSS = 8  # lanes of a simdgroup side by side, 128 bytes, where lines do
AHEAD = 8  # reads of a thread that are under way there

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

// As many at a time as a GPU reads at once: more would have to begin at multiples of 32 bytes.
template <int N, typename Pointer>
FUNCTION void read_floats(Pointer from, thread float* x) {
    #pragma unroll
    for (int v = 0; v < N; v += 4) read_together<4>(from + v, x + v);
}

FUNCTION float new_factor(float before, float sum_of_squares, float wanted, float eps) {
    const float norm = square_root(sum_of_squares);
    return norm == 0 ? 0.0f : quotient(before * wanted, before * norm + eps);
}
"""

# The body of the kernel, in Metal's words.
SOURCE = """
    const int thread_index = thread_position_in_threadgroup.x;
    const int simdgroup = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
    const int columns = options[0];  // 1 if they are the lines, 0 if rows are
    const bool has_before = options[1] != 0, has_others = options[2] != 0;  // or all are 1
    constexpr int LINES = SIMDGROUPS * AT_ONCE, TILE = ACROSS * VECTOR, DOWN = SIMDGROUP / ACROSS * SIMDGROUPS;
    static_assert(LINES <= TILE, "a threadgroup has a tile of its own");
    const int lines = g_shape[1 + columns], length = g_shape[2 - columns];
    const int64_t line_step = g_strides[1 + columns], step = g_strides[2 - columns];
    const uint32_t group = threadgroup_position_in_grid.x, groups = (lines + LINES - 1) / LINES;
    const int64_t matrix = group / groups, first_factor = matrix * lines;
    const int number = group % groups;
    const float wanted = sqrt(static_cast<float>(length)), least = eps[0];
    auto from = g + matrix * g_strides[0];
    auto weights = others + (has_others ? matrix * length : 0);
    // Decided once: several reads are then under way before the first is waited for.
    const bool can_be_together = g_strides[0] % VECTOR == 0 && aligned<VECTOR>(g);

    if (step == 1 || line_step != 1) {
        const int i = number * LINES + simdgroup * AT_ONCE;
        // Behind the last line the last one is read again.
        int64_t line_at[AT_ONCE];
        #pragma unroll
        for (int l = 0; l < AT_ONCE; l++) line_at[l] = (i + l < lines ? i + l : lines - 1) * line_step;
        float sums[AT_ONCE] = {};
        if (can_be_together && step == 1 && length % VECTOR == 0 && line_step % VECTOR == 0) {
            #pragma unroll 4
            for (int j = lane * VECTOR; j < length; j += SIMDGROUP * VECTOR) {
                float weight[VECTOR];
                #pragma unroll
                for (int v = 0; v < VECTOR; v++) weight[v] = 1;
                if (has_others) read_floats<VECTOR>(weights + j, weight);
                #pragma unroll
                for (int l = 0; l < AT_ONCE; l++) {
                    float x[VECTOR];
                    read_together<VECTOR>(from + line_at[l] + j, x);
                    sums[l] += weighted_squares<VECTOR>(x, weight);
                }
            }
        } else {
            for (int j = lane; j < length; j += SIMDGROUP) {
                const float weight = has_others ? weights[j] : 1.0f;
                #pragma unroll
                for (int l = 0; l < AT_ONCE; l++) {
                    const float x = static_cast<float>(from[line_at[l] + j * step]) * weight;
                    sums[l] += x * x;
                }
            }
        }
        #pragma unroll
        for (int l = 0; l < AT_ONCE; l++) {
            #pragma unroll
            for (int distance = 16; distance > 0; distance /= 2) sums[l] += simd_shuffle_xor(sums[l], distance);
            if (lane == 0 && i + l < lines) {
                const float factor = has_before ? before[first_factor + i + l] : 1.0f;
                after[first_factor + i + l] = new_factor(factor, sums[l], wanted, least);
            }
        }
        return;
    }
    threadgroup float parts[SIMDGROUPS][TILE];
    const int tile = number * TILE, i = tile + lane % ACROSS * VECTOR;
    const int down = simdgroup * (SIMDGROUP / ACROSS) + lane / ACROSS;
    if (tile >= lines) return;
    float sums[VECTOR] = {};
    if (can_be_together && lines % VECTOR == 0 && step % VECTOR == 0) {
        const auto column = from + (i < lines ? i : 0);
        for (int start = down; start < length; start += AHEAD * DOWN) {
            AsItIs<T, VECTOR> x[AHEAD];
            float weight[AHEAD];
            #pragma unroll
            for (int l = 0; l < AHEAD; l++) {
                const int j = start + l * DOWN;
                // Behind the last one a row is read again, and counts nothing.
                x[l] = read_as_it_is<VECTOR, T>(column + (j < length ? j : start) * step);
                weight[l] = j >= length ? 0.0f : has_others ? weights[j] : 1.0f;
            }
            #pragma unroll
            for (int l = 0; l < AHEAD; l++) {
                float wide[VECTOR];
                widen(x[l], wide);
                add_squares<VECTOR>(wide, weight[l], sums);
            }
        }
    } else {
        for (int j = down; j < length; j += DOWN) {
            float x[VECTOR];
            read_one_by_one<VECTOR>(from + i + j * step, 1, lines - i, x);
            add_squares<VECTOR>(x, has_others ? weights[j] : 1.0f, sums);
        }
    }
    #pragma unroll
    for (int v = 0; v < VECTOR; v++) {
        #pragma unroll
        for (int distance = 16; distance >= ACROSS; distance /= 2) sums[v] += simd_shuffle_xor(sums[v], distance);
        if (lane < ACROSS) parts[simdgroup][lane * VECTOR + v] = sums[v];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (thread_index < TILE && tile + thread_index < lines) {
        float sum = 0;
        #pragma unroll
        for (int k = 0; k < SIMDGROUPS; k++) sum += parts[k][thread_index];
        const int64_t at = first_factor + tile + thread_index;
        after[at] = new_factor(has_before ? before[at] : 1.0f, sum, wanted, least);
    }
"""

TEXT = Text(
    name="ember_sinkhorn",
    inputs=("g", "before", "others", "options", "eps"),
    outputs=("after",),
    source=SOURCE,
    functions=FUNCTIONS,
)


def factors(g: mx.array, passes: int, eps: float) -> tuple[mx.array, mx.array]:
    """The factors after so many passes: ``a`` of the rows of ``g``, (E, m), and ``b`` of the columns, (E, n), float32.

    Args:
        g (array): (E, m, n), on the GPU that is MLX's default device, in float32, bfloat16 or float16. However it lies
            in memory, it is not copied; fastest are contiguous ones and their transposes.
        passes (int): 1 or more.
        eps (float): Added to the norms of the rows, and then of the columns, of ``a * g * b``.
    """
    a = b = mx.array([1.0] * 8)  # not read; Metal has arrays of fewer elements in another address space
    eps = mx.array([eps], mx.float32)
    for i in range(passes):
        later = int(i > 0)
        (a,) = kernel(TEXT)(inputs=[g, a, b, mx.array([0, later, later], mx.uint32), eps], **launch(g, 0))
        (b,) = kernel(TEXT)(inputs=[g, b, a, mx.array([1, later, 1], mx.uint32), eps], **launch(g, 1))
    return a, b


def launch(g: mx.array, columns: int) -> dict[str, Any]:
    """What the kernel is called with for the rows of ``g``, or for its columns: constants, grid and output."""
    matrices, lines = g.shape[0], g.shape[1 + columns]
    constants = {
        "T": g.dtype,  # also for MLX's CUDA backend, which keeps compiled kernels by their name and these alone
        "VECTOR": BYTES_AT_ONCE // g.itemsize,
        "AT_ONCE": AT_ONCE,
        "ACROSS": ACROSS,
        "AHEAD": AHEAD,
        "SIMDGROUPS": MOST_THREADS // SIMDGROUP,
        "SIMDGROUP": SIMDGROUP,
    }
    groups = -(-lines // (MOST_THREADS // SIMDGROUP * AT_ONCE))
    return launch_of(constants, matrices * groups, MOST_THREADS, [(matrices, lines)], [mx.float32])


def differences(dtype: mx.Dtype) -> str | None:
    """Where the kernel differs from plain operations on pairs of awkward matrices of that dtype, in words, or None.

    Their rows and columns are of odd sizes, or else can be read several elements at once; they take several
    threadgroups, the last one incomplete. They lie in memory as most do, and then transposed.
    """
    for shape in ((2, 5, 293), (2, 136, 168)):
        g = mx.random.normal(shape, key=mx.random.key(0)) * mx.linspace(0.1, 2, shape[1])[:, None]
        g = (g * mx.linspace(1, 3, shape[2])).astype(dtype)
        expected, squares = [mx.ones((2, length)) for length in shape[1:]], mx.square(g.astype(mx.float32))
        for _ in range(2):
            for axis in (0, 1):
                norms = mx.sqrt((squares * mx.square(mx.expand_dims(expected[1 - axis], 1 + axis))).sum(axis=2 - axis))
                factor, length = expected[axis], shape[2 - axis]
                expected[axis] = factor * math.sqrt(length) / (factor * norms + 0.5)
        for way, matrices in {"": g, "transposed ": mx.contiguous(g.swapaxes(1, 2)).swapaxes(1, 2)}.items():
            for name, found, exact in zip(("row", "column"), factors(matrices, 2, 0.5), expected, strict=True):
                error = (mx.abs(found - exact) / exact).max().item()
                if not error < 1e-5:  # a NaN is not
                    return f"The {name} factors of {way}{dtype} matrices of {shape} are off by {error:.1e}"
    return None
