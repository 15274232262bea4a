"""Saving during a run: adapter files and checkpoints, on disks that may fill up."""

import shlex
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.cli_ui import make_console, rprint

from ember_mlx.finetune import adapter_saving, adapters, checkpoints
from ember_mlx.finetune.best import Best, BestAdapter
from ember_mlx.finetune.disk import DiskUse, Kept, disk_use
from ember_mlx.finetune.model_card import RESULT
from ember_mlx.finetune.options import Options
from ember_mlx.finetune.position import Position
from ember_mlx.finetune.resume import as_json, versions
from ember_mlx.finetune.safe_writing import existing_parent
from ember_mlx.finetune.stop_signals import Interrupted
from ember_mlx.optimizers.guarded import GuardedOptimizer, fill
from ember_mlx.optimizers.paired import PairedOptimizer
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.units import format_bytes

__all__ = ["Saving", "refuse_full_disk"]


class Saving:
    """Saves a run. What a disk does not take is told in a line and the run goes on, with what was saved before.

    Args:
        args, model, optimizer: The run's.
        made_of (dict): See :func:`ember_mlx.finetune.resume.made_of`.
        rows (list[int]): How many it trains and validates on.
        kept (Kept): What of its saves is kept.
        resumed (Path, optional): The checkpoint with which the run began.
        in_place (bool): Whether that is in the same adapter folder.
        steps_done (int): Where that was.
    """

    def __init__(
        self,
        args: Options,
        model: nn.Module,
        optimizer: GuardedOptimizer | PairedOptimizer,
        made_of: dict,
        rows: list[int],
        kept: Kept,
        resumed: Path | None = None,
        in_place: bool = False,
        steps_done: int = 0,
    ):
        self.model = model
        self.optimizer = optimizer
        self.folder = Path(args.adapter_path)
        self.save_every = args.save_every
        self.with_changes = args.resume_with_changes
        began_with = resumed if in_place else None
        self.began_with = began_with and began_with.name
        self.began_at = steps_done if in_place else None
        self.adapter = adapter_saving.Saver(self.folder, model, args, goes_on=in_place, keep=kept.numbered)
        self.best = BestAdapter(self.adapter, checkpoints.run_folder_of(resumed), steps_done) if kept.best else None
        self.checkpoints = checkpoints.Checkpoints(self.folder, kept.checkpoints, began_with)
        self.described = {"options": as_json(vars(args)), "made_of": made_of, "versions": versions()}
        self.recorded = {"rows": rows, "versions": self.described["versions"]}
        self.failed = []  # in words, what could not be saved

    def save(self, steps_done: int, position: Position) -> bool:
        """A checkpoint of ``position``, and the adapter as it is after ``steps_done``; whether that was taken.

        Without room for the one there may still be some for the other.
        """
        checkpoint = self._tried(f"checkpoint of step {position.step}", self._checkpoint, position)
        numbered = steps_done % self.save_every == 0
        adapter = self._tried(f"adapter of step {steps_done}", self.adapter.save, steps_done, numbered)
        if adapter and not self.checkpoints.keep:
            self.checkpoints.remove_others()  # of the run that the adapter of this one has now replaced
        if steps_done != self.began_at:  # of a finished run the same files are written again, which is no news
            _tell(checkpoint + adapter)
        return bool(adapter)

    def save_best(self, now: Best, untrained: float | None, position: Position, is_saved: bool) -> None:
        """See :meth:`BestAdapter.hear`. A run that replaces another one does that first, by a save of its own."""
        if self.adapter.replaced and self.best.is_lower(now, untrained) and not self.save(now.step, position):
            return
        losses = {"loss_name": "Validation loss", "loss_before": untrained, "loss_after": now.validation_loss}
        recorded = {RESULT: losses | {"steps": now.step} | self.recorded}
        what = f"{adapters.BEST}/ of step {now.step}"
        names = self._tried(what, self.best.hear, now, untrained, is_saved, recorded)
        if names:
            _tell(names, f"    [ui.accent]val[/ui.accent] [ui.strong]{self.best.found.validation_loss:.3f}[/ui.strong]")

    def record(self, result: dict) -> None:
        """Put what came of the run into the config of the adapter, for its model card."""
        if self.adapter.saved:
            self._tried("what came of the run", self.adapter.save_config, {RESULT: result | self.recorded})

    def save_checkpoint(self, position: Position) -> bool:
        """The checkpoint alone, for a run that is to end here, and whether it is there; none of a weight of NaN."""
        try:
            return bool(self._tried(f"checkpoint of step {position.step}", self._checkpoint, position))
        except InputError as error:
            rprint(f"  not saved  {error}")
            return False

    def go_back(self) -> Path | None:
        """Put weights, optimizer and adapter files as the newest checkpoint of this run has them; that checkpoint.

        Raises:
            InputError: when it has been damaged since.
        """
        if not self.newest:
            return None
        checkpoint = checkpoints.read(self.newest)
        self.model.load_weights(list(checkpoint.weights.items()), strict=False)
        fill(self.optimizer.state, checkpoint.optimizer)
        self._tried(f"adapter of step {checkpoint.position.step}", self.adapter.save, checkpoint.position.step, False)
        return self.newest

    def interrupted(self, signal_number: int, position: Position) -> Interrupted:
        """What a signal raises that stopped the run at ``position``."""
        message = f"{signal.Signals(signal_number).name}: stopped at step {position.step}; {self._how_to_go_on()}"
        return Interrupted(signal_number, message, self.newest, self.resume_words())

    @contextmanager
    def telling_what_is_left(self) -> Iterator[None]:
        """When the run breaks off for another reason than a signal, say from where it can go on."""
        try:
            yield
        except Interrupted:
            raise
        except BaseException:
            if self.newest:
                rprint(f"The run stopped early; {self._how_to_go_on()}")
            raise

    def resume_words(self) -> list[str]:
        """The options that go on from the newest checkpoint of this run, beside its own."""
        if not self.newest:
            return []
        words = ["--resume"]
        if checkpoints.in_folder(self.folder)[-1:] != [self.newest]:  # it began with an older one, and saved none yet
            words.append(str(self.newest))
        if self.with_changes and self.newest.name == self.began_with:
            words.append("--resume-with-changes")
        return words

    def _how_to_go_on(self):
        if not self.newest:
            return "no checkpoint exists to resume from"
        return f"{self.newest} is saved, and {shlex.join(self.resume_words())} continues from it"

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint of this run."""
        return self.checkpoints.newest

    def _checkpoint(self, position):
        weights = dict(tree_flatten(self.model.trainable_parameters()))
        state = dict(tree_flatten(self.optimizer.state))
        path = self.checkpoints.save(position, weights, state, **self.described)
        return [f"{checkpoints.FOLDER}/{path.name}"] if path else []

    def _tried(self, what, save, *arguments):
        """The names of what was saved, none if the disk did not take it."""
        try:
            return save(*arguments)
        except OSError as error:
            self.failed.append(f"{what} ({error.strerror or error})")
            newest = f"{self.newest} is unchanged" if self.newest else "no checkpoint exists to resume from"
            rprint(f"  not saved  {self.failed[-1]}; {newest}")
            return []


def _tell(names, more=""):
    if names:
        make_console().print(f"  [ui.good]save[/ui.good]  [ui.muted]{', '.join(names)}[/ui.muted]{more}")


def refuse_full_disk(
    args: Options, model: nn.Module, optimizer: GuardedOptimizer | PairedOptimizer, kept: Kept
) -> DiskUse:
    """What the run takes on the disk, the one in its adapter folder replaced or continued.

    Raises:
        InputError: when the disk cannot hold that, with what is needed and what is free.
    """
    weights = sum(array.nbytes for _, array in tree_flatten(model.trainable_parameters()))
    state = sum(array.nbytes for _, array in tree_flatten(optimizer.state))
    use = disk_use(args, weights, state, kept)
    folder = Path(args.adapter_path)
    free = shutil.disk_usage(existing_parent(folder)).free + _taken(folder)
    if use.peak > free:
        raise InputError(
            f"--adapter-path {folder}: {format_bytes(free)} are free there, and this run takes {use}; make room, give "
            f"another path, {'add --no-keep-best, ' if kept.best else ''}lower --keep-checkpoints {kept.checkpoints}, "
            f"or raise --save-every {args.save_every}"
        )
    return use


def _taken(folder):
    """Bytes of the run that a folder holds: this one replaces them all."""
    found = [*checkpoints.in_folder(folder), *adapter_saving.run_files(folder)]
    files = [file for path in found for file in (path.glob("*") if path.is_dir() else [path])]
    sizes = {(stat.st_dev, stat.st_ino): stat.st_size for stat in (file.lstat() for file in files)}  # a link once
    return sum(sizes.values())
