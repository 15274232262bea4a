"""What a training step leaves to be measured: a few rows and entries of its gradients, and how far some tokens moved.

Nothing of a table's size is made. What is read lies in the optimizer's state, the one thing that mlx-lm's compiled
step hands out, and is overwritten in the next step.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ember_mlx.optimizers.guarded import clip_by_norm, global_norm
from ember_mlx.optimizers.paired import PairedOptimizer

UPDATES = "updates"


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


class ProbedOptimizer:
    """The optimizer as mlx-lm's loop takes it, with ``readings`` beside its state.

    ``readings[UPDATES]`` counts the updates. ``readings["tables"][path]`` holds, all float32, the gradient's ``rows``
    (n, D) and ``block`` (rows, columns), and ``moved`` (m,): the root mean square over the row of what an update
    changed in the rows ``tokens`` (m,), in learning rates of the table. ``tokens`` is to be set before a step.
    ``readings["hidden"][path]`` holds rows of other gradients (n, D). All gradients are as the optimizer takes them,
    after accumulation and clipping.

    Args:
        optimizer (PairedOptimizer): What trains.
        parameters (dict): path -> array, of what trains.
        tables (dict): path -> TableSample.
        hidden (dict): path -> row numbers.
    """

    def __init__(self, optimizer: PairedOptimizer, parameters, tables, hidden):
        self.optimizer = optimizer
        self.tables = tables
        self.hidden = hidden
        self.readings = {UPDATES: mx.array(0, mx.uint32), "tables": {}, "hidden": {}}
        for path, sample in tables.items():
            columns = parameters[path].shape[1]
            self.readings["tables"][path] = {
                "rows": mx.zeros((len(sample.rows), columns)),
                "block": mx.zeros((len(sample.block_rows), len(sample.block_columns))),
                "tokens": mx.zeros((sample.batch_tokens,), mx.int32),
                "moved": mx.zeros((sample.batch_tokens,)),
            }
        for path, rows in hidden.items():
            self.readings["hidden"][path] = mx.zeros((len(rows), parameters[path].shape[1]))
        # One container for the life of the optimizer: the compiled step holds it.
        self.state = {"optimizer": optimizer.state, "readings": self.readings}

    @property
    def learning_rate(self):
        return self.optimizer.learning_rate

    def update(self, model, gradients):
        taken = gradients
        if self.optimizer.clip_grad_norm is not None:
            taken = clip_by_norm(gradients, global_norm(gradients), self.optimizer.clip_grad_norm)
        taken = dict(tree_flatten(taken))
        before = dict(tree_flatten(model.trainable_parameters()))
        for path, rows in self.hidden.items():
            self.readings["hidden"][path] = taken[path][mx.array(rows)].astype(mx.float32)
        for path, sample in self.tables.items():
            reading, gradient = self.readings["tables"][path], taken[path]
            reading["rows"] = gradient[mx.array(sample.rows)].astype(mx.float32)
            block = gradient[mx.array(sample.block_rows)[:, None], mx.array(sample.block_columns)]
            reading["block"] = block.astype(mx.float32)
        self.optimizer.update(model, gradients)
        after = dict(tree_flatten(model.trainable_parameters()))
        for path in self.tables:
            reading = self.readings["tables"][path]
            tokens = reading["tokens"]
            change = after[path][tokens].astype(mx.float32) - before[path][tokens].astype(mx.float32)
            reading["moved"] = mx.sqrt(mx.square(change).mean(axis=1)) / self.optimizer.table_learning_rate
        self.readings[UPDATES] = self.readings[UPDATES] + 1
