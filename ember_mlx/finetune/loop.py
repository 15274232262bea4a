"""The training loop: draw, step, accumulate, evaluate, report, save, stop.

It does what mlx-lm's ``train`` does, to the bit, with mlx-lm's data sets, batches, losses and progress display. Here it
is also saved and stopped between two steps, starts from any position, and lets watchers look on.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.cli_ui import rprint
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import grad_checkpoint

from ember_mlx.finetune.batches import Rows, TrainingBatches, shared_loss
from ember_mlx.finetune.best import Best, batches_id
from ember_mlx.finetune.display import Display
from ember_mlx.finetune.evaluation import evaluate
from ember_mlx.finetune.history import LossHistory
from ember_mlx.finetune.lost_peers import PeerDeadline
from ember_mlx.finetune.memory_limit import is_over, refuse_over
from ember_mlx.finetune.nonfinite import NonfiniteSteps
from ember_mlx.finetune.options import Options
from ember_mlx.finetune.position import Position, numpy_random
from ember_mlx.finetune.saving import Saving
from ember_mlx.finetune.stop_signals import StopSignals
from ember_mlx.finetune.time_left import TimeLeft
from ember_mlx.finetune.watchers import StepResult, Watcher
from ember_mlx.finetune.workers import Workers
from ember_mlx.optimizers.guarded import GuardedOptimizer
from ember_mlx.optimizers.paired import PairedOptimizer
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.replacing import replaced
from ember_mlx.token_tables import TokenTable

__all__ = ["Report", "Training"]

OVER_MEMORY = 2**8  # above the numbers of all signals


class Training:
    """The steps of one run.

    With several workers all stop at the same step, and the first one saves. After :meth:`train`, ``history`` has the
    losses, ``batches`` the position in the data, ``nonfinite`` the number of steps that were left out, and
    ``peak_worker`` the rank that had the peak.

    Args:
        args, model, optimizer, tables: The run's.
        saving (Saving): What saves it; of several workers only the first uses it.
        callbacks (list): Of mlx-lm's kind; they hear of every report.
        watchers (list): They look on between the steps.
        start (Position, optional): Where to resume.
        make_step (callable): Makes the step, as a :class:`~ember_mlx.finetune.step.Step` is made: of model, optimizer,
            loss and accumulation.
        deadline (PeerDeadline): Hears of every meeting of the workers.
        whole (callable): See :meth:`~ember_mlx.finetune.streamed.Streamed.whole`, and that of ``ShardedTables``;
            ``nullcontext`` where every worker has all.
    """

    def __init__(
        self,
        args: Options,
        model: nn.Module,
        optimizer: GuardedOptimizer | PairedOptimizer,
        tables: Sequence[TokenTable],
        saving: Saving,
        callbacks: Sequence[TrainingCallback],
        watchers: Sequence[Watcher],
        start: Position | None,
        make_step: Callable,
        deadline: PeerDeadline,
        whole: Callable,
    ):
        self.args = args
        self.model = model
        self.optimizer = optimizer
        self.tables = tables
        self.saving = saving
        self.whole = whole
        self.time_left = TimeLeft(args)
        self.watchers = [*watchers, self.time_left]
        self.start = start
        self.make_step = make_step
        self.workers = deadline.workers
        self.deadline = deadline
        self.signals = StopSignals(saving.checkpoints.keep > 0)
        self.deadline.signalled = lambda: bool(self.signals.number)
        self.history = LossHistory(args, callbacks, optimizer, start.record if start else None)
        self.same_batches = bool(args.token_tables or args.keep_best or args.patience)
        self.steps_done = args.iters
        self.loss_after = None  # of the validation that ended the run, if one did
        self.nonfinite = NonfiniteSteps(optimizer, args.on_nonfinite, self._save_checkpoint, saving.go_back)

    def train(self, loss: Callable, train_set: Sequence, valid_set: CacheDataset) -> int:
        """Take all the steps that are left, and save; returns the peak memory in bytes, the largest of all workers.

        Raises:
            InputError: when the disk did not take what was trained; for a step that is not finite with
                ``--on-nonfinite stop``, or when all steps are such with ``skip``.
            Interrupted: when a signal stopped the run, once it is saved.
        """
        args, rows = self.args, Rows(train_set)
        self.batches = TrainingBatches(args, rows, self.history, self.start)
        for watcher in self.watchers:
            watcher.before_training(self.model, self.optimizer, self.tables, rows)
        mx.reset_peak_memory()
        with self.signals, self.saving.telling_what_is_left():
            if self.batches.step < args.iters:
                checkpointing = args.grad_checkpoint and not args.stream
                with _checkpointed(self.model.layers[0]) if checkpointing else nullcontext():
                    step = self.make_step(self.model, self.optimizer, shared_loss(loss), args.grad_accumulation_steps)
                    self._loop(step, loss, valid_set)
            peaks = [int(peak) for (peak,) in self.workers.all_numbers(mx.get_peak_memory())]
            with self.workers.one_outcome():
                self.nonfinite.refuse_nothing()
                if not self._save(self.steps_done):
                    failed = f"what was trained could not be saved: {self.saving.failed[-1]}"
                    raise InputError(f"--adapter-path {self.saving.folder}: {failed}")
        self._stop_for(self._meet())  # for the signals that came last, too
        self.peak_worker = peaks.index(max(peaks))
        return max(peaks)

    def _loop(self, take_step, loss, valid_set):
        args, batches = self.args, self.batches
        first, before_extra_evaluation = batches.step + 1, None
        report = Report(self.history)
        with Display(args.iters, self.workers.rank, self.time_left.seconds) as ui:
            for _ in range(batches.step):
                ui.advance()
            self.model.train()
            signal = self._meet()
            for step in range(first, args.iters + 1):
                self._stop_for(signal)
                batch = batches.draw()

                if len(valid_set) and (step in (1, args.iters) or step % args.steps_per_eval == 0):
                    if step == args.iters > 1 and args.iters % args.steps_per_eval:
                        # Evaluated only because it is the last: a longer run resumes as if it had not been.
                        before_extra_evaluation = numpy_random()
                    value = self._evaluate(step, loss, valid_set, ui)
                    if self.history.validations.exhausted:
                        self.steps_done, self.loss_after = step - 1, value
                        break

                start = time.perf_counter()
                is_last = step % args.grad_accumulation_steps == 0
                asked = [watcher.before_step(step, batch[:2]) for watcher in self.watchers]
                with self.workers.own_randomness():
                    result = take_step(batch, is_last, [each for each in asked if each is not None])
                report.add(result, start)
                for watcher in self.watchers:
                    watcher.after_step(step, result)
                if mx.get_cache_memory() > args.clear_cache_threshold:
                    mx.clear_cache()
                ui.advance()

                report.due |= step % args.steps_per_report == 0 or step == args.iters
                if report.due and report.steps:
                    report.send(step, ui)
                with self.workers.one_outcome(self._wish) as meeting:  # the one between two steps
                    self.nonfinite(step, result)
                    batches.mark(before_extra_evaluation)
                    saves = step % args.save_every == 0 and step < args.iters and not self.nonfinite.nothing_is_learned
                    if saves and not (step == 1 and self.workers.all_max(int(is_over(args.memory_limit)))):
                        self._save(step)
                self.deadline.passed()
                signal = meeting.largest
                if signal >= OVER_MEMORY:
                    self._end_over_memory(step)
        if self.steps_done < args.iters:
            rprint(f"Stopped after step {self.steps_done}, by {self.history.validations.end(self._not_kept())}")
        self._report_dropped()

    def losses(self, loss: Callable, valid_set: CacheDataset) -> tuple[float | None, float]:
        """Before and after, once trained: of the validation or, without a set, of the first and the last report.

        Where these are one report, there is no before. The loss after the last step may be the lowest, too.
        """
        args, found = self.args, self.history.losses
        if not valid_set:
            first, last = found.get("train_loss", [math.nan] * 2)  # none of a finite loss
            return (first if args.iters > args.steps_per_report else None), last
        last = self.loss_after
        if last is None:
            with self.batches.as_first_evaluated():  # a test that follows draws what mlx-lm would
                last = evaluate(args, self.model, loss, valid_set, args.val_batches, self.deadline.passed)
        if self.same_batches:
            self._validated(self.steps_done, last, is_saved=True)
        return found.get("val_loss", [last])[0], last

    def _validated(self, steps_done, loss, counts=False, is_saved=False):
        """After a validation: the weights are kept if its loss is the lowest.

        Args:
            steps_done: How many steps the weights have taken.
            loss: Over the batches of the first validation.
            counts: Whether ``--patience`` counts it.
            is_saved: Whether the adapter folder holds the same weights.
        """
        validations = self.history.validations
        batches = self._batches_id()
        validations.hear(steps_done, loss, batches, counts)
        if self.saving.best:
            now = Best(steps_done, loss, batches)
            is_lower = self.workers.leads and self.saving.best.is_lower(now, validations.untrained)
            with self.workers.one_outcome(), self.whole(is_lower), self.deadline.alone():
                if self.workers.leads:
                    self.saving.save_best(now, validations.untrained, self.batches.position, is_saved)

    def _evaluate(self, step, loss, valid_set, ui):
        """The validation loss before ``step``.

        Where the one after the last step compares with that before it, this is shown only if it is the lowest so far.
        """
        args = self.args
        start = time.perf_counter()
        whole = len(valid_set) // args.batch_size
        total = whole if args.val_batches == -1 else min(whole, args.val_batches)
        with ui.val_task(total) as advance:

            def between_batches():
                advance()
                self._stop_for(self._meet())

            with self.batches.evaluation(whole, self.same_batches):
                value = evaluate(args, self.model, loss, valid_set, args.val_batches, between_batches)
        self.model.train()
        seconds = time.perf_counter() - start
        shown = not (step == args.iters > 1 and self.same_batches)
        if not shown and (self.saving.best or args.patience):  # which tell of the lowest
            shown = self.history.validations.is_lowest(value, self._batches_id())
        if shown:
            ui.report_val(step - 1, value, seconds)
        self.history.on_val_loss_report({"iteration": step - 1, "val_loss": value, "val_time": seconds})
        with self.whole(self.args.sample_prompts is not None):
            for watcher in self.watchers:
                watcher.after_validation(step, value)
        if self.same_batches:
            self._validated(step - 1, value, counts=step > 1 and step % args.steps_per_eval == 0)
        return value

    def _batches_id(self):
        return batches_id(self.args, self.saving.described["made_of"], self.batches.first_evaluation)

    def _not_kept(self):
        if self.saving.best:
            return ""
        return "--no-keep-best" if self.args.keep_best is False else "add --keep-best"

    def _report_dropped(self):
        done = self.steps_done
        dropped = done % self.args.grad_accumulation_steps
        if dropped:
            of = f"--iters {done}" if done == self.args.iters else done
            rprint(
                f"Of {of} steps the last {'is' if dropped == 1 else f'{dropped} are'} not applied: an update takes "
                f"--grad-accumulation-steps {self.args.grad_accumulation_steps}"
            )

    def _save(self, step):
        with self.whole(), self.deadline.alone():
            return self.saving.save(step, self.batches.position) if self.workers.leads else True

    def _save_checkpoint(self):
        with self.whole(), self.deadline.alone():
            return self.workers.leads and self.saving.save_checkpoint(self.batches.position)

    def _end_over_memory(self, step):
        """End a run of which any worker took too much. What it learned is saved, once for all.

        One step would only be in the next run's way.
        """
        if step > 1:
            self._save_checkpoint()
        with self.workers.one_outcome():
            refuse_over(self.args)

    def _wish(self):
        """What this worker tells between two steps: that it took too much memory, or else the signal that it heard."""
        return OVER_MEMORY if is_over(self.args.memory_limit) else self.signals.number

    def _meet(self):
        """The signal that any worker has heard, or 0."""
        number = self.workers.all_max(self.signals.number)
        self.deadline.passed()
        return number

    def _stop_for(self, number):
        if number:
            self._save_checkpoint()
            raise self.saving.interrupted(number, self.batches.position)


@contextmanager
def _checkpointed(layer: nn.Module) -> Iterator[None]:
    """mlx-lm changes the class of the layers, for all models of the process; here until the training ends."""
    kind = type(layer)
    with replaced(kind, "__call__", kind.__call__):
        grad_checkpoint(layer)
        yield


class Report:
    """Adds up what the steps since the last report told, as mlx-lm does.

    One that is ``due`` waits for a step that tells of a batch.
    """

    def __init__(self, history: LossHistory):
        self.history = history
        self._begin()

    def _begin(self):
        self.losses = self.tokens = self.steps = self.seconds = 0
        self.due = False

    def add(self, result: StepResult, start: float) -> None:
        self.losses += result.loss * result.batches
        self.tokens += result.tokens
        self.steps += result.batches
        mx.eval(self.losses, self.tokens)
        self.seconds += time.perf_counter() - start

    def send(self, step: int, ui: Display) -> None:
        """To the display, the history and the callbacks."""
        own = self.losses.item(), self.tokens.item(), mx.get_peak_memory()
        losses, counts, peaks = zip(*Workers.join().all_numbers(*own), strict=True)
        loss, tokens = sum(losses) / (self.steps * len(losses)), int(sum(counts))
        trained_tokens = self.history.trained_tokens + tokens
        ui.report_train(step, loss, tokens / self.seconds, trained_tokens)
        self.history.on_train_loss_report(
            {
                "iteration": step,
                "train_loss": loss,
                "learning_rate": self.history.optimizer.learning_rate.item(),
                "iterations_per_second": self.history.args.steps_per_report / self.seconds,
                "tokens_per_second": tokens / self.seconds,
                "trained_tokens": trained_tokens,
                "peak_memory": max(peaks) / 1e9,
            }
        )
        self._begin()
