"""Ember's update of a 16-bit table with stochastic rounding: one kernel, written once for Metal and CUDA.

MLX does not fuse a reading of float32 bits as integers (``view``) with the operations around it, and the hash is too
deep for one fused kernel: as plain operations the float32 values and the random bits become two tables each. Here they
live in registers. A threadgroup takes ``ROWS`` rows; its threads lie side by side along the columns, ``VECTOR``
columns each, and walk down the rows with what is of a column alone.
"""

import platform
import warnings
from functools import cache

import mlx.core as mx

from ember_mlx.kernels import choice
from ember_mlx.optimizers import stochastic_rounding
from ember_mlx.optimizers.stochastic_rounding import DROPPED_BITS

__all__ = ["update_table", "usable"]

ROWS = 32  # of a threadgroup: of a transposed gradient as many neighbours as a GPU reads at least at once, and more
AT_ONCE = 2  # rows read before the first is written
MOST_THREADS = 256  # of a threadgroup
BYTES_AT_ONCE = 16  # that a thread writes to a row
SIMDGROUP = 32  # threads, on every GPU that MLX runs on

INPUTS = ["w", "g", "a", "b", "row_keys", "column_keys", "numbers"]
OUTPUTS = ["new_w"]

# The body of the kernel, in Metal's words, as in statistics.py.
SOURCE = """
    const int thread_index = thread_position_in_threadgroup.x, threads = threads_per_threadgroup.x;
    const int64_t columns = w_shape[1], first = static_cast<int64_t>(threadgroup_position_in_grid.x) * ROWS;
    const int rows = w_shape[0] - first < ROWS ? w_shape[0] - first : ROWS;
    const float learning_rate = numbers[0], decay = numbers[1], eps = numbers[2];

    for (int64_t j = thread_index * VECTOR; j < columns; j += threads * VECTOR) {
        float b_j[VECTOR];
        uint32_t column_key[VECTOR];
        #pragma unroll
        for (int v = 0; v < VECTOR; v++) {
            b_j[v] = j + v < columns ? b[j + v] : 1.0f;
            column_key[v] = j + v < columns ? column_keys[j + v] : 0;
        }
        for (int i = 0; i < rows; i += AT_ONCE) {
            float w_ij[AT_ONCE][VECTOR], g_ij[AT_ONCE][VECTOR];
            #pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                const int64_t row = first + i + k, left = i + k < rows ? columns - j : 0;
                read_as_float<VECTOR>(w + row * w_strides[0] + j * w_strides[1], w_strides[1], left, w_ij[k]);
                read_as_float<VECTOR>(g + row * g_strides[0] + j * g_strides[1], g_strides[1], left, g_ij[k]);
            }
            #pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                const int64_t row = first + i + k;
                if (i + k < rows) {
                    const float a_i = a[row];
                    const uint32_t row_key = row_keys[row];
                    #pragma unroll
                    for (int v = 0; v < VECTOR; v++) {
                        const float update = g_ij[k][v] / (a_i * b_j[v] + eps);
                        const float value = decay * w_ij[k][v] - learning_rate * update;
                        w_ij[k][v] = round_stochastically<DROPPED_BITS>(value, mix_bits(row_key ^ column_key[v]));
                    }
                    write_rounded<VECTOR>(new_w + row * columns + j, columns - j, w_ij[k]);
                }
            }
        }
    }
"""

# As in optimizers/stochastic_rounding.py, number by number. (Metal has a mix of its own.)
ROUNDING = """
FUNCTION uint32_t mix_bits(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

template <int DROPPED>
FUNCTION float round_stochastically(float value, uint32_t random) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
    if (magnitude >= 0x7f800000u) return value;  // infinity or NaN
    if (DROPPED == 13 && magnitude < 0x38800000u) {  // below 2^-14 float16 has numbers 2^-24 apart
        const float unit = 5.9604644775390625e-8f, scaled = value * 16777216.0f, lower = floor(scaled);
        return (lower + (scaled - lower > (random >> 8) * unit ? 1.0f : 0.0f)) * unit;
    }
    return float_of(((bits + (random >> (32 - DROPPED))) >> DROPPED) << DROPPED);
}
"""

METAL_HEADER = f"""
#define FUNCTION inline
#define bits_of(value) as_type<uint32_t>(value)
#define float_of(bits) as_type<float>(bits)
{ROUNDING}
template <int N, typename Pointer>
inline void read_as_float(Pointer from, int64_t step, int64_t left, thread float* x) {{
    if (step == 1 && left >= N) {{
        #pragma unroll
        for (int v = 0; v < N; v++) x[v] = static_cast<float>(from[v]);
    }} else {{
        #pragma unroll
        for (int v = 0; v < N; v++) x[v] = v < left ? static_cast<float>(from[v * step]) : 0.0f;
    }}
}}

template <int N, typename T>
inline void write_rounded(device T* to, int64_t left, thread const float* x) {{
    #pragma unroll
    for (int v = 0; v < N; v++)
        if (v < left) to[v] = static_cast<T>(x[v]);
}}
"""

