"""``--shard-tables``: the rows of the token tables that train lie on several workers, V / N on each.

A run begins and ends with whole tables on all workers, and what it saves is whole: an ordinary run, to any number of
workers. Between its steps each worker has its own rows alone, with their gradients and their optimizer state.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ember_mlx.finetune.chunked_loss import chunked_loss
from ember_mlx.finetune.step import Step
from ember_mlx.finetune.vocabulary_parallel import ShardedEmbedding, sharded_loss
from ember_mlx.finetune.workers import Averages, Workers
from ember_mlx.optimizers.guarded import norm_of, squares_of
from ember_mlx.optimizers.paired import PairedOptimizer
from ember_mlx.optimizers.row_shards import RowShards
from ember_mlx.shared.errors import InputError
from ember_mlx.streaming.head_module import Head, evaluating, find_head
from ember_mlx.token_tables import TokenTable

__all__ = ["ShardedStep", "ShardedTables", "check_modules"]

GATHERED_AT_ONCE = 2**24  # bytes of each worker
REMEDY = "train without --shard-tables"


class ShardedTables:
    """The tables of a run, of which this worker keeps its own rows from now on. All workers make it together.

    Args:
        model (Module): Ready to train, the same on all workers.
        optimizer (PairedOptimizer): Of ``model``, its state made or restored.
        tables: Those that train; :func:`check_modules` has passed them.
        workers: Of the run, at least two.
        loss (callable): The run's, of whole tables. :attr:`loss` is the one of these.
        chunked: Whether it makes as few logits at a time as ``--chunked-loss``.

    Raises:
        InputError: when the loss is not what it was.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: PairedOptimizer,
        tables: Sequence[TokenTable],
        workers: Workers,
        loss: Callable,
        *,
        chunked: bool = False,
    ):
        self.workers = workers
        self._optimizer = optimizer.tables
        self.shards = RowShards.of(workers.rank, workers.size, tables[0].shape[0])
        self.paths = frozenset(table.path for table in tables)
        modules = dict(model.named_modules())
        self._owners = [modules[table.module_path] for table in tables]
        self._places = [*((owner, "weight") for owner in self._owners)]
        for table in tables:
            state = self._optimizer.state[table.path]
            self._places += [(state, name) for name, array in state.items() if _is_by_rows(name, array, table.shape)]
        head = find_head(model) if any(table.role != "embedding" for table in tables) else None
        before = _try(model, loss, self.shards)
        self._shard()
        self._optimizer.row_shards = self.shards
        self.loss = loss
        if head:
            of_own_rows = Head(model, head.module, head.method, self.shards.rows)
            self.loss = sharded_loss(of_own_rows, self.shards, chunked=chunked)
        self._refuse_another_loss(model, before)

    def __str__(self):
        shards = self.shards
        rows = f"rows {shards.first_row:,} to {shards.first_row + shards.rows - 1:,} of {shards.total_rows:,}"
        return f"Sharded over {shards.size} workers: this one has {rows} of {' and '.join(sorted(self.paths))}"

    def _shard(self):
        for container, name in self._places:
            container[name] = self.shards.own_rows(container[name])
            mx.eval(container[name])  # one after another: whole and own rows of all at once would be more
        self._look_up_here()

    def _look_up_here(self):
        for owner in self._owners:
            if type(owner) is nn.Embedding:
                owner.__class__, owner.shards = ShardedEmbedding, self.shards

    @contextmanager
    def whole(self, needed: bool = True) -> Iterator[None]:
        """Within, rank 0's model and optimizer are whole, as those of one worker; the others have their rows.

        Args:
            needed: Whether this worker needs that; where none does, nothing is sent.
        """
        if not self.workers.all_max(int(needed)):
            yield
            return
        own = [container[name] for container, name in self._places]
        self._gather(everywhere=False)
        try:
            yield
        finally:
            for (container, name), array in zip(self._places, own, strict=True):
                container[name] = array
            self._look_up_here()

    def make_whole(self) -> None:
        """Model and optimizer are whole again, on all workers."""
        self._gather(everywhere=True)
        self._optimizer.row_shards = None

    def _gather(self, everywhere):
        keeps = everywhere or self.workers.leads
        for container, name in self._places:
            found = _gathered(container[name], self.shards, keeps)
            if keeps:
                container[name] = found
        for owner in self._owners if keeps else ():
            if type(owner) is ShardedEmbedding:
                owner.__class__ = nn.Embedding

    def _refuse_another_loss(self, model, before):
        after = _try(model, self.loss, self.shards)
        # GPUs multiply float32 with 10 bits unless told not to.
        eps = max(mx.finfo(owner.weight.dtype).eps for owner in self._owners)
        differs = not abs(after - before) <= max(8 * eps, 2.0**-10) * max(abs(before), 1)
        with self.workers.one_outcome():
            if differs:
                raise InputError(
                    f"--shard-tables: {type(model).__module__}: its loss is {after:.4g} then, and {before:.4g} with "
                    f"whole tables; {REMEDY}"
                )

    def step(self, model: nn.Module, optimizer: PairedOptimizer, loss: Callable, accumulation: int = 1) -> Step:
        """What makes the step, as :class:`~ember_mlx.finetune.step.Step` is made."""
        return ShardedStep(self, model, optimizer, loss, accumulation)


