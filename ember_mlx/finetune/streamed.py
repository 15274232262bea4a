"""The streamed step as a run takes it: micro-batches gather for one update, and what it costs is told beforehand."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.cli_ui import rprint

from ember_mlx.finetune import checkpoints
from ember_mlx.finetune.options import Options, flag
from ember_mlx.finetune.step import Step
from ember_mlx.finetune.watchers import Measurement, StepResult
from ember_mlx.finetune.workers import Workers
from ember_mlx.optimizers.guarded import GuardedOptimizer
from ember_mlx.optimizers.paired import PairedOptimizer
from ember_mlx.shared.errors import InputError
from ember_mlx.streaming import StreamedStep
from ember_mlx.streaming.shards import Group

__all__ = ["Streamed", "as_it_began", "step_of"]

NOTHING_CHANGED = (("loss",), ("gradient norm",))  # what StreamedStep calls a step that was left out as a whole


class Streamed:
    """:class:`ember_mlx.streaming.StreamedStep` with the call of :class:`ember_mlx.finetune.step.Step`.

    Args:
        model (Module): What trains; frozen and unfrozen already.
        optimizer (GuardedOptimizer or PairedOptimizer): Made of ``model``.
        args: The run's options.

    Raises:
        InputError: for a model that cannot be differentiated, and an optimizer that needs all gradients at once.

    Of several workers each gradient becomes the mean over all as soon as it is made.
    """

    def __init__(self, model: nn.Module, optimizer: GuardedOptimizer | PairedOptimizer, args: Options):
        self.args = args
        self._workers = workers = Workers.join()
        group = None
        if args.shard_optimizer:
            group = Group(workers.rank, workers.size, mx.distributed.sum_scatter, mx.distributed.all_gather)
        try:
            self.step = StreamedStep(
                model.train(),
                optimizer,
                clip_norm_pass=args.clip_grad_norm is not None,
                clip_layer_norm=args.clip_layer_norm,
                keep_inputs=args.keep_inputs or 1,
                reduce=mx.distributed.all_sum if workers.size > 1 else None,
                group=group,
            )
        except InputError as error:
            which, remedy = "--stream", "--no-stream takes an ordinary step"
            if args.shard_optimizer:
                which, remedy = "--shard-optimizer", "or leave it out"
            raise InputError(f"{which}: {error}; {remedy}") from error
        self._gathered = []

    @contextmanager
    def whole(self, needed: bool = True) -> Iterator[None]:
        """Within, the first worker has the whole optimizer state, for a checkpoint; all call this together.

        Args:
            needed: Whether this worker needs it.
        """
        needed = self.step.shards is not None and self._workers.all_max(int(needed))
        with self.step.shards.whole() if needed else nullcontext():
            yield

    @property
    def notes(self) -> list[str]:
        """What is special about streaming this run, in words."""
        args, included = self.args, [name for name in ("grad_checkpoint", "chunked_loss") if getattr(self.args, name)]
        notes = list(self.step.notes)
        if included:
            flags = " and ".join(map(flag, included))
            notes.append(f"{flags}: streaming includes {'them' if len(included) > 1 else 'it'}")
        if args.clip_grad_norm is not None:
            notes.append("--clip-grad-norm: exact, by a backward pass more: a step takes 40 to 75 % longer")
        return notes

    def __call__(
        self, batch: tuple[mx.array, ...], last_of_accumulation: bool = True, measurements: Iterable[Measurement] = ()
    ) -> StepResult:
        """Take one batch; update the weights if it is the last that is gathered.

        Raises:
            InputError: for ``measurements``: there are no whole gradients to measure.
        """
        if measurements:
            names = ", ".join(each.name for each in measurements)
            raise InputError(f"--stream: no step has whole gradients, which {names} measures; use --no-stream")
        self._gathered.append(batch)
        if not last_of_accumulation:
            return StepResult(mx.array(0.0), mx.array(0), updated=False, nonfinite=False, measurements={}, batches=0)
        batches, self._gathered = self._gathered, []
        shares = [batch[2].item() if len(batch) > 2 else 1.0 for batch in batches]
        result = self.step.accumulated([batch[:2] for batch in batches], shares)
        left_out = result.nonfinite in NOTHING_CHANGED
        return StepResult(
            mx.array(result.loss),
            mx.array(result.tokens if self._workers.leads else 0),  # they are those of all workers already
            updated=not left_out,
            nonfinite=bool(result.nonfinite),
            measurements={},
            unstepped=() if left_out else result.nonfinite,
            batches=len(batches),
        )


def as_it_began(args: Options, measured: bool) -> Options:
    """The options, with ``stream`` off where it is not given, and a checkpoint to resume did not stream.

    Args:
        args: The run's options.
        measured: Whether somebody may measure gradients: then it streams only if that is asked for.
    """
    if args.stream is not None:
        return args
    if args.resume is not None:
        streamed = checkpoints.options_of(Path(args.adapter_path), args.resume).get("stream")
        return args if streamed else args | {"stream": False}
    return args | {"stream": False} if measured else args


def step_of(
    args: Options,
    model: nn.Module,
    optimizer: GuardedOptimizer | PairedOptimizer,
    asked: bool | None,
    not_streamed: str | None,
) -> tuple[Options, Callable, Callable]:
    """The run's options, with what is special about streaming it; what makes the step; and what makes the state whole.

    Args:
        args: The run's options, with the choices.
        model, optimizer: What trains, and by what.
        asked: ``--stream`` as it was given. What streams by default and cannot takes an ordinary step, and says why.
        not_streamed: Why it was decided not to stream, in words.

    Raises:
        InputError: for ``--stream`` where it cannot be.
    """
    if not_streamed:
        rprint(f"Not streamed: {not_streamed}\n")
    ordinary = partial(Step, head_first=not args.chunked_loss)
    if not args.stream:
        return args, ordinary, nullcontext
    try:
        streamed = Streamed(model, optimizer, args)
    except InputError as error:
        if asked:
            raise
        rprint(f"Not streamed: {str(error).removeprefix('--stream: ')}\n")
        return args | {"stream": False}, ordinary, nullcontext
    told = ["Streamed: every weight that trains is stepped inside the backward pass", *streamed.notes]
    rprint("\n".join(told) + "\n")
    return args | {"streaming_notes": streamed.notes}, lambda *_: streamed, streamed.whole
