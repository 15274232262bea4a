"""The texts of the kernels of ``sinkhorn.py``, for Metal and CUDA."""

from ember_mlx.kernels.metal_and_cuda import Text
from ember_mlx.kernels.statistics import SUM_OVER_LANES

__all__ = ["COLUMNS", "CUDA_THREADS", "TEXT"]

CUDA_THREADS = 512  # at most

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

// As many as a GPU reads and writes at once: more would have to begin at multiples of 32 bytes.
template <int N, typename Pointer>
FUNCTION void read_floats(Pointer from, thread float* x) {
    #pragma unroll
    for (int v = 0; v < N; v += 4) read_together<4>(from + v, x + v);
}

template <int N, typename Pointer>
FUNCTION void write_floats(Pointer to, thread const float* x) {
    #pragma unroll
    for (int v = 0; v < N; v += 4) write_together<4, float>(to + v, x + v);
}

FUNCTION float new_factor(float before, float sum_of_squares, float wanted, float eps) {
    const float norm = square_root(sum_of_squares);
    return norm == 0 ? 0.0f : quotient(before * wanted, before * norm + eps);
}
"""
)

# How a gradient lies, the same in both kernels. Of the matrix that lies in rows there are `height` rows.
LAYOUT = """
    const bool turned = g_strides[1] == 1 && g_strides[2] != 1;
    const int height = turned ? g_shape[2] : g_shape[1], columns = turned ? g_shape[1] : g_shape[2];
    const int band = turned ? sizes[1] : sizes[0], bands = (height + band - 1) / band;
    const bool first_stage = sizes[4] != 0, last_stage = sizes[5] != 0;
    const uint32_t line = sizes[3];
    const float least = eps[0];
"""

# Rows wait in registers. Each thread makes the same factors, of the same sums: one barrier is enough.
IN_REGISTERS = """
        AsItIs<T, VECTOR> x[AHEAD][AT_ONCE][N] = {};
        float weight[N][VECTOR], sums[N][VECTOR] = {};
        // Only of the last vectors of a row some threads have none.
        const bool has_last = ((N - 1) * THREADS + thread_index) * VECTOR < columns;
        auto row_ahead = g + corner + thread_index * VECTOR;
        #pragma unroll
        for (int l = 0; l < AHEAD * AT_ONCE; l++, row_ahead += row_step) {
            #pragma unroll
            for (int k = 0; k < N; k++)
                if (l < rows && (k < N - 1 || has_last))
                    x[l / AT_ONCE][l % AT_ONCE][k] = read_as_it_is<VECTOR, T>(row_ahead + k * THREADS * VECTOR);
        }
        #pragma unroll
        for (int k = 0; k < N; k++) {
            #pragma unroll
            for (int v = 0; v < VECTOR; v++) weight[k][v] = 1;
            if (!first_stage && (k < N - 1 || has_last))
                read_floats<VECTOR>(columns_before + line_at + (k * THREADS + thread_index) * VECTOR, weight[k]);
        }
        int side = 0;
        for (int start = 0; start < rows; start += AHEAD * AT_ONCE) {
            #pragma unroll
            for (int s = 0; s < AHEAD; s++) {
                const int i = start + s * AT_ONCE;
                float factor[AT_ONCE];
                #pragma unroll
                for (int l = 0; l < AT_ONCE; l++)
                    factor[l] = i + l >= rows ? 0.0f : first_stage ? 1.0f : rows_before[line_at + top + i + l];
                if (norms) {
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
                    if (of_lane >= 0) row_sums[side][of_lane][simdgroup] = of_rows[0];
                    threadgroup_barrier(mem_flags::mem_threadgroup);
                    #pragma unroll
                    for (int l = 0; l < AT_ONCE; l++) {
                        float sum = lane < SIMDGROUPS ? row_sums[side][l][lane] : 0.0f;
                        #pragma unroll
                        for (int distance = 16; distance > 0; distance /= 2) sum += simd_shuffle_xor(sum, distance);
                        factor[l] = new_factor(factor[l], sum, wanted, least);
                    }
                    side = 1 - side;  // others may still read this one
                }
                #pragma unroll
                for (int l = 0; l < AT_ONCE; l++, row_ahead += row_step) {
                    if (thread_index == 0 && i + l < rows) rows_to[rows_at + i + l] = factor[l];
                    #pragma unroll
                    for (int k = 0; k < N; k++) {
                        if (!last_stage) {
                            float wide[VECTOR];
                            widen(x[s][l][k], wide);
                            add_squares<VECTOR>(wide, factor[l], sums[k]);
                        }
                        // The row that takes its place is under way while the next ones are summed.
                        x[s][l][k] = {};
                        if (i + l + AHEAD * AT_ONCE < rows && (k < N - 1 || has_last))
                            x[s][l][k] = read_as_it_is<VECTOR, T>(row_ahead + k * THREADS * VECTOR);
                    }
                }
            }
        }
        #pragma unroll
        for (int k = 0; k < N; k++)
            if (!last_stage && (k < N - 1 || has_last))
                write_floats<VECTOR>(column_sums + sums_at + (k * THREADS + thread_index) * VECTOR, sums[k]);
