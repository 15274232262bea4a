"""What the float formats can hold; needs neither framework."""

import numpy as np

__all__ = ["FORMATS", "LARGEST", "ROUNDS_TO_INFINITY", "ROUNDS_TO_ONE", "SMALLEST_NORMAL", "unit_in_the_last_place"]

LARGEST = 2.0**128 - 2.0**104  # of float32
ROUNDS_TO_INFINITY = 2.0**128 - 2.0**103  # in float32: this and all above
ROUNDS_TO_ONE = 1 - 2.0**-25  # in float32: this and all between it and 1
SMALLEST_NORMAL = 2.0**-126  # of float32; below it GPUs flush to zero and a CPU keeps fewer and fewer digits
# (bits of the fraction, smallest exponent) of the dtypes that a parameter may have.
FORMATS = {"float32": (23, -126), "bfloat16": (7, -126), "float16": (10, -14)}


def unit_in_the_last_place(values: np.ndarray, dtype: str) -> np.ndarray:
    """The distance between neighbours of that dtype at each of the float64 values."""
    fraction_bits, smallest_exponent = FORMATS[dtype]
    fraction, exponent = np.frexp(values)  # value = fraction * 2^exponent with a fraction from 1/2 to 1, or 0 for 0
    exponent = np.where(fraction == 0, smallest_exponent, np.maximum(exponent - 1, smallest_exponent))
    return np.exp2(exponent - float(fraction_bits))
