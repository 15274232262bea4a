"""What becomes of a gradient as soon as it can be made: a step of its weight, or its square for the global norm."""

import mlx.core as mx

from ember_mlx.optimizers.guarded import global_norm
from ember_mlx.streaming.embedding import mean_squares_of_rows, step_looked_up

__all__ = ["GlobalNorm", "Stepping"]


class Stepping:
    """Steps weight after weight, each evaluated before the gradient of the next is made.

    Args:
        updates (Updates): The optimizer.
        weights (Weights): The model's.
        pace (Pace): Evaluates.
        clip_layer_norm (float, optional): The most that the norm of one unit's gradients together may be.
    """

    keeps_recordings = False

    def __init__(self, updates, weights, pace, clip_layer_norm=None):
        self._updates = updates
        self._weights = weights
        self._pace = pace
        self._clip_layer_norm = clip_layer_norm

    def arrays(self, gradients):
        """Gradients by path; the dict is emptied, last first."""
        scale = None
        if self._clip_layer_norm is not None and gradients:
            scale = mx.minimum(self._clip_layer_norm / (global_norm(gradients) + 1e-6), 1.0)
        stepped = self._updates({path: self._weights[path] for path in gradients}, gradients, scale)
        gradients.clear()
        # The module lets go of the old weights before the new ones are made: they may take their place.
        for path in stepped:
            self._weights[path] = stepped[path][0]
        while stepped:
            _, (new, state) = stepped.popitem()
            self._pace(new, *state)
            del new, state
        self._pace.start()

    def embedding(self, table, ids, rows):
        table.take(*mean_squares_of_rows(ids, rows, table.shape[0]))
        step_looked_up(table, ids, rows)

    def head(self, head, looked_up=None):
        head.table.take(*head.statistics(looked_up))
        head.step(looked_up)


class GlobalNorm:
    """Adds up the squares of all gradients, and steps nothing."""

    keeps_recordings = True

    def __init__(self, pace):
        self._pace = pace
        self._squares = mx.array(0.0)

    def arrays(self, gradients):
        while gradients:
            _, gradient = gradients.popitem()
            self._add(mx.square(global_norm([gradient])))

    def embedding(self, table, ids, rows):
        self._add(mx.square(rows).sum())

    def head(self, head, looked_up=None):
        row_mean, _ = head.statistics(looked_up)
        self._add(row_mean.sum() * head.table.shape[1])

    def norm(self):
        return mx.sqrt(self._squares)

    def _add(self, squares):
        self._squares = self._squares + squares
        self._pace.one_behind(self._squares)
