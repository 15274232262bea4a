"""How far a float32 optimizer may be from the float64 oracle: one table, each bound with its reason.

The bounds are derived from the arithmetic: the sizes of roundings, and how they add up. ``measured`` is the largest
error seen, as a part of the bound (MLX 0.32.4 and PyTorch 2.13 on an x86-64 CPU): a bound far above what is measured
would hide faults, and one right at it would break on the next machine. Only the rounding to the dtype of the parameter,
at most half a unit, is reached by nature.
"""

from dataclasses import dataclass

import numpy as np

from ember_mlx.shared.float_formats import SMALLEST_NORMAL, unit_in_the_last_place

__all__ = ["ROUNDING", "TOLERANCES", "Tolerance", "bound", "weight_bound", "worst"]

ROUNDING = 2.0**-24  # the largest relative error of one float32 operation

# A running mean forgets: what happened more than about 1 / (1 - beta2) steps ago no longer adds to its error.
MEMORY = 1000

# The mean over a row or a column squares, adds up to 257 values (the largest table here) and divides. The errors of a
# sum of positive numbers are a random walk, sqrt(257) = 16.
MEAN_OF_SQUARES = 16 * ROUNDING

# Each step rounds the running mean once, by 0.4 * ROUNDING (root mean square over all fractions): as a random walk,
# 0.4 * sqrt(steps). Thousands of elements are compared, so allow four standard deviations. That asks for the form
# r + (1 - beta2) * (mean - r). In beta2 * r + (1 - beta2) * mean the rounding of beta2 itself, 1.3e-8 for 0.999, comes
# back at every step and adds up to 5e-6 of r after 1000: too much here, and needless.
RUNNING_MEAN = 1.6 * ROUNDING

# sqrt(r * c / s) has half the relative error of r, half that of c and half that of s.
STATISTICS_IN_STEP = 1.5

# s, 1 - beta2^t (logarithm, product and exponential), their product, a division, two roots, a product, eps, the
# division of the gradient, the learning rate and its rounding: about a dozen, those under a root counting half.
STEP_OPERATIONS = 10 * ROUNDING


@dataclass(frozen=True)
class Tolerance:
    reason: str
    measured: float  # the largest error seen, as a part of the bound
    once: float = 0.0  # relative
    per_root_step: float = 0.0  # relative, times the square root of the number of steps
    units: float = 0.0  # units in the last place of the dtype
    absolute: float = 0.0


TOLERANCES = {
    **{
        (quantity, "float32"): Tolerance(
            once=MEAN_OF_SQUARES,
            per_root_step=RUNNING_MEAN,
            absolute=SMALLEST_NORMAL,
            measured=measured,
            reason=f"a mean over a {line}, a running mean; squares of gradients under 1e-19 are subnormal or flushed",
        )
        for quantity, line, measured in (("r", "row", 0.41), ("c", "column", 0.55))
    },
    ("c of many rows", "float32"): Tolerance(
        once=64 * ROUNDING,
        absolute=SMALLEST_NORMAL,
        measured=0.14,
        reason="a sum down blocks of 4,096 rows is a random walk of 64 roundings; the blocks are few beside that",
    ),
    **{
        # The change of the weights, seen alone: the step from a table of zeros.
        ("step", dtype): Tolerance(
            once=STATISTICS_IN_STEP * MEAN_OF_SQUARES + STEP_OPERATIONS,
            per_root_step=STATISTICS_IN_STEP * RUNNING_MEAN,
            units=0.5,
            absolute=SMALLEST_NORMAL,
            measured=measured,
            reason="the errors of r, c and s through a root, a dozen float32 operations, and one rounding to the dtype",
        )
        for dtype, measured in {"float32": 0.26, "bfloat16": 1.00, "float16": 1.00}.items()
    },
    **{
        # On top of the error of the step: see weight_bound.
        ("weight", dtype): Tolerance(
            once=3 * ROUNDING,
            units=0.5,
            absolute=SMALLEST_NORMAL,
            measured=measured,
            reason="1 - lr * wd, its product with the weight, a difference in float32, one rounding to the dtype",
        )
        for dtype, measured in {"float32": 0.56, "bfloat16": 1.00, "float16": 1.00}.items()
    },
}


def bound(quantity: str, dtype: str, expected: np.ndarray, steps: int | np.ndarray) -> np.ndarray:
    """The largest error allowed of each element after that many steps, one number or an array beside ``expected``."""
    tolerance = TOLERANCES[quantity, dtype]
    relative = tolerance.once + tolerance.per_root_step * np.sqrt(np.minimum(steps, MEMORY))
    return relative * np.abs(expected) + tolerance.units * unit_in_the_last_place(expected, dtype) + tolerance.absolute


def weight_bound(
    dtype: str, before: np.ndarray, expected: np.ndarray, change: np.ndarray, steps: int | np.ndarray
) -> np.ndarray:
    """The largest error allowed of weights that one step, the last of ``steps``, took from ``before`` to ``expected``.

    ``change`` is what that step subtracted; its error counts whether or not the weight is large beside it.
    """
    tolerance = TOLERANCES["weight", dtype]
    return (
        bound("step", "float32", change, steps)
        + tolerance.once * np.maximum(np.abs(before), np.abs(expected))
        + tolerance.units * unit_in_the_last_place(expected, dtype)
        + tolerance.absolute
    )


def worst(actual: np.ndarray, expected: np.ndarray, allowed: np.ndarray) -> float:
    """The largest error as a part of what is allowed: at most 1 where all is well, infinite where a NaN turns up."""
    error = np.abs(np.asarray(actual, dtype=np.float64) - expected)
    return float(np.max(np.where(np.isfinite(error), error / allowed, np.inf), initial=0.0))