# Metal's words in CUDA, where several elements at once need an address that is a multiple of their size.
CUDA_HEADER = f"""
#define FUNCTION __device__ inline
#define bits_of(value) __float_as_uint(value)
#define float_of(bits) __uint_as_float(bits)
#define thread_position_in_threadgroup threadIdx
#define threads_per_threadgroup blockDim
#define threadgroup_position_in_grid blockIdx
{ROUNDING}
template <typename T, int N>
struct alignas(sizeof(T) * N) Together {{
    T values[N];
}};

template <int N, typename T>
__device__ inline void read_as_float(const T* from, int64_t step, int64_t left, float* x) {{
    if (step == 1 && left >= N && reinterpret_cast<size_t>(from) % sizeof(Together<T, N>) == 0) {{
        const Together<T, N> together = *reinterpret_cast<const Together<T, N>*>(from);
        #pragma unroll
        for (int v = 0; v < N; v++) x[v] = static_cast<float>(together.values[v]);
    }} else {{
        #pragma unroll
        for (int v = 0; v < N; v++) x[v] = v < left ? static_cast<float>(from[v * step]) : 0.0f;
    }}
}}

template <int N, typename T>
__device__ inline void write_rounded(T* to, int64_t left, const float* x) {{
    if (left >= N && reinterpret_cast<size_t>(to) % sizeof(Together<T, N>) == 0) {{
        Together<T, N> together;
        #pragma unroll
        for (int v = 0; v < N; v++) together.values[v] = static_cast<T>(x[v]);
        *reinterpret_cast<Together<T, N>*>(to) = together;
    }} else {{
        #pragma unroll
        for (int v = 0; v < N; v++)
            if (v < left) to[v] = static_cast<T>(x[v]);
    }}
}}
"""


def update_table(w, g, a, b, learning_rate, eps, weight_decay, keys):
    """As ``update_table`` of ``ember_mlx.optimizers.ember``, for tables (V, D) on the GPU, however they lie in memory.

    Args:
        w (array): In bfloat16 or float16, the dtype of the new table.
        g (array): Its gradient, in float32, bfloat16 or float16.
        keys (tuple): What ``bit_keys`` gives.
    """
    numbers = mx.stack([mx.array(x, mx.float32) for x in (learning_rate, 1 - learning_rate * weight_decay, eps)])
    inputs = [w, g, a, b, *keys, numbers]
    (new_w,) = kernel("metal" if mx.metal.is_available() else "cuda")(inputs=inputs, **launch(w, g))
    return new_w


@cache
def kernel(backend):
    """MLX's callable for ``"metal"`` or ``"cuda"``; nothing is compiled yet."""
    metal = backend == "metal"
    return (mx.fast.metal_kernel if metal else mx.fast.cuda_kernel)(
        name="ember_update_with_stochastic_rounding",
        input_names=INPUTS,
        output_names=OUTPUTS,
        source=SOURCE,
        header=METAL_HEADER if metal else CUDA_HEADER,
        ensure_row_contiguous=False,
    )


def launch(w, g):
    """What the kernel is called with for ``w`` and ``g``: its constants, the size of its grid, and its output."""
    rows, columns = w.shape
    vector = BYTES_AT_ONCE // w.itemsize
    threads = min(MOST_THREADS, -(-columns // (SIMDGROUP * vector)) * SIMDGROUP)
    constants = {
        # The dtypes are not in the text, but MLX's CUDA backend keeps compiled kernels by their name and these alone.
        "W": w.dtype,
        "G": g.dtype,
        "VECTOR": vector,
        "ROWS": ROWS,
        "AT_ONCE": AT_ONCE,
        "DROPPED_BITS": DROPPED_BITS[w.dtype],
    }
    return {
        "template": list(constants.items()),
        "grid": (-(-rows // ROWS) * threads, 1, 1),
        "threadgroup": (threads, 1, 1),
        "output_shapes": [(rows, columns)],
        "output_dtypes": [w.dtype],
    }


def usable(w_dtype, g_dtype):
    """Whether the kernel can take a table and a gradient of those dtypes, on MLX's default device. As ``choice``'s."""
    return choice.usable(g_dtype) and w_dtype in DROPPED_BITS and fault() is None


@cache
def fault():
    """What is wrong with the kernel on this machine, or None. Found once a process, and then warned about."""
    try:
        found = differences()
    except (RuntimeError, ValueError) as error:  # MLX's for a source that does not compile and for a bad launch
        found = f"MLX says: {error}"
    if found:
        machine = f"{mx.device_info().get('device_name')}, {platform.platform()}, MLX {mx.__version__}"
        warnings.warn(
            f"ember_mlx: the kernel for stochastic rounding does not work on this machine ({machine}). {found}. Ember "
            "goes on with plain operations: the results are the same, the scratch memory is several tables. Please "
            f"report this message to the authors of ember-mlx; {choice.VARIABLE}=off silences it",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def differences():
    """Where the kernel differs from plain operations on an awkward table, in words, or None.

    With w = 0, a = b = 1 and a learning rate of 1 the value to be rounded is -g, exactly: every bit must agree. Of
    other numbers a GPU may round a sum of products once where plain operations round twice. Odd sizes, two threadgroups
    of rows, and a gradient that lies as that of an untied LM head.
    """
    for dtype in DROPPED_BITS:
        shape = (ROWS + 3, MOST_THREADS * BYTES_AT_ONCE // dtype.size + 37)
        keys = stochastic_rounding.bit_keys(mx.array(1, mx.uint32), mx.array(1), *shape)
        random = stochastic_rounding.random_bits(*keys)
        g = mx.random.normal(shape, key=mx.random.key(0)) * mx.power(2.0, mx.linspace(-30, 18, shape[1]))
        zeros, ones = mx.zeros(shape, dtype), [mx.ones(length) for length in shape]
        expected = stochastic_rounding.round_stochastically(-g, random, dtype)
        for way, table in {"": g, "transposed ": mx.contiguous(g.T).T}.items():
            found = update_table(zeros, table, *ones, 1.0, 2.0**-126, 0.0, keys)
            wrong = (found != expected).sum().item()
            if wrong:
                return f"{wrong} of {g.size} values of a {way}float32 gradient are rounded otherwise to {dtype}"
    return None