"""

READ_TWICE = """
        for (int start = 0; start < rows; start += ROWS) {
            const int here = rows - start < ROWS ? rows - start : ROWS;
            const int64_t begin = corner + start * row_step;
            for (int i = simdgroup; i < here; i += SIMDGROUPS) {
                const float before = first_stage ? 1.0f : rows_before[line_at + top + start + i];
                float sum = 0;
                if (norms && together) {
                    #pragma unroll 2
                    for (int j = lane * VECTOR; j < columns; j += SIMDGROUP * VECTOR) {
                        float x[VECTOR], weight[VECTOR];
                        #pragma unroll
                        for (int v = 0; v < VECTOR; v++) weight[v] = 1;
                        read_together<VECTOR>(g + begin + i * row_step + j, x);
                        if (!first_stage) read_floats<VECTOR>(columns_before + line_at + j, weight);
                        sum += weighted_squares<VECTOR>(x, weight);
                    }
                } else if (norms) {
                    for (int j = lane; j < columns; j += SIMDGROUP) {
                        const float x = static_cast<float>(g[begin + i * row_step + j * column_step]);
                        const float weighted = first_stage ? x : x * columns_before[line_at + j];
                        sum += weighted * weighted;
                    }
                }
                #pragma unroll
                for (int distance = 16; distance > 0; distance /= 2) sum += simd_shuffle_xor(sum, distance);
                const float after = norms ? new_factor(before, sum, wanted, least) : before;
                if (lane == 0) {
                    factors[i] = after;
                    rows_to[rows_at + start + i] = after;
                }
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            for (int j = thread_index * VECTOR; j < columns && !last_stage; j += THREADS * VECTOR) {
                float sums[VECTOR] = {};
                if (together) {
                    #pragma unroll 4
                    for (int i = 0; i < here; i++) {
                        float x[VECTOR];
                        read_together<VECTOR>(g + begin + i * row_step + j, x);
                        add_squares<VECTOR>(x, factors[i], sums);
                    }
                } else {
                    for (int i = 0; i < here; i++) {
                        float x[VECTOR];
                        const int64_t at = begin + i * row_step + j * column_step;
                        read_one_by_one<VECTOR>(g + at, column_step, columns - j, x);
                        add_squares<VECTOR>(x, factors[i], sums);
                    }
                }
                #pragma unroll
                for (int v = 0; v < VECTOR; v++)
                    if (start > 0 && j + v < columns) sums[v] += column_sums[sums_at + j + v];
                write_as<VECTOR, float>(column_sums + sums_at + j, columns - j, sums);
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
        }
"""

# The body of the kernel, in Metal's words.
SOURCE = f"""
    const int thread_index = thread_position_in_threadgroup.x;
    const int simdgroup = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
    constexpr int THREADS = SIMDGROUPS * SIMDGROUP;
    {LAYOUT}
    const int64_t row_step = turned ? g_strides[2] : g_strides[1], column_step = turned ? g_strides[1] : g_strides[2];
    const uint32_t group = threadgroup_position_in_grid.x, of_matrix = sizes[2];
    const uint32_t matrix = group / of_matrix, line_at = matrix * line;  // there are fewer than 2^32 factors
    const int number = group % of_matrix, top = number * band;
    const int rows = height - top < band ? height - top : band;
    const int64_t corner = matrix * g_strides[0] + top * row_step;
    const int64_t sums_at = (static_cast<int64_t>(matrix) * bands + number) * columns;
    const float wanted = sqrt(static_cast<float>(columns));
    const bool norms = turned ? !first_stage : !last_stage;
    // What the last stage writes are the factors of rows and of columns, as they are called outside.
    auto rows_to = last_stage && turned ? column_sums : new_rows;
    auto columns_to = turned ? new_rows : column_sums;
    const uint32_t rows_at = (last_stage ? matrix * height : line_at) + top;
    threadgroup float row_sums[2][MOST_AT_ONCE][SIMDGROUPS], factors[ROWS];

    if (last_stage)
        for (int j = number * THREADS + thread_index; j < columns; j += of_matrix * THREADS)
            columns_to[matrix * columns + j] = columns_before[line_at + j];
    if (rows <= 0) return;
    if (last_stage && !turned) {{
        for (int i = thread_index; i < rows; i += THREADS) rows_to[rows_at + i] = rows_before[line_at + top + i];
        return;
    }}
    // Decided once: several reads are then under way before the first is waited for.
    const bool together = column_step == 1 && columns % VECTOR == 0 && row_step % VECTOR == 0
        && g_strides[0] % VECTOR == 0 && aligned<VECTOR>(g) && (first_stage || aligned<4>(columns_before));
    if (together && VECTORS > 0 && (!turned || ALIKE)) {{
        constexpr int N = VECTORS > 0 ? VECTORS : 1, AHEAD = ROWS_AHEAD, AT_ONCE = ROWS_AT_ONCE;
        {IN_REGISTERS}
    }} else if (together && TURNED_VECTORS > 0 && turned && !ALIKE) {{
        constexpr int N = TURNED_VECTORS > 0 ? TURNED_VECTORS : 1;
        constexpr int AHEAD = TURNED_ROWS_AHEAD, AT_ONCE = TURNED_ROWS_AT_ONCE;
        {IN_REGISTERS}
    }} else {{
        {READ_TWICE}
    }}
"""

TEXT = Text(
    name="ember_sinkhorn",
    inputs=("g", "rows_before", "columns_before", "sizes", "eps"),
    outputs=("new_rows", "column_sums"),
    source=SOURCE,
    functions=FUNCTIONS,
)

# The sums of all bands, and the column factors that are made of them. A simdgroup takes 4 bands of ACROSS * 4 columns.
COLUMNS = Text(
    name="ember_sinkhorn_columns",
    inputs=("column_sums", "g", "columns_before", "sizes", "eps"),
    outputs=("new_columns",),
    source=f"""
    {LAYOUT}"""
    + """
    constexpr int ACROSS = 8, VECTOR = 4, WIDTH = ACROSS * VECTOR, DOWN = SIMDGROUP / ACROSS * SIMDGROUPS;
    const int simdgroup = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
    const uint32_t group = threadgroup_position_in_grid.x, tiles = (line + WIDTH - 1) / WIDTH;
    const int64_t matrix = group / tiles;
    const int tile = group % tiles * WIDTH, j = tile + lane % ACROSS * VECTOR, down = simdgroup * 4 + lane / ACROSS;
    if (tile >= columns) return;
    auto from = column_sums + matrix * bands * columns + j;
    const bool together = columns % VECTOR == 0 && aligned<VECTOR>(column_sums);
    threadgroup float parts[SIMDGROUPS][WIDTH];

    float sums[VECTOR] = {};
    for (int k = down; k < bands; k += BANDS_AT_ONCE * DOWN) {
        float x[BANDS_AT_ONCE][VECTOR] = {};
        #pragma unroll
        for (int l = 0; l < BANDS_AT_ONCE; l++) {
            const int64_t at = static_cast<int64_t>(k + l * DOWN) * columns;
            const int left = k + l * DOWN < bands ? columns - j : 0;
            if (!together) read_one_by_one<VECTOR>(from + at, 1, left, x[l]);
            else if (left > 0) read_together<VECTOR>(from + at, x[l]);
        }
        #pragma unroll
        for (int l = 0; l < BANDS_AT_ONCE; l++) {
            #pragma unroll
            for (int v = 0; v < VECTOR; v++) sums[v] += x[l][v];
        }
    }
    #pragma unroll
    for (int v = 0; v < VECTOR; v++) {
        #pragma unroll
        for (int distance = 16; distance >= ACROSS; distance /= 2) sums[v] += simd_shuffle_xor(sums[v], distance);
        if (lane < ACROSS) parts[simdgroup][lane * VECTOR + v] = sums[v];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup == 0 && tile + lane < columns) {
        float sum = 0;
        #pragma unroll
        for (int k = 0; k < SIMDGROUPS; k++) sum += parts[k][lane];
        const int64_t at = matrix * line + tile + lane;
        const float before = first_stage ? 1.0f : columns_before[at];
        new_columns[at] = new_factor(before, sum, sqrt(static_cast<float>(height)), least);
    }
""",
    functions=FUNCTIONS,
)