class ShardedStep(Step):
    """The ordinary step. Gradients of the rows here are what they are; the norm is that of all workers' rows."""

    def __init__(self, sharded: ShardedTables, *made_of: Any):
        self.sharded = sharded
        super().__init__(*made_of, reduce=self._average_others)

    def _average_others(self, gradients, _):
        _, others = self._apart(gradients)
        averages = Averages(dict(others))
        averages.means = {name: averages.means.get(name, array) for name, array in gradients.items()}
        return averages

    def _looked_up_by_tokens(self):
        return {}

    def _exchanged(self):
        """The state of which the update exchanges a part: table after table, in one order on all workers."""
        states = self.optimizer.tables.state
        return [[states[path]["c"]] for path in sorted(self.sharded.paths) if "c" in states[path]]

    def _squares_of(self, gradients):
        tables, others = self._apart(gradients)
        of_workers = self.sharded.shards.gather(norm_of(squares_of(tree_unflatten(tables)))[None])
        return [*(squares_of(tree_unflatten(others)) if others else ()), mx.square(of_workers)]

    def _is_finite(self):
        return not self.sharded.workers.all_max(int(not super()._is_finite()))

    def _apart(self, gradients):
        """The tables, and all others, by name."""
        flat = tree_flatten(gradients)
        return tuple([pair for pair in flat if (pair[0] in self.sharded.paths) == which] for which in (True, False))


def check_modules(model: nn.Module, tables: Sequence[TokenTable]) -> None:
    """Refuse a model whose tables that train are no plain embeddings or linears, or whose head cannot be cut.

    Raises:
        InputError: for that, with the table.
    """
    modules = dict(model.named_modules())
    for table in tables:
        owner = modules[table.module_path]
        kind = nn.Linear if table.role == "head" else nn.Embedding
        if type(owner) is not kind or set(owner) != {"weight"}:
            raise InputError(
                f"--shard-tables: {table.module_path} is no nn.{kind.__name__} with a weight alone; {REMEDY}"
            )
        wrapper = table.module_path.rpartition(".")[0]
        if "lora_a" in modules.get(wrapper, {}):
            raise InputError(f"--shard-tables: {wrapper} has an adapter; leave it out of the keys in lora_parameters")
    if any(table.role != "embedding" for table in tables):
        chunked_loss(model, flag="--shard-tables")


def _is_by_rows(name, array, shape):
    """Whether an array of a table's optimizer state has a part for each row: r of Ember, or all of the table's size."""
    return name == "r" or array.shape == tuple(shape)


def _gathered(own, shards, keeps):
    """The whole of an array whose rows lie on all workers, block by block; None where it is not kept."""
    rows = max(GATHERED_AT_ONCE // max(own[:1].nbytes, 1), 1)
    whole = mx.zeros((shards.total_rows, *own.shape[1:]), own.dtype) if keeps else None
    for first in range(0, shards.most_rows, rows):
        height = min(rows, shards.most_rows - first)
        block = own[first : first + height]
        if len(block) < height:  # of the worker with a row less
            block = mx.concatenate([block, mx.zeros((height - len(block), *own.shape[1:]), own.dtype)])
        every = shards.gather(block[None])
        mx.eval(every)
        for rank in range(shards.size if keeps else 0):
            start, end = shards.first_row_of(rank) + first, shards.first_row_of(rank + 1)
            number = min(height, end - start)
            if number:
                whole[start : start + number] = every[rank, :number]
        mx.eval(whole)
    return whole


def _try(model, loss, shards):
    """The loss of a few tokens from all over the vocabulary, others on each worker."""
    tokens = (mx.linspace(0, shards.total_rows - 1, 8).astype(mx.int32) + 3 * shards.rank) % shards.total_rows
    with evaluating(model):
        return loss(model, tokens.reshape(2, 4), mx.array([[0, 3], [1, 2]]))[0].item()
