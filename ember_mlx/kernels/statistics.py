"""Row means and column means of squares or magnitudes, in one reading of the gradient: one kernel for Metal and CUDA.

As plain operations the squares become a float32 table, since MLX fuses nothing into a reduction. Here a threadgroup
takes ``ROWS`` rows. Its threads lie side by side along the columns, ``VECTOR`` columns each, and walk down the rows:
each keeps the sums of its columns in registers, and the sum of each row is shuffled together across its simdgroup.
The sums of squares down ``ROWS`` rows, (V / ROWS, D), are what is left to add up. All sums are float32, in an order
that the text fixes, without atomics: the same input gives the same bits.

The gradient of an untied LM head comes out of MLX's matrix product as a transposed view: the rows of a column lie side
by side in memory. To copy it would take a table, so the kernel reads it as it lies, with rows and columns changed over.
"""

import mlx.core as mx

from ember_mlx.kernels.metal_and_cuda import BYTES_AT_ONCE, MOST_THREADS, SIMDGROUP, Text, kernel

__all__ = ["ROWS", "TEXT", "differences", "launch", "mean_magnitudes", "mean_squares"]

ROWS = 128  # of a threadgroup, a multiple of 32; the column sums take 2 / ROWS of a table of 16 bits

# The body of the kernel, in Metal's words.
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
                    const float square = MAGNITUDES ? fabs(x[v]) : x[v] * x[v];
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
                const float square = MAGNITUDES ? fabs(x[v]) : x[v] * x[v];
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

TEXT = Text(name="ember_statistics", inputs=("g",), outputs=("row_means", "column_sums"), source=SOURCE)


def mean_squares(g: mx.array) -> tuple[mx.array, mx.array]:
    """Means of ``g`` squared: over the columns, (V,), and over the rows, (D,), float32.

    Args:
        g (array): (V, D), on the GPU that is MLX's default device, in float32, bfloat16 or float16. However it lies in
            memory, it is not copied; fastest are contiguous ones and their transposes.
    """
    row_means, column_sums = kernel(TEXT)(inputs=[g], **launch(g))
    return row_means, column_sums.sum(axis=0) / g.shape[0]


def mean_magnitudes(g: mx.array) -> tuple[mx.array, mx.array]:
    """As ``mean_squares``, of the magnitudes of ``g``."""
    row_means, column_sums = kernel(TEXT)(inputs=[g], **launch(g, magnitudes=True))
    return row_means, column_sums.sum(axis=0) / g.shape[0]


def launch(g: mx.array, magnitudes: bool = False) -> dict:
    """What the kernel is called with for ``g``: its constants, the size of its grid, and its outputs."""
    rows, columns = g.shape
    vector = BYTES_AT_ONCE // g.itemsize
    # As many threads as leave the last of their walks along the columns as full as the others.
    simdgroups = -(-columns // (SIMDGROUP * vector))
    walks = -(-simdgroups * SIMDGROUP // MOST_THREADS)
    threads = -(-simdgroups // walks) * SIMDGROUP
    groups = -(-rows // ROWS)
    constants = {
        "T": g.dtype,  # not in the text, but MLX's CUDA backend keeps compiled kernels by their name and these alone
        "VECTOR": vector,
        "ROWS": ROWS,
        "MOST_SIMDGROUPS": MOST_THREADS // SIMDGROUP,
        "SIMDGROUP": SIMDGROUP,
        "MAGNITUDES": int(magnitudes),
    }
    return {
        "template": list(constants.items()),
        "grid": (groups * threads, 1, 1),
        "threadgroup": (threads, 1, 1),
        "output_shapes": [(rows,), (groups, columns)],
        "output_dtypes": [mx.float32, mx.float32],
    }


def differences(dtype: mx.Dtype) -> str | None:
    """Where the kernel differs from plain operations on an awkward table of that dtype, in words, or None.

    The table has more than one threadgroup of rows, more columns than its threads take at once, and odd sizes: rows
    start at any address, and the last rows and columns are incomplete. It lies in memory as most gradients do, and then
    as that of an untied LM head.
    """
    shape = (ROWS + 3, MOST_THREADS * BYTES_AT_ONCE // dtype.size + 37)
    g = mx.random.normal(shape, key=mx.random.key(0)) * mx.linspace(0.1, 2, shape[0])[:, None]
    g = (g * mx.linspace(1, 3, shape[1])).astype(dtype)
    exact = g.astype(mx.float32)
    for way, table in {"": g, "transposed ": mx.contiguous(g.T).T}.items():
        for of, means, values in (
            ("", mean_squares, mx.square(exact)),
            (" of magnitudes", mean_magnitudes, mx.abs(exact)),
        ):
            for axis, (name, mean) in enumerate(zip(("row", "column"), means(table), strict=True)):
                expected = values.mean(axis=1 - axis)
                error = (mx.abs(mean - expected) / expected).max().item()
                if not error < 1e-5:  # a NaN is not
                    return f"The {name} means{of} of a {way}{dtype} table of {shape} are off by {error:.1e}"
    return None
