"""Training a model that is ready for it: mlx-lm's loop, and what a run does between two of its steps."""

from collections.abc import Callable
from contextlib import nullcontext, suppress

import mlx.core as mx
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import TrainingArgs, train

from ember_mlx.finetune.loop import Batches, Finished, Position, Record, Rows, train_from
from ember_mlx.finetune.nonfinite import NonfiniteSteps
from ember_mlx.finetune.run_log_writer import RunLogWriter
from ember_mlx.finetune.saving import Saving
from ember_mlx.finetune.stop_signals import StopSignals
from ember_mlx.optimizers.guarded import spoil_gradients_of_nonfinite
from ember_mlx.shared.errors import InputError
from ember_mlx.token_tables import TokenTable


class Training:
    """The steps of one run. Between two of them it is saved, stopped, and looked at for numbers that are not finite.

    ``leader`` says whether this worker is the one that saves. After :meth:`train`, ``record`` has the losses,
    ``batches`` the position in the data, and ``nonfinite`` the number of steps that were left out.

    Args:
        args, model, optimizer, tables: The run's.
        saving (Saving): What saves it; of several workers only the first uses it.
        callbacks (list): Of mlx-lm's kind; they hear of every report.
        log (RunLogWriter, optional): The log of the run.
        start (Position, optional): Where it goes on.
    """

    def __init__(
        self,
        args,
        model,
        optimizer,
        tables: list[TokenTable],
        saving: Saving,
        callbacks: list[TrainingCallback],
        log: RunLogWriter | None = None,
        start: Position | None = None,
    ):
        self.args = args
        self.model = model
        self.optimizer = optimizer
        self.tables = tables
        self.saving = saving
        self.log = log
        self.steps_done_before = start.step if start else 0
        self.leader = mx.distributed.init().rank() == 0
        self.signals = StopSignals()
        callbacks = [*callbacks, log] if log else callbacks
        self.record = Record(args, callbacks, optimizer, start.record if start else None)
        self.nonfinite = NonfiniteSteps(optimizer, args.on_nonfinite, self._save_checkpoint)
        self.batches = Batches(args, self.record, self._after_step, self._save, self._stop, start)

    def train(self, loss: Callable, train_set, valid_set, observe: Callable | None = None) -> int:
        """Take all the steps that are left, and save; returns the peak memory in bytes.

        ``observe`` is that of :func:`ember_mlx.finetune.run.run`.

        Raises:
            InputError: when the disk did not take what was trained, for a validation loss that is not finite, and, with
                ``--on-nonfinite stop``, for a training loss or a gradient that is not.
            Interrupted: when a signal stopped the run, once it is saved.
        """
        rows, optimizer, batches = Rows(train_set), self.optimizer, self.batches
        if observe is not None:
            optimizer, batches = observe(self.model, optimizer, self.tables, rows, batches)
        if self.log:
            optimizer = self.log.measured(optimizer)
        # Several workers would stop at different steps, and wait for each other: there a signal ends a worker at once.
        alone = mx.distributed.init().size() == 1
        mx.reset_peak_memory()
        with self.signals if alone else nullcontext(), self.saving.telling_what_is_left():
            if self.steps_done_before < self.args.iters:
                self._loop(loss, rows, valid_set, optimizer, batches)
            peak_memory = mx.get_peak_memory()
            if not self._save(self.args.iters):
                failed = self.saving.failed[-1]
                raise InputError(f"--adapter-path {self.saving.folder}: what was trained could not be saved: {failed}")
        self._stop()  # for the signals that came last, too
        return peak_memory

    def _loop(self, loss, rows, valid_set, optimizer, batches):
        with suppress(Finished):
            (train_from(self.steps_done_before) if self.steps_done_before else train)(
                model=self.model,
                optimizer=optimizer,
                train_dataset=rows,
                val_dataset=CacheDataset(valid_set),
                args=_training_args(self.args),
                loss=spoil_gradients_of_nonfinite(loss),
                iterate_batches=batches,
                training_callback=self.record,
            )
        self.batches.finish()

    # What Batches calls between two steps, and NonfiniteSteps where it stops the run:

    def _after_step(self, steps_done):
        self.nonfinite(steps_done)
        if self.log:
            self.log.before_step(steps_done + 1)

    def _save(self, steps_done):
        return self.saving.save(steps_done, self.batches.position) if self.leader else True

    def _save_checkpoint(self):
        return self.leader and self.saving.save_checkpoint(self.batches.position)

    def _stop(self):
        if self.signals.number is not None:
            self._save_checkpoint()
            raise self.saving.interrupted(self.signals.number, self.batches.position)


def _training_args(args):
    return TrainingArgs(
        batch_size=args.batch_size,
        iters=args.iters,
        val_batches=args.val_batches,
        steps_per_report=args.steps_per_report,
        steps_per_eval=args.steps_per_eval,
        steps_per_save=args.iters + 1,  # Batches saves: mlx-lm would put tables where its loader refuses them
        max_seq_length=args.max_seq_length,
        grad_checkpoint=args.grad_checkpoint,
        grad_accumulation_steps=args.grad_accumulation_steps,
        clear_cache_threshold=args.clear_cache_threshold,
    )
