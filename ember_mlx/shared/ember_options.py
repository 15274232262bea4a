"""What the optimizers of both frameworks ask of their options beyond ranges of numbers; needs neither framework."""

import sys
import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np

from ember_mlx.shared.errors import InputError, did_you_mean
from ember_mlx.shared.float_formats import ROUNDS_TO_ONE, unit_in_the_last_place

__all__ = [
    "BETA2_RANGE",
    "SAMPLE",
    "STEPS_TO_LOOK_AT",
    "check_beta2_schedule",
    "check_rounding",
    "check_row_limit",
    "check_switch",
    "check_word",
    "not_one_number",
    "rounding_warning",
    "warn",
]

ROUNDINGS = ("nearest", "stochastic")
SAMPLE = 2**18  # elements of a table, about, that are looked at
LIBRARIES = ("ember_mlx", "cuda_ref", "mlx", "torch")
STEPS_TO_LOOK_AT = (0, *(2**i for i in range(17)))  # of a schedule, in steps done: to 65,536
# At 1, as float32 has it, a moment would never move.
BETA2_RANGE = (0, ROUNDS_TO_ONE, "at least 0 and, in float32, below 1, usually 0.999")
LEAST, MOST = 1e-30, 1e30  # of row_clip and row_floor: beyond, float32 comes to infinity, and that times 0 to NaN


def check_row_limit(option: str, value: float | None, flag: str | None = None, off: str = "") -> float | None:
    """Of ``row_clip`` or ``row_floor``; ``flag`` is its name on the command line, where it comes from there.

    Args:
        option, value, flag: See above.
        off: How the command line turns it off, for the error.

    Returns:
        The value as a plain float: NumPy would take ``numpy.float64(3) / array`` for its own.
    """
    if value is None:
        return None
    if not isinstance(value, Real) or not LEAST <= value <= MOST:
        call, or_none = (f"{flag} {value}", off) if flag else (f"Ember({option}={value!r})", ", or None")
        raise InputError(f"{call}: must be a number from 1e-30 to 1e30, usually 1 to 10{or_none}")
    return float(value)


def check_word(call: str, option: str, value: Any, allowed: tuple[str | None, ...]) -> None:
    """Refuse what is none of the words ``allowed``; ``call`` is the class for the error."""
    if not isinstance(value, str | None) or value not in allowed:
        *others, last = map(repr, allowed)
        in_words = f"{', '.join(others)} or {last}" if others else last
        near = did_you_mean(str(value), filter(None, allowed))
        raise InputError(f"{call}({option}={value!r}): must be {in_words}{near}")


def check_switch(call: str, option: str, value: Any, or_none: bool = False) -> None:
    """Refuse what is neither True nor False, such as the word "no", which Python takes for true."""
    if not isinstance(value, bool) and not (or_none and value is None):
        raise InputError(f"{call}({option}={value!r}): must be True or False{', or None' if or_none else ''}")


def check_rounding(rounding: str, seed: int) -> None:
    check_word("Ember", "rounding", rounding, ROUNDINGS)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise InputError(f"Ember(seed={seed!r}): must be a whole number from 0 to 2^32 - 1")


def check_beta2_schedule(beta2: Callable[[int], float]) -> None:
    """Look at the values of a schedule, from the number of steps done: inside a compiled step nothing can be raised."""
    for step in STEPS_TO_LOOK_AT:
        value = beta2(step)
        if not 0 <= value < ROUNDS_TO_ONE:
            raise InputError(
                f"Ember(beta2=...): the schedule gives {value:.6g} after {step} steps: must be at least 0 and below 1, "
                "in float32, too"
            )


def not_one_number(option: str, value: Any, step: int | None = None, optimizer: str = "Ember") -> InputError:
    """What to raise where the schedule of an option gave, after ``step`` steps if that is known, such a value."""
    gave = f"an array of shape {tuple(value.shape)}" if hasattr(value, "shape") else repr(value)
    when = "" if step is None else f" after {step} steps"
    return InputError(
        f"{optimizer}({option}=...): the schedule gives {gave}{when}: must be one number; return a float or an "
        "array without dimensions"
    )


def rounding_warning(
    rounding: str, name: str, dtype: str, sample: Callable[[], np.ndarray], learning_rate: Callable[[], float]
) -> str | None:
    """What to say of a table whose ``rounding`` does nothing, or leaves nothing of most steps; None for the others.

    An element moves by about a learning rate a step. To nearest it stays where it is when that is under half the
    distance to its neighbour: for bfloat16 under 1/512 to 1/256 of it.

    Args:
        sample, learning_rate (callable): Some of the elements, in any shape, and the learning rate. Called only where
            they matter, which is for 16-bit tables to nearest.
    """
    if rounding == "stochastic":
        nothing = f'Ember(rounding="stochastic"): does nothing to {name}, which is float32: it is for 16-bit tables'
        return nothing if dtype == "float32" else None
    if dtype not in ("bfloat16", "float16"):
        return None
    values, rate = np.asarray(sample(), np.float64), learning_rate()
    needed = unit_in_the_last_place(values, dtype) / 2
    share = np.mean(needed > rate)
    if not rate > 0 or share <= 0.5:
        return None
    return (
        f'Ember(rounding="nearest"): a step of the learning rate {rate:.3g} is rounded away in {share:.0%} of the '
        f"elements of {name}, which are {dtype} and of the usual size {np.median(np.abs(values)):.2g}: such a step "
        'leaves them as they are. Use rounding="stochastic" (--table-rounding stochastic), which keeps steps on '
        f"average, or a learning rate of at least {np.median(needed):.2g}, at which half of them change"
    )


def warn(message: str) -> None:
    """Warn at the line of the user's own code that led here, through whichever of the libraries."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
