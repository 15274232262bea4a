"""The batches of a run, from any position on: mlx-lm's order, which NumPy's random state decides."""

import mlx.core as mx
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import iterate_batches

from ember_mlx.finetune.history import LossHistory
from ember_mlx.finetune.options import Options
from ember_mlx.finetune.position import Position, numpy_random, set_numpy_random, set_random

__all__ = ["Rows", "TrainingBatches"]


class Rows(CacheDataset):
    """mlx-lm's data set, which need not tokenize the rows of batches that are only counted off."""

    skipping = False

    def __getitem__(self, index):
        return ([0], 0) if self.skipping else super().__getitem__(index)


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
        self.batches_an_epoch = max(len(rows) // args.batch_size, 1)
        self.history = history
        self.step = self.drawn = 0
        self.epoch_random = self.first_evaluation = None
        world = mx.distributed.init()
        self._batches = iterate_batches(rows, args.batch_size, args.max_seq_length, loop=True, comm_group=world)
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

    def draw(self) -> tuple[mx.array, mx.array]:
        """The tokens and the lengths of the next batch."""
        if not self.drawn:
            self.epoch_random = numpy_random()
        batch = next(self._batches)
        self.drawn = (self.drawn + 1) % self.batches_an_epoch
        self.step += 1
        self.history.draw(batch)
        return batch

    def begin_evaluation(self) -> None:
        """The first validation's batches are those on which the last one is repeated."""
        self.first_evaluation = self.first_evaluation or numpy_random()

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
