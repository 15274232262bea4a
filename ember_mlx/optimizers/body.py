"""What the optimizers of a model's body share: checked options, state that is stated beforehand, Adam for vectors."""

import reprlib
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path

from ember_mlx.optimizers.checks import CheckedOptimizer, check_number
from ember_mlx.optimizers.ember import bias_correction, update_second_moment
from ember_mlx.shared.ember_options import check_switch
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.float_formats import ROUNDS_TO_INFINITY, ROUNDS_TO_ONE, SMALLEST_NORMAL

__all__ = ["BodyOptimizer", "Rate", "Tree", "adamw_step", "rows_of_block"]

Rate = float | Callable[[mx.array], mx.array]
"""A number, or a schedule: from the number of steps done to the value for the next one."""
Tree = dict[str, Any]
"""Arrays by name, in dictionaries and lists, as modules have them."""

# MLX computes up to 20 blocks at once, each with a few float32 copies of itself.
MOST_BLOCKS, SMALLEST_BLOCK = 512, 2**15  # elements
OF_WRAPPERS = ("rest", "seed")  # what SplitWeights and StochasticRounding keep beside a subclass's state


def rows_of_block(x: mx.array) -> int:
    """How many rows of a matrix (m, n) to compute at a time, or of several (..., m, n) together; 1 at least."""
    return max(1, max(SMALLEST_BLOCK, x.size // MOST_BLOCKS) // (x.size // x.shape[-2]))


def adamw_step(
    w: mx.array,
    g: mx.array,
    m: mx.array,
    v: mx.array,
    t: mx.array,
    learning_rate: float | mx.array,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float | mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """One step of AdamW (arXiv 1711.05101) in float32; returns the new ``w`` in its own dtype, ``m`` and ``v``."""
    g = g.astype(mx.float32)
    m = update_second_moment(m, g, beta1)
    v = update_second_moment(v, mx.square(g), beta2)
    update = (m / bias_correction(t, beta1)) / (mx.sqrt(v / bias_correction(t, beta2)) + eps)
    new = (1 - learning_rate * weight_decay) * w.astype(mx.float32) - learning_rate * update
    return new.astype(w.dtype), m, v


class BodyOptimizer(CheckedOptimizer):
    """Weights of any shape, decoupled weight decay, ``betas`` and ``eps``; a subclass says its state and its step.

    A subclass gives ``state_of(path, parameter)``, name -> (shape, dtype), all of it zeros at the start, and
    ``apply_single``. State is kept by path. Vectors (norms, biases) get no weight decay unless ``decay_vectors``.
    """

    def __init__(
        self, learning_rate: Rate, betas: tuple[float, float], eps: float, weight_decay: Rate, decay_vectors: bool
    ):
        super().__init__()
        name = type(self).__name__
        try:
            self.betas = tuple(float(beta) for beta in betas)
        except (TypeError, ValueError):
            self.betas = ()
        if len(self.betas) != 2 or not all(0 <= beta < ROUNDS_TO_ONE for beta in self.betas):
            raise InputError(
                f"{name}(betas={reprlib.repr(betas)}): must be two numbers from 0 to below 1, in float32 too, "
                "usually (0.9, 0.999)"
            )
        check_number("eps", eps, SMALLEST_NORMAL, ROUNDS_TO_INFINITY, "a positive number, usually 1e-8", name)
        check_switch(name, "decay_vectors", decay_vectors)
        self.eps = eps
        self.decay_vectors = decay_vectors
        self._schedule("learning_rate", learning_rate)
        self._schedule("weight_decay", weight_decay)

    def init(self, parameters: Tree) -> None:
        self._check_parameters(parameters)
        super().init(parameters)
        states = []
        tree_map_with_path(lambda path, w, state: states.append((path, w, state)), parameters, self.state)
        for path, w, state in states:
            wanted = self.state_of(path, w)
            for name, (shape, dtype) in wanted.items() if not state else ():
                state[name] = mx.zeros(shape, dtype)
            self._check_state(path, w, state, wanted)

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        """Nothing: ``init`` makes the state, which depends on the path."""

    def weight_decay_of(self, parameter: mx.array) -> float | mx.array:
        """The weight decay of a parameter: zero for vectors, unless they are to decay."""
        return self.state["weight_decay"] if parameter.ndim > 1 or self.decay_vectors else 0.0

    def _check_parameters(self, parameters):
        for path, parameter in tree_flatten(parameters):
            if not parameter.size or not mx.issubdtype(parameter.dtype, mx.floating):
                raise InputError(
                    f"{type(self).__name__}: {path} has shape {parameter.shape} and dtype {parameter.dtype}; "
                    f"{type(self).__name__} takes floating arrays with elements, of any shape: freeze this parameter"
                )

    def _check_state(self, path, parameter, state, wanted):
        for name, (shape, dtype) in wanted.items():
            found = state.get(name)
            if found is None or found.shape != shape or found.dtype != dtype:
                has = f"no {name}" if found is None else f"{name} of shape {found.shape} and dtype {found.dtype}"
                raise InputError(
                    f"{type(self).__name__}: the state has {has} for {path} of shape {parameter.shape}, which needs "
                    f"{name} of shape {shape} and dtype {dtype}; load the state of this model, made with these options"
                )
        for name, found in tree_flatten(state):
            if name not in wanted and name not in OF_WRAPPERS:
                raise InputError(
                    f"{type(self).__name__}: the state has {name} of shape {found.shape} and dtype {found.dtype} for "
                    f"{path} of shape {parameter.shape}, which needs no {name}; load the state of this model, made by "
                    f"{type(self).__name__} with these options"
                )
