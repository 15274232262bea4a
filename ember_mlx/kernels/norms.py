"""Sums of squares of several arrays at once, for the norm of all gradients: one kernel for Metal and CUDA.

As plain operations each array takes three kernels and float32 scratch of its size; a model has hundreds of arrays, and
to hand so many kernels to a GPU takes longer than to read the numbers. Here one launch takes ``ARRAYS`` arrays. A
threadgroup takes ``CHUNK`` elements of one of them, and reads them in the order in which they lie in memory: a sum of
all asks for no other. All sums are float32, in an order that the text fixes, without atomics: the same input gives the
same bits.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ember_mlx.kernels.metal_and_cuda import BYTES_AT_ONCE, MOST_THREADS, SIMDGROUP, Text, kernel, launch_of

__all__ = ["ARRAYS", "CHUNK", "TEXT", "differences", "largest_sums", "launch", "sums_of_squares"]

# Of a launch. Metal binds 31 buffers, and each array takes three; CUDA takes 4096 bytes, and each array takes 128.
ARRAYS = 24 if mx.cuda.is_available() else 8
CHUNK = 2**15  # elements of a threadgroup

FUNCTIONS = """
template <int CHUNK, int VECTOR, typename Pointer>
FUNCTION float squares_of_thread(
    Pointer g, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step, int64_t first, int thread_index,
    int threads
) {
    const int64_t size = rows * columns, end = first + CHUNK < size ? first + CHUNK : size;
    // In rows or in columns without a gap, or else element by element.
    const bool dense = (column_step == 1 && (row_step == columns || rows == 1)) ||
        (row_step == 1 && (column_step == rows || columns == 1));
    float sums[VECTOR] = {};
    for (int64_t i = first + thread_index * VECTOR; i < end; i += threads * VECTOR) {
        float x[VECTOR];
        if (dense) {
            read_as_float<VECTOR>(g + i, 1, end - i, x);
        } else {
            for (int v = 0; v < VECTOR; v++) {
                const int64_t row = (i + v) / columns, column = (i + v) % columns;
                x[v] = i + v < end ? static_cast<float>(g[row * row_step + column * column_step]) : 0.0f;
            }
        }
        #pragma unroll
        for (int v = 0; v < VECTOR; v++) sums[v] += x[v] * x[v];
    }
    float sum = 0;
    #pragma unroll
    for (int v = 0; v < VECTOR; v++) sum += sums[v];
    return sum;
}
"""

OF_ONE_ARRAY = """
    {{
        const int64_t rows = {g}_shape[0], columns = {g}_shape[1], chunks = (rows * columns + CHUNK - 1) / CHUNK;
        if (chunk >= 0 && chunk < chunks)
            sum = squares_of_thread<CHUNK, VECTOR>(
                {g}, rows, columns, {g}_strides[0], {g}_strides[1], chunk * CHUNK, thread_index, threads);
        chunk -= chunks;
    }}
"""

NAMES = tuple(f"g{i}" for i in range(ARRAYS))

# The body of the kernel, in Metal's words.
SOURCE = f"""
    const int thread_index = thread_position_in_threadgroup.x, threads = threads_per_threadgroup.x;
    int64_t chunk = threadgroup_position_in_grid.x;  // of the array, once those before it are taken off
    float sum = 0;
    {"".join(OF_ONE_ARRAY.format(g=name) for name in NAMES)}
    threadgroup float sums_of_simdgroups[SIMDGROUPS];
    #pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += simd_shuffle_xor(sum, distance);
    if (thread_index_in_simdgroup == 0) sums_of_simdgroups[simdgroup_index_in_threadgroup] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (thread_index == 0) {{
        sum = 0;
        for (int k = 0; k < SIMDGROUPS; k++) sum += sums_of_simdgroups[k];
        sums[threadgroup_position_in_grid.x] = sum;
    }}
"""

TEXT = Text(name="ember_norms", inputs=NAMES, outputs=("sums",), source=SOURCE, functions=FUNCTIONS)


def sums_of_squares(arrays: Sequence[mx.array]) -> mx.array:
    """Sums of squares, (n,) float32, that add up to the sum of the squares of all the arrays.

    Args:
        arrays (list of array): One to ``ARRAYS``, each (rows, columns), of one dtype: float32, bfloat16 or float16. On
            the GPU that is MLX's default device. However they lie in memory, they are not copied; fastest are
            contiguous ones and their transposes.
    """
    padded = [*arrays, *[mx.zeros((1, 1), arrays[0].dtype)] * (ARRAYS - len(arrays))]
    return kernel(TEXT)(inputs=padded, **launch(padded))[0]


def largest_sums(arrays: Sequence[mx.array], times: int = 1) -> mx.array:
    """Of each array the largest sum of squares of ``CHUNK`` elements, float32; NaN where one is NaN.

    Args:
        arrays: As of :func:`sums_of_squares`.
        times (int): How often each number stands in the result, (len(arrays) * times,).
    """
    ends = np.cumsum([-(-array.size // CHUNK) for array in arrays])
    first = np.array([0, *ends[:-1]])
    most = max(ends - first)
    # An array of fewer chunks than another has its last one several times.
    chunks = np.minimum(first[:, None] + np.arange(most), ends[:, None] - 1).repeat(times, axis=0)
    return sums_of_squares(arrays)[mx.array(chunks.astype(np.uint32))].max(axis=1)


def launch(arrays: Sequence[mx.array]) -> dict:
    """What the kernel is called with for these ``ARRAYS`` arrays: its constants, the size of its grid, its output."""
    chunks = sum(-(-array.shape[0] * array.shape[1] // CHUNK) for array in arrays)
    constants = {
        "T": arrays[0].dtype,  # not in the text, but MLX's CUDA backend keeps compiled kernels by their name and these
        "VECTOR": BYTES_AT_ONCE // arrays[0].itemsize,
        "CHUNK": CHUNK,
        "SIMDGROUPS": MOST_THREADS // SIMDGROUP,
    }
    return launch_of(constants, chunks, MOST_THREADS, [(chunks,)], [mx.float32])


def differences(dtype: mx.Dtype) -> str | None:
    """Where the kernel differs from plain operations on awkward arrays of that dtype, in words, or None.

    They have more than one chunk, odd sizes, and lie in rows, in columns and with gaps.
    """
    g = mx.random.normal((97, CHUNK // 64 + 3), key=mx.random.key(0)).astype(dtype)
    arrays = {"an array": g, "a transposed array": mx.contiguous(g.T).T, "an array with gaps": mx.pad(g, 1)[1:-1, 1:-1]}
    expected = 2 * mx.square(g.astype(mx.float32)).sum()
    for name, array in arrays.items():
        error = (mx.abs(sums_of_squares([g, array]).sum() - expected) / expected).item()
        if not error < 1e-5:  # a NaN is not
            return f"The sum of squares of {name} of {dtype} is off by {error:.1e}"
    return None
