"""Several machines: every gradient is the mean over them before it is used, and no table's gradient is whole either.

A sum of squares is not that of a sum, so a table's rows go over the wire block by block, in float32, twice: once for
the second moments, once for the step.
"""

from collections.abc import Callable

import mlx.core as mx

from ember_mlx.streaming.head import StreamedHead
from ember_mlx.streaming.table import EmberTable

__all__ = ["Machines", "Reduce"]

Reduce = Callable[[mx.array], mx.array]
"""An array of this machine -> the sum over all, as ``mx.distributed.all_sum``."""
BLOCK_ROWS = 4096  # of an embedding


class Machines:
    """The machines that train together.

    Args:
        reduce: It is asked once for the sum of ones, which says how many there are; None is this machine alone.
    """

    def __init__(self, reduce: Reduce | None):
        self.sum = reduce or (lambda array: array)
        self.several = reduce is not None
        self.count = self.sum(mx.array(1.0)).item()

    def mean(self, array: mx.array) -> mx.array:
        """Over the machines, in the array's dtype."""
        return (self.sum(array) / self.count).astype(array.dtype) if self.several else array

    def row_gradients(
        self, table: EmberTable, head: StreamedHead | None, looked_up: tuple[mx.array, mx.array] | None
    ) -> list[tuple[slice, Callable[[], mx.array]]]:
        """A table's gradient, block by block: the rows, and a function that makes it, (n, D) float32.

        Args:
            table: The table.
            head: Where it is a head.
            looked_up: Ids (U,) and the gradient of their embeddings, (U, D) float32.
        """
        rows, features = table.shape
        blocks = head.blocks if head else [slice(i, min(i + BLOCK_ROWS, rows)) for i in range(0, rows, BLOCK_ROWS)]

        def gradient_of(number):
            block = blocks[number]
            of_block = head.block_gradient(number) if head else mx.zeros((block.stop - block.start, features))
            if looked_up is not None:
                ids, added = looked_up
                inside = mx.logical_and(ids >= block.start, ids < block.stop)
                places = mx.where(inside, ids - block.start, 0)
                of_block = of_block.at[places].add(mx.where(inside[:, None], added, 0))
            return self.mean(of_block)

        return [(block, lambda number=number: gradient_of(number)) for number, block in enumerate(blocks)]

    def statistics(self, gradients: list, pace: Callable) -> tuple[mx.array, mx.array]:
        """Means of squares over columns (V,) and rows (D,), float32, from ``row_gradients``."""
        row_means, columns = [], 0
        for _, gradient in gradients:
            squares = mx.square(gradient())
            row_means.append(squares.mean(1))
            columns = columns + squares.sum(0)
            pace(columns, row_means[-1])
        row_mean = mx.concatenate(row_means)
        return row_mean, columns / row_mean.size

    def step(self, table: EmberTable, gradients: list) -> None:
        """Step the table, whose second moments have been stepped."""
        for block, gradient in gradients:
            table.write(block, table.new_rows(block, table.weight[block], gradient()))
        table.flush()
