"""A whole step of Adam-mini: one kernel, written once for Metal and CUDA.

As plain operations the squares of a gradient are a float32 copy of it, and momentum in 8 bits becomes whole again. Here
a threadgroup takes a row. It reads the gradient of the row for the sum of its squares, and again, from the cache, for
the step. Weights and momentum are read and written once. A group of 32 codes lies in one simdgroup.

MLX gives the outputs of such a kernel memory of their own: nothing is updated in place.
"""

import math
from typing import Any, NamedTuple

import mlx.core as mx

from ember_mlx.kernels.metal_and_cuda import (
    BYTES_AT_ONCE,
    MOST_THREADS,
    SIMDGROUP,
    Text,
    flag,
    kernel,
    launch_of,
    scalars,
)
from ember_mlx.optimizers.companded import GROUP, decode_momentum, encode_momentum
from ember_mlx.optimizers.flash_kernel import FUNCTIONS, MOST_FLIPPED, changed
from ember_mlx.shared.float_formats import SMALLEST_NORMAL

__all__ = ["Numbers", "differences", "step_rows"]

# Measured on an H100 (examples/benchmarks/kernel_times.py). The fewer rows at a time, the more of their gradient is
# still in the cache when it is read again.
CUDA_THREADS, CUDA_THREADS_INT8 = 1024, 512

NUMBERS = ("learning_rate", "kept", "forgotten1", "forgotten2", "correction2", "eps")

# The body of the kernel, in Metal's words.
SOURCE = """
    constexpr int LANES = GROUP / VECTOR;
    const int thread_index = thread_position_in_threadgroup.x, threads = threads_per_threadgroup.x;
    const int64_t row = threadgroup_position_in_grid.x, columns = w_shape[1], corner = row * columns;
    const float decay = kept[0], forget = forgotten1[0];
    const bool steps = !SELECTS || finite[0];
    threadgroup float sums[MOST_SIMDGROUPS];

    float square = v[row];
    if (ROWS_ARE_BLOCKS) {
        float squares[GRADIENTS] = {}, sum = 0;
        if (columns % GRADIENTS == 0 && aligned<GRADIENTS>(g + corner)) {
            #pragma unroll 4
            for (int64_t j = thread_index * GRADIENTS; j < columns; j += threads * GRADIENTS) {
                float x[GRADIENTS];
                read_together<GRADIENTS>(g + corner + j, x);
                #pragma unroll
                for (int i = 0; i < GRADIENTS; i++) squares[i] += x[i] * x[i];
            }
        } else {
            for (int64_t j = thread_index; j < columns; j += threads) {
                const float x = static_cast<float>(g[corner + j]);
                squares[0] += x * x;
            }
        }
        #pragma unroll
        for (int i = 0; i < GRADIENTS; i++) sum += squares[i];
        #pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) sum += simd_shuffle_xor(sum, distance);
        if (thread_index_in_simdgroup == 0) sums[simdgroup_index_in_threadgroup] = sum;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        sum = 0;
        for (int k = 0; k < threads / SIMDGROUP; k++) sum += sums[k];
        if (steps) square = square + forgotten2[0] * (sum / columns - square);
    }
    if (thread_index == 0) new_v[row] = square;
    const float rate = learning_rate[0] / (sqrt(square / correction2[0]) + eps[0]);

    // All reads of a thread are under way before the first is waited for.
    const bool together = columns % VECTOR == 0 && aligned<VECTOR>(w + corner) && aligned<VECTOR>(g + corner)
        && aligned<VECTOR>(m + corner);
    for (int64_t start = 0; start < columns; start += threads * VECTOR) {
        const int64_t j = start + thread_index * VECTOR, left = columns - j, at = corner + j;
        float y[VECTOR], x[VECTOR], first[VECTOR], largest = SMALLEST_NORMAL;
        int codes[VECTOR];
        if (together && left > 0) {
            read_together<VECTOR>(w + at, y);
            read_together<VECTOR>(g + at, x);
            read_together<VECTOR>(m + at, first);
        } else {
            read_one_by_one<VECTOR>(w + at, 1, left, y);
            read_one_by_one<VECTOR>(g + at, 1, left, x);
            read_one_by_one<VECTOR>(m + at, 1, left, first);
        }
        const float scale = INT8 && left > 0 ? m_scales[at / GROUP] : 0.0f;
        #pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            if (!steps) continue;
            const float part = quotient(first[i], 127.0f);
            const float old = INT8 ? quotient(scale * part, 2 - fabs(part)) : first[i];
            first[i] = old + forget * (x[i] - old);
            largest = larger(largest, fabs(first[i]));
            y[i] = decay * y[i] - rate * first[i];
            if (BFLOAT16) y[i] = bfloat16_of(y[i]);
        }
        if (INT8) {
            #pragma unroll
            for (int distance = LANES / 2; distance > 0; distance /= 2)
                largest = larger(largest, simd_shuffle_xor(largest, distance));
            if (left > 0 && at % GROUP == 0) new_m_scales[at / GROUP] = steps ? largest : scale;
            #pragma unroll
            for (int i = 0; i < VECTOR; i++) {
                const float z = quotient(first[i], largest);
                codes[i] = steps ? code_of(127 * (2 * quotient(z, 1 + fabs(z)))) : static_cast<int>(first[i]);
            }
        }
        write_as<VECTOR, W>(new_w + at, left, y);
        if (INT8) {
            write_as<VECTOR, M>(new_m + at, left, codes);
        } else {
            write_as<VECTOR, M>(new_m + at, left, first);
        }
    }
"""

