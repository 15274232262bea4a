"""How long a run will still take: a watcher that times updates and validations."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median

import mlx.nn as nn
from mlx.optimizers import Optimizer

from ember_mlx.finetune.options import Options
from ember_mlx.finetune.watchers import StepResult, Watcher
from ember_mlx.token_tables import TokenTable

__all__ = ["TimeLeft", "in_words"]

RECENT = 32  # updates, of whose times the median counts: compiling and saving are among the slowest


class TimeLeft(Watcher):
    """Times whole updates, since accumulated and streamed batches take unlike times; and validations, answers included.

    It comes last among the watchers: what others do after a validation is part of it.

    Args:
        args: The run's options.
        clock (callable): Seconds.
    """

    def __init__(self, args: Options, clock: Callable[[], float] = time.perf_counter):
        self.args = args
        self.clock = clock
        self._updates = deque(maxlen=RECENT)
        self._validations = deque(maxlen=RECENT)
        self._ended = None  # the last step or validation
        self._began = None  # the update under way, less the time of validations in it

    def before_training(
        self, model: nn.Module, optimizer: Optimizer, tables: Sequence[TokenTable], rows: Sequence
    ) -> None:
        self._ended = self.clock()

    def after_step(self, step: int, result: StepResult) -> None:
        self._ended = self.clock()
        if step % self.args.grad_accumulation_steps == 0:
            if self._began is not None:
                self._updates.append(self._ended - self._began)
            self._began = self._ended

    def after_validation(self, step: int, loss: float) -> None:
        now = self.clock()
        self._validations.append(now - self._ended)
        if self._began is not None:
            self._began += now - self._ended
        self._ended = now

    def seconds(self, step: int) -> float | None:
        """What is left after ``step``, the validation after the last step included; None before it can be told."""
        if not self._updates:
            return None
        args = self.args
        of_steps = (args.iters - step) / args.grad_accumulation_steps * median(self._updates)
        if not self._validations:
            return of_steps
        every = args.steps_per_eval
        validations = args.iters // every - step // every
        if step < args.iters and args.iters % every:
            validations += 1
        return of_steps + (validations + 1) * median(self._validations)


def in_words(seconds: float) -> str:
    """A time in its largest unit, two for hours and days: "45 s", "12 min", "2 h 5 min", "3 days 4 h"."""
    minutes = math.ceil(seconds / 60)
    if seconds <= 59:
        return f"{math.ceil(seconds)} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} {'day' if days == 1 else 'days'}" + (f" {hours} h" if hours else "")
