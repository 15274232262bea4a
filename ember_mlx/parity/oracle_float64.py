"""What Ember should do, in float64 NumPy: plain, slow, and written from the update rule alone.

It shares no line with ``ember_mlx`` and imports nothing of it. It builds the whole second-moment table, which the
optimizer must never do, because here being obviously right is all that counts.
"""

from collections.abc import Callable

import numpy as np

__all__ = ["EmberOracle"]


class EmberOracle:
    """Ember for one table of V rows and D columns.

    ``row_mean_square`` (V,) and ``column_mean_square`` (D,) are the running means ``r`` and ``c``, float64, and
    ``step_number`` is the number of steps done. The weights are not kept: each step gets them and gives the new ones
    back, so that a test may follow its own weights or start every step from those of the optimizer that it checks.

    ``beta2`` may be a function of the steps done, whose value is then taken as float32 has it, as an optimizer does.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        beta2: float | Callable[[int], float] = 0.999,
        eps: float = 1e-8,
        row_clip: float | None = None,
        row_floor: float | None = None,
    ):
        rows, columns = shape
        self.beta2 = beta2
        self.eps = eps
        self.row_clip = row_clip
        self.row_floor = row_floor
        self.row_mean_square = np.zeros(rows)
        self.column_mean_square = np.zeros(columns)
        self.step_number = 0
        self.product_of_beta2 = 1.0

    def change(self, gradient: np.ndarray, learning_rate: float) -> np.ndarray:
        """Take the gradient (V, D) into the statistics; return what the step subtracts from the weights, (V, D)."""
        gradient = np.asarray(gradient, dtype=np.float64)
        squares = gradient**2
        beta2 = float(np.float32(self.beta2(self.step_number))) if callable(self.beta2) else self.beta2
        self.step_number += 1
        self.product_of_beta2 *= beta2
        self.row_mean_square = beta2 * self.row_mean_square + (1 - beta2) * squares.mean(axis=1)
        self.column_mean_square = beta2 * self.column_mean_square + (1 - beta2) * squares.mean(axis=0)
        overall = max(self.column_mean_square.mean(), 1e-30)
        bias_correction = 1 - self.product_of_beta2
        rows = self.row_mean_square
        if self.row_floor is not None:
            rows = np.maximum(rows, self.row_floor**2 * overall)
        second_moment = np.outer(rows, self.column_mean_square) / (overall * bias_correction)
        too_long = self._too_long(squares.mean(axis=1), rows, bias_correction)
        return learning_rate * gradient / (np.sqrt(second_moment) * too_long[:, None] + self.eps)

    def _too_long(self, mean_square, running, bias_correction):
        """By how much the step of each row is beyond ``row_clip``, at least 1: its root mean square, as if the squares
        of the row lay over the columns as all squares do."""
        if self.row_clip is None:
            return np.ones(len(mean_square))
        ratio = np.divide(mean_square, running, where=running > 0, out=np.zeros(len(mean_square)))
        return np.maximum(1, np.sqrt(ratio * bias_correction) / self.row_clip)

    def step(
        self, weights: np.ndarray, gradient: np.ndarray, learning_rate: float, weight_decay: float = 0.0
    ) -> np.ndarray:
        """The weights (V, D) after one step."""
        weights = np.asarray(weights, dtype=np.float64)
        return (1 - learning_rate * weight_decay) * weights - self.change(gradient, learning_rate)
