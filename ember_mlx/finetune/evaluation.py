"""The loss on a set: mlx-lm's ``evaluate``, where rows with nothing to learn are left out and named."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.cli_ui import rprint
from mlx_lm.tuner import trainer
from mlx_lm.tuner.datasets import CacheDataset

from ember_mlx.finetune.batches import batches_of
from ember_mlx.finetune.history import learned_tokens
from ember_mlx.finetune.one_behind import OneBehind
from ember_mlx.finetune.options import Options
from ember_mlx.finetune.rows import spans_of
from ember_mlx.finetune.workers import Workers
from ember_mlx.shared.replacing import replaced

__all__ = ["evaluate"]


@contextmanager
def _streams_left_to_mlx() -> Iterator[None]:
    """mlx-lm sums on the CPU's stream, which NCCL does not know; MLX itself chooses one that the backend has."""
    all_sum = mx.distributed.all_sum
    with replaced(mx.distributed, "all_sum", lambda array, stream=None: all_sum(array)):
        yield


@contextmanager
def _paced(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within, layers are evaluated one after another."""
    evaluated = OneBehind()

    def paced(call):
        def call_and_evaluate(*inputs, **more):
            output = call(*inputs, **more)
            evaluated(output)
            return output

        return call_and_evaluate

    with ExitStack() as stack:
        for kind in {type(layer) for layer in layers}:
            stack.enter_context(replaced(kind, "__call__", paced(kind.__call__)))
        yield


@_streams_left_to_mlx()
def evaluate(
    args: Options,
    model: nn.Module,
    loss: Callable,
    rows: CacheDataset,
    num_batches: int,
    between_batches: Callable[[], None] = lambda: None,
) -> float:
    """The mean loss over the tokens of ``num_batches`` batches, or of all with -1, in nats.

    NaN only if no batch has anything to learn. ``between_batches`` is called after each batch; it may raise.
    With ``--stream``, whose steps take little more than the weights, layers are paced.
    """
    empty, workers = [], Workers.join()

    def batches(dataset, **_):
        for whole in batches_of(args, dataset):  # padded alike on all workers
            batch = tuple(each[workers.rank :: workers.size] for each in whole)
            empty.append(learned_tokens(batch).count(0))
            yield batch

    def loss_or_nothing(model, tokens, learned):
        value, count = loss(model, tokens, learned)
        return mx.where(count > 0, value, 0), count

    with _paced(model.layers) if args.stream else nullcontext():
        mean = trainer.evaluate(
            model=model,
            dataset=rows,
            batch_size=args.batch_size,
            num_batches=num_batches,
            max_seq_length=args.max_seq_length,
            loss=loss_or_nothing,
            iterate_batches=batches,
            clear_cache_threshold=args.clear_cache_threshold,
            progress_callback=between_batches,
        )
    if workers.all_max(sum(empty)) and not getattr(rows, "empty_rows_named", False):
        rows.empty_rows_named = True
        _name_empty(args, rows)
    return mean


def _name_empty(args, rows):
    """Say which rows the mean leaves out, counted from 1."""
    empty = [i + 1 for i in range(len(rows)) if not spans_of(*rows[i], args.max_seq_length)]
    shown = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
    rprint(f"Warning: {len(empty)} of {len(rows)} rows have nothing to learn; the mean loss leaves them out: {shown}")
