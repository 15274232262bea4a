"""What hangs into mlx-lm's training loop: its batches, its reports, and where it begins to count.

The loop asks for a batch exactly between two steps. There nothing is under way, so there a run is saved and stopped.
"""

import math
from dataclasses import asdict, dataclass
from functools import partial
from types import FunctionType

import mlx.core as mx
import numpy as np
from mlx_lm.tuner import trainer
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import CacheDataset

from ember_mlx.shared.errors import InputError

NUMPY_STATE = {"keys": str, "position": int, "has_gauss": int, "cached_gaussian": float}


@dataclass(frozen=True)
class Position:
    """Where a run is, after a step that left no gradients accumulated; all of it can be JSON.

    Args:
        step (int): Steps done, as mlx-lm counts them: batches.
        drawn (int): How many of them were drawn in the epoch under way; 0 between two epochs.
        epoch_random (dict): NumPy's random state from which the order of this epoch's batches was drawn.
        numpy_random (dict): NumPy's random state now: evaluations draw from it too.
        mlx_random (list): MLX's random state, two numbers.
        first_evaluation (dict): NumPy's random state from which the first evaluation drew its batches, or None.
        record (dict): What Record keeps.
    """

    step: int
    drawn: int
    epoch_random: dict
    numpy_random: dict
    mlx_random: list
    first_evaluation: dict | None
    record: dict

    TYPES = {  # noqa: RUF012
        "step": int,
        "drawn": int,
        "epoch_random": NUMPY_STATE,
        "numpy_random": NUMPY_STATE,
        "mlx_random": [int],
        "first_evaluation": (dict, type(None)),
        "record": {"losses": dict, "trained_tokens": int},
    }
    to_json = asdict


class Rows(CacheDataset):
    """mlx-lm's data set, which need not tokenize the rows of batches that are only counted off."""

    skipping = False

    def __getitem__(self, index):
        return ([0], 0) if self.skipping else super().__getitem__(index)


