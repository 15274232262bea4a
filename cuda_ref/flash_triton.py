"""A whole step of FlashAdamW or FlashLion in Triton: decoded moments live in registers.

One kernel reads weight, gradient and codes once and writes weight and codes. A program takes whole groups of 32.
"""

import torch

from cuda_ref import triton_kernels
from cuda_ref.optimizers.companded import GROUP
from cuda_ref.optimizers.flash_arithmetic import Numbers, Stored
from cuda_ref.triton_kernels import device_of, launchable
from ember_mlx.shared.float_formats import SMALLEST_NORMAL

if triton_kernels.available():
    import triton
    import triton.language as tl

    _running_mean = triton_kernels._running_mean  # Triton finds it among the globals of its file

__all__ = ["flash_step"]

GROUPS_PER_PROGRAM = 64


def flash_step(stored: Stored, g: torch.Tensor, numbers: Numbers) -> Stored:
    """As ``flash_step`` of ``cuda_ref.optimizers.flash_arithmetic`` in its own format; ``w`` and ``g`` have any shape.

    All of ``stored`` is overwritten. What does not lie row by row in memory is copied first.
    """
    w, groups = stored.w.contiguous(), len(stored.m)
    learning_rate, kept = (launchable(number, w.device) for number in (numbers.learning_rate, numbers.kept))
    with device_of(w):
        _flash_step[(triton.cdiv(groups, GROUPS_PER_PROGRAM),)](
            w, stored.rest, g.contiguous(), stored.m, stored.m_scales, stored.v, stored.v_scales, w.numel(), groups,
            learning_rate, kept, float(numbers.beta1), 1.0 - numbers.beta1, float(numbers.beta2), 1.0 - numbers.beta2,
            numbers.correction1, numbers.correction2, float(numbers.eps), SMALLEST_NORMAL,
            RATE_IS_TENSOR=isinstance(learning_rate, torch.Tensor), BFLOAT16=w.dtype == torch.bfloat16,
            GROUP=GROUP, GROUPS=GROUPS_PER_PROGRAM, num_warps=4,
        )  # fmt: skip
    if not stored.w.is_contiguous():
        stored.w.copy_(w)
    return stored


if triton_kernels.available():

    @triton.jit
    def _flash_step(
        w, rest, g, m, m_scales, v, v_scales, size, groups,
        learning_rate, kept, beta1, forget1, beta2, forget2, correction1, correction2, eps, least,
        RATE_IS_TENSOR: tl.constexpr, BFLOAT16: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    ):  # fmt: skip
        if RATE_IS_TENSOR:
            learning_rate, kept = tl.load(learning_rate), tl.load(kept)
        learning_rate, kept = tl.cast(learning_rate, tl.float32), tl.cast(kept, tl.float32)
        eps, least = tl.cast(eps, tl.float32), tl.cast(least, tl.float32)
        group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
        at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside, is_group = at < size, group < groups
        has_codes = (at >= 0) & is_group[:, None]

        y = tl.load(w + at, mask=inside, other=0).to(tl.float32)
        x = tl.load(g + at, mask=inside, other=0).to(tl.float32)
        if rest is not None:
            r = tl.load(rest + at, mask=inside, other=0).to(tl.float32)
            y = tl.where(r == 0, y, y + _half_unit(y) * r / 127)
        part = tl.load(m + at, mask=has_codes, other=0).to(tl.float32) / 127
        old = tl.load(m_scales + group, mask=is_group, other=0)[:, None] * part / (2 - tl.abs(part))
        if v is not None:
            root = tl.load(v_scales + group, mask=is_group, other=0)[:, None]
            root = root * tl.load(v + at, mask=has_codes, other=0).to(tl.float32) / 255
            square = root * root
            square = _running_mean(square, x * x, beta2, forget2, False)
            new = _running_mean(old, x, beta1, forget1, False)
            corrected = tl.sqrt_rn(square / tl.load(correction2)) + eps
            y = kept * y - learning_rate * ((new / tl.load(correction1)) / corrected)
            root = tl.sqrt_rn(square)
            largest = _largest(root, least)
            tl.store(v_scales + group, largest, mask=is_group)
            codes = _code(255 * (root / largest[:, None]))
            codes = tl.where((root > 0) & (codes < 1), 1.0, codes)
            tl.store(v + at, codes.to(tl.uint8), mask=has_codes)
        else:
            direction = _running_mean(old, x, beta1, forget1, False)
            new = _running_mean(old, x, beta2, forget2, False)
            sign = (direction > 0).to(tl.float32) - (direction < 0).to(tl.float32)
            y = kept * y - learning_rate * tl.where(direction == direction, sign, direction)
        largest = _largest(tl.abs(new), least)
        tl.store(m_scales + group, largest, mask=is_group)
        z = new / largest[:, None]
        tl.store(m + at, _code(127 * (2 * z / (1 + tl.abs(z)))).to(tl.int8), mask=has_codes)
        if BFLOAT16:
            low = _to_bfloat16(y)
            if rest is not None:
                part = (y - low) / _half_unit(low)
                part = 127 * tl.where(part > 1, 1.0, tl.where(part < -1, -1.0, part))
                r = tl.where(part < 0, -_code(-part), _code(part))
                tl.store(rest + at, r.to(tl.int8), mask=inside)
            y = low
        tl.store(w + at, y.to(w.dtype.element_ty), mask=inside)

    @triton.jit
    def _largest(magnitudes, least):
        """Of each group, (GROUPS,), at least that; NaN where there is one."""
        has_nan = tl.max((magnitudes != magnitudes).to(tl.int32), 1) > 0
        return tl.where(has_nan, float("nan"), tl.maximum(tl.max(magnitudes, 1), least))

    @triton.jit
    def _code(value):
        """The nearest whole number; 0 for a NaN."""
        code = tl.floor(value + 0.5)
        return tl.where(code == code, code, 0.0)

    @triton.jit
    def _to_bfloat16(value):
        """To the nearest bfloat16, still float32: by its bits, since Triton's interpreter cuts off."""
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where((bits & 0x7FFFFFFF) < 0x7F800000, rounded, value)

    @triton.jit
    def _half_unit(low):
        """As ``half_unit`` of ``cuda_ref.optimizers.split_weights``, by the bits."""
        exponent = low.to(tl.uint32, bitcast=True) & 0x7F800000
        return (tl.maximum(exponent, 9 << 23) - (8 << 23)).to(tl.float32, bitcast=True)
