"""Writing the log of a run while it trains; :mod:`ember_mlx.finetune.run_log` says what is in it."""

import json
import math
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.cli_ui import rprint
from mlx_lm.tuner.callbacks import TrainingCallback

from ember_mlx.finetune import adapter_saving, run_log
from ember_mlx.finetune.history import perplexity
from ember_mlx.finetune.options import Options
from ember_mlx.finetune.resume import as_json, versions
from ember_mlx.finetune.safe_writing import existing_parent
from ember_mlx.finetune.update_ratio import UpdateRatio
from ember_mlx.finetune.watchers import Measurement, StepResult, Watcher
from ember_mlx.shared.errors import InputError

__all__ = ["RunLogWriter", "check"]


class RunLogWriter(TrainingCallback, Watcher):
    """Hears of the reports and writes a line for each. A line is in the file, or kept until the disk takes it.

    Args:
        args: The run's options; ``log_jsonl`` is the file, which exists.
        steps_done (int): Where the run begins.
        goes_on (bool): Append to the log of the run that is resumed. Otherwise a log that is there is replaced.

    Raises:
        OSError: when the log that is there cannot be changed.
    """

    def __init__(self, args: Options, steps_done: int, goes_on: bool):
        self.path = Path(args.log_jsonl)
        self.args = args
        self.update_ratio = UpdateRatio(args.token_tables)
        self._unwritten = []
        os.truncate(self.path, _whole_lines(self.path) if goes_on else 0)  # the same file, on which the run has a lock
        self._write("start", steps_done, format=run_log.FORMAT, options=as_json(vars(args)), versions=versions())

    def before_step(self, step: int, batch: tuple[mx.array, mx.array]) -> Measurement | None:
        """The update is measured if the next report will tell of it; a streamed one has no moment for that."""
        every, accumulate = self.args.steps_per_report, self.args.grad_accumulation_steps
        next_report = min(math.ceil(step / every) * every, self.args.iters)
        due = step % accumulate == 0 and next_report < step + accumulate
        return self.update_ratio.measurement if due and not self.args.stream else None

    def after_step(self, step: int, result: StepResult) -> None:
        self.update_ratio.take(result)

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """A report of the loop."""
        ratios = self.update_ratio.ratios()
        same = ("train_loss", "learning_rate", "tokens_per_second", "trained_tokens")
        self._write(
            "train",
            train_info["iteration"],
            **{name: train_info[name] for name in same},
            table_learning_rate=train_info.get("table_learning_rate"),
            peak_memory=round(train_info["peak_memory"] * 1e9),
            update_ratio_tables=ratios["tables"],
            update_ratio_body=ratios["body"],
        )

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """A validation of the loop."""
        self._validation("validation", val_info["iteration"], val_info["val_loss"])

    def on_samples(self, steps_done: int, samples: list[dict[str, str]]) -> None:
        """The answers to ``--sample-prompts`` at a validation."""
        self._write("samples", steps_done, samples=samples)

    def end(self, steps_done: int, validation_loss: float | None) -> None:
        """After the last step, with the loss on the batches of the first validation if there is a set."""
        self._validation("end", steps_done, validation_loss)

    def _validation(self, event, step, loss):
        self._write(event, step, validation_loss=loss, perplexity=None if loss is None else perplexity(loss))

    def _write(self, event, step, **values):
        finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}
        self._unwritten.append(json.dumps({"event": event, "step": step} | finite, allow_nan=False) + "\n")
        try:
            _append(self.path, "".join(self._unwritten).encode())
        except OSError as error:
            if len(self._unwritten) == 1:
                rprint(
                    f"  not logged  step {step} ({error.strerror or error}); {self.path} gets it when the disk has room"
                )
        else:
            self._unwritten.clear()


def check(args: Options, goes_on: bool) -> None:
    """Refuse a ``--log-jsonl`` that cannot be written, or holds what is not to be replaced; nothing is changed.

    Raises:
        InputError: for that; also with ``--overwrite`` or on ``--resume`` for a file that is no log.
    """
    path = Path(args.log_jsonl)
    where = f"--log-jsonl {path}"
    above = existing_parent(path.absolute().parent)
    if adapter_saving.is_run_path(Path(args.adapter_path), path):
        raise InputError(f"{where}: is a file that the run itself writes there; give another name")
    if path.exists() and not path.is_file():
        raise InputError(f"{where}: is not an ordinary file; give the name of one")
    if not above.is_dir() or not os.access(above, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise InputError(f"{where}: cannot be written; give another path")
    if not path.exists() or not path.stat().st_size:
        return
    try:
        run_log.read(path)
    except InputError as error:
        raise InputError(f"{where}: exists and is not a log: {error}; give another path, or remove it") from error
    if not goes_on and not args.overwrite:
        raise InputError(f"{where}: already holds the log of a run; give another path, or --overwrite to replace it")


def _append(path, data):
    """Append all of ``data`` or, raising OSError, nothing."""
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(end)
            raise


def _whole_lines(path):
    """The bytes of a file up to its last end of line."""
    return path.read_bytes().rfind(b"\n") + 1
