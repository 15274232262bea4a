"""What SAGE and the Flash optimizers share: options that may be schedules, and state made from the parameters."""

import math

import mlx.core as mx
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_map

from ember_mlx.optimizers.checks import as_number
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.float_formats import SMALLEST_NORMAL

__all__ = ["ScheduledOptimizer", "bias_correction", "checked", "running_mean"]


class ScheduledOptimizer(Optimizer):
    """An optimizer whose learning rate and weight decay are numbers or schedules, with arrays alone in its state.

    A subclass gives ``state_of(shape, dtype)``, the zeros that a parameter starts from by name, and ``apply_single``.

    Raises:
        InputError: (a ``ValueError``) for an option out of range; at the first sight of the parameters, for one that
            the optimizer does not take, and for state that was loaded and is not of these parameters.
    """

    def __init__(self, learning_rate, weight_decay, eps=None, betas=None):
        super().__init__()
        self.name = type(self).__name__
        if eps is not None:
            self.eps = checked(self.name, "eps", eps, SMALLEST_NORMAL, math.inf, "a positive number, usually 1e-8")
        if betas is not None:
            self.betas = self._checked_betas(betas)
        self._schedule("learning_rate", learning_rate)
        self._schedule("weight_decay", weight_decay)

    def init(self, parameters):
        for path, parameter in tree_flatten(parameters):
            self.check_parameter(path, parameter)
        super().init(parameters)
        state = dict(tree_flatten(self.state))
        for path, parameter in tree_flatten(parameters):
            self._check_state(path, parameter, state)

    def apply_gradients(self, gradients, parameters):
        if not self._initialized:  # MLX would call init with the gradients
            self.init(tree_map(lambda _, parameter: parameter, gradients, parameters))
        return super().apply_gradients(gradients, parameters)

    def init_single(self, parameter, state):
        state.update(self.state_of(parameter.shape, parameter.dtype))

    def check_parameter(self, path, parameter):
        """Raise InputError for a parameter that this optimizer does not take."""
        if not parameter.size or not mx.issubdtype(parameter.dtype, mx.floating):
            raise InputError(
                f"{self.name}: {path} has shape {parameter.shape} and dtype {parameter.dtype}; {self.name} takes "
                "floating parameters that are not empty: freeze this one"
            )

    def _check_state(self, path, parameter, state):
        for name, zeros in self.state_of(parameter.shape, parameter.dtype).items():
            found = state.get(f"{path}.{name}")
            if found is None or found.shape != zeros.shape or found.dtype != zeros.dtype:
                has = f"no {name}" if found is None else f"{name} of shape {found.shape} and dtype {found.dtype}"
                raise InputError(
                    f"{self.name}: the state has {has} for {path} of shape {parameter.shape}, which needs {name} of "
                    f"shape {zeros.shape} and dtype {zeros.dtype}: load the state of this model, of a run with the "
                    "same optimizer and the same options"
                )

    def _checked_betas(self, betas):
        try:
            first, second = betas
        except (TypeError, ValueError):
            raise InputError(f"{self.name}(betas={betas!r}): must be two numbers, usually (0.9, 0.999)") from None
        return tuple(checked(self.name, "betas", beta, 0, 1, "at least 0 and below 1") for beta in (first, second))

    def _schedule(self, option, value):
        if callable(value):
            self._maybe_schedule(option, lambda step: as_number(option, value(step), step.size))
        else:
            checked(self.name, option, value, 0, math.inf, "a finite number, zero or more, or a schedule")
            self._maybe_schedule(option, float(value))


def checked(optimizer, option, value, least, below, in_words):
    """The value of an option, a plain float from ``least`` to under ``below``."""
    try:
        allowed = least <= value < below
    except TypeError:
        allowed = False
    if not allowed:
        raise InputError(f"{optimizer}({option}={value!r}): must be {in_words}")
    return float(value)


def running_mean(mean, value, beta):
    """``beta * mean + (1 - beta) * value``, as a step towards it: 0.999 has no exact float32, 0 has."""
    return mean + (1 - beta) * (value - mean)


def bias_correction(t, beta):
    """``1 - beta ** t``, which loses four digits in float32 at t = 1; expm1 loses none."""
    log_beta = math.log(beta) if beta > 0 else -math.inf
    return -mx.expm1(t.astype(mx.float32) * log_beta)
