"""How far a step moves the weights: the L2 norm of the step over that of the weights, for tables and body apart."""

from collections.abc import Iterable

import mlx.core as mx

from ember_mlx.finetune.watchers import Measurement, StepResult, Update

__all__ = ["NAME", "UpdateRatio"]

ELEMENTS_PER_BLOCK = 2**20  # 4 MB of float32
NAME = "update_ratio"


class UpdateRatio:
    """Measures updates where that is asked for.

    An update is measured in blocks, each after the other and all of them right after the parameter is updated: nothing
    of a table's size is made, and the old weights live no longer than the update itself lets them.

    Args:
        table_paths (iterable of str): The parameters that are token tables; all others are the body.
    """

    def __init__(self, table_paths: Iterable[str]):
        self.table_paths = frozenset(table_paths)
        self.measurement = Measurement(NAME, self._measure)
        self._squares = {"tables": (0.0, 0.0), "body": (0.0, 0.0)}  # of the step and of the weights

    def take(self, result: StepResult) -> None:
        """Take in what an update that was measured told, if this is one."""
        if NAME in result.measurements:
            self._squares = {
                side: (step.item(), weights.item()) for side, (step, weights) in result.measurements[NAME].items()
            }

    def ratios(self) -> dict[str, float | None]:
        """By side, ``||w_new - w|| / ||w||`` of the last step measured; None where nothing trains or all of w was 0."""
        return {side: (step / weights) ** 0.5 if weights else None for side, (step, weights) in self._squares.items()}

    def _measure(self, update: Update):
        sums = {side: (mx.array(0.0), mx.array(0.0)) for side in self._squares}
        for path in update.new:
            side = "tables" if path in self.table_paths else "body"
            update.new[path], *squares = _measured(update.old[path], update.new[path])
            sums[side] = [total + square for total, square in zip(sums[side], squares, strict=True)]
        return sums


def _measured(old, new):
    """``new``, and the sums of squares of ``new - old`` and of ``old``, float32 scalars on which it now depends.

    So whoever evaluates ``new`` first lets go of ``old``. Each parameter has sums of its own: it is measured when it is
    updated, in whatever order that is.
    """
    step = weights = mx.array(0.0)
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
