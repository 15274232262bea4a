"""The embedding's gradient as what it is: the few rows that were looked up, each added up in float32."""

import mlx.core as mx
import numpy as np

from ember_mlx.streaming.table import EmberTable

__all__ = ["LookedUp", "mean_squares_of_rows", "step_looked_up"]


class LookedUp:
    """The rows that one step's calls of an embedding have looked up, and their gradients.

    Args:
        features (int): D of the table.
    """

    def __init__(self, features: int):
        self._features = features
        self._ids = []
        self._gradients = []

    def add(self, ids: mx.array, gradient: mx.array) -> None:
        """One call: its token ids, of any shape, and the gradient of what it gave, with D more."""
        self._ids.append(np.array(ids).reshape(-1))
        self._gradients.append(gradient.reshape(-1, self._features).astype(mx.float32))

    def rows(self) -> tuple[mx.array, mx.array] | None:
        """The ids, sorted, each once, and their gradients (U, D) float32; None where nothing was looked up."""
        if not self._ids:
            return None
        ids, place = np.unique(np.concatenate(self._ids), return_inverse=True)
        gradients = mx.concatenate(self._gradients)
        ids = mx.array(ids)
        rows = mx.zeros((ids.size, self._features)).at[mx.array(place.reshape(-1))].add(gradients)
        mx.eval(rows)
        self._ids, self._gradients = [], []
        return ids, rows


def mean_squares_of_rows(ids: mx.array, rows: mx.array, vocabulary: int) -> tuple[mx.array, mx.array]:
    """Means of squares of a gradient (V, D) that has these rows and is zero elsewhere: (V,) and (D,)."""
    squares = mx.square(rows)
    return mx.zeros((vocabulary,)).at[ids].add(squares.mean(1)), squares.sum(0) / vocabulary


def step_looked_up(table: EmberTable, ids: mx.array, rows: mx.array, block_rows: int = 4096) -> None:
    """Step a table by such a gradient; its second moments have been stepped.

    The rows that were not looked up change by weight decay alone.
    """
    new = table.new_rows(ids, rows)
    if table.decays():
        mx.eval(new)
        for first in range(0, table.shape[0], block_rows):
            block = slice(first, min(first + block_rows, table.shape[0]))
            table.write(block, table.new_rows(block, mx.zeros((block.stop - first, rows.shape[1]), table.weight.dtype)))
    table.write(ids, new)
    table.flush()
