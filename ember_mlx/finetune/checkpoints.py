"""Checkpoints: all of a run between two of its steps, so that it can go on as if it had never stopped.

Where. Between two finished steps (``finetune/loop.py``) a checkpoint is written every ``--save-every`` steps, and
before a signal stops the run; another one at the end. Gradients that are accumulated lie in the step; but while they
gather, weights and optimizer stand still. So a checkpoint is always of the last step after which nothing was
accumulated, whose random states and data position are kept for that: it can be taken at any step, and costs the
repetition of the micro-batches since.

What. ``<adapter>/checkpoints/step-0000100/`` holds ``weights.safetensors``, everything that trains;
``optimizer.safetensors``, the optimizer's whole state; and ``checkpoint.json``: the position in the data, MLX's and
NumPy's random states, the losses so far, the options, what the data and the model were, versions, and the size and
SHA-256 of both files and of itself. Weights take what they take in the model; Ember's state of a table of V x D takes
4 (V + D) bytes.

How. It is written under another name, each file and the folder flushed to the disk, and then renamed: a checkpoint is
whole or not there. What is no longer kept goes when the new one is on the disk. Those of a run that this one replaces,
newer ones perhaps, step aside for it as ``step-0000100.replaced``, which are read only where there are no others: so a
kill at any moment leaves either run to go on with, and never the new one behind the old. Reading believes nothing: no
name in the JSON is ever used as a path, checksums come before contents, and names, shapes and dtypes are those of the
run or refused.
"""

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ember_mlx.finetune import safe_reading, safe_writing
from ember_mlx.finetune.adapters import ADAPTERS
from ember_mlx.finetune.best import Validations
from ember_mlx.finetune.position import NUMPY_STATE, Position
from ember_mlx.shared.errors import InputError

__all__ = [
    "FOLDER",
    "INDEX",
    "NAME",
    "OPTIMIZER",
    "REPLACED",
    "WEIGHTS",
    "Checkpoint",
    "Checkpoints",
    "adapter_folder_of",
    "find",
    "in_folder",
    "options_of",
    "read",
    "run_folder_of",
]

FOLDER = "checkpoints"
WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
INDEX = "checkpoint.json"
FORMAT = 1
REPLACED = ".replaced"
NAME = re.compile(r"step-(\d{7,12})(\.replaced)?")
FILE_TYPES = {"bytes": int, "sha256": str}
TYPES = {
    "format": int,
    "position": Position.TYPES,
    "options": dict,
    "made_of": dict,
    "versions": dict,
    "files": {WEIGHTS: FILE_TYPES, OPTIMIZER: FILE_TYPES},
}


@dataclass(frozen=True)
class Checkpoint:
    """One that was read and found good.

    ``made_of`` tells the data, the model and the number of workers; ``weights`` and ``optimizer`` are arrays by name.
    """

    folder: Path
    position: Position
    options: dict
    made_of: dict
    versions: dict
    weights: dict[str, mx.array]
    optimizer: dict[str, mx.array]


