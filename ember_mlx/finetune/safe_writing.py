"""Files that are whole or not there, also after a power cut: written beside, flushed to the disk, then renamed."""

import ctypes
import fcntl
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlx.core as mx

from ember_mlx.finetune.safe_reading import check_finite
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.units import format_bytes

__all__ = [
    "PARTIAL",
    "REMOVED",
    "check_space",
    "existing_parent",
    "finish_replacing",
    "link",
    "make_folder",
    "move_all",
    "new_folder",
    "remove",
    "replace_together",
    "sync_folder",
    "write_arrays",
    "write_bytes",
]

PARTIAL = ".partial-"  # a name that begins so is of something unfinished
REMOVED = ".removed-"  # and one that begins so is on its way out
EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
WORKING_FOLDER = -100  # AT_FDCWD of Linux
NOT_SAVED = (
    "it is not saved: a step overflowed, or it was so from the start. Lower the learning rates, or resume from an "
    "earlier checkpoint"
)


def write_arrays(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str] | None = None) -> dict:
    """A new safetensors file, on the disk when this returns; its size and checksum: ``{"bytes": ..., "sha256": ...}``.

    Raises:
        InputError: for an array that is not finite; nothing is written.
        OSError: for whatever the disk has against it.
    """
    check_finite(arrays, path.name, NOT_SAVED)
    with _new_file(path) as file:
        hashed = _Hashed(file)
        mx.save_safetensors(hashed, arrays, metadata or {})
        return {"bytes": file.tell(), "sha256": hashed.sha256.hexdigest()}


def write_bytes(path: Path, data: bytes) -> None:
    """A new file, on the disk when this returns."""
    with _new_file(path) as file:
        file.write(data)


def link(path: Path, new: Path) -> None:
    """The same file under a second name, on the disk once: a clone (APFS), else a hard link, else a copy.

    Of a hard link, whoever writes either name later must replace it, as all here do: a change would be to both.
    """
    system = ctypes.CDLL(None)
    if hasattr(system, "clonefile") and system.clonefile(os.fsencode(path), os.fsencode(new), 0) == 0:
        return
    try:
        os.link(path, new)
    except OSError:
        with open(path, "rb") as file, _new_file(new) as copy:
            shutil.copyfileobj(file, copy)


def replace_together(folder: Path, files: dict[str, dict[str, mx.array] | bytes], metadata: dict[str, str]) -> None:
    """Write files by name into ``folder``, in the place of those that are there, once all of them are on the disk.

    A kill while they are put in their places, one by one, leaves some of the files of before: ``metadata``, which all
    with arrays get, is for telling that.

    Raises:
        OSError: for whatever the disk has against it; what was there is unchanged, unless it refused a rename after
            others.
    """
    partials = {folder / f"{PARTIAL}{name}": folder / name for name in files}
    try:
        for partial, content in zip(partials, files.values(), strict=True):
            partial.unlink(missing_ok=True)
            if isinstance(content, bytes):
                write_bytes(partial, content)
            else:
                write_arrays(partial, content, metadata)
        for partial, path in partials.items():
            os.replace(partial, path)
    except BaseException:
        for partial in partials:
            partial.unlink(missing_ok=True)
        raise
    sync_folder(folder)


def check_space(flag: str, folder: Path, needed: int) -> None:
    """Refuse a folder whose disk has less than ``needed`` bytes left.

    Raises:
        InputError: then.
    """
    free = shutil.disk_usage(existing_parent(folder.absolute().parent)).free
    if needed > free:
        raise InputError(
            f"{flag} {folder}: {format_bytes(needed)} are to be written, and {format_bytes(free)} are free there"
        )


