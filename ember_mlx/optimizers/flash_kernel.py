"""A whole step of FlashAdamW or FlashLion: one kernel, written once for Metal and CUDA.

As plain operations, decoded moments are float32 arrays, more scratch memory than AdamW's state. Here they live in
registers. A group of 32 weights lies in one simdgroup: 4 threads take 8 weights each, and the largest magnitude of the
group is shuffled together. Each weight is read and written once, with 8 bits of each moment.
"""

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ember_mlx.kernels.metal_and_cuda import MOST_THREADS, Text, flag, kernel, launch_of, scalars
from ember_mlx.optimizers.companded import GROUP
from ember_mlx.optimizers.flash_arithmetic import Numbers, Stored, flash_block
from ember_mlx.optimizers.split_weights import join
from ember_mlx.shared.float_formats import SMALLEST_NORMAL

__all__ = ["FUNCTIONS", "MOST_FLIPPED", "changed", "differences", "flash_step"]

NUMBERS = ("learning_rate", "kept", "forgotten1", "forgotten2", "correction1", "correction2", "eps")
VECTOR = 8  # weights of a thread
MOST_FLIPPED = 0.02  # codes that a float32 rounding moves to their neighbour

# The body of the kernel, in Metal's words. The arrays are flat; those of codes have whole groups.
SOURCE = """
    constexpr int LANES = GROUP / VECTOR;
    const int thread_index = thread_position_in_threadgroup.x;
    const int64_t size = w_shape[0], groups = (size + GROUP - 1) / GROUP;
    const int64_t threadgroup_index = threadgroup_position_in_grid.x;
    const int64_t at = (threadgroup_index * THREADS + thread_index) * VECTOR, group = at / GROUP;
    const int64_t left = size - at, left_of_codes = groups * GROUP - at;
    const float rate = learning_rate[0], decay = kept[0], forget1 = forgotten1[0], forget2 = forgotten2[0];
    const float bias1 = correction1[0], bias2 = correction2[0], least_denominator = eps[0];
    const bool steps = !SELECTS || finite[0];
    const float m_scale = group < groups ? m_scales[group] : 0.0f;
    const float v_scale = ADAMW && group < groups ? v_scales[group] : 0.0f;

    // All reads are under way before the first is waited for.
    const bool together = left >= VECTOR && aligned<VECTOR>(w + at) && aligned<VECTOR>(g + at)
        && (!SPLIT || aligned<VECTOR>(rest + at)) && aligned<VECTOR>(m + at) && (!ADAMW || aligned<VECTOR>(v + at));
    float y[VECTOR], x[VECTOR], r[VECTOR], first[VECTOR], second[VECTOR];
    if (together) {
        read_together<VECTOR>(w + at, y);
        read_together<VECTOR>(g + at, x);
        read_together<VECTOR>(m + at, first);
        if (SPLIT) read_together<VECTOR>(rest + at, r);
        if (ADAMW) read_together<VECTOR>(v + at, second);
    } else {
        read_one_by_one<VECTOR>(w + at, 1, left, y);
        read_one_by_one<VECTOR>(g + at, 1, left, x);
        read_one_by_one<VECTOR>(m + at, 1, left_of_codes, first);
        if (SPLIT) read_one_by_one<VECTOR>(rest + at, 1, left, r);
        if (ADAMW) read_one_by_one<VECTOR>(v + at, 1, left_of_codes, second);
    }

    float largest_m = 0, largest_root = 0;
    #pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        if (!steps) continue;
        if (SPLIT) y[i] = joined(y[i], r[i]);
        const float part = quotient(first[i], 127.0f);
        const float old = quotient(m_scale * part, 2 - fabs(part));
        first[i] = old + (ADAMW ? forget1 : forget2) * (x[i] - old);
        largest_m = larger(largest_m, fabs(first[i]));
        if (ADAMW) {
            const float root = quotient(v_scale * second[i], 255.0f), old_square = root * root;
            const float square = old_square + forget2 * (x[i] * x[i] - old_square);
            const float denominator = square_root(quotient(square, bias2)) + least_denominator;
            y[i] = decay * y[i] - rate * quotient(quotient(first[i], bias1), denominator);
            second[i] = square_root(square);
            largest_root = larger(largest_root, second[i]);
        } else {
            const float direction = old + forget1 * (x[i] - old);
            const float sign = direction > 0 ? 1.0f : direction < 0 ? -1.0f : direction == 0 ? 0.0f : direction;
            y[i] = decay * y[i] - rate * sign;
        }
    }
    #pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        largest_m = larger(largest_m, simd_shuffle_xor(largest_m, distance));
        if (ADAMW) largest_root = larger(largest_root, simd_shuffle_xor(largest_root, distance));
    }
    if (left_of_codes <= 0) return;

    constexpr float least = SMALLEST_NORMAL;
    largest_m = larger(largest_m, least);
    largest_root = larger(largest_root, least);
    if (at % GROUP == 0) {
        new_m_scales[group] = steps ? largest_m : m_scale;
        if (ADAMW) new_v_scales[group] = steps ? largest_root : v_scale;
    }
    int m_codes[VECTOR], v_codes[VECTOR], rests[VECTOR];
    #pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        if (!steps) {  // what was read
            m_codes[i] = static_cast<int>(first[i]);
            if (ADAMW) v_codes[i] = static_cast<int>(second[i]);
            if (SPLIT) rests[i] = static_cast<int>(r[i]);
            continue;
        }
        const float z = quotient(first[i], largest_m);
        m_codes[i] = code_of(127 * (2 * quotient(z, 1 + fabs(z))));
        if (ADAMW) {
            const int code = code_of(255 * quotient(second[i], largest_root));
            v_codes[i] = second[i] > 0 && code < 1 ? 1 : code;
        }
        if (BFLOAT16) {
            const float low = bfloat16_of(y[i]);
            if (SPLIT) rests[i] = rest_of(y[i], low);
            y[i] = low;
        }
    }
    write_together<VECTOR, M>(new_m + at, m_codes);
    if (ADAMW) write_together<VECTOR, V>(new_v + at, v_codes);
    write_as<VECTOR, W>(new_w + at, left, y);
    if (SPLIT) write_as<VECTOR, M>(new_rest + at, left, rests);
"""

