"""Row means and column means of squares, in one reading of the gradient: one kernel, written once for Metal and CUDA.

As plain operations the squares become a float32 table, since MLX fuses nothing into a reduction. Here a threadgroup
takes ``ROWS`` rows. Its threads lie side by side along the columns, ``VECTOR`` columns each, and walk down the rows:
each keeps the sums of its columns in registers, and the sum of each row is shuffled together across its simdgroup.
The sums of squares down ``ROWS`` rows, (V / ROWS, D), are what is left to add up. All sums are float32, in an order
that the text fixes, without atomics: the same input gives the same bits.

The gradient of an untied LM head comes out of MLX's matrix product as a transposed view: the rows of a column lie side
by side in memory. To copy it would take a table, so the kernel reads it as it lies, with rows and columns changed over.
"""

from functools import cache

import mlx.core as mx

__all__ = ["DTYPES", "mean_squares"]

DTYPES = (mx.float32, mx.bfloat16, mx.float16)
ROWS = 128  # of a threadgroup, a multiple of 32; the column sums take 2 / ROWS of a table of 16 bits
MOST_THREADS = 256  # of a threadgroup
BYTES_AT_ONCE = 16  # that a thread reads from a row
SIMDGROUP = 32  # threads, on every GPU that MLX runs on

INPUTS = ["g"]
OUTPUTS = ["row_means", "column_sums"]

# The body of the kernel, in Metal's words. MLX writes the signature around it, from the names that it finds here:
# `const device T* g`, or `constant` for fewer than 8 elements, `g_shape`, `g_strides` in elements, the outputs, and
# Metal's attributes.
SOURCE = """
    constexpr int DOWN = ROWS / SIMDGROUP;
    const int thread_index = thread_position_in_threadgroup.x;
    const int threads = threads_per_threadgroup.x, simdgroups = threads / SIMDGROUP;
    const int simdgroup = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
    const int64_t columns = g_shape[1], row_step = g_strides[0], column_step = g_strides[1];
    const int64_t group = threadgroup_position_in_grid.x, first = group * ROWS;
    const int rows = g_shape[0] - first < ROWS ? g_shape[0] - first : ROWS;
    threadgroup float row_sums[ROWS][MOST_SIMDGROUPS];

    if (row_step != 1 || column_step == 1) {
        for (int64_t start = 0; start < columns; start += threads * VECTOR) {
            const int64_t j = start + thread_index * VECTOR;
            float sums[VECTOR] = {};
            for (int i = 0; i < rows; i++) {
                float x[VECTOR], sum = 0;
                read_as_float<VECTOR>(g + (first + i) * row_step + j * column_step, column_step, columns - j, x);
                #pragma unroll
                for (int v = 0; v < VECTOR; v++) {
                    const float square = x[v] * x[v];
                    sums[v] += square;
                    sum += square;
                }
                #pragma unroll
                for (int distance = 16; distance > 0; distance /= 2) sum += simd_shuffle_xor(sum, distance);
                if (lane == 0) row_sums[i][simdgroup] = start == 0 ? sum : row_sums[i][simdgroup] + sum;
            }
            #pragma unroll
            for (int v = 0; v < VECTOR; v++)
                if (j + v < columns) column_sums[group * columns + j + v] = sums[v];
        }
    } else {
        // A simdgroup takes a column at a time, and a lane DOWN rows of it.
        const int i = lane * DOWN;
        float sums[DOWN] = {};
        for (int64_t j = simdgroup; j < columns; j += simdgroups) {
            float x[DOWN], sum = 0;
            read_as_float<DOWN>(g + first + i + j * column_step, 1, rows - i, x);
            #pragma unroll
            for (int v = 0; v < DOWN; v++) {
                const float square = x[v] * x[v];
                sums[v] += square;
                sum += square;
            }
            #pragma unroll
            for (int distance = 16; distance > 0; distance /= 2) sum += simd_shuffle_xor(sum, distance);
            if (lane == 0) column_sums[group * columns + j] = sum;
        }
        for (int v = 0; v < DOWN; v++) row_sums[i + v][simdgroup] = sums[v];
    }

    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = thread_index; i < rows; i += threads) {
        float sum = 0;
        for (int k = 0; k < simdgroups; k++) sum += row_sums[i][k];
        row_means[first + i] = sum / columns;
    }
"""

