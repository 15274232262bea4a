"""What the optimizers ask of options, parameters and loaded state: else InputError, before anything is computed.

:class:`CheckedOptimizer` is the base of Ember and of the optimizers of the body.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_map

from ember_mlx.shared.ember_options import SAMPLE, not_one_number, rounding_warning
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.float_formats import ROUNDS_TO_INFINITY

__all__ = ["CheckedOptimizer", "as_number", "check_number", "check_parameters", "check_state", "warning_of"]

FINITE = (0, ROUNDS_TO_INFINITY, "zero or more and finite in float32, or a schedule")


class CheckedOptimizer(Optimizer):
    """An optimizer of one array at a time, with checked schedules, and state that is made of the parameters."""

    one_array_at_a_time = True  # apply_gradients adds nothing but the state's making

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """One step: the new parameters, in a tree as that of ``gradients``; state that is missing is made first."""
        if not self._initialized:  # MLX would call init with the gradients
            self.init(tree_map(lambda _, parameter: parameter, gradients, parameters))
        return super().apply_gradients(gradients, parameters)

    def _schedule(self, name, value):
        """As ``_maybe_schedule``, but for what a schedule may return and what becomes of it."""
        optimizer = type(self).__name__
        if callable(value):
            self._maybe_schedule(name, lambda step: as_number(name, value(step), step.size, optimizer=optimizer))
        else:
            check_number(name, value, *FINITE, optimizer)
            self._maybe_schedule(name, float(value))


def check_number(name: str, value: Any, least: float, below: float, in_words: str, optimizer: str = "Ember") -> None:
    """Refuse a value that is not from ``least`` to below ``below``; ``in_words`` says what must be given."""
    try:
        allowed = least <= value < below
    except TypeError:
        allowed = False
    if not allowed:
        raise InputError(f"{optimizer}({name}={value!r}): must be {in_words}")


def as_number(option: str, value: Any, count: int = 1, step: int | None = None, optimizer: str = "Ember") -> mx.array:
    """What the schedule of an option gave, as float32 whatever its type: MLX would compile another type anew.

    Args:
        count: Of the steps that the schedule was asked for; it may return as many numbers.
        step: The one that it was asked for, for the message.

    Returns:
        One number, (), or ``count`` numbers.
    """
    try:
        number = mx.array(value, mx.float32)
    except (TypeError, ValueError):
        raise not_one_number(option, value, step, optimizer) from None
    if number.size not in (1, count):
        raise not_one_number(option, value, step, optimizer)
    return number.reshape(()) if number.size == 1 else number


def check_parameters(parameters: Mapping[str, Any]) -> None:
    """Refuse a tree of parameters in which not all are token tables: (V, D), floating, not empty."""
    for path, parameter in tree_flatten(parameters):
        if parameter.ndim != 2 or not parameter.size or not mx.issubdtype(parameter.dtype, mx.floating):
            raise InputError(
                f"Ember: {path} has shape {parameter.shape} and dtype {parameter.dtype}; Ember takes 2-D floating "
                "token tables only: with PairedOptimizer it is tables=, and another optimizer is rest="
            )


def check_state(state: Mapping[str, Any], parameters: Mapping[str, Any], scheduled: bool) -> None:
    """Refuse loaded state of other tables, or without what a schedule of ``beta2`` needs where it is ``scheduled``."""
    state = dict(tree_flatten(state))
    if scheduled and not {"beta2", "bias_correction"} <= state.keys():
        raise InputError(
            "Ember: the state has no bias_correction, so beta2 was a number in its run, and is a schedule here; give "
            "the number, or start without that state"
        )
    for path, parameter in tree_flatten(parameters):
        for name, length in zip(("r", "c"), parameter.shape, strict=True):
            found = state.get(f"{path}.{name}")
            if found is None or found.shape != (length,) or found.dtype != mx.float32:
                has = f"no {name}" if found is None else f"{name} of shape {found.shape} and dtype {found.dtype}"
                raise InputError(
                    f"Ember: the state has {has} for {path} of shape {parameter.shape}, which needs {name} of "
                    f"shape ({length},) and dtype float32; load the state of this model"
                )


def warning_of(parameters: Mapping[str, Any], rounding: str, learning_rate: Callable[[], float]) -> str | None:
    """Of the first table whose rounding does nothing or leaves nothing of a step; None also where MLX is tracing.

    Args:
        learning_rate: Gives the largest; called only where it matters.
    """
    for path, w in tree_flatten(parameters):
        dtype = str(w.dtype).removeprefix("mlx.core.")
        try:
            found = rounding_warning(rounding, path, dtype, partial(_sample, w), learning_rate)
        except (RuntimeError, ValueError):  # MLX's, for values that are not there yet
            return None
        if found:
            return found
    return None


def _sample(w):
    """Some rows of the table, evenly spaced, as float32 in NumPy."""
    return np.array(w[:: -(-w.size // SAMPLE)].astype(mx.float32))
