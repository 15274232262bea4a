r"""Moments in 8 bits: groups of 32 neighbours, each with a scale, and codes on a curve that spares small values.

The formats are those of FlashOptim (arXiv 2602.23349). Of a group with the largest magnitude :math:`s`

.. math::

    z &= m / s, \quad \text{code} = \lfloor 127 \cdot 2 z / (1 + |z|) + 1/2 \rfloor, \quad
    y = \text{code} / 127, \quad m \approx s \, y / (2 - |y|) \\
    u &= \sqrt{v} / s, \quad \text{code} = \lfloor 255 u + 1/2 \rfloor, \quad v \approx (s \, \text{code} / 255)^2

where in the second line :math:`s` is the largest :math:`\sqrt{v}`. Two things are ours, and options give them up.
Scales are float32, since float16 loses moments of gradients below 1e-5. No positive v gets the code 0, since a step
would then divide by epsilon alone.
"""

import math

import mlx.core as mx

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
LEAST_SCALES = {mx.float32: SMALLEST_NORMAL, mx.float16: 1e-12}


def encode_momentum(m: mx.array, scale_dtype: mx.Dtype = mx.float32) -> tuple[mx.array, mx.array]:
    """Codes (groups, 32) int8 and scales (groups,) of ``m``, of any shape, float32; the last group is padded."""
    m = grouped(m)
    scales = mx.maximum(mx.abs(m).max(axis=1), LEAST_SCALES[scale_dtype])
    z = m / scales[:, None]
    codes = mx.floor(127 * (2 * z / (1 + mx.abs(z))) + 0.5)
    return codes.astype(mx.int8), scales.astype(scale_dtype)


def decode_momentum(codes: mx.array, scales: mx.array, shape: tuple[int, ...]) -> mx.array:
    """The float32 array of ``shape`` that the codes and scales stand for."""
    y = codes.astype(mx.float32) / 127
    return ungrouped(scales[:, None].astype(mx.float32) * y / (2 - mx.abs(y)), shape)


def encode_second_moment(
    v: mx.array, scale_dtype: mx.Dtype = mx.float32, keep_positive: bool = True
) -> tuple[mx.array, mx.array]:
    """Codes (groups, 32) uint8 and scales (groups,) of ``v``, zero or more, of any shape, float32.

    With ``keep_positive`` a v above 0 gets at least the code 1.
    """
    root = mx.sqrt(grouped(v))
    scales = mx.maximum(root.max(axis=1), LEAST_SCALES[scale_dtype])
    codes = mx.floor(255 * (root / scales[:, None]) + 0.5)
    if keep_positive:
        codes = mx.where(root > 0, mx.maximum(codes, 1), codes)
    return codes.astype(mx.uint8), scales.astype(scale_dtype)


def decode_second_moment(codes: mx.array, scales: mx.array, shape: tuple[int, ...]) -> mx.array:
    """The float32 array of ``shape`` that the codes and scales stand for."""
    root = scales[:, None].astype(mx.float32) * codes.astype(mx.float32) / 255
    return ungrouped(mx.square(root), shape)


def groups_of(size: int) -> int:
    """How many groups an array of ``size`` elements has."""
    return -(-size // GROUP)


def grouped(x: mx.array) -> mx.array:
    """Any array as (groups, 32), the last group filled up with zeros."""
    x = x.reshape(-1)
    missing = -x.size % GROUP
    return (mx.pad(x, (0, missing)) if missing else x).reshape(-1, GROUP)


def ungrouped(x: mx.array, shape: tuple[int, ...]) -> mx.array:
    """The first elements of (groups, 32), in ``shape``."""
    size = math.prod(shape)
    return (x if x.size == size else x.reshape(-1)[:size]).reshape(shape)
