"""Stochastic rounding as it should be, in NumPy: float64 arithmetic, which is exact here, and integers for the bits.

Written apart from what it checks, like the oracle, except for the hash, which is a definition.
"""

import numpy as np

from ember_mlx.shared.float_formats import FORMATS

__all__ = ["mix", "random_bits", "round_stochastically"]

MASK = np.uint64(2**32 - 1)


def mix(x: np.ndarray) -> np.ndarray:
    """lowbias32 of numbers below 2^32, in 64 bits."""
    x = np.asarray(x, np.uint64)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor) & MASK
    return x ^ (x >> np.uint64(16))


def random_bits(seed: int, number: int, step: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """What the optimizer with that seed uses for its table of that number, from 0, in that step, from 1.

    Args:
        rows, columns (array): The numbers of the rows and of the columns to look at.
    """
    of_table = mix(np.uint64(seed) ^ mix(number + 1))
    of_rows = mix(mix(of_table ^ mix(step)) ^ np.asarray(rows, np.uint64))
    return mix(of_rows[:, None] ^ mix(columns)).astype(np.uint32)


def round_stochastically(values: np.ndarray, random: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 values rounded to that dtype by those 32 random bits each; as float64.

    Away from zero when the part of the way to that neighbour and a random part, of the 16 or 13 bits that a float32 has
    more, make a whole. Below its normal numbers float16 compares with 24 bits, and from the neighbour below.
    """
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    magnitude = np.where(finite, np.abs(values), 0)
    fraction_bits, smallest_exponent = FORMATS[dtype]
    unit = np.exp2(np.maximum(np.frexp(magnitude)[1] - 1, smallest_exponent) - float(fraction_bits))
    bits = 23 - fraction_bits
    part = magnitude / unit % 1 + (random >> (32 - bits)) * 2.0**-bits
    rounded = np.copysign(np.floor(magnitude / unit) + (part >= 1), values) * unit
    if dtype == "float16":
        below = np.floor(np.where(finite, values, 0) / unit)
        up = np.where(finite, values, 0) / unit - below > (random >> 8) * 2.0**-24
        rounded = np.where(magnitude < 2.0**-14, (below + up) * unit, rounded)
    largest = (2 - 2.0**-fraction_bits) * 2.0 ** (127 if dtype == "bfloat16" else 15)
    rounded = np.clip(rounded, -largest, largest)  # what is finite stays finite
    return np.where(finite, rounded, values)
