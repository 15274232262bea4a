"""Saving what a run has trained: its adapter folder, the numbered saves in it, and ``best/``.

The files of a save take their places one by one, so a kill may leave some of the save before. They know each other by
ids in their metadata, made from what is saved: ``settings_id``, of what the config says of loading, and ``save_id``, of
the arrays in both files.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ember_mlx.finetune import safe_reading, safe_writing
from ember_mlx.finetune.adapters import ADAPTERS, BEST, CONFIG, REFUSAL, SAVE_ID, SETTINGS_ID, TABLES
from ember_mlx.finetune.options import Options
from ember_mlx.shared.errors import InputError

__all__ = ["Saver", "is_run_path", "run_files"]

SETTINGS = ("fine_tune_type", "num_layers", "lora_parameters", "token_tables", "added_tokens", "quantize")
RUN_FILE = re.compile(r"adapter_config\.json|best|(\d{7,}_)?(adapters|token_tables)\.safetensors")
NUMBERED = re.compile(r"(\d{7,})_")


class Saver:
    """Writes the trainable parameters of ``model`` to ``folder``: all files, or those of before stay.

    The first save, not the start of the run, takes the place of an earlier run in the folder: one that breaks off
    before it has anything to save loses nothing. A run that ``goes_on`` from a checkpoint in it takes nobody's place.

    Args:
        folder, model, args, goes_on: See above.
        keep (int, optional): How many numbered saves to keep, the newest; all by default.
    """

    def __init__(self, folder: Path, model: nn.Module, args: Options, goes_on: bool = False, keep: int | None = None):
        self.folder = folder
        self.keep = keep
        self.model = model
        self.options = vars(args).copy()
        self.options[SETTINGS_ID] = _settings_id(self.options)
        self.config = _as_config(self.options)
        # Half, because a checkpoint's index holds the same and a little more.
        if len(self.config) > safe_reading.JSON_LIMIT // 2:
            raise InputError(
                f"--adapter-path {folder}: {CONFIG} would have {len(self.config):,} bytes, and at most "
                f"{safe_reading.JSON_LIMIT // 2:,} are read again: add fewer tokens, or give a smaller YAML file"
            )
        self.table_paths = args.token_tables if args.fine_tune_type != "full" else []
        self.replaced = [] if goes_on else run_files(folder)  # until the first save
        self.saved = False

    def save(self, steps_done: int, numbered: bool) -> list[str]:
        """Save what is trained so far, under a number too, as mlx-lm does, if asked for; the names written.

        Raises:
            OSError: for whatever the disk has against it; the files that were there are as they were.
        """
        files, metadata = self._arrays()
        if numbered and self.keep != 0:
            files |= {f"{steps_done:07d}_{name}": arrays for name, arrays in files.items()}
        names = list(files)
        if not self.saved:
            files[CONFIG] = self.config
        safe_writing.replace_together(self.folder, files, metadata)
        if not self.saved:
            for path in (*self.replaced, *self.folder.glob(f"{safe_writing.PARTIAL}*.safetensors")):
                if path.name not in files:
                    safe_writing.remove(path)
            safe_writing.finish_replacing(self.folder / BEST)
        self.saved, self.replaced = True, []
        self._prune(steps_done)
        return names

    def save_best(self, more: dict[str, Any], is_saved: bool) -> None:
        """Put what is trained so far into ``best/``, an adapter folder of its own, in the place of the one there.

        Args:
            more: What its config says of it, beside the options.
            is_saved: Whether the last :meth:`save` was of the same weights: ``best/`` then holds the same files.

        Raises:
            OSError: for whatever the disk has against it; the ``best/`` that was there is as it was.
        """
        with safe_writing.new_folder(self.folder / BEST) as best:
            safe_writing.write_bytes(best / CONFIG, _as_config(self.options | more))
            files, metadata = self._arrays()
            for name, arrays in files.items():
                if is_saved:
                    safe_writing.link(self.folder / name, best / name)
                else:
                    safe_writing.write_arrays(best / name, arrays, metadata)

    def save_config(self, more: dict[str, Any]) -> None:
        """Put ``more`` into the config of what is saved.

        Raises:
            OSError: for whatever the disk has against it; the config that was there is as it was.
        """
        safe_writing.replace_together(self.folder, {CONFIG: _as_config(self.options | more)}, {})

    def _arrays(self):
        """The arrays of each file, and the metadata that makes them one save."""
        weights = dict(tree_flatten(self.model.trainable_parameters()))
        tables = {name: weights.pop(name) for name in self.table_paths}
        metadata = {SETTINGS_ID: self.options[SETTINGS_ID]}
        if tables:
            metadata[SAVE_ID] = _save_id(weights | tables)
            return {ADAPTERS: weights | {REFUSAL: mx.zeros(1)}, TABLES: tables}, metadata
        return {ADAPTERS: weights}, metadata

    def _prune(self, steps_done):
        """Leave the newest numbered saves; later ones are of what the run went back over."""
        if self.keep is None:
            return
        numbers = {path: int(found[1]) for path in run_files(self.folder) if (found := NUMBERED.match(path.name))}
        steps = sorted({step for step in numbers.values() if step <= steps_done})
        kept = steps[max(len(steps) - self.keep, 0) :]
        for path, step in numbers.items():
            if step not in kept:
                path.unlink(missing_ok=True)


def run_files(folder: Path) -> list[Path]:
    """What a run wrote into ``folder``, this one or an earlier one: the files, and the folder ``best``."""
    return sorted(path for path in folder.glob("*") if RUN_FILE.fullmatch(path.name))


def is_run_path(folder: Path, path: Path) -> bool:
    """Whether ``path`` is a file that a run writes into its adapter folder ``folder``, or may be one of its parts."""
    folder, path = folder.resolve(), path.resolve()
    if not path.is_relative_to(folder):
        return False
    first = path.relative_to(folder).parts[:1]
    # Some disks take A and a for one name.
    return not first or first[0].lower().startswith((".", "checkpoints")) or bool(RUN_FILE.fullmatch(first[0].lower()))


def _as_config(settings):
    return json.dumps(dict(sorted(settings.items())), indent=4, default=str).encode()


def _settings_id(settings):
    text = json.dumps({key: settings.get(key) for key in SETTINGS}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _save_id(arrays):
    """Of the contents and no random number: the same run gives the same bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(memoryview(array.reshape(-1).view(mx.uint8)))
    return digest.hexdigest()