class Batches:
    """mlx-lm's ``iterate_batches``, from any position on.

    Args:
        args: The run's options.
        record (Record): What the reports said so far.
        after_step (callable): Called with the number of steps done between any two; it may raise to leave the loop.
        save (callable): Called with the number of steps done after every ``--save-every``.
        stop (callable): Called between two steps, and between the batches of an evaluation; it may raise to leave the
            loop.
        start (Position, optional): Where to go on.
    """

    def __init__(self, args, record, after_step, save, stop, start: Position | None = None):
        self.args = args
        self.record = record
        self.after_step = after_step
        self.save = save
        self.stop = stop
        self.start = start
        self.position = start  # the last one at which nothing was accumulated; weights and optimizer are as they were
        self.steps_drawn = self.drawn = 0
        self.epoch_random = self.first_evaluation = self._before_extra_evaluation = None
        if start:
            self.steps_drawn, self.drawn = start.step, start.drawn
            self.epoch_random, self.first_evaluation = start.epoch_random, start.first_evaluation

    def __call__(self, dataset, batch_size, max_seq_length, loop=False, **options):
        draw = partial(trainer.iterate_batches, dataset, batch_size, max_seq_length, loop=loop, **options)
        if not loop:
            return self._evaluation(draw())
        return self._training(draw(), dataset, len(dataset) // batch_size)

    def finish(self):
        """The last step is done, and mlx-lm asks for no more."""
        self.after_step(self.steps_drawn)
        if self._before_extra_evaluation is None:
            self._mark()
        else:
            self._mark(numpy_random=self._before_extra_evaluation)

    def _training(self, batches, dataset, batches_an_epoch):
        if self.start:
            if self.drawn:
                set_numpy_random(self.epoch_random)
                dataset.skipping = True
                for _ in range(self.drawn):
                    next(batches)
                dataset.skipping = False
            set_random(self.start)
        else:
            self._mark()
        first = self.steps_drawn
        while True:
            if self.steps_drawn > first:
                self.after_step(self.steps_drawn)
                self._mark()
                if self.steps_drawn % self.args.save_every == 0:
                    self.save(self.steps_drawn)
            self.stop()
            if not self.drawn:
                self.epoch_random = numpy_random()
            batch = next(batches)
            self.drawn = (self.drawn + 1) % batches_an_epoch
            self.steps_drawn += 1
            self.record.draw(batch)
            yield batch

    def _evaluation(self, batches):
        self.first_evaluation = self.first_evaluation or numpy_random()
        iters = self.args.iters
        if self.steps_drawn == iters > 1 and iters % self.args.steps_per_eval:
            # Of the last step only because it is the last: a run of more iterations goes on as if it had not been.
            self._before_extra_evaluation = numpy_random()
        for batch in batches:
            self.stop()
            yield batch

    def _mark(self, **known):
        if self.steps_drawn % self.args.grad_accumulation_steps == 0:
            now = {
                "step": self.steps_drawn,
                "drawn": self.drawn,
                "epoch_random": self.epoch_random,
                "numpy_random": numpy_random(),
                "mlx_random": mx.random.state[0].tolist(),
                "first_evaluation": self.first_evaluation,
                "record": self.record.to_json(),
            }
            now["epoch_random"] = now["epoch_random"] or now["numpy_random"]
            self.position = Position(**(now | known))


class Record(TrainingCallback):
    """Keeps the first and the last losses, adds the tables' learning rate, and hands the reports on to other callbacks.

    With the report of the last step it raises Finished: mlx-lm's loop would go on to write everything that trains,
    tables and all, into one file.
    """

    def __init__(self, args, callbacks, optimizer, saved: dict | None = None):
        self.args = args
        self.callbacks = callbacks
        self.optimizer = optimizer
        saved = saved or {"losses": {}, "trained_tokens": 0}
        self.losses = dict(saved["losses"])  # "train_loss" and "val_loss": [first, last]
        self.trained_tokens = self._tokens_before = saved["trained_tokens"]
        self._tokens_since = 0

    def to_json(self):
        return {"losses": dict(self.losses), "trained_tokens": self.trained_tokens + self._tokens_since}

    def draw(self, batch):
        """Count the tokens of a batch that mlx-lm's loss learns from, which it tells with the next report only."""
        tokens, lengths = batch
        last = tokens.shape[1] - 1
        # Of this worker; the report then brings the sum over all of them.
        self._tokens_since += sum(max(0, min(end, last) - max(start, 1) + 1) for start, end in lengths.tolist())

    def on_train_loss_report(self, train_info):
        # A step that was left out has a loss all the same, and one that stops the run is told between the steps.
        if math.isfinite(train_info["train_loss"]):
            self._keep("train_loss", train_info)
        train_info["trained_tokens"] += self._tokens_before
        self.trained_tokens, self._tokens_since = int(train_info["trained_tokens"]), 0
        if self.args.token_tables:
            train_info["table_learning_rate"] = self.optimizer.table_learning_rate.item()
        for callback in self.callbacks:
            callback.on_train_loss_report(train_info)
        if train_info["iteration"] == self.args.iters:
            raise Finished

    def on_val_loss_report(self, val_info):
        loss = val_info["val_loss"]
        if not math.isfinite(loss):
            raise InputError(
                f"the validation loss is {loss} at iteration {val_info['iteration']}; the weights are not saved. Lower "
                "the learning rates, or look for rows with nothing to learn: with --mask-prompt, prompts as long as "
                "--max-seq-length"
            )
        self._keep("val_loss", val_info)
        for callback in self.callbacks:
            callback.on_val_loss_report(val_info)

    def _keep(self, name, info):
        self.losses[name] = [self.losses.get(name, [info[name]])[0], info[name]]


class Finished(Exception):
    """All steps are done and reported."""


def train_from(step: int):
    """mlx-lm's ``train``, which counts its steps on from ``step``.

    It has no option for that, and what a step does (accumulate, evaluate, report) follows from its number. This is its
    own code with another ``range``, which it calls once, for that number.
    """

    def steps(first, end):
        return range(first + step, end)

    def ui(total, rank):
        shown = trainer.TrainUI(total, rank=rank)
        for _ in range(step):
            shown.advance()
        return shown

    train = trainer.train
    return FunctionType(train.__code__, vars(trainer) | {"range": steps, "TrainUI": ui}, argdefs=train.__defaults__)


def numpy_random() -> dict:
    """NumPy's random state, as JSON can have it."""
    _, keys, position, has_gauss, cached_gaussian = np.random.get_state()
    return {
        "keys": keys.astype("<u4").tobytes().hex(),
        "position": position,
        "has_gauss": has_gauss,
        "cached_gaussian": cached_gaussian,
    }


def set_numpy_random(state: dict):
    """Raises ValueError for what is no state: NumPy itself would take a position beyond the end of the keys."""
    keys = np.frombuffer(bytes.fromhex(state["keys"]), "<u4")
    if len(keys) != 624 or not 0 <= state["position"] <= 624 or state["has_gauss"] not in (0, 1):
        raise ValueError("no state of NumPy's generator")
    np.random.set_state(("MT19937", keys, state["position"], state["has_gauss"], state["cached_gaussian"]))


def set_random(position: Position):
    """Put MLX's and NumPy's random states back.

    Raises:
        ValueError: for what is no random state.
    """
    set_numpy_random(position.numpy_random)
    high, low = position.mlx_random
    if not (0 <= high < 2**32 and 0 <= low < 2**32):
        raise ValueError(f"mlx_random {position.mlx_random}: two numbers of 32 bits")
    mx.random.seed(high << 32 | low)  # the seed is the state: its two halves
