"""One pass of Sinkhorn's normalization by factors, in one reading of the gradient.

A pass makes row factors ``a`` of the norms of the rows, weighted by the column factors ``b``, and then sums squares
down the columns, weighted by ``a``. As plain operations it needs the squares of the gradient as a float32 matrix. Here
a threadgroup takes a band of rows, and its threads lie side by side along whole rows. Each keeps the factors of its
columns, their sums and some rows in registers: rows wait there for their norms, and are read once.

Rows that are too wide for that, or that lie in memory in another way, are read twice. So are transposed gradients,
along their columns. All sums are float32, in an order that the text fixes, without atomics: the same input gives the
same bits.
"""

import math
from typing import Any

import mlx.core as mx

from ember_mlx.kernels.metal_and_cuda import BYTES_AT_ONCE, MOST_THREADS, SIMDGROUP, Text, kernel
from ember_mlx.kernels.statistics import SUM_OVER_LANES

__all__ = ["MOST_ROWS", "differences", "launch", "one_pass"]

# Rows of a threadgroup. Sums down 32 rows take 2 / 32 of a matrix of 16 bits. Of transposed gradients 16 rows are 32
# bytes, the least that a GPU reads.
LEAST_ROWS, MOST_ROWS = 8, 32
THREADGROUPS = 128  # that a GPU should have, before bands become larger
CUDA_THREADS, STEP_OF_THREADS = 512, 128  # at most, and what their number is a multiple of
COLUMNS_AT_ONCE = 4  # of a thread, where gradients are transposed
# 512 threads have 128 registers each, and some are for indices.
REGISTERS, MOST_UNDER_WAY, MOST_AHEAD = 96, 8, 4

FUNCTIONS = (
    SUM_OVER_LANES
    + f"""
#ifdef __CUDACC__
// Without a bound the compiler may give {CUDA_THREADS} threads more registers than there are.
#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__({CUDA_THREADS})
#endif
"""
    + """
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

// VECTOR rows of N columns, so many apart. Rows lie side by side, and can be read together where that is said.
template <int N, int VECTOR, typename Pointer>
FUNCTION void read_columns(
    Pointer g, int64_t column_step, int apart, int columns, int rows, bool together, thread float* x
) {
    if (together) {
        #pragma unroll
        for (int k = 0; k < N * VECTOR; k++) x[k] = 0;
        #pragma unroll
        for (int k = 0; k < N; k++)
            if (k * apart < columns) read_together<VECTOR>(g + k * apart * column_step, x + k * VECTOR);
    } else {
        #pragma unroll
        for (int k = 0; k < N; k++)
            read_one_by_one<VECTOR>(g + k * apart * column_step, 1, k * apart < columns ? rows : 0, x + k * VECTOR);
    }
}

FUNCTION float new_factor(float before, float sum_of_squares, float wanted, float eps) {
    const float norm = sqrt(sum_of_squares);
    return norm == 0 ? 0.0f : before * wanted / (before * norm + eps);
}
"""
)