# As in companded.py and split_weights.py, number by number. A NaN is the largest, and its code is 0.
FUNCTIONS = """
FUNCTION float larger(float a, float b) {
    return a > b || a != a ? a : b;
}

FUNCTION int code_of(float value) {
    return value == value ? static_cast<int>(floor(value + 0.5f)) : 0;
}

FUNCTION float bfloat16_of(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) >= 0x7f800000u) return value;  // infinity or NaN
    return float_of((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

FUNCTION uint32_t bits_of_half_unit(float low) {
    const uint32_t exponent = bits_of(low) & 0x7f800000u, least = 9u << 23;
    return (exponent > least ? exponent : least) - (8u << 23);
}

FUNCTION int rest_of(float value, float low) {
    const float of_half_units = float_of((254u << 23) - bits_of_half_unit(low));  // one over it, a power of two
    const float part = (value - low) * of_half_units;
    const int rest = code_of(127 * fabs(part > 1 ? 1.0f : part < -1 ? -1.0f : part));
    return part < 0 ? -rest : rest;
}

FUNCTION float joined(float low, float rest) {
    return rest == 0 ? low : low + quotient(float_of(bits_of_half_unit(low)) * rest, 127.0f);
}
"""

TEXT = Text(
    name="ember_flash_step",
    inputs=("w", "rest", "g", "m", "m_scales", "v", "v_scales", *NUMBERS, "finite"),
    outputs=("new_w", "new_rest", "new_m", "new_m_scales", "new_v", "new_v_scales"),
    source=SOURCE.replace("SMALLEST_NORMAL", f"{SMALLEST_NORMAL!r}f"),
    functions=FUNCTIONS,
)


def flash_step(stored: Stored, g: mx.array, numbers: Numbers, finite: mx.array | None = None) -> Stored:
    """As ``flash_block`` of ``flash_arithmetic``, on the GPU, in its own format; ``w`` and ``g`` have any shape.

    Args:
        stored (Stored): With ``w`` in float32 or bfloat16, and ``rest``, if any, in one and the same shape.
        g (array): The gradient, in the shape of ``w``; a transposed one is copied.
        numbers (Numbers): Of this step.
        finite (array, optional): A bool. Where it is False, all is what it was, whatever ``g`` holds.
    """
    nothing = mx.zeros(1)
    given = [nothing.astype(mx.int8) if stored.rest is None else stored.rest, g, stored.m, stored.m_scales]
    given += [nothing.astype(mx.uint8), nothing] if stored.v is None else [stored.v, stored.v_scales]
    n = numbers._replace(beta1=1 - numbers.beta1, beta2=1 - numbers.beta2)
    flat = [array.reshape(-1) for array in (stored.w, *given)]
    made = kernel(TEXT)(inputs=[*flat, *scalars(*n), flag(finite)], **launch(stored, g, finite is not None))
    return Stored(*(
        None if old is None else new.reshape(old.shape) for old, new in zip(stored, made, strict=True)
    ))  # fmt: skip


