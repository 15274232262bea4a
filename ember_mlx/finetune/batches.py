"""The batches of a run, from any position on: mlx-lm's order, which NumPy's random state decides.

Several workers all draw the whole batch, and each keeps every N-th of its rows. So each knows the tokens of all without
a word, and the mean of their gradients is that of one machine with the whole batch.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import iterate_batches

from ember_mlx.finetune.history import LossHistory, learned_tokens
from ember_mlx.finetune.options import Options
from ember_mlx.finetune.packing import PackedRows
from ember_mlx.finetune.position import Position, numpy_random, set_numpy_random, set_random
from ember_mlx.finetune.rows import spans_of
from ember_mlx.finetune.run_length import batches_an_epoch
from ember_mlx.finetune.workers import Workers
from ember_mlx.streaming.marks import are_marks, marks_of, marks_that_learn_all

__all__ = ["Rows", "TrainingBatches", "batches_of", "own_part", "rows_to_send", "shared_loss"]


class Rows(CacheDataset):
    """mlx-lm's data set, which need not tokenize the rows of batches that are only counted off."""

    skipping = False

    def __getitem__(self, index):
        return ([0], 0) if self.skipping else super().__getitem__(index)


class _Cut(CacheDataset):
    """Rows as mlx-lm's batches would cut them, with a warning for each batch; a run tells once of all.

    ``numbered`` ones have their number where mlx-lm's batches hand on how much of a row is not learned.
    """

    def __init__(self, rows: CacheDataset, max_seq_length: int, numbered: bool = False):
        super().__init__(rows)
        self.itemlen = rows.itemlen
        self.max_seq_length, self.numbered = max_seq_length, numbered

    def __getitem__(self, index):
        tokens, learned = self._data[index]
        return tokens[: self.max_seq_length], index if self.numbered else learned


def batches_of(args: Options, rows: CacheDataset, loop: bool = False) -> Iterator[tuple[mx.array, mx.array]]:
    """mlx-lm's batches, in its order: tokens (B, T), and what is learned of them.

    That is mlx-lm's lengths, or marks where a row may have several spans: see :mod:`ember_mlx.streaming.marks`. By its
    lengths mlx-lm also learns a token of padding after each shorter row; marks leave it out.

    Args:
        args: The run's options.
        rows: The set.
        loop: Without end, each pass in another order.
    """
    sizes = args.batch_size, args.max_seq_length
    if not args.packing and (not args.mask_prompt or args.train_tables == "none"):
        yield from iterate_batches(_Cut(rows, args.max_seq_length), *sizes, loop=loop)
        return
    packs = isinstance(getattr(rows, "_data", None), PackedRows)
    numbered = _Cut(rows, args.max_seq_length, numbered=True)
    for tokens, lengths in iterate_batches(numbered, *sizes, loop=loop):
        marks = np.zeros(tokens.shape, np.uint32 if packs else np.uint8)
        for row, (number, length) in zip(marks, lengths.tolist(), strict=True):
            of_row, learned = rows[number]
            row[:length] = learned if packs else marks_of(length, spans_of(of_row, learned, length))
        yield tokens, mx.array(marks)