# The body of the kernel, in Metal's words.
SOURCE = """
    const int thread_index = thread_position_in_threadgroup.x;
    const int simdgroup = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
    constexpr int THREADS = SIMDGROUPS * SIMDGROUP;
    const int height = g_shape[1], columns = g_shape[2];
    const int64_t row_step = g_strides[1], column_step = g_strides[2];
    const uint32_t group = threadgroup_position_in_grid.x, groups = (height + ROWS - 1) / ROWS;
    const int64_t matrix = group / groups;
    const int first = group % groups * ROWS, rows = height - first < ROWS ? height - first : ROWS;
    const int64_t corner = matrix * g_strides[0] + first * row_step, first_row = matrix * height + first;
    const int64_t sums_at = static_cast<int64_t>(group) * columns, weights_at = matrix * columns;
    const float wanted = sqrt(static_cast<float>(columns)), least = eps[0];
    // Decided once: several reads are then under way before the first is waited for.
    const bool together = column_step == 1 && columns % VECTOR == 0 && row_step % VECTOR == 0
        && g_strides[0] % VECTOR == 0 && aligned<VECTOR>(g) && aligned<VECTOR>(weights);

    threadgroup float row_sums[ROWS][SIMDGROUPS], factors[ROWS];
    for (int i = thread_index; i < ROWS; i += THREADS) factors[i] = i < rows ? before[first_row + i] : 0.0f;

    if (together && VECTORS > 0) {
        constexpr int N = VECTORS > 0 ? VECTORS : 1;
        AsItIs<T, VECTOR> x[AHEAD][AT_ONCE][N] = {};
        float weight[N][VECTOR] = {}, sums[N][VECTOR] = {};
        bool has[N];
        auto row_ahead = g + corner + thread_index * VECTOR;
        #pragma unroll
        for (int k = 0; k < N; k++) has[k] = (k * THREADS + thread_index) * VECTOR < columns;
        #pragma unroll
        for (int l = 0; l < AHEAD * AT_ONCE; l++, row_ahead += row_step) {
            #pragma unroll
            for (int k = 0; k < N; k++)
                if (l < rows && has[k])
                    x[l / AT_ONCE][l % AT_ONCE][k] = read_as_it_is<VECTOR, T>(row_ahead + k * THREADS * VECTOR);
        }
        #pragma unroll
        for (int k = 0; k < N; k++)
            if (has[k])
                read_together<VECTOR>(weights + weights_at + (k * THREADS + thread_index) * VECTOR, weight[k]);
        for (int start = 0; start < rows; start += AHEAD * AT_ONCE) {
            #pragma unroll
            for (int s = 0; s < AHEAD; s++) {
                const int i = start + s * AT_ONCE;
                float of_rows[AT_ONCE] = {};
                #pragma unroll
                for (int l = 0; l < AT_ONCE; l++) {
                    #pragma unroll
                    for (int k = 0; k < N; k++) {
                        float wide[VECTOR];
                        widen(x[s][l][k], wide);
                        of_rows[l] += weighted_squares<VECTOR>(wide, weight[k]);
                    }
                }
                const int of_lane = sum_over_lanes<AT_ONCE>(of_rows, lane);
                if (of_lane >= 0 && i + of_lane < rows) row_sums[i + of_lane][simdgroup] = of_rows[0];
                threadgroup_barrier(mem_flags::mem_threadgroup);
                if (thread_index < AT_ONCE && i + thread_index < rows) {
                    float sum = 0;
                    #pragma unroll
                    for (int k = 0; k < SIMDGROUPS; k++) sum += row_sums[i + thread_index][k];
                    factors[i + thread_index] = new_factor(factors[i + thread_index], sum, wanted, least);
                }
                threadgroup_barrier(mem_flags::mem_threadgroup);
                #pragma unroll
                for (int l = 0; l < AT_ONCE; l++, row_ahead += row_step) {
                    const float factor = i + l < rows ? factors[i + l] : 0.0f;
                    #pragma unroll
                    for (int k = 0; k < N; k++) {
                        float wide[VECTOR];
                        widen(x[s][l][k], wide);
                        add_squares<VECTOR>(wide, factor, sums[k]);
                        // The row that takes its place is under way while the next ones are summed.
                        x[s][l][k] = {};
                        if (i + l + AHEAD * AT_ONCE < rows && has[k])
                            x[s][l][k] = read_as_it_is<VECTOR, T>(row_ahead + k * THREADS * VECTOR);
                    }
                }
            }
        }
        #pragma unroll
        for (int k = 0; k < N; k++)
            if (has[k])
                write_together<VECTOR, float>(column_sums + sums_at + (k * THREADS + thread_index) * VECTOR, sums[k]);
    } else {
        const bool along_rows = row_step != 1 || column_step == 1;
        // Of columns that lie side by side in memory, a simdgroup takes so many, with so many lanes each.
        constexpr int CHUNKS = ROWS / VECTOR, SIDE_BY_SIDE = SIMDGROUP / CHUNKS, APART = SIMDGROUPS * SIDE_BY_SIDE;
        const int down = lane % CHUNKS * VECTOR, first_column = simdgroup * SIDE_BY_SIDE + lane / CHUNKS;
        const int64_t corner_of_lane = corner + down + first_column * column_step;
        const bool side_by_side = rows == ROWS && column_step % VECTOR == 0 && aligned<VECTOR>(g + corner);
        if (along_rows) {
            for (int i = simdgroup; i < rows; i += SIMDGROUPS) {
                float sum = 0;
                if (together) {
                    #pragma unroll 4
                    for (int j = lane * VECTOR; j < columns; j += SIMDGROUP * VECTOR) {
                        float x[VECTOR], weight[VECTOR];
                        read_together<VECTOR>(g + corner + i * row_step + j, x);
                        read_together<VECTOR>(weights + weights_at + j, weight);
                        sum += weighted_squares<VECTOR>(x, weight);
                    }
                } else {
                    for (int j = lane; j < columns; j += SIMDGROUP) {
                        const float x = static_cast<float>(g[corner + i * row_step + j * column_step]);
                        const float weighted = x * weights[weights_at + j];
                        sum += weighted * weighted;
                    }
                }
                #pragma unroll
                for (int distance = 16; distance > 0; distance /= 2) sum += simd_shuffle_xor(sum, distance);
                if (lane == 0) row_sums[i][0] = sum;
            }
        } else {
            float sums[VECTOR] = {};
            for (int start = 0; start < columns; start += COLUMNS_AT_ONCE * APART) {
                const int left = columns - start - first_column;
                float x[COLUMNS_AT_ONCE * VECTOR];
                read_columns<COLUMNS_AT_ONCE, VECTOR>(
                    g + corner_of_lane + start * column_step, column_step, APART, left, rows - down, side_by_side, x
                );
                #pragma unroll
                for (int k = 0; k < COLUMNS_AT_ONCE; k++)
                    if (k * APART < left)
                        add_squares<VECTOR>(x + k * VECTOR, weights[weights_at + columns - left + k * APART], sums);
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
        for (int i = thread_index; i < rows; i += THREADS) {
            float sum = 0;
            for (int k = 0; k < (along_rows ? 1 : SIMDGROUPS); k++) sum += row_sums[i][k];
            factors[i] = new_factor(factors[i], sum, wanted, least);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        if (along_rows) {
            for (int j = thread_index * VECTOR; j < columns; j += THREADS * VECTOR) {
                float sums[VECTOR] = {};
                if (together) {
                    #pragma unroll 8
                    for (int i = 0; i < rows; i++) {
                        float x[VECTOR];
                        read_together<VECTOR>(g + corner + i * row_step + j, x);
                        add_squares<VECTOR>(x, factors[i], sums);
                    }
                } else {
                    for (int i = 0; i < rows; i++) {
                        float x[VECTOR];
                        const int64_t at = corner + i * row_step + j * column_step;
                        read_one_by_one<VECTOR>(g + at, column_step, columns - j, x);
                        add_squares<VECTOR>(x, factors[i], sums);
                    }
                }
                write_as<VECTOR, float>(column_sums + sums_at + j, columns - j, sums);
            }
        } else {
            float weight[VECTOR];
            #pragma unroll
            for (int v = 0; v < VECTOR; v++) weight[v] = factors[down + v];
            for (int start = 0; start < columns; start += COLUMNS_AT_ONCE * APART) {
                const int left = columns - start - first_column;
                float x[COLUMNS_AT_ONCE * VECTOR];
                read_columns<COLUMNS_AT_ONCE, VECTOR>(
                    g + corner_of_lane + start * column_step, column_step, APART, left, rows - down, side_by_side, x
                );
                #pragma unroll
                for (int k = 0; k < COLUMNS_AT_ONCE; k++) {
                    float sum = weighted_squares<VECTOR>(x + k * VECTOR, weight);
                    #pragma unroll
                    for (int distance = CHUNKS / 2; distance > 0; distance /= 2) sum += simd_shuffle_xor(sum, distance);
                    if (down == 0 && k * APART < left) column_sums[sums_at + columns - left + k * APART] = sum;
                }
            }
        }
    }
    for (int i = thread_index; i < rows; i += THREADS) new_a[first_row + i] = factors[i];
"""