def launch(stored: Stored, g: mx.array, selects: bool) -> dict[str, Any]:
    """What the kernel is called with: its constants, the size of its grid, and its outputs."""
    constants = {
        "SELECTS": int(selects),
        "W": stored.w.dtype,
        "G": g.dtype,
        "M": mx.int8,
        "V": mx.uint8,
        "ADAMW": int(stored.v is not None),
        "SPLIT": int(stored.rest is not None),
        "BFLOAT16": int(stored.w.dtype == mx.bfloat16),
        "GROUP": GROUP,
        "VECTOR": VECTOR,
        "THREADS": MOST_THREADS,
    }
    groups = -(-stored.m.size // (MOST_THREADS * VECTOR))
    shapes = [(1 if old is None else old.size,) for old in stored]
    dtypes = [stored.w.dtype, mx.int8, mx.int8, mx.float32, mx.uint8, mx.float32]
    return launch_of(constants, groups, MOST_THREADS, shapes, dtypes)


def differences(w_dtype: mx.Dtype, g_dtype: mx.Dtype) -> str | None:
    """Where the kernel differs from plain operations on awkward weights of those dtypes, in words, or None.

    Groups that no threadgroup fills evenly, over eight decades; AdamW and Lion, with a rest and without
    where the weights are bfloat16. A GPU may round a sum of products once where plain operations round twice, which
    moves a few codes to their neighbour. By a gradient that is not finite nothing may change.
    """
    groups = 2 * MOST_THREADS * VECTOR // GROUP + 3
    numbers = Numbers(*map(mx.array, (1e-3, 0.9999)), 0.9, 0.999, *map(mx.array, (0.1, 0.001)), 1e-8)
    scale = 10 ** mx.linspace(-6, 2, groups)[:, None]
    normal = [mx.random.normal((groups, GROUP), key=mx.random.key(number)) for number in range(4)]
    w, g = normal[0].astype(w_dtype), (normal[1] * scale).astype(g_dtype)
    g[:, ::2] *= 1e-6  # beside the others, second moments that would round to 0
    m, v = (mx.clip(40 * x, -127, 127) for x in normal[2:])
    v[:, ::4] = 0
    for rest in (None, m.astype(mx.int8)) if w_dtype == mx.bfloat16 else (None,):
        for second in ((mx.abs(v).astype(mx.uint8), scale[:, 0]), (None, None)):
            stored = Stored(w, rest, m.astype(mx.int8), scale[:, 0], *second)
            expected = flash_block(stored, g, numbers, False)
            wrong = changed(flash_step(stored, g * math.nan, numbers, mx.array(False)), stored)
            for finite in (None, mx.array(True)):
                wrong = wrong or _difference(flash_step(stored, g, numbers, finite), expected, w)
            if wrong:
                return f"{wrong}, of {w_dtype} weights and {g_dtype} gradients"
    return None


def changed(left: Sequence[mx.array | None], before: Sequence[mx.array | None]) -> str | None:
    """What a step by a gradient that is not finite has changed, in words, or None."""
    wrong = sum((new != old).sum().item() for new, old in zip(left, before, strict=True) if old is not None)
    return f"{wrong} values change by a gradient that is not finite" if wrong else None


def _difference(found, expected, before):
    """In words, or None."""
    for name in ("m", "v"):
        if getattr(expected, name) is None:
            continue
        codes = [getattr(stored, name).astype(mx.int32) for stored in (found, expected)]
        apart = mx.abs(codes[0] - codes[1])
        if apart.max().item() > 1 or (apart > 0).mean().item() > MOST_FLIPPED:
            return f"{(apart > 0).mean().item():.1%} of the codes of {name} differ, by up to {apart.max().item()}"
        if name == "v" and ((codes[0] == 0) != (codes[1] == 0)).any().item():
            return "positive second moments have the code 0, or others have not"
        scales = [getattr(stored, f"{name}_scales") for stored in (found, expected)]
        error = (mx.abs(scales[0] - scales[1]) / scales[1]).max().item()
        if not error < 1e-5:
            return f"the scales of {name} are off by {error:.1e}"
    exact = [s.w.astype(mx.float32) if s.rest is None else join(s.w, s.rest) for s in (found, expected)]
    units = {mx.float32: 10 * 2.0**-23, mx.bfloat16: 2.0**-5}[found.w.dtype] if found.rest is None else 2.0**-13
    # A weight is what was and what is taken from it. The latter comes of five quotients and roots, within 2 units each.
    sizes = mx.maximum(mx.maximum(mx.abs(exact[1]), mx.abs(before.astype(mx.float32))), 1e-3)
    error = (mx.abs(exact[0] - exact[1]) / sizes).max().item()
    if not error <= units:
        return f"weights are off by {error:.1e} of themselves"
    return None
