r"""Moments in 8 bits: groups of 32 neighbours, each with a scale, and codes on a curve that spares small values.

The formats are those of FlashOptim (arXiv 2602.23349). Of a group with the largest magnitude :math:`s`

.. math::

    z &= m / s, \quad \text{code} = \lfloor 127 \cdot 2 z / (1 + |z|) + 1/2 \rfloor, \quad
    y = \text{code} / 127, \quad m \approx s \, y / (2 - |y|) \\
    u &= \sqrt{v} / s, \quad \text{code} = \lfloor 255 u + 1/2 \rfloor, \quad v \approx (s \, \text{code} / 255)^2

where in the second line :math:`s` is the largest :math:`\sqrt{v}`. Two things are ours, and options give them up.
Scales are float32, since float16 loses moments of gradients below 1e-5. No positive v gets the code 0, since a step
would then divide by epsilon alone.
The functions are those of ``ember_mlx/optimizers/companded.py``, line against line.
"""

import math

import torch

from ember_mlx.shared.float_formats import SMALLEST_NORMAL

__all__ = [
    "GROUP",
    "decode_momentum",
    "decode_second_moment",
    "encode_momentum",
    "encode_second_moment",
    "grouped",
    "groups_of",
    "ungrouped",
]

GROUP = 32  # neighbours that share a scale: a simdgroup
# No scale is below: float16, by the publication, has nothing between 0 and 6e-8 anyway.
LEAST_SCALES = {torch.float32: SMALLEST_NORMAL, torch.float16: 1e-12}


def encode_momentum(m: torch.Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (groups, 32) int8 and scales (groups,) of ``m``, of any shape, float32; the last group is padded."""
    m = grouped(m)
    scales = torch.clamp(torch.abs(m).amax(dim=1), min=LEAST_SCALES[scale_dtype])
    z = m / scales[:, None]
    codes = torch.floor(127 * (2 * z / (1 + torch.abs(z))) + 0.5)
    return codes.to(torch.int8), scales.to(scale_dtype)


def decode_momentum(codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The float32 array of ``shape`` that the codes and scales stand for."""
    y = codes.to(torch.float32) / 127
    return ungrouped(scales[:, None].to(torch.float32) * y / (2 - torch.abs(y)), shape)


def encode_second_moment(
    v: torch.Tensor, scale_dtype: torch.dtype = torch.float32, keep_positive: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (groups, 32) uint8 and scales (groups,) of ``v``, zero or more, of any shape, float32.

    With ``keep_positive`` a v above 0 gets at least the code 1.
    """
    root = torch.sqrt(grouped(v))
    scales = torch.clamp(root.amax(dim=1), min=LEAST_SCALES[scale_dtype])
    codes = torch.floor(255 * (root / scales[:, None]) + 0.5)
    if keep_positive:
        codes = torch.where(root > 0, torch.clamp(codes, min=1), codes)
    return codes.to(torch.uint8), scales.to(scale_dtype)


def decode_second_moment(codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The float32 array of ``shape`` that the codes and scales stand for."""
    root = scales[:, None].to(torch.float32) * codes.to(torch.float32) / 255
    return ungrouped(torch.square(root), shape)


def groups_of(size: int) -> int:
    """How many groups an array of ``size`` elements has."""
    return -(-size // GROUP)


def grouped(x: torch.Tensor) -> torch.Tensor:
    """Any array as (groups, 32), the last group filled up with zeros."""
    x = x.reshape(-1)
    missing = -x.numel() % GROUP
    return (torch.nn.functional.pad(x, (0, missing)) if missing else x).reshape(-1, GROUP)


def ungrouped(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The first elements of (groups, 32), in that shape."""
    size = math.prod(shape)
    return (x if x.numel() == size else x.reshape(-1)[:size]).reshape(shape)