TEXT = Text(
    name="ember_sinkhorn",
    inputs=("g", "weights", "before", "eps"),
    outputs=("new_a", "column_sums"),
    source=SOURCE,
    functions=FUNCTIONS,
)


# The sums of all bands, and the column factors that are made of them.
COLUMNS = Text(
    name="ember_sinkhorn_columns",
    inputs=("column_sums", "before", "numbers"),
    outputs=("new_b",),
    source="""
    const int simdgroup = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
    const int bands = column_sums_shape[1], columns = column_sums_shape[2];
    const uint32_t group = threadgroup_position_in_grid.x, tiles = (columns + SIMDGROUP - 1) / SIMDGROUP;
    const int64_t matrix = group / tiles, at = matrix * bands * columns;
    const int j = group % tiles * SIMDGROUP + lane;
    threadgroup float parts[SIMDGROUPS][SIMDGROUP];

    float sum = 0;
    if (j < columns) {
        #pragma unroll 8
        for (int k = simdgroup; k < bands; k += SIMDGROUPS) sum += column_sums[at + k * columns + j];
    }
    parts[simdgroup][lane] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup == 0 && j < columns) {
        #pragma unroll
        for (int k = 1; k < SIMDGROUPS; k++) sum += parts[k][lane];
        new_b[matrix * columns + j] = new_factor(before[matrix * columns + j], sum, numbers[0], numbers[1]);
    }
""",
    functions=FUNCTIONS,
)