@contextmanager
def new_folder(path: Path, keeps: Callable[[Path], bool] = lambda _: False) -> Iterator[Path]:
    """A folder to write into. It takes the place of ``path``, whole, when the block ends, and is gone if that raises.

    That is one step of the file system: a kill at any moment leaves the old folder or the new one. Where the system
    cannot exchange two names, or something is kept, it takes several; :func:`finish_replacing` mends a kill between.

    Args:
        path (Path): What it replaces, if that exists. A link is replaced itself.
        keeps (callable): Of each entry of the folder that is replaced: whether it moves into the new one.

    Raises:
        OSError: for whatever the disk has against it; what was there is unchanged.
    """
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    partial, replaced = _beside(path)
    try:
        make_folder(path.parent)
        finish_replacing(path, keeps)
        partial.mkdir()
        yield partial
        for written in partial.rglob("*"):
            sync_folder(written)  # or a file
        sync_folder(partial)
        kept = [entry.name for entry in path.iterdir() if keeps(entry)] if path.exists() else []
        if not path.exists():
            os.rename(partial, path)
        elif kept or not _exchange(partial, path):
            move_all([(path, replaced), (partial, path), *((replaced / name, path / name) for name in kept)])
    except BaseException:
        with suppress(OSError):
            finish_replacing(path, keeps)
            for folder in missing:
                folder.rmdir()
        raise
    with suppress(OSError):  # the next one tries again
        sync_folder(path.parent)
        finish_replacing(path, keeps)


def finish_replacing(path: Path, keeps: Callable[[Path], bool] = lambda _: False) -> None:
    """What a kill in :func:`new_folder` has left to do: what was there is back, or the new folder is whole."""
    partial, replaced = _beside(path)
    if replaced.exists() and not path.exists():
        os.rename(replaced, path)
    elif replaced.exists():
        for entry in replaced.iterdir():
            if keeps(entry) and not (path / entry.name).exists():
                os.rename(entry, path / entry.name)
    for left in (partial, replaced):
        remove(left)


def _beside(path):
    """The unfinished folder beside ``path``, and the one that is on its way out."""
    return path.with_name(PARTIAL + path.name), path.with_name(REMOVED + path.name)


def _exchange(one, other):
    """Swap the names of two folders at once; whether the system can."""
    system = ctypes.CDLL(None)
    names = [os.fsencode(path) for path in (one, other)]
    if hasattr(system, "renamex_np"):  # macOS
        return system.renamex_np(*names, EXCHANGE) == 0
    if hasattr(system, "renameat2"):
        return system.renameat2(WORKING_FOLDER, names[0], WORKING_FOLDER, names[1], EXCHANGE) == 0
    return False


def move_all(moves: list[tuple[Path, Path]]) -> None:
    """Rename each first path to its second, in this order: all of them or, raising OSError, none."""
    moved = []
    try:
        for source, target in moves:
            os.rename(source, target)
            moved.append((target, source))
    except BaseException:
        for names in reversed(moved):
            os.rename(*names)
        raise


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, each of them to last."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def existing_parent(path: Path) -> Path:
    """The path if something is there, or else the nearest folder above it that exists: on its disk it will lie."""
    return next(above for above in (path, *path.absolute().parents) if above.exists())


def sync_folder(path: Path) -> None:
    """Make the names in a folder last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a folder or a link, at once for whoever looks at the names; nothing that a link leads to is touched."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not path.name.startswith((PARTIAL, REMOVED)):
        hidden = path.with_name(REMOVED + path.name)
        remove(hidden)
        path = path.rename(hidden)
    shutil.rmtree(path)


class _Hashed(io.RawIOBase):
    """A file to write to, with the checksum of what was written."""

    def __init__(self, file):
        self.file = file
        self.sha256 = hashlib.sha256()

    def tell(self):
        return self.file.tell()

    def write(self, data):
        self.sha256.update(data)
        return self.file.write(data)


@contextmanager
def _new_file(path):
    with open(path, "xb") as file:  # x: never through a link that lies there
        yield file
        file.flush()
        _sync(file.fileno())


def _sync(descriptor):
    full_sync = getattr(fcntl, "F_FULLFSYNC", None)  # macOS, where fsync stops at the drive's own cache
    try:
        if full_sync is not None:
            fcntl.fcntl(descriptor, full_sync)
            return
    except OSError:  # a network drive does not know it
        pass
    os.fsync(descriptor)