# N neighbours, or as many as are left, and zeros. They may start at any element. Apple's GPUs read up to four at once
# from any element on, and the compiler joins such a loop into those reads: MLX's own Metal kernels have it so.
METAL_HEADER = """
template <int N, typename Pointer>
inline void read_as_float(Pointer from, int64_t step, int64_t left, thread float* x) {
    if (step == 1 && left >= N) {
        #pragma unroll
        for (int v = 0; v < N; v++) x[v] = static_cast<float>(from[v]);
    } else {
        #pragma unroll
        for (int v = 0; v < N; v++) x[v] = v < left ? static_cast<float>(from[v * step]) : 0.0f;
    }
}
"""

# Metal's words in CUDA. It reads several elements at once from an address that is a multiple of their size only.
CUDA_HEADER = """
#define thread_position_in_threadgroup threadIdx
#define threads_per_threadgroup blockDim
#define threadgroup_position_in_grid blockIdx
#define thread_index_in_simdgroup (threadIdx.x % 32)
#define simdgroup_index_in_threadgroup (threadIdx.x / 32)
#define threadgroup __shared__
#define threadgroup_barrier(memory) __syncthreads()
#define simd_shuffle_xor(value, distance) __shfl_xor_sync(0xffffffffu, value, distance)

template <typename T, int N>
struct alignas(sizeof(T) * N) Together {
    T values[N];
};

template <int N, typename T>
__device__ inline void read_as_float(const T* from, int64_t step, int64_t left, float* x) {
    if (step == 1 && left >= N && reinterpret_cast<size_t>(from) % sizeof(Together<T, N>) == 0) {
        const Together<T, N> together = *reinterpret_cast<const Together<T, N>*>(from);
        #pragma unroll
        for (int v = 0; v < N; v++) x[v] = static_cast<float>(together.values[v]);
    } else {
        #pragma unroll
        for (int v = 0; v < N; v++) x[v] = v < left ? static_cast<float>(from[v * step]) : 0.0f;
    }
}
"""


def mean_squares(g):
    """Means of ``g`` squared: over the columns, (V,), and over the rows, (D,), float32.

    Args:
        g (array): (V, D), on the GPU that is MLX's default device, of one of ``DTYPES``. However it lies in memory, it
            is not copied; fastest are contiguous ones and their transposes.
    """
    row_means, column_sums = kernel("metal" if mx.metal.is_available() else "cuda")(inputs=[g], **launch(g))
    return row_means, column_sums.sum(axis=0) / g.shape[0]


@cache
def kernel(backend):
    """MLX's callable for ``"metal"`` or ``"cuda"``; nothing is compiled yet."""
    metal = backend == "metal"
    return (mx.fast.metal_kernel if metal else mx.fast.cuda_kernel)(
        name="ember_statistics",
        input_names=INPUTS,
        output_names=OUTPUTS,
        source=SOURCE,
        header=METAL_HEADER if metal else CUDA_HEADER,
        ensure_row_contiguous=False,
    )


def launch(g):
    """What the kernel is called with for ``g``: its constants, the size of its grid, and its outputs."""
    rows, columns = g.shape
    vector = BYTES_AT_ONCE // g.itemsize
    threads = min(MOST_THREADS, -(-columns // (SIMDGROUP * vector)) * SIMDGROUP)
    groups = -(-rows // ROWS)
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
        "output_shapes": [(rows,), (groups, columns)],
        "output_dtypes": [mx.float32, mx.float32],
    }