class TrainingBatches:
    """Draws the next batch of the training set, and knows where the run is.

    Args:
        args: The run's options.
        rows (Rows): The training set.
        history (LossHistory): Kept in each position.
        start (Position, optional): Where to resume.

    ``position`` is the last one at which nothing was accumulated: there weights and optimizer are as they were.
    """

    def __init__(self, args: Options, rows: Rows, history: LossHistory, start: Position | None = None):
        self.accumulation = args.grad_accumulation_steps
        self.batches_an_epoch = batches_an_epoch(args, len(rows))
        self.history = history
        self.step = self.drawn = 0
        self.epoch_random = self.first_evaluation = None
        self.workers = Workers.join()
        self._batches = batches_of(args, rows, loop=True)
        if start is None:
            self.mark()
            return
        self.position = start
        self.step, self.drawn = start.step, start.drawn
        self.epoch_random, self.first_evaluation = start.epoch_random, start.first_evaluation
        if self.drawn:
            set_numpy_random(self.epoch_random)
            rows.skipping = True
            for _ in range(self.drawn):
                next(self._batches)
            rows.skipping = False
        set_random(start)

    def draw(self) -> tuple[mx.array, ...]:
        """The next batch, of :func:`batches_of`; of several workers, this one's :func:`own_part` of it."""
        if not self.drawn:
            self.epoch_random = numpy_random()
        batch = next(self._batches)
        self.drawn = (self.drawn + 1) % self.batches_an_epoch
        self.step += 1
        self.history.draw(batch)
        return own_part(batch, self.workers)

    @contextmanager
    def evaluation(self, batches: int, same: bool) -> Iterator[None]:
        """Within it a validation draws its batches: fresh ones as in mlx-lm or, if asked, those of the first one.

        Either way the training batches after it are the same.

        Args:
            batches: How many the validation set has.
            same: Whether losses are to compare.
        """
        if not (same and self.first_evaluation):
            self.first_evaluation = self.first_evaluation or numpy_random()
            yield
            return
        with self.as_first_evaluated():
            yield
        np.random.permutation(batches)  # as mlx-lm draws a validation's batches

    @contextmanager
    def as_first_evaluated(self) -> Iterator[None]:
        """Within it the batches of the first validation are drawn, if there was one; nothing is drawn outside."""
        now = numpy_random()
        set_numpy_random(self.first_evaluation or now)
        yield
        set_numpy_random(now)

    def mark(self, random: dict | None = None) -> None:
        """Call it between two steps. ``random`` is NumPy's state, if not as it is now."""
        if self.step % self.accumulation:
            return
        random = random or numpy_random()
        self.position = Position(
            step=self.step,
            drawn=self.drawn,
            epoch_random=self.epoch_random or random,
            numpy_random=random,
            mlx_random=mx.random.state[0].tolist(),
            first_evaluation=self.first_evaluation,
            record=self.history.to_json(),
        )


def own_part(batch: tuple[mx.array, mx.array], workers: Workers) -> tuple[mx.array, ...]:
    """A worker's rows of a batch, how much its mean loss counts in the mean over all workers, and the tokens of all.

    Args:
        batch: Tokens (B, T) and lengths (B, 2) or marks (B, T) of the whole batch, the same on all workers.
        workers: Their number N divides B.

    Returns:
        ``batch`` itself for one worker. Else the same with B / N rows; the share, float32: N times the
        part of the batch's learned tokens that are in these rows; and :func:`rows_to_send`. The share is 0 where there
        are none, and NaN, as the loss of one machine is, where the whole batch has none.
    """
    if workers.size == 1:
        return batch
    counts = learned_tokens(batch)
    own, whole = sum(counts[workers.rank :: workers.size]), sum(counts)
    tokens, learned = (each[workers.rank :: workers.size] for each in batch)
    if not own:
        # A mean over no tokens has NaN gradients, which no share of 0 removes; that of any tokens does as well.
        every = mx.broadcast_to(mx.array([1, tokens.shape[1] - 1]), (learned.shape[0], 2))
        learned = marks_that_learn_all(learned) if are_marks(learned) else every
    share = mx.array(workers.size * own / whole if whole else math.nan)
    return tokens, learned, share, mx.array(rows_to_send(np.array(batch[0][:, :-1])))


def rows_to_send(inputs: np.ndarray, number: int | None = None) -> np.ndarray:
    """The rows of an embedding that have a gradient, and the first others, up to ``number``.

    Args:
        inputs: Token ids, non-negative integers, that the model looks up.
        number: At least as many as distinct ids; default: one for each of ``inputs``. So it depends on the batch's
            shape alone, and the step is compiled once for each.

    Returns:
        Distinct row numbers.
    """
    number = inputs.size if number is None else number
    occurs = np.zeros(max(number, inputs.max(initial=0) + 1), bool)
    occurs[inputs.reshape(-1)] = True
    found = np.flatnonzero(occurs)
    others = np.flatnonzero(~occurs[:number])[: number - len(found)]
    return np.concatenate([found, others]).astype(inputs.dtype)


def shared_loss(loss: Callable) -> Callable:
    """mlx-lm's kind of loss, for batches of :func:`own_part`: the mean over the workers is that over all tokens."""

    def of_own_part(model, tokens, learned, share=None):
        value, count = loss(model, tokens, learned)
        return (value, count) if share is None else (value * share, mx.where(share > 0, count, 0))

    return of_own_part
