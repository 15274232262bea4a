"""What becomes of a gradient as soon as it can be made: a step of its weight, or its square for the global norm."""

from collections.abc import Iterable

import mlx.core as mx

from ember_mlx.optimizers.guarded import global_norm
from ember_mlx.streaming.embedding import mean_squares_of_rows, step_looked_up
from ember_mlx.streaming.head import StreamedHead
from ember_mlx.streaming.machines import LookedUpRows, Machines
from ember_mlx.streaming.pacing import Pace
from ember_mlx.streaming.shards import Shards
from ember_mlx.streaming.table import EmberTable
from ember_mlx.streaming.updates import Updates
from ember_mlx.streaming.weights import Weights

__all__ = ["GlobalNorm", "Stepping"]


class Stepping:
    """Steps weight after weight, each evaluated before the gradient of the next is made.

    Args:
        updates: The optimizer.
        weights: The model's.
        pace: Evaluates.
        machines: Those that train together.
        clip_layer_norm: The most that the norm of one unit's gradients together may be.
        shards: The weights whose state is shared out among the machines.
    """

    keeps_recordings = False

    def __init__(
        self,
        updates: Updates,
        weights: Weights,
        pace: Pace,
        machines: Machines,
        clip_layer_norm: float | None,
        shards: Shards | None,
    ):
        self._updates = updates
        self._weights = weights
        self._pace = pace
        self._machines = machines
        self._clip_layer_norm = clip_layer_norm
        self._shards = shards

    def bytes_made(self, paths: Iterable[str]) -> int:
        """Bytes of the weights and the state that a step of these makes new."""
        return sum(self._updates.nbytes[path] for path in paths)

    def arrays(self, gradients: dict[str, mx.array]) -> None:
        """Gradients by path; the dict is emptied, last first."""
        if self._shards:
            self._shards.step(gradients)
        means = self._machines.means(gradients)
        if self._clip_layer_norm is None:
            for some in means:
                self._step(some, None)
            return
        for some in list(means):  # the norm is that of all
            gradients |= some
        scale = mx.minimum(self._clip_layer_norm / (global_norm(gradients) + 1e-6), 1.0) if gradients else None
        self._step(gradients, scale)

    def _step(self, gradients, scale):
        together = self._pace.takes_together(self.bytes_made(gradients))
        weights = {path: self._weights[path] for path in gradients}
        stepped = self._updates(weights, gradients, scale, together=together)
        del weights
        gradients.clear()
        # The module lets go of the old weights before the new ones are made: they may take their place.
        for path in stepped:
            self._weights[path] = stepped[path][0]
        while stepped:
            _, (new, state) = stepped.popitem()
            self._pace(new, *state)
            del new, state
        self._pace.start()

    def table(self, table: EmberTable, head: StreamedHead | None, looked_up: LookedUpRows | None) -> None:
        """A table that Ember trains: the head, or the rows that an embedding has looked up, or both."""
        if self._machines.several and head:
            table.take(*self._machines.head_statistics(head, looked_up, self._pace.one_behind))
            self._machines.step_head(head, looked_up)
        elif head:
            table.take(*head.statistics(looked_up, step_follows=True))
            head.step(looked_up)
        elif looked_up is not None:
            if self._machines.several:
                looked_up = self._machines.looked_up(looked_up, table.shape[0])
            table.take(*mean_squares_of_rows(*looked_up, table.shape[0]))
            step_looked_up(table, *looked_up)


class GlobalNorm:
    """Adds up the squares of all gradients, and steps nothing.

    Args:
        pace: Evaluates.
        machines: Those that train together.
    """

    keeps_recordings = True

    def __init__(self, pace: Pace, machines: Machines):
        self._pace = pace
        self._machines = machines
        self._squares = mx.array(0.0)

    def bytes_made(self, paths: Iterable[str]) -> int:
        """Bytes of the weights and the state that a step of these makes new."""
        return 0

    def arrays(self, gradients: dict[str, mx.array]) -> None:
        """Gradients by path; the dict is emptied, last first."""
        if self._machines.several:
            for some in self._machines.means(gradients):
                self._add(mx.square(global_norm(some)))
        while gradients:
            _, gradient = gradients.popitem()
            self._add(mx.square(global_norm([gradient])))

    def table(self, table: EmberTable, head: StreamedHead | None, looked_up: LookedUpRows | None) -> None:
        """A table that Ember trains: the head, or the rows that an embedding has looked up, or both."""
        if self._machines.several and head:
            row_mean, _ = self._machines.head_statistics(head, looked_up, self._pace.one_behind)
        elif head:
            row_mean, _ = head.statistics(looked_up)
        elif looked_up is not None:
            if self._machines.several:
                looked_up = self._machines.looked_up(looked_up, table.shape[0])
            row_mean = mx.square(looked_up[1]).mean(1)
        else:
            return
        self._add(row_mean.sum() * table.shape[1])

    def norm(self) -> mx.array:
        """The global norm of what has been added."""
        return mx.sqrt(self._squares)

    def _add(self, squares):
        self._squares = self._squares + squares
        self._pace.one_behind(self._squares)
