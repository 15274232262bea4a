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

from ember_mlx.kernels.metal_and_cuda import BYTES_AT_ONCE, MOST_THREADS, SIMDGROUP, Text, kernel, launch_of

__all__ = ["ROWS", "TEXT", "differences", "launch", "mean_magnitudes", "mean_squares"]

AT_ONCE = 8  # rows whose sums are shuffled together: a power of two, up to 32
ROWS = 128  # of a threadgroup, a multiple of 32; the column sums take 2 / ROWS of a table of 16 bits

FUNCTIONS = """
// Sums N numbers of each lane over the simdgroup: sums[0] becomes that of the number returned, where that is not -1.
// Lanes keep one half of their numbers each time, and send the other half: 9 shuffles for 8 numbers, not 40.
template <int N>
FUNCTION int sum_over_lanes(thread float* sums, int lane) {
    #pragma unroll
    for (int half = N / 2; half > 0; half /= 2) {
        const int distance = 32 * half / N;
        const bool upper = (lane & distance) != 0;
        #pragma unroll
        for (int k = 0; k < half; k++) {
            const float sent = upper ? sums[k] : sums[k + half], kept = upper ? sums[k + half] : sums[k];
            sums[k] = kept + simd_shuffle_xor(sent, distance);
        }
    }
    #pragma unroll
    for (int distance = 16 / N; distance > 0; distance /= 2) sums[0] += simd_shuffle_xor(sums[0], distance);
    return lane % (32 / N) == 0 ? lane / (32 / N) : -1;
}

template <int VECTOR, int MAGNITUDES>
FUNCTION float add_squares(thread const float* x, thread float* sums) {
    float sum = 0;
    #pragma unroll
    for (int v = 0; v < VECTOR; v++) {
        const float square = MAGNITUDES ? fabs(x[v]) : x[v] * x[v];
        sums[v] += square;
        sum += square;
    }
    return sum;
}

// All reads are under way before the first is waited for.
template <int N, int VECTOR, int MAGNITUDES, typename Pointer>
FUNCTION void sum_together(
    Pointer g, int64_t row_step, int rows, int64_t columns, thread float* sums, thread float* of_rows
) {
    float x[N][VECTOR];
    #pragma unroll
    for (int i = 0; i < N; i++) {
        #pragma unroll
        for (int v = 0; v < VECTOR; v++) x[i][v] = 0;
        if (i < rows && columns > 0) read_together<VECTOR>(g + i * row_step, x[i]);
    }
    #pragma unroll
    for (int i = 0; i < N; i++) of_rows[i] = add_squares<VECTOR, MAGNITUDES>(x[i], sums);
}

template <int VECTOR, int MAGNITUDES, typename Pointer>
FUNCTION void sum_one_by_one(Pointer g, int64_t step, int64_t columns, thread float* sums, thread float* of_row) {
    float x[VECTOR];
    read_as_float<VECTOR>(g, step, columns, x);
    of_row[0] = add_squares<VECTOR, MAGNITUDES>(x, sums);
}
"""

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
        const bool together = column_step == 1 && columns % VECTOR == 0 && row_step % VECTOR == 0 && aligned<VECTOR>(g);
        for (int64_t start = 0; start < columns; start += threads * VECTOR) {
            const int64_t j = start + thread_index * VECTOR;
            float sums[VECTOR] = {};
            for (int i = 0; i < rows; i += together ? AT_ONCE : 1) {
                const int64_t at = (first + i) * row_step + j * column_step;
                float of_rows[AT_ONCE];
                int of_lane;
                if (together) {
                    sum_together<AT_ONCE, VECTOR, MAGNITUDES>(g + at, row_step, rows - i, columns - j, sums, of_rows);
                    of_lane = sum_over_lanes<AT_ONCE>(of_rows, lane);
                } else {
                    sum_one_by_one<VECTOR, MAGNITUDES>(g + at, column_step, columns - j, sums, of_rows);
                    of_lane = sum_over_lanes<1>(of_rows, lane);
                }
                if (of_lane >= 0 && i + of_lane < rows) {
                    const float sum = of_rows[0];
                    row_sums[i + of_lane][simdgroup] = start == 0 ? sum : row_sums[i + of_lane][simdgroup] + sum;
                }
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
            float x[DOWN];
            read_as_float<DOWN>(g + first + i + j * column_step, 1, rows - i, x);
            float sum = add_squares<DOWN, MAGNITUDES>(x, sums);
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

TEXT = Text(
    name="ember_statistics",
    inputs=("g",),
    outputs=("row_means", "column_sums"),
    source=SOURCE,
    functions=FUNCTIONS,
)


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
        "AT_ONCE": AT_ONCE,
        "MOST_SIMDGROUPS": MOST_THREADS // SIMDGROUP,
        "SIMDGROUP": SIMDGROUP,
        "MAGNITUDES": int(magnitudes),
    }
    return launch_of(constants, groups, threads, [(rows,), (groups, columns)], [mx.float32] * 2)


def differences(dtype: mx.Dtype) -> str | None:
    """Where the kernel differs from plain operations on an awkward table of that dtype, in words, or None.

    One table has more than one threadgroup of rows, more columns than its threads take at once, and odd sizes: rows
    start at any address, and the last rows and columns are incomplete. The other can be read several elements at once.
    Each lies in memory as most gradients do, and then as that of an untied LM head.
    """
    for columns in (MOST_THREADS * BYTES_AT_ONCE // dtype.size + 37, 80):
        shape = (ROWS + 3, columns)
        g = mx.random.normal(shape, key=mx.random.key(0)) * mx.linspace(0.1, 2, shape[0])[:, None]
        g = (g * mx.linspace(1, 3, shape[1])).astype(dtype)
        for way, table in {"": g, "transposed ": mx.contiguous(g.T).T}.items():
            for means, error in _errors(table, g.astype(mx.float32)):
                if not error < 1e-5:  # a NaN is not
                    return f"The {means} of a {way}{dtype} table of {shape} are off by {error:.1e}"
    return None


def _errors(table, exact):
    """The name of each mean, and its largest error."""
    for of, means, values in (
        ("", mean_squares, mx.square(exact)),
        (" of magnitudes", mean_magnitudes, mx.abs(exact)),
    ):
        for axis, (name, mean) in enumerate(zip(("row", "column"), means(table), strict=True)):
            expected = values.mean(axis=1 - axis)
            yield f"{name} means{of}", (mx.abs(mean - expected) / expected).max().item()