TEXT = Text(
    name="ember_adam_mini_step",
    inputs=("w", "g", "m", "m_scales", "v", *NUMBERS, "finite"),
    outputs=("new_w", "new_m", "new_m_scales", "new_v"),
    source=SOURCE.replace("SMALLEST_NORMAL", f"{SMALLEST_NORMAL!r}f"),
    functions=FUNCTIONS,
    in_rows=True,
)


class Numbers(NamedTuple):
    """What a step needs beside its arrays: floats, or arrays of one float32."""

    learning_rate: mx.array  # over 1 - beta1^t
    kept: mx.array  # of a weight after decay, 1 - learning_rate * weight_decay
    forget1: float  # 1 - beta1, of a beta1 of 0.5 or more
    forget2: float
    correction2: mx.array  # 1 - beta2^t
    eps: float


def step_rows(
    w: mx.array,
    g: mx.array,
    m: mx.array,
    m_scales: mx.array | None,
    v: mx.array,
    numbers: Numbers,
    rows_are_blocks: bool,
    finite: mx.array | None = None,
) -> tuple[mx.array, mx.array, mx.array | None, mx.array]:
    """One step of the rows of a matrix, on the GPU that is MLX's default device.

    Args:
        w (array): (rows, columns), float32 or bfloat16.
        g (array): Its gradient, in float32, bfloat16 or float16; a transposed one is copied.
        m (array): The momentum, float32 (rows, columns); or its codes, int8 (groups, 32), of columns in whole groups.
        m_scales (array, optional): Of the codes, (groups,) float32.
        v (array): Second moments of the rows, (rows,) float32: those before this step where ``rows_are_blocks``, which
            the kernel then updates; else those of this step.
        numbers (Numbers): Of this step.
        finite (array, optional): A bool. Where it is False, all four are what they were, whatever ``g`` holds.

    Returns:
        The new ``w``, ``m``, ``m_scales`` and ``v``.
    """
    scales = mx.zeros(1) if m_scales is None else m_scales
    inputs = [w, g, m, scales, v, *scalars(*numbers), flag(finite)]
    w, m, scales, v = kernel(TEXT)(inputs=inputs, **launch(w, g, m, scales, rows_are_blocks, finite is not None))
    return w, m, None if m_scales is None else scales, v


