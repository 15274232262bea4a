"""A token table under Ember, stepped some rows at a time from the means of squares of a gradient that nobody has whole.

The rows are written into the table itself. MLX does that in place where nothing else holds the table, neither a view
of it in Python nor a command that the GPU has not finished; else it copies the table.
"""

import mlx.core as mx
import mlx.nn as nn

from ember_mlx import kernels
from ember_mlx.kernels.stochastic_rounding import DROPPED_BITS
from ember_mlx.streaming.pacing import Pace
from ember_mlx.streaming.updates import Updates

__all__ = ["EmberTable"]


class EmberTable:
    """One table (V, D) of a model.

    Args:
        updates (Updates): The optimizer.
        path (str): The table's name in the model; Ember trains it.
        module (Module): What holds it, as its ``weight``.
        pace (Pace): What is in flight.
    """

    def __init__(self, updates: Updates, path: str, module: nn.Module, pace: Pace):
        self.path = path
        self.shape = module.weight.shape
        self._updates = updates
        self._module = module
        self._pace = pace
        self._written, self._bytes = [], 0
        self._ember = updates.leaf(path)
        self._stepped = mx.compile(self.stepped)
        if self._ember.rounding == "stochastic" and self.weight.dtype in DROPPED_BITS:
            for dtype in (self.weight.dtype, mx.float32):
                kernels.usable(kernels.rounding, self.weight.dtype, dtype)  # tried now: a step traces it

    @property
    def weight(self) -> mx.array:
        """The table, (V, D)."""
        return self._module.weight

    def take(self, row_mean: mx.array, column_mean: mx.array) -> None:
        """Step the second moments by a step's means of squares, (V,) and (D,), unless one is not finite."""
        state = self._updates.state(self.path)
        new = dict(state)
        self._a, self._b = self._ember.take_statistics(new, row_mean, column_mean)
        finite = mx.isfinite(row_mean.sum() + column_mean.sum())
        state.update({name: mx.where(finite, new[name], state[name]) for name in "rc"})
        self._updates.note(self.path, finite)
        self._keys = self._ember.keys(state, self.shape)
        self._numbers = self._ember.learning_rate, self._ember.state["weight_decay"], finite
        mx.eval(state["r"], state["c"], self._a, self._b, finite, self._keys, self._numbers)

    def decays(self) -> bool:
        """Whether rows without a gradient change too."""
        return self._ember.state["weight_decay"].item() != 0

    def new_rows(self, rows: slice | mx.array, gradient: mx.array) -> mx.array:
        """Those rows after the step.

        Args:
            rows (slice or array): Which.
            gradient (array): Theirs, (n, D).
        """
        return self._stepped(gradient, *self.read_by(rows))

    def read_by(self, rows: slice | mx.array) -> tuple[mx.array | tuple[mx.array, mx.array] | None, ...]:
        """What :meth:`stepped` reads of those rows beside their gradient."""
        keys = None if self._keys is None else (self._keys[0][rows], self._keys[1])
        return self.weight[rows], self._a[rows], self._b, keys, *self._numbers

    def stepped(
        self,
        gradient: mx.array,
        weight: mx.array,
        a: mx.array,
        b: mx.array,
        keys: tuple[mx.array, mx.array] | None,
        learning_rate: mx.array,
        weight_decay: mx.array,
        finite: mx.array,
    ) -> mx.array:
        """Some rows after the step, as a function of all that it reads, which may be part of a compiled one.

        Args:
            gradient, weight (array): Theirs, (n, D).
            a, b (array): Factors of these rows and of the columns, (n,) and (D,).
            keys (tuple of array, optional): Of the random bits by which they are rounded.
            learning_rate, weight_decay (array): Scalars.
            finite (array): Whether the step is taken at all, a scalar bool.
        """
        new = self._ember.update_block(weight, gradient, a, b, learning_rate, weight_decay, keys)
        return mx.where(finite, new, weight)

    def write(self, rows: slice | mx.array, new: mx.array, room: int | None = None) -> None:
        """Put rows into the table, at the latest at :meth:`flush`. The caller holds no view of it any more.

        Args:
            rows, new: Which, and what they become.
            room: Bytes of rows that may wait, by default a quarter of what a GPU is run ahead.
        """
        self._pace.in_turn(new)
        self._written.append((rows, new))
        self._bytes += new.nbytes
        if self._bytes >= (self._pace.ahead // 4 if room is None else room):
            self.flush()

    def flush(self) -> None:
        """One wait for several blocks of rows: until nothing in flight holds the table."""
        self._pace.finish()
        table = self.weight
        for rows, new in self._written:
            table[rows] = new
        self._written, self._bytes = [], 0
        mx.eval(table)
