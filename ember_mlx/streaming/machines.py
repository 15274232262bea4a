"""Several machines: every gradient is the mean over them before it is used, and no table's gradient is whole either.

Small gradients of one dtype go over the wire together. Of an embedding the rows go that any machine has looked up. A
sum of squares is not that of a sum, so a head's rows go twice, block by block, in float32: once for the second moments,
once for the step.
"""

from collections.abc import Callable, Iterator
from functools import cached_property

import mlx.core as mx
import numpy as np

from ember_mlx.optimizers.row_shards import places_among
from ember_mlx.streaming.head import StreamedHead

__all__ = ["LookedUpRows", "Machines", "Reduce", "buckets"]

Reduce = Callable[[mx.array], mx.array]
"""An array of this machine -> the sum over all, as ``mx.distributed.all_sum``."""
LookedUpRows = tuple[mx.array, mx.array]
"""Ids (U,), each once, and the gradient of their rows, (U, D) float32."""


class Machines:
    """The machines that train together.

    Args:
        reduce: It is asked once for the sum of ones, which says how many there are; None is this machine alone.
        together: Bytes of gradients that go over the wire at a time, or one array that has more.
    """

    def __init__(self, reduce: Reduce | None, together: float):
        self.several = reduce is not None
        self._reduce = reduce
        self._together = together

    @cached_property
    def count(self) -> float:
        """How many there are."""
        return self.sum(mx.array(1.0)).item()

    def sum(self, array: mx.array) -> mx.array:
        """Over the machines, in an evaluation of its own: what a GPU has in flight must not wait for a network."""
        mx.eval(array)
        total = self._reduce(array)
        mx.eval(total)
        return total

    def mean(self, array: mx.array) -> mx.array:
        """Over the machines, in the array's dtype."""
        return (self.sum(array) / self.count).astype(array.dtype)

    def means(self, gradients: dict[str, mx.array]) -> Iterator[dict[str, mx.array]]:
        """The means of gradients by path, some at a time, last first; the dict is emptied. One machine gives all."""
        if not self.several:
            yield gradients
            return
        for some in buckets(gradients, self._together):
            yield self._mean_together(some)

    def _mean_together(self, some):
        """The means of arrays of one dtype; ``some`` is emptied."""
        shapes = {path: array.shape for path, array in some.items()}
        ends = np.cumsum([array.size for array in some.values()])[:-1].tolist()
        joined = mx.concatenate([array.reshape(-1) for array in some.values()])
        some.clear()
        parts = mx.split(self.mean(joined), ends) if ends else [self.mean(joined)]
        return {path: part.reshape(shape) for (path, shape), part in zip(shapes.items(), parts, strict=True)}

    def looked_up(self, rows: LookedUpRows, vocabulary: int) -> LookedUpRows:
        """The rows that any machine has looked up, and the means of their gradients.

        Args:
            rows: Of this machine.
            vocabulary: Rows of the table.
        """
        ids, gradients = rows
        seen = self.sum(mx.zeros((vocabulary,), mx.int32).at[ids].add(1))
        union = np.flatnonzero(np.array(seen))
        places = mx.array(np.searchsorted(union, np.array(ids)))
        own = mx.zeros((union.size, gradients.shape[1])).at[places].add(gradients)
        some = max(int(self._together // (own.itemsize * own.shape[1])), 1)
        parts = [self.mean(own[first : first + some]) for first in range(0, union.size, some)]
        return mx.array(union), mx.concatenate(parts)

    def head_statistics(
        self, head: StreamedHead, looked_up: LookedUpRows | None, evaluate: Callable
    ) -> tuple[mx.array, mx.array]:
        """Means of squares of a head's gradient, over columns (V,) and rows (D,), float32.

        Args:
            head: Has the table, which may be tied.
            looked_up: Where it is tied, the rows that this machine has looked up.
            evaluate: Takes the arrays of a block.
        """
        row_means, columns = [], 0
        for number in range(len(head.blocks)):
            squares = mx.square(self._block_gradient(head, number, looked_up))
            row_means.append(squares.mean(1))
            columns = columns + squares.sum(0)
            evaluate(columns, row_means[-1])
        row_mean = mx.concatenate(row_means)
        return row_mean, columns / row_mean.size

    def step_head(self, head: StreamedHead, looked_up: LookedUpRows | None) -> None:
        """Step the table of the head, whose second moments have been stepped."""
        for number, block in enumerate(head.blocks):
            head.table.write(block, head.table.new_rows(block, self._block_gradient(head, number, looked_up)))
        head.table.flush()

    def _block_gradient(self, head, number, looked_up):
        """The mean gradient of one of the head's blocks, (n, D) float32."""
        block, of_block = head.blocks[number], head.block_gradient(number)
        if looked_up is not None:
            ids, added = looked_up
            places, inside = places_among(ids, block.start, block.stop - block.start)
            of_block = of_block.at[places].add(mx.where(inside[:, None], added, 0))
        return self.mean(of_block)


def buckets(gradients: dict[str, mx.array], together: float) -> Iterator[dict[str, mx.array]]:
    """Some of the gradients at a time, of one dtype and at most so many bytes, or one; the dict is emptied, last first.

    Who takes them empties what is given.
    """
    while gradients:
        some, size, dtype = {}, 0, next(reversed(gradients.values())).dtype
        while gradients:
            path, array = next(reversed(gradients.items()))
            if some and (array.dtype != dtype or size + array.nbytes > together):
                break
            some[path] = gradients.pop(path)
            size += array.nbytes
        del array
        yield some