def launch(
    w: mx.array, g: mx.array, m: mx.array, m_scales: mx.array, rows_are_blocks: bool, selects: bool
) -> dict[str, Any]:
    """What the kernel is called with: its constants, the size of its grid, and its outputs."""
    rows, columns = w.shape
    int8 = m.dtype == mx.int8
    vector = BYTES_AT_ONCE // max(w.itemsize, g.itemsize, 1 if int8 else m.itemsize)
    on_cuda = CUDA_THREADS_INT8 if int8 else CUDA_THREADS
    most = on_cuda if mx.cuda.is_available() else MOST_THREADS
    threads = min(most, -(-columns // (SIMDGROUP * vector)) * SIMDGROUP)
    constants = {
        "SELECTS": int(selects),
        "W": w.dtype,
        "G": g.dtype,
        "M": m.dtype,
        "INT8": int(int8),
        "ROWS_ARE_BLOCKS": int(rows_are_blocks),
        "BFLOAT16": int(w.dtype == mx.bfloat16),
        "GROUP": GROUP,
        "VECTOR": vector,
        "GRADIENTS": BYTES_AT_ONCE // g.itemsize,
        "SIMDGROUP": SIMDGROUP,
        "MOST_SIMDGROUPS": most // SIMDGROUP,
    }
    shapes, dtypes = [w.shape, m.shape, m_scales.shape, (rows,)], [w.dtype, m.dtype, mx.float32, mx.float32]
    return launch_of(constants, rows, threads, shapes, dtypes)


def differences(w_dtype: mx.Dtype, g_dtype: mx.Dtype) -> str | None:
    """Where the kernel differs from plain operations on awkward rows of those dtypes, in words, or None.

    More columns than the threads take at once, rows that begin at any address, over eight decades; momentum in float32
    and in 8 bits. A GPU may round a sum of products once where plain operations round twice, which moves a few codes.
    By a gradient that is not finite nothing may change.
    """
    numbers = Numbers(*map(mx.array, (1e-2, 0.999)), 0.1, 0.001, mx.array(0.002), 1e-8)
    odd = MOST_THREADS * BYTES_AT_ONCE // g_dtype.size + 37
    for columns, int8 in ((odd, False), (41 * GROUP, False), (41 * GROUP, True)):
        shape = (7, columns)
        normal = [mx.random.normal(shape, key=mx.random.key(number)) for number in range(3)]
        scale = 10 ** mx.linspace(-6, 2, shape[0])[:, None]
        w, g, m = normal[0].astype(w_dtype), (normal[1] * scale).astype(g_dtype), normal[2] * scale
        v = mx.square(scale[:, 0])
        stored = encode_momentum(m) if int8 else (m, None)
        old = decode_momentum(*stored, shape) if int8 else m
        for own in (True, False):
            momentum = old + numbers.forget1 * (g.astype(mx.float32) - old)
            square = v + own * numbers.forget2 * (mx.square(g.astype(mx.float32)).mean(axis=1) - v)
            rates = numbers.learning_rate / (mx.sqrt(square / numbers.correction2) + numbers.eps)
            expected = numbers.kept * w.astype(mx.float32) - rates[:, None] * momentum
            given = *stored, v, numbers, own
            wrong = changed(step_rows(w, g * math.nan, *given, mx.array(False)), (w, *stored, v))
            for finite in (None, mx.array(True)):
                wrong = wrong or _difference(step_rows(w, g, *given, finite), expected, momentum, square)
            if wrong:
                kind = "8-bit momentum" if int8 else "float32 momentum"
                return f"{wrong}, of {w_dtype} weights, {g_dtype} gradients and {kind}"
    return None


def _difference(found, w, momentum, v):
    """In words, or None."""
    new_w, m, scales, new_v = found
    half_unit = {mx.float32: 2.0**-22, mx.bfloat16: 2.0**-8}[new_w.dtype]  # float32: of two roundings
    if not (error := (mx.abs(new_w.astype(mx.float32) - w) - half_unit * mx.abs(w)).max().item()) <= 1e-6:
        return f"Weights are off by {error:.1e}"
    if not (error := (mx.abs(new_v - v) / v).max().item()) < 1e-5:
        return f"Second moments are off by {error:.1e} of themselves"
    if scales is None:
        error = (mx.abs(m - momentum) / mx.abs(momentum).max(axis=1, keepdims=True)).max().item()
        return None if error < 1e-6 else f"The momentum is off by {error:.1e}"
    codes, expected = encode_momentum(momentum)
    if not (error := (mx.abs(scales - expected) / expected).max().item()) < 1e-5:
        return f"Scales are off by {error:.1e} of themselves"
    apart = mx.abs(m.astype(mx.int32) - codes.astype(mx.int32))
    if apart.max().item() > 1 or (apart > 0).mean().item() > MOST_FLIPPED:
        return f"{(apart > 0).mean().item():.1%} of the codes differ, by up to {apart.max().item()}"
    return None
