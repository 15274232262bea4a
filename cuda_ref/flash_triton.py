"""A whole step of FlashAdamW or FlashLion in Triton: decoded moments live in registers.

One kernel reads weight, gradient and codes once and writes weight and codes. A program takes whole groups of 32.
"""

import torch

from cuda_ref import triton_kernels
from cuda_ref.optimizers.companded import GROUP
from cuda_ref.optimizers.flash_arithmetic import Stored
from cuda_ref.triton_kernels import device_of, launchable, log_of, shares
from ember_mlx.shared.float_formats import SMALLEST_NORMAL

if triton_kernels.available():
    import triton
    import triton.language as tl

    # Triton finds what a kernel calls among the globals of its file.
    _one_minus_exp, _running_mean = triton_kernels._one_minus_exp, triton_kernels._running_mean

__all__ = ["flash_step"]

GROUPS_PER_PROGRAM, NUM_WARPS = 64, 4


def flash_step(
    stored: Stored,
    g: torch.Tensor,
    t: torch.Tensor,
    learning_rate: float | torch.Tensor,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> Stored:
    """As ``flash_step`` of ``cuda_ref.optimizers.flash_arithmetic`` in its own format; ``w`` and ``g`` have any shape.

    ``t`` is the number of this step, from 1. All of ``stored`` is overwritten. What does not lie row by row in memory
    is copied first.
    """
    w, groups = stored.w.contiguous(), len(stored.m)
    learning_rate = launchable(learning_rate, w.device)
    with device_of(w):
        _flash_step[(triton.cdiv(groups, GROUPS_PER_PROGRAM),)](
            w, stored.rest, g.contiguous(), stored.m, stored.m_scales, stored.v, stored.v_scales, w.numel(), groups,
            t, learning_rate, float(weight_decay), *shares(betas[0]), *shares(betas[1]),
            *map(log_of, betas), float(eps), SMALLEST_NORMAL, RATE_IS_TENSOR=isinstance(learning_rate, torch.Tensor),
            BFLOAT16=w.dtype == torch.bfloat16, WHOLE_GROUPS=w.numel() % GROUP == 0,
            GROUP=GROUP, GROUPS=GROUPS_PER_PROGRAM, num_warps=NUM_WARPS,
        )  # fmt: skip
    if not stored.w.is_contiguous():
        stored.w.copy_(w)
    return stored


if triton_kernels.available():

    @triton.jit
    def _flash_step(
        w, rest, g, m, m_scales, v, v_scales, size, groups,
        t, learning_rate, weight_decay, beta1, forget1, beta2, forget2, log_beta1, log_beta2, eps, least,
        RATE_IS_TENSOR: tl.constexpr, BFLOAT16: tl.constexpr, WHOLE_GROUPS: tl.constexpr,
        GROUP: tl.constexpr, GROUPS: tl.constexpr,
    ):  # fmt: skip
        if RATE_IS_TENSOR:
            learning_rate = tl.load(learning_rate)
        learning_rate, weight_decay = tl.cast(learning_rate, tl.float32), tl.cast(weight_decay, tl.float32)
        eps, least = tl.cast(eps, tl.float32), tl.cast(least, tl.float32)
        kept = 1 - learning_rate * weight_decay
        group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
        at = group.to(tl.int64)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        is_group = group < groups
        has_codes = (at >= 0) & is_group[:, None]
        inside = has_codes if WHOLE_GROUPS else at < size

        y = tl.load(w + at, mask=inside, other=0).to(tl.float32)
        x = tl.load(g + at, mask=inside, other=0).to(tl.float32)
        if rest is not None:
            y += _half_unit(y) * (tl.load(rest + at, mask=inside, other=0).to(tl.float32) * (1 / 127))
        scale = tl.load(m_scales + group, mask=is_group, other=0)
        old = _decoded_momentum(tl.load(m + at, mask=has_codes, other=0), scale)
        if v is not None:
            step = tl.load(t)
            rate = learning_rate / _one_minus_exp(step * tl.cast(log_beta1, tl.float32))
            unbiased = 1 / tl.sqrt_rn(_one_minus_exp(step * tl.cast(log_beta2, tl.float32)))
            root = (tl.load(v_scales + group, mask=is_group, other=0) * (1 / 255))[:, None]
            root *= tl.load(v + at, mask=has_codes, other=0).to(tl.float32)
            root = _root(_running_mean(root * root, x * x, beta2, forget2, False))
            new = _running_mean(old, x, beta1, forget1, False)
            y = kept * y - rate * (new / (root * unbiased + eps))
            largest = _largest_of(root, least)
            tl.store(v_scales + group, largest, mask=is_group)
            codes = 255 * (root * (1 / largest)[:, None])
            # No positive second moment gets the code 0.
            codes = tl.where(root > 0, tl.maximum(codes, 1.0), 0.0)
            tl.store(v + at, (codes + 0.5).to(tl.uint8), mask=has_codes)
        else:
            direction = _running_mean(old, x, beta1, forget1, False)
            new = _running_mean(old, x, beta2, forget2, False)
            sign = (direction > 0).to(tl.float32) - (direction < 0).to(tl.float32)
            y = kept * y - learning_rate * tl.where(direction == direction, sign, direction)
        largest = _largest_of(new, least)
        tl.store(m_scales + group, largest, mask=is_group)
        tl.store(m + at, _momentum_codes(new, largest), mask=has_codes)
        if BFLOAT16:
            low = _to_bfloat16(y)
            if rest is not None:
                part = (y - low) * _one_over(_half_unit(low))
                part = 127 * tl.where(tl.abs(part) <= 1, part, 0.0)  # 0 of infinity and NaN
                r = tl.where(part < 0, part - 0.5, part + 0.5)  # half away from zero, as what follows cuts off
                tl.store(rest + at, r.to(tl.int8), mask=inside)
            y = low
        tl.store(w + at, y.to(w.dtype.element_ty), mask=inside)

    @triton.jit
    def _decoded_momentum(codes, scales):
        """As ``decode_momentum`` of ``cuda_ref.optimizers.companded``, of (GROUPS, 32) and (GROUPS,)."""
        code = codes.to(tl.float32)
        # y / (2 - |y|) is code / (254 - |code|): a reciprocal root, twice, is a third of a division of any numbers.
        one_over = tl.rsqrt(254 - tl.abs(code))
        return scales[:, None] * (code * one_over * one_over)

    @triton.jit
    def _momentum_codes(moment, scales):
        """As ``encode_momentum`` of ``cuda_ref.optimizers.companded`` by these scales."""
        z = moment * (1 / scales)[:, None]
        one_over = tl.rsqrt(1 + tl.abs(z))
        return tl.floor(254 * (z * one_over * one_over) + 0.5).to(tl.int8)

    @triton.jit
    def _largest_of(moments, least):
        """The largest magnitude of each group, (GROUPS,), at least that; NaN where there is one.

        By their bits, whose order is that of the magnitudes, with NaN above all.
        """
        bits = tl.max(tl.abs(moments).to(tl.int32, bitcast=True), 1)
        return tl.maximum(bits, tl.cast(least, tl.float32).to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)

    @triton.jit
    def _root(x):
        """The square root of x >= 0. The quick one takes subnormal numbers for zero, so small ones are scaled."""
        small = x < 5.421010862427522e-20  # 2^-64
        root = tl.sqrt(tl.where(small, x * 1.8446744073709552e19, x))
        return tl.where(small, root * 2.3283064365386963e-10, root)

    @triton.jit
    def _to_bfloat16(value):
        """To the nearest bfloat16, still float32: by its bits, since Triton's interpreter cuts off."""
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(value == value, rounded, value)

    @triton.jit
    def _one_over(power):
        """Of a power of two whose reciprocal is a normal number: exact, by the bits."""
        return ((254 << 23) - power.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)

    @triton.jit
    def _half_unit(low):
        """As ``half_unit`` of ``cuda_ref.optimizers.split_weights``, by the bits."""
        exponent = low.to(tl.uint32, bitcast=True) & 0x7F800000
        return (tl.maximum(exponent, 9 << 23) - (8 << 23)).to(tl.float32, bitcast=True)