class Checkpoints:
    """Writes the checkpoints of one run to an adapter folder and keeps the newest of them.

    Args:
        adapter_folder (Path): Where ``checkpoints/`` is, or will be.
        keep (int): How many to keep; with 0 none is written.
        resumed (Path, optional): The checkpoint in there with which the run began. Older ones are of this run too;
            all others, the newer ones among them, are of runs that this one replaces, and go after its first save.

    Raises:
        InputError: when ``checkpoints`` is a file or a link.
    """

    def __init__(self, adapter_folder: Path, keep: int, resumed: Path | None = None):
        self.folder = adapter_folder / FOLDER
        _refuse_what_is_no_folder(self.folder)
        self.keep = keep
        self.own = []
        if resumed:
            older = (path for path in _not_replaced(self.folder) if _step(path) < _step(resumed))
            self.own = [*older, self.folder / resumed.name]

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint of this run."""
        return self.own[-1] if self.own else None

    def save(
        self,
        position: Position,
        weights: dict[str, mx.array],
        optimizer: dict[str, mx.array],
        options: dict[str, Any],
        made_of: dict[str, Any],
        versions: dict[str, str],
    ) -> Path | None:
        """Write one, then remove what is no longer kept; the folder written, or None with ``keep`` of 0.

        One that is there already, since the run began with it, is not written again, and newer ones then stay.

        Raises:
            OSError: for whatever the disk has against it; the earlier ones are as they were.
        """
        path = self.folder / f"step-{position.step:07d}"
        if path == self.newest:
            self.remove_others(newer=False)  # a kill may have kept the save before from it
            return path
        if not self.keep:
            return None
        if self.folder.is_symlink():
            raise OSError(f"{self.folder} has become a link")
        safe_writing.make_folder(self.folder)
        partial = path.with_name(safe_writing.PARTIAL + path.name)
        safe_writing.remove(partial)
        partial.mkdir()
        try:
            content = {
                "format": FORMAT,
                "position": position.to_json(),
                "options": options,
                "made_of": made_of,
                "versions": versions,
                "files": {
                    WEIGHTS: safe_writing.write_arrays(partial / WEIGHTS, weights),
                    OPTIMIZER: safe_writing.write_arrays(partial / OPTIMIZER, optimizer),
                },
            }
            index = {"sha256": _checksum(content), "content": content}
            safe_writing.write_bytes(partial / INDEX, json.dumps(index, indent=1, allow_nan=False).encode())
            safe_writing.sync_folder(partial)
            _put_in_place(partial, path, [other for other in _not_replaced(self.folder) if other not in self.own])
        except BaseException:
            safe_writing.remove(partial)
            raise
        safe_writing.sync_folder(self.folder)
        self.own = [*self.own, path][-self.keep :]
        self.remove_others()
        return path

    def remove_others(self, newer: bool = True) -> None:
        """Remove what is not this run's, the newer ones too if asked for, and what a kill left unfinished."""
        if not self.folder.is_dir() or self.folder.is_symlink():
            return
        for path in self.folder.iterdir():
            hidden = path.name.startswith((safe_writing.PARTIAL, safe_writing.REMOVED))
            checkpoint = NAME.fullmatch(path.name) and (newer or _step(path) <= _step(self.newest))
            if path not in self.own and (hidden or checkpoint):
                with suppress(OSError):  # the next save tries again
                    safe_writing.remove(path)


def in_folder(adapter_folder: Path) -> list[Path]:
    """The folders of checkpoints, good or not, by their steps: the last good one is gone on from."""
    folder = adapter_folder / FOLDER
    if not folder.is_dir() or folder.is_symlink():
        return []
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (path.suffix != REPLACED, _step(path)))


def adapter_folder_of(asked: Path) -> Path | None:
    """The adapter folder, when that or the ``checkpoints`` in it is asked for and not one of the checkpoints."""
    if asked.name == FOLDER:
        return asked.parent
    return asked if (asked / FOLDER).is_dir() else None


def run_folder_of(checkpoint: Path | None) -> Path | None:
    """The adapter folder that a checkpoint lies in, if it does."""
    return checkpoint.parent.parent if checkpoint and checkpoint.parent.name == FOLDER else None


def find(adapter_folder: Path, asked: str | bool, tell: Callable[[str], Any] = print) -> Checkpoint:
    """The checkpoint that ``--resume`` means.

    That is the folder of one, or the newest good one: with True of ``adapter_folder``, else of the one asked for.

    Raises:
        InputError: when there is none; for a damaged one that was asked for, it names the newest good one beside it.
    """
    where = f"--resume: --adapter-path {adapter_folder}" if asked is True else f"--resume {asked}"
    adapter_folder, asked = _meant(adapter_folder, asked)
    if asked is not True:
        try:
            return read(Path(asked))
        except InputError as error:
            weights = Path(asked) / ADAPTERS
            if weights.is_file():
                remedy = f"to start from its weights, --resume-adapter-file {weights}"
                raise InputError(f"--resume {asked}: is an adapter and no checkpoint; {remedy}") from error
            beside = Path(asked).parent
            adapter_folder = beside.parent if beside.name == FOLDER else adapter_folder
            good = _newest_good(adapter_folder, lambda _: None)
            remedy = f"the newest good one is {good.folder}" if good else f"{adapter_folder} has no good one either"
            raise InputError(f"--resume {asked}: {error}; {remedy}") from error
    _refuse_what_is_no_folder(adapter_folder / FOLDER)
    good = _newest_good(adapter_folder, tell)
    if good is None:
        damaged = len(in_folder(adapter_folder))
        why = f"all {damaged} checkpoints in it are damaged" if damaged else "it has no checkpoint"
        raise InputError(f"{where}: {why}; give another, or start without --resume")
    return good


def options_of(adapter_folder: Path, asked: str | bool) -> dict[str, Any]:
    """The options of what :func:`find` finds, by its index alone: of a damaged one, none or those of an older one."""
    adapter_folder, asked = _meant(adapter_folder, asked)
    for path in reversed(in_folder(adapter_folder)) if asked is True else [Path(asked)]:
        with suppress(InputError):
            return _read_index(path)["options"]
    return {}


