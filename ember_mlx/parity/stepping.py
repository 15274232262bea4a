"""What the suite asks of an implementation: steps along gradients, from given weights, and what each step made.

NumPy goes in and out: 16-bit values travel as float32, which holds them all exactly.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

__all__ = ["Gradients", "Stepped", "Tables", "Weights", "of_weights"]

Gradients = Sequence[tuple[np.ndarray, str]]  # of one step after the other, each with its dtype's name


class Stepped(NamedTuple):
    """What T steps made, float64: r (T, V), c (T, D), what each subtracts from zeros (T, V, D), weights (T, V, D)."""

    r: np.ndarray
    c: np.ndarray
    step: np.ndarray
    w: np.ndarray

    @classmethod
    def of(cls, together: np.ndarray, shape: tuple[int, int]) -> "Stepped":
        """From float32 numbers, a row a step, with the zeros after it: a GPU is waited for once, whatever is read."""
        rows, columns = shape
        ends = np.cumsum([rows, columns, rows * columns])
        r, c, zeros, w = np.split(together.astype(np.float64), ends, axis=1)
        return cls(r, c, -zeros.reshape(-1, *shape), w.reshape(-1, *shape))


class Tables(Protocol):
    """Two tables of one shape and dtype in one optimizer: the first is zeros at every step, the other gets weights."""

    def start(self) -> None:
        """Forget all steps."""

    def steps(self, weights: np.ndarray, gradients: Gradients) -> Stepped:
        """Steps of both tables; ``weights`` and gradients, (V, D) float32, hold values of their dtypes exactly."""

    def state(self) -> object:
        """A copy of the optimizer's state."""

    def restore(self, state: object) -> None:
        """Go back to what ``state`` gave."""


class Weights(Protocol):
    """Two weights of one shape and dtype in an optimizer of the body: the first is zeros at every step."""

    def steps(self, weights: np.ndarray, gradients: Gradients) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Steps of both: what each subtracts from zeros, the weights after it, float64, and the second's state."""


def of_weights(
    names: Iterable[str], read: Iterable[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """What `Weights.steps` returns, from the zeros after each step, the weights and the state of those names."""
    zeros, w, *state = read
    return -zeros.astype(np.float64), w.astype(np.float64), dict(zip(names, state, strict=True))