def one_pass(g: mx.array, a: mx.array, b: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """The factors after a pass: ``a`` of the rows of ``g``, (E, m), and of them ``b`` of the columns, (E, n), float32.

    Args:
        g (array): (E, m, n), on the GPU that is MLX's default device, in float32, bfloat16 or float16. However it lies
            in memory, it is not copied; fastest are contiguous ones and their transposes.
        a (array): The row factors before, (E, m) float32.
        b (array): The column factors, (E, n) float32.
        eps (float): Added to the norms of the rows, and then of the columns, of ``a * g * b``.
    """
    b = mx.contiguous(b)
    new_a, sums = kernel(TEXT)(inputs=[g, b, mx.contiguous(a), mx.array([eps], mx.float32)], **launch(g))
    numbers = mx.array([math.sqrt(g.shape[1]), eps], mx.float32)
    (new_b,) = kernel(COLUMNS)(inputs=[sums, b, numbers], **launch_columns(sums))
    return new_a, new_b


def launch(g: mx.array) -> dict[str, Any]:
    """What the kernel is called with for ``g``: its constants, the size of its grid, and its outputs."""
    matrices, height, columns = g.shape
    vector = BYTES_AT_ONCE // g.itemsize
    rows = min(MOST_ROWS, max(LEAST_ROWS, 2 ** int(math.log2(max(1, matrices * height / THREADGROUPS)))))
    most_threads = CUDA_THREADS if mx.cuda.is_available() else MOST_THREADS
    neighbours = -(-columns // vector)
    vectors = -(-neighbours // most_threads)
    threads = min(most_threads, -(-neighbours // vectors // STEP_OF_THREADS) * STEP_OF_THREADS)
    # Rows that a thread has in registers, beside the factors and sums of its columns, which are float32.
    under_way = min(MOST_UNDER_WAY, (REGISTERS - 2 * vectors * vector) // (4 * vectors))
    if under_way < 2:
        threads, vectors, under_way = most_threads, 0, 2
    ahead = min(MOST_AHEAD, under_way)
    groups = matrices * -(-height // rows)
    constants = {
        "T": g.dtype,  # also for MLX's CUDA backend, which keeps compiled kernels by their name and these alone
        "VECTOR": vector,
        "VECTORS": vectors,
        "ROWS": rows,
        "AHEAD": ahead,
        "AT_ONCE": 2 ** int(math.log2(under_way // ahead)),
        "COLUMNS_AT_ONCE": COLUMNS_AT_ONCE,
        "SIMDGROUPS": threads // SIMDGROUP,
        "SIMDGROUP": SIMDGROUP,
    }
    return {
        "template": list(constants.items()),
        "grid": (groups * threads, 1, 1),
        "threadgroup": (threads, 1, 1),
        "output_shapes": [(matrices, height), (matrices, groups // matrices, columns)],
        "output_dtypes": [mx.float32, mx.float32],
    }


def launch_columns(sums: mx.array) -> dict[str, Any]:
    """What the kernel of column factors is called with for sums of bands, (E, bands, n)."""
    matrices, _, columns = sums.shape
    return {
        "template": [("SIMDGROUPS", MOST_THREADS // SIMDGROUP), ("SIMDGROUP", SIMDGROUP)],
        "grid": (matrices * -(-columns // SIMDGROUP) * MOST_THREADS, 1, 1),
        "threadgroup": (MOST_THREADS, 1, 1),
        "output_shapes": [(matrices, columns)],
        "output_dtypes": [mx.float32],
    }


def differences(dtype: mx.Dtype) -> str | None:
    """Where the kernels differ from plain operations on pairs of awkward matrices of that dtype, in words, or None.

    They have more than one threadgroup of rows, more columns than its threads take at once, and odd sizes; or else can
    be read several elements at once, along rows or columns. They lie in memory as most do, and then transposed.
    """
    odd = MOST_THREADS * BYTES_AT_ONCE // dtype.size + 37
    for rows, columns in ((MOST_ROWS + 3, odd), (MOST_ROWS + 3, 80), (MOST_ROWS + 8, 80)):
        shape = (2, rows, columns)
        g = mx.random.normal(shape, key=mx.random.key(0)) * mx.linspace(0.1, 2, shape[1])[:, None]
        g = g.astype(dtype)
        a, b = (mx.broadcast_to(mx.linspace(0.5, 3, length), (2, length)) for length in shape[1:])
        for way, matrices in {"": g, "transposed ": mx.contiguous(g.swapaxes(1, 2)).swapaxes(1, 2)}.items():
            norms = mx.sqrt(mx.square(g.astype(mx.float32) * b[:, None]).sum(axis=2))
            factors = a * math.sqrt(shape[2]) / (a * norms + 0.5)
            norms = mx.sqrt(mx.square(g.astype(mx.float32) * factors[..., None]).sum(axis=1))
            factors = factors, b * math.sqrt(shape[1]) / (b * norms + 0.5)
            found = one_pass(matrices, a, b, 0.5)
            for name, actual, expected in zip(("row factors", "column factors"), found, factors, strict=True):
                error = (mx.abs(actual - expected) / expected).max().item()
                if not error < 1e-5:  # a NaN is not
                    return f"The {name} of {way}{dtype} matrices of {shape} are off by {error:.1e}"
    return None
