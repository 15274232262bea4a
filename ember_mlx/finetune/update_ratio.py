"""How far a step moves the weights: the L2 norm of the step over that of the weights, for tables and body apart."""

from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_map_with_path

__all__ = ["MeasuredOptimizer", "add_squares"]

ELEMENTS_PER_BLOCK = 2**20  # 4 MB of float32


class MeasuredOptimizer:
    """An optimizer whose steps are measured where that is asked for, for a loop that compiles ``optimizer.update``.

    A step is measured in blocks, each after the other and all of them right after the parameter is updated: nothing of
    a table's size is made, and the old weights live no longer than the update itself lets them.

    Args:
        optimizer (Optimizer): The optimizer; its state must have been made.
        table_paths (iterable of str): The parameters that are token tables; all others are the body.

    ``state`` is what a compiled step must capture: that of the optimizer, which is all that a checkpoint needs, and the
    measurements.
    """

    def __init__(self, optimizer: Optimizer, table_paths: Iterable[str]):
        self.optimizer = optimizer
        self.table_paths = frozenset(table_paths)
        self._squares = {side: {"step": mx.array(0.0), "weights": mx.array(0.0)} for side in ("tables", "body")}
        self._wanted = {}
        self.state = [optimizer.state, self._squares, self._wanted]
        self.measure_next(False)

    def measure_next(self, wanted: bool) -> None:
        """Whether to measure the next step. A compiled step has no branches; but it is compiled anew for each shape."""
        self._wanted["shape"] = mx.zeros(1 if wanted else 0)

    def update(self, model: nn.Module, gradients: dict) -> None:
        if not self._wanted["shape"].size:
            self.optimizer.update(model, gradients)
            return
        old = dict(tree_flatten(model.parameters()))
        self.optimizer.update(model, gradients)
        new = dict(tree_flatten(model.parameters()))
        sums = {side: (mx.array(0.0), mx.array(0.0)) for side in self._squares}
        for path, _ in tree_flatten(gradients):
            side = "tables" if path in self.table_paths else "body"
            new[path], *sums[side] = add_squares(old[path], new[path], *sums[side])
        for side, (step, weights) in sums.items():
            self._squares[side] |= {"step": step, "weights": weights}
        model.update(tree_map_with_path(lambda path, _: new[path], gradients))

    @property
    def learning_rate(self):
        return self.optimizer.learning_rate

    def ratios(self) -> dict[str, float | None]:
        """By side, ``||w_new - w|| / ||w||`` of the last step measured; None where nothing trains or all of w was 0."""
        return {
            side: (squares["step"].item() / squares["weights"].item()) ** 0.5 if squares["weights"].item() else None
            for side, squares in self._squares.items()
        }


def add_squares(old, new, step, weights):
    """Add the sums of squares of ``new - old`` and of ``old`` to ``step`` and ``weights``, float32 scalars.

    Returns:
        ``new``, which now depends on the sums, and the sums: whoever evaluates ``new`` first lets go of ``old``.
    """
    columns = old.shape[-1] if old.ndim else 1
    old_rows, new_rows = old.reshape(-1, columns), new.reshape(-1, columns)
    block = max(1, ELEMENTS_PER_BLOCK // columns)
    for first in range(0, len(old_rows), block):
        rows = slice(first, first + block)
        # Without this order all blocks might be there at once.
        before, after = mx.depends([old_rows[rows], new_rows[rows]], [step, weights])
        before = before.astype(mx.float32)
        step = step + _sum_of_squares(after.astype(mx.float32) - before)
        weights = weights + _sum_of_squares(before)
    return mx.depends([new], [step, weights])[0], step, weights


def _sum_of_squares(rows):
    """Rows first: on the CPU a sum of many millions would be kept in one float32 number."""
    return mx.square(rows).sum(axis=1).sum()
