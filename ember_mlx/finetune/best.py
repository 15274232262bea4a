"""The weights of the lowest validation loss, kept in ``best/``, and the end of a run that finds no lower one.

Losses compare when they are of the same batches, cut and masked alike: :func:`batches_id` tells that. What is in
``best/`` says its own loss, step and batches, so a run that is resumed knows its best by looking there. How long it has
waited for a lower loss is in the checkpoints: they may be older than ``best/``, and what they had seen counts there.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ember_mlx.finetune import adapter_saving, adapters, safe_reading, safe_writing
from ember_mlx.finetune.options import Options
from ember_mlx.shared.errors import InputError

__all__ = ["Best", "BestAdapter", "Validations", "batches_id", "keeps_best", "read_best"]

CUT_BY = ("batch_size", "val_batches", "max_seq_length", "mask_prompt", "packing")


@dataclass(frozen=True)
class Best:
    """The lowest validation loss of a run.

    Attributes:
        step: How many steps were done.
        validation_loss: Nats a token.
        batches: The :func:`batches_id` of what it is the loss of.
    """

    step: int
    validation_loss: float
    batches: str

    TYPES = {"step": int, "validation_loss": float, "batches": str}  # noqa: RUF012
    to_json = asdict


def keeps_best(args: Options, tables: bool, validates: bool) -> bool:
    """Whether a run keeps ``best/``: by default where tables train and a validation set exists.

    Raises:
        InputError: where that, or ``--patience``, is asked for without a validation set.
    """
    for flag, asked in (("--keep-best", args.keep_best), (f"--patience {args.patience}", args.patience)):
        if asked and not validates:
            raise InputError(f"{flag}: there are no validation rows; give some, or a --valid-fraction above 0")
    return validates and (tables if args.keep_best is None else args.keep_best)


def batches_id(args: Options, made_of: dict[str, Any], first_evaluation: dict | None) -> str:
    """A checksum of what the validation losses of a run are of: rows, which of them, and how they are cut."""
    rows = [made_of["data"][1], made_of["tokens"][1]]
    text = json.dumps([rows, first_evaluation, *(getattr(args, name) for name in CUT_BY)], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Validations:
    """Counts the validations since the lowest loss.

    Args:
        patience (int, optional): After how many the run ends.
        saved (dict, optional): What :meth:`to_json` gave, of a run that is resumed.
    """

    TYPES = {  # noqa: RUF012
        "batches": str,
        "untrained": (float, type(None)),
        "lowest": (float, type(None)),
        "step": int,
        "waited": int,
    }

    def __init__(self, patience: int | None = None, saved: dict[str, Any] | None = None):
        self.patience = patience
        self._begin("")
        vars(self).update(saved or {})

    def _begin(self, batches):
        self.batches = batches
        self.untrained = None  # the loss before the first step
        self.lowest = None
        self.step = self.waited = 0

    def hear(self, steps_done: int, loss: float, batches: str, counts: bool) -> None:
        """Of a validation. One of other batches begins anew; one that does not count can only be the lowest."""
        if batches != self.batches:
            self._begin(batches)
        if not math.isfinite(loss):
            self.waited += counts
            return
        if steps_done == 0:
            self.untrained = loss
        if self.is_lowest(loss, batches):
            self.lowest, self.step, self.waited = loss, steps_done, 0
        else:
            self.waited += counts

    def is_lowest(self, loss: float, batches: str) -> bool:
        """Whether no loss of the same batches was as low."""
        return math.isfinite(loss) and (batches != self.batches or self.lowest is None or loss < self.lowest)

    @property
    def exhausted(self) -> bool:
        """Whether the run has waited long enough."""
        return self.patience is not None and self.waited >= self.patience

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {name: getattr(self, name) for name in self.TYPES}

    def end(self, not_kept: str = "") -> str:
        """Why the run ends, in a line; ``not_kept`` says why ``best/`` does not hold the weights of the lowest loss."""
        lowest = "none was finite" if self.lowest is None else f"the lowest is {self.lowest:.3f} after step {self.step}"
        if not_kept and self.step:
            lowest += f" (its weights were not kept: {not_kept})"
        validations = "1 validation" if self.waited == 1 else f"{self.waited} validations"
        return (
            f"--patience {self.patience}: {validations} found no lower loss; {lowest}. --resume with a "
            "higher --patience continues"
        )


class BestAdapter:
    """Keeps ``best/`` of one adapter folder.

    Args:
        adapter (Saver): Of the folder.
        resumed (Path, optional): The adapter folder of the checkpoint with which the run began.
        steps_done (int): Where that was.
    """

    def __init__(self, adapter: adapter_saving.Saver, resumed: Path | None = None, steps_done: int = 0):
        self.adapter = adapter
        self.folder = adapter.folder / adapters.BEST
        self.found = self.elsewhere = None
        if resumed is None:
            return
        in_place = resumed.resolve() == adapter.folder.resolve()
        if in_place:
            safe_writing.finish_replacing(self.folder)
        found = read_best(resumed / adapters.BEST)
        # On a branch, one of a later step is of another run. In the same folder a kill may have kept the checkpoint
        # from being as new.
        if found and (in_place or found.step <= steps_done):
            self.found = found
            self.elsewhere = None if in_place else resumed / adapters.BEST

    def hear(self, now: Best, untrained: float | None, is_saved: bool, recorded: dict[str, Any]) -> list[str]:
        """Of a validation: keep the weights if its loss is the lowest of these batches; the names written.

        Args:
            now: The validation.
            untrained: The loss before the first step, whose weights nobody needs to keep.
            is_saved: Whether the adapter folder holds the same weights.
            recorded: What else its config is to hold.

        Raises:
            OSError: for whatever the disk has against it; the ``best/`` that was there stays.
        """
        if self.is_lower(now, untrained):
            self.adapter.save_best(recorded | {adapters.BEST: now.to_json()}, is_saved)
            self.found, self.elsewhere = now, None
            return [adapters.BEST]
        if self.elsewhere and self.found.batches == now.batches:
            self._bring()
            return [f"{adapters.BEST} (still that of step {self.found.step}, whose loss was lower)"]
        return []

    def is_lower(self, now: Best, untrained: float | None) -> bool:
        """Whether the weights are better than those in ``best/``, if these were judged by the same batches."""
        if now.step == 0 or not math.isfinite(now.validation_loss):
            return False
        if self.found and self.found.batches == now.batches:
            return now.validation_loss < self.found.validation_loss
        return untrained is None or now.validation_loss < untrained

    def _bring(self):
        """Of the folder from which this one branched off; its files are never changed in place."""
        with safe_writing.new_folder(self.folder) as best:
            for path in adapter_saving.run_files(self.elsewhere):
                safe_writing.link(path, best / path.name)
        self.elsewhere = None


def read_best(folder: Path) -> Best | None:
    """What a ``best/`` says of itself, if it is there and whole."""
    try:
        found = adapters.read_config(folder).get(adapters.BEST)
        safe_reading.check_types(found, Best.TYPES, str(folder))
    except InputError:
        return None
    return Best(**found)
