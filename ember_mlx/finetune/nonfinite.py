"""What a run does about a step with a NaN or an infinity in it, which the optimizer's guard has left out."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from mlx_lm.cli_ui import rprint

from ember_mlx.finetune.watchers import StepResult
from ember_mlx.optimizers.guarded import COUNT, GuardedOptimizer
from ember_mlx.shared.errors import InputError

__all__ = ["NonfiniteSteps"]

FOUND = "a NaN or an infinity in the loss, a gradient or a new weight"
REMEDY = (
    "Lower the learning rates, limit the gradients with --clip-grad-norm 1, look for rows with nothing to learn (with "
    "--mask-prompt, prompts as long as --max-seq-length)"
)
RESUME = ". --resume continues before that step; all but the last of these need --resume-with-changes too"


class NonfiniteSteps:
    """Called between two steps with the number of steps done: stops the run, or says what was left out.

    The guard judges sums of gradients: with accumulation, the step named here is the one that the sum was for, and with
    several machines it is the same on all of them.

    Args:
        optimizer (GuardedOptimizer): With ``skip_nonfinite``, its state loaded if the run is resumed.
        on_nonfinite (str): "stop" or "skip".
        save (callable): Called before the run is stopped, when everything is as it was before that step; returns
            whether there is a checkpoint of it.
        go_back (callable): Called instead where a part of the weights was stepped; returns the checkpoint that the run
            went back to, or None.

    Raises:
        InputError: at the first such step, if that is what ``on_nonfinite`` asks for.
    """

    def __init__(
        self,
        optimizer: GuardedOptimizer,
        on_nonfinite: str,
        save: Callable[[], bool],
        go_back: Callable[[], Path | None],
    ):
        self.optimizer = optimizer
        self.on_nonfinite = on_nonfinite
        self.save = save
        self.go_back = go_back
        self.count = optimizer.nonfinite_steps.item()

    def __call__(self, steps_done: int, result: StepResult) -> None:
        if not result.nonfinite:
            return
        found = f"step {steps_done}: {_found(result)}"
        if self.on_nonfinite == "stop":
            self.optimizer.state[COUNT] = mx.array(self.count, mx.uint32)
            reached, resume = self._undo() if result.unstepped else ("", RESUME if self.save() else "")
            raise InputError(
                f"{found}; it reached neither the weights nor the optimizer's state{reached}. {REMEDY}, or leave such "
                f"steps out with --on-nonfinite skip{resume}"
            )
        self.count += 1
        left_out = "these weights were left out, the others stepped" if result.unstepped else "it was left out"
        rprint(f"Warning: {found}; {left_out}, {self.count} so far")

    def _undo(self):
        """A streamed step is half applied: what to tell of that, before and after the advice."""
        checkpoint = self.go_back()
        if checkpoint is None:
            return ", but other weights were stepped: of this half step nothing is saved", ""
        return f", but other weights were stepped: the run went back to {checkpoint}", ". --resume continues from there"

    @property
    def nothing_is_learned(self) -> bool:
        """Whether no step has changed the weights yet."""
        return self.optimizer.step.item() == 0

    def refuse_nothing(self) -> None:
        """At the end: raises InputError if every step was left out."""
        if self.count and self.nothing_is_learned:
            raise InputError(
                f"--on-nonfinite skip: {self.count} of {self.count} steps had {FOUND}, so nothing was learned and no "
                f"adapter is saved. {REMEDY}, or try the model with --learning-rate 0 --table-learning-rate 0"
            )

    def report(self) -> None:
        """At the end: how many there were, those before a resumption included."""
        if self.count:
            were = "step was" if self.count == 1 else "steps were"
            rprint(f"{self.count} {were} left out, with {FOUND}")


def _found(result):
    if not result.unstepped:
        return FOUND
    first, *more = result.unstepped
    return f"a NaN or an infinity in the gradient of {first}" + (f" and of {len(more)} more weights" if more else "")
