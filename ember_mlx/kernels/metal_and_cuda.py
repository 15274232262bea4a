"""What the kernels share: one language for both backends, and reading and writing of several neighbours at once.

A kernel is the text of a body, in Metal's words. MLX writes the signature around it, from the names that it finds
there: `const device T* g`, or `constant` for fewer than 8 elements, `g_shape`, `g_strides` in elements, the outputs,
and Metal's attributes. A header turns these words into CUDA's.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

__all__ = [
    "BYTES_AT_ONCE",
    "CUDA",
    "METAL",
    "MOST_THREADS",
    "SIMDGROUP",
    "Text",
    "flag",
    "kernel",
    "launch_of",
    "scalars",
]

MOST_THREADS = 256  # of a threadgroup
SIMDGROUP = 32  # threads, on every GPU that MLX runs on
BYTES_AT_ONCE = 16  # that a thread reads or writes

# They may start at any element. Apple's GPUs read up to four elements at once from any element on, and the compiler
# joins such a loop into those reads: MLX's own Metal kernels have it so.
METAL = """
#define FUNCTION inline
#define bits_of(value) as_type<uint32_t>(value)
#define float_of(bits) as_type<float>(bits)
#define quotient(a, b) ((a) / (b))
#define square_root(value) sqrt(value)

template <int N, typename Pointer>
inline bool aligned(Pointer) {
    return true;
}

template <int N, typename Pointer>
inline void read_together(Pointer from, thread float* x) {
    #pragma unroll
    for (int v = 0; v < N; v++) x[v] = static_cast<float>(from[v]);
}

template <typename T, int N>
struct AsItIs {
    T values[N];
};

template <int N, typename T, typename Pointer>
inline AsItIs<T, N> read_as_it_is(Pointer from) {
    AsItIs<T, N> read;
    #pragma unroll
    for (int v = 0; v < N; v++) read.values[v] = from[v];
    return read;
}

template <typename T, int N>
inline void widen(AsItIs<T, N> from, thread float* x) {
    #pragma unroll
    for (int v = 0; v < N; v++) x[v] = static_cast<float>(from.values[v]);
}

template <int N, typename T, typename Pointer, typename X>
inline void write_together(Pointer to, thread const X* x) {
    #pragma unroll
    for (int v = 0; v < N; v++) to[v] = static_cast<T>(x[v]);
}
"""

# Several elements at once only from an address that is a multiple of their size.
CUDA = """
#define FUNCTION __device__ inline
#define bits_of(value) __float_as_uint(value)
#define float_of(bits) __uint_as_float(bits)
#define thread_position_in_threadgroup threadIdx
#define threads_per_threadgroup blockDim
#define threadgroup_position_in_grid blockIdx
#define thread_index_in_simdgroup (threadIdx.x % 32)
#define simdgroup_index_in_threadgroup (threadIdx.x / 32)
#define threadgroup __shared__
#define thread
#define threadgroup_barrier(memory) __syncthreads()
#define simdgroup_barrier(memory) __syncwarp()
#define simd_shuffle_xor(value, distance) __shfl_xor_sync(0xffffffffu, value, distance)

// To 2 units in the last place, in two instructions where exact ones take ten, and 0 for what is below 2^-126.
__device__ inline float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
    float result;
    asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
#else
    return a / b;
#endif
}

__device__ inline float square_root(float value) {
#ifdef __CUDA_ARCH__
    float result;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
#else
    return sqrt(value);
#endif
}

template <typename T, int N>
struct alignas(sizeof(T) * N) Together {
    T values[N];
};

template <int N, typename T>
__device__ inline bool aligned(const T* pointer) {
    return reinterpret_cast<size_t>(pointer) % sizeof(Together<T, N>) == 0;
}

template <int N, typename T>
__device__ inline void read_together(const T* from, float* x) {
    const Together<T, N> together = *reinterpret_cast<const Together<T, N>*>(from);
    #pragma unroll
    for (int v = 0; v < N; v++) x[v] = static_cast<float>(together.values[v]);
}

// In words: elements of 16 bits would get a register each.
template <typename T, int N>
struct alignas(sizeof(T) * N) AsItIs {
    uint32_t words[N * sizeof(T) / 4];
};

template <int N, typename T>
__device__ inline AsItIs<T, N> read_as_it_is(const T* from) {
    return *reinterpret_cast<const AsItIs<T, N>*>(from);
}

template <typename T>
__device__ inline void widen_word(uint32_t word, float* x) {
    T values[4 / sizeof(T)];
    memcpy(values, &word, 4);
    #pragma unroll
    for (int v = 0; v < 4 / sizeof(T); v++) x[v] = static_cast<float>(values[v]);
}

