"""Who looks on while a run trains: the protocol of watchers, and what they may have measured inside a step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer

from ember_mlx.token_tables import TokenTable

__all__ = ["Measurement", "StepResult", "Update", "Watcher"]


@dataclass(frozen=True)
class Update:
    """One update as a measurement sees it, inside the compiled step. All three are flat: path -> array.

    ``gradients`` are as the optimizer takes them: accumulated, averaged, clipped.
    """

    old: dict[str, mx.array]
    gradients: dict[str, mx.array]
    new: dict[str, mx.array]


@dataclass(frozen=True)
class Measurement:
    """What a watcher wants to know of the next update.

    Args:
        name (str): Under which the readings are found in ``StepResult.measurements``. One name, one ``measure``: the
            update is compiled for each set of names.
        measure (callable): ``measure(update, **inputs)`` gives the readings, a tree of arrays. It may put arrays into
            ``update.new`` that depend on the readings, so that whoever evaluates the weights lets go of the old ones.
        inputs (dict): Arrays that change from step to step.
    """

    name: str
    measure: Callable[..., Any]
    inputs: dict[str, mx.array] = field(default_factory=dict)


@dataclass(frozen=True)
class StepResult:
    """What a step tells.

    Args:
        loss (array): Mean over the batch's tokens, nats; over several batches, the mean of these means. With several
            workers, this one's part of it: their mean is the loss.
        tokens (array): How many those are.
        updated (bool): Whether the weights changed: not while gradients accumulate, not in a step left out.
        nonfinite (bool): Whether an update was left out, for a loss, gradients or weights that are not finite.
        unstepped (tuple): Of an update that was left out in part: the paths of the weights that were not stepped.
        batches (int): How many batches ``loss`` and ``tokens`` are of. A streamed step tells of all that it has
            gathered with the last of them, and of 0 before.
        measurements (dict): name -> the readings that were asked for, where ``updated``.
    """

    loss: mx.array
    tokens: mx.array
    updated: bool
    nonfinite: bool
    measurements: dict[str, Any]
    unstepped: tuple[str, ...] = ()
    batches: int = 1


class Watcher(Protocol):
    """Looks on. Each method is called between two steps, when weights and optimizer state are evaluated.

    A subclass defines only what it listens to; the methods here do nothing.
    """

    def before_training(
        self, model: nn.Module, optimizer: Optimizer, tables: Sequence[TokenTable], rows: Sequence
    ) -> None:
        """All is ready: the model, its optimizer, the tables that train, and the training set."""

    def before_step(self, step: int, batch: tuple[mx.array, mx.array]) -> Measurement | None:
        """Step number ``step``, from 1, is about to see ``batch``. What is to be measured if it updates the weights."""

    def after_step(self, step: int, result: StepResult) -> None:
        """The step is done; a report of it comes next, if one is due."""

    def after_validation(self, step: int, loss: float) -> None:
        """The validation before ``step`` found this loss."""
