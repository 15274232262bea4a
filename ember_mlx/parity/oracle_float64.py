"""What Ember should do, in float64 NumPy: plain, slow, and written from the update rule alone.

It shares no line with ``ember_mlx`` and imports nothing of it. It builds the whole second-moment table, which the
optimizer must never do, because here being obviously right is all that counts.
"""

import numpy as np


class EmberOracle:
    """Ember for one table of V rows and D columns.

    ``row_mean_square`` (V,) and ``column_mean_square`` (D,) are the running means ``r`` and ``c``, float64, and
    ``step_number`` is the number of steps done. The weights are not kept: each step gets them and gives the new ones
    back, so that a test may follow its own weights or start every step from those of the optimizer that it checks.
    """

    def __init__(self, shape, beta2=0.999, eps=1e-8):
        rows, columns = shape
        self.beta2 = beta2
        self.eps = eps
        self.row_mean_square = np.zeros(rows)
        self.column_mean_square = np.zeros(columns)
        self.step_number = 0

    def change(self, gradient, learning_rate):
        """Take the gradient (V, D) into the statistics; return what the step subtracts from the weights, (V, D)."""
        gradient = np.asarray(gradient, dtype=np.float64)
        squares = gradient**2
        self.step_number += 1
        self.row_mean_square = self.beta2 * self.row_mean_square + (1 - self.beta2) * squares.mean(axis=1)
        self.column_mean_square = self.beta2 * self.column_mean_square + (1 - self.beta2) * squares.mean(axis=0)
        overall = self.column_mean_square.mean()
        bias_correction = 1 - self.beta2**self.step_number
        second_moment = np.outer(self.row_mean_square, self.column_mean_square) / (
            max(overall, 1e-30) * bias_correction
        )
        return learning_rate * gradient / (np.sqrt(second_moment) + self.eps)

    def step(self, weights, gradient, learning_rate, weight_decay=0.0):
        """The weights (V, D) after one step."""
        weights = np.asarray(weights, dtype=np.float64)
        return (1 - learning_rate * weight_decay) * weights - self.change(gradient, learning_rate)