template <>
__device__ inline void widen_word<__nv_bfloat16>(uint32_t word, float* x) {
    x[0] = float_of(word << 16);
    x[1] = float_of(word & 0xffff0000u);
}

template <typename T, int N>
__device__ inline void widen(AsItIs<T, N> from, float* x) {
    constexpr int OF_WORD = 4 / sizeof(T);
    #pragma unroll
    for (int k = 0; k < N / OF_WORD; k++) widen_word<T>(from.words[k], x + k * OF_WORD);
}

template <int N, typename T, typename Pointer, typename X>
__device__ inline void write_together(Pointer to, const X* x) {
    Together<T, N> together;
    #pragma unroll
    for (int v = 0; v < N; v++) together.values[v] = static_cast<T>(x[v]);
    *reinterpret_cast<Together<T, N>*>(to) = together;
}
"""

BOTH = """
// N neighbours, or as many as are left, and zeros.
template <int N, typename Pointer>
FUNCTION void read_one_by_one(Pointer from, int64_t step, int64_t left, thread float* x) {
    #pragma unroll
    for (int v = 0; v < N; v++) x[v] = v < left ? static_cast<float>(from[v * step]) : 0.0f;
}

// The same, at once if that can be. Several such reads wait for one another: where it matters, decide once for all.
template <int N, typename Pointer>
FUNCTION void read_as_float(Pointer from, int64_t step, int64_t left, thread float* x) {
    if (step == 1 && left >= N && aligned<N>(from)) return read_together<N>(from, x);
    read_one_by_one<N>(from, step, left, x);
}

// N neighbours, or as many as are left, each of which T holds exactly.
template <int N, typename T, typename Pointer, typename X>
FUNCTION void write_as(Pointer to, int64_t left, thread const X* x) {
    if (left >= N && aligned<N>(to)) return write_together<N, T>(to, x);
    #pragma unroll
    for (int v = 0; v < N; v++)
        if (v < left) to[v] = static_cast<T>(x[v]);
}
"""


@dataclass(frozen=True)
class Text:
    """A kernel as it is written: its name, the names of its arrays, its functions and its body, in Metal's words.

    One that reads all inputs ``in_rows`` gets copies of those that lie otherwise. Operations of their own for that,
    ``mx.contiguous``, cost a host their time even where there is nothing to copy.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str
    functions: str = ""
    in_rows: bool = False

    def header(self, backend: str) -> str:
        """What stands before the body for ``"metal"`` or ``"cuda"``."""
        return {"metal": METAL, "cuda": CUDA}[backend] + BOTH + self.functions


@cache
def kernel(text: Text, backend: str | None = None) -> Callable:
    """MLX's callable of ``text``; nothing is compiled yet. Unless ``in_rows`` it copies no input, however that lies.

    MLX's CUDA backend keeps compiled kernels on disk, by their name alone: a changed text needs another name.
    """
    backend = backend or ("metal" if mx.metal.is_available() else "cuda")
    digest = hashlib.sha256((text.header(backend) + text.source).encode()).hexdigest()[:12]
    return {"metal": mx.fast.metal_kernel, "cuda": mx.fast.cuda_kernel}[backend](
        name=f"{text.name}_{digest}",
        input_names=list(text.inputs),
        output_names=list(text.outputs),
        source=text.source,
        header=text.header(backend),
        ensure_row_contiguous=text.in_rows,
    )


def launch_of(
    constants: dict[str, object], groups: int, threads: int, shapes: list[tuple[int, ...]], dtypes: list[mx.Dtype]
) -> dict:
    """What a kernel is called with beside its inputs: constants, the size of its grid, in threads, and its outputs.

    Args:
        constants: Of the text, by name: numbers and dtypes.
        groups, threads: Threadgroups, and the threads of each, in a row.
        shapes, dtypes: Of the outputs.
    """
    return {
        "template": list(constants.items()),
        "grid": (groups * threads, 1, 1),
        "threadgroup": (threads, 1, 1),
        "output_shapes": shapes,
        "output_dtypes": dtypes,
    }


def scalars(*numbers: float | mx.array) -> list[mx.array]:
    """Each number as an input of a kernel, float32 of shape (1,): by itself, since to join them takes a kernel each."""
    return [_input(number, mx.float32) for number in numbers]


def flag(value: mx.array | None) -> mx.array:
    """A bool as an input of a kernel, of shape (1,); None for one that is not read."""
    return _input(True if value is None else value, mx.bool_)


def _input(value, dtype):
    """``mx.array`` of an array takes a kernel that copies it, even where it has that dtype."""
    array = value.astype(dtype) if isinstance(value, mx.array) else mx.array(value, dtype)
    return array.reshape(1)