def read(folder: Path) -> Checkpoint:
    """A checkpoint, whose files are those that were written.

    Raises:
        InputError: for anything else: missing, damaged, made to do harm, not finite, or of a later release.
    """
    content, where, arrays = _read_index(folder), f"checkpoint {folder}", {}
    for name, described in content["files"].items():
        size = safe_reading.plain_file(folder / name, where).stat().st_size
        if size != described["bytes"] or safe_reading.sha256(folder / name, where) != described["sha256"]:
            raise InputError(f"{where}: {name} is damaged: its checksum is not the one in {INDEX}")
        arrays[name] = safe_reading.read_arrays(folder / name, where)
        safe_reading.check_finite(arrays[name], f"{where}: {name}", "use an earlier checkpoint")
    return Checkpoint(
        folder=folder,
        position=_position(content["position"], f"{where}: {INDEX}"),
        options=content["options"],
        made_of=content["made_of"],
        versions=content["versions"],
        weights=arrays[WEIGHTS],
        optimizer=arrays[OPTIMIZER],
    )


def _meant(adapter_folder, asked):
    """The adapter folder whose newest good one is asked for, and True; or else the folder of the one asked for."""
    other = None if asked is True else adapter_folder_of(Path(asked))
    return (other, True) if other else (adapter_folder, asked)


def _read_index(folder):
    """What the index of a checkpoint holds, as it was written."""
    where = f"checkpoint {folder}"
    if folder.is_symlink() or not folder.is_dir():
        raise InputError(f"{where}: this folder does not exist" + (", only a link" if folder.is_symlink() else ""))
    index = safe_reading.read_json(folder / INDEX, where)
    safe_reading.check_types(index, {"sha256": str, "content": dict}, f"{where}: {INDEX}")
    content = index["content"]
    if index["sha256"] != _checksum(content):
        raise InputError(f"{where}: {INDEX} is damaged: its checksum is not that of its content")
    if content.get("format") != FORMAT:
        raise InputError(f"{where}: is of format {content.get('format')!r}; this release reads format {FORMAT}")
    with suppress(AttributeError, KeyError, TypeError):  # of a release that counted none
        content["position"]["record"].setdefault("validations", None)
    safe_reading.check_types(content, TYPES, f"{where}: {INDEX}")
    if NAME.fullmatch(folder.name) and _step(folder) != content["position"]["step"]:
        raise InputError(f"{where}: {INDEX} is that of step {content['position']['step']}")
    return content


def _put_in_place(partial, path, others):
    """After a kill between any two of these, the newest is that of the run before or the one gone on from."""
    aside = [(other, other.with_name(other.name + REPLACED)) for other in others]  # the oldest first
    for _, replaced in aside:
        safe_writing.remove(replaced)
    safe_writing.move_all([*aside, (partial, path)])


def _not_replaced(folder):
    return [path for path in in_folder(folder.parent) if path.suffix != REPLACED]


def _step(path):
    return int(NAME.fullmatch(path.name)[1])


def _position(fields, where):
    if fields["first_evaluation"] is not None:
        safe_reading.check_types(fields["first_evaluation"], NUMPY_STATE, f"{where}: first_evaluation")
    for name, losses in fields["record"]["losses"].items():
        safe_reading.check_types(losses, [(int, float)], f"{where}: losses: {name}")
        if name not in ("train_loss", "val_loss") or len(losses) != 2:
            raise InputError(f"{where}: losses: {name}: must be train_loss or val_loss, each the first and the last")
    if fields["record"]["validations"] is not None:
        safe_reading.check_types(fields["record"]["validations"], Validations.TYPES, f"{where}: validations")
    if fields["step"] < 0 or fields["drawn"] < 0 or fields["drawn"] > fields["step"]:
        raise InputError(f"{where}: step {fields['step']} and drawn {fields['drawn']} cannot be")
    return Position(**fields)


def _newest_good(adapter_folder, tell):
    for path in reversed(in_folder(adapter_folder)):
        try:
            return read(path)
        except InputError as error:
            tell(f"Skipped: {error}")
    return None


def _refuse_what_is_no_folder(path):
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"{path}: is {'a link, which is not followed' if path.is_symlink() else 'a file'}; remove it")


def _checksum(content):
    """Of the content and not of the bytes: what changes no value does no harm."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
