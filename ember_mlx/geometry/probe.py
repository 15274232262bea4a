"""What a training step leaves to be measured: a few rows and entries of its gradients, and how far some tokens moved.

Nothing of a table's size is made. The compiled update returns what is read.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ember_mlx.finetune.watchers import Measurement, Update
from ember_mlx.optimizers.paired import PairedOptimizer

__all__ = ["NAME", "Probe", "TableSample"]

NAME = "geometry"


@dataclass(frozen=True)
class TableSample:
    """What is measured of one table; all are numbers of rows or columns, int32, ascending.

    Args:
        rows (ndarray): Rows whose gradients are read with all columns.
        block_rows, block_columns (ndarray): Entries of the gradient that are read: these columns in these rows.
        path_rows (ndarray): Rows whose weights are followed.
        batch_tokens (int): How many tokens of a batch have their steps measured.
    """

    rows: np.ndarray
    block_rows: np.ndarray
    block_columns: np.ndarray
    path_rows: np.ndarray
    batch_tokens: int


class Probe:
    """What to measure in an update, and in :attr:`readings` what the last one told.

    ``readings["tables"][path]`` holds, all float32, the gradient's ``rows`` (n, D) and ``block`` (rows, columns),
    ``tokens`` (m,), the rows that were asked for, and ``moved`` (m,): the root mean square over the row of what the
    update changed in them, in learning rates of the table. ``readings["hidden"][path]`` holds rows of other gradients
    (n, D). All gradients are as the optimizer takes them, after accumulation and clipping.

    Args:
        optimizer (PairedOptimizer): What trains.
        tables (dict): path -> TableSample.
        hidden (dict): path -> row numbers.
    """

    def __init__(self, optimizer: PairedOptimizer, tables: dict[str, TableSample], hidden: dict[str, np.ndarray]):
        self.optimizer = optimizer
        self.tables = tables
        self.hidden = hidden
        self.readings = None

    def measurement(self, tokens: dict[str, mx.array]) -> Measurement:
        """For the next step; ``tokens`` are the rows of each table, (m,) int32, whose moves are measured."""
        return Measurement(NAME, self._measure, {"tokens": tokens})

    def _measure(self, update: Update, tokens):
        readings = {"tables": {}, "hidden": {}}
        for path, rows in self.hidden.items():
            readings["hidden"][path] = update.gradients[path][mx.array(rows)].astype(mx.float32)
        for path, sample in self.tables.items():
            gradient, rows = update.gradients[path], tokens[path]
            block = gradient[mx.array(sample.block_rows)[:, None], mx.array(sample.block_columns)]
            old, new = (table[path][rows].astype(mx.float32) for table in (update.old, update.new))
            readings["tables"][path] = {
                "rows": gradient[mx.array(sample.rows)].astype(mx.float32),
                "block": block.astype(mx.float32),
                "tokens": rows,
                "moved": mx.sqrt(mx.square(new - old).mean(axis=1)) / self.optimizer.table_learning_rate,
            }
        return readings
