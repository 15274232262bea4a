"""One run at a time in a folder."""

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

from mlx_lm.cli_ui import rprint

from ember_mlx.shared.errors import InputError

__all__ = ["FolderLock"]

NAME = ".lock"
CANNOT_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}  # of some network drives


class FolderLock:
    """Held from ``take`` until the end of its ``with``, or of the process, however that ends.

    The file stays, however a run ends; the lock on it does not. Were it removed, a run that had just opened it would
    lock a file that no other run finds. ``take(make=False)`` takes it only where the file is there already, so that a
    second run can be refused before it does anything, and nothing is written by one that is refused for its input.

    On a file system that knows no locks a run goes on without one, and says so: it has nothing else to lose by that.
    """

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self._held = {}  # descriptors by path

    def take(self, make: bool) -> None:
        """Raises InputError when another process, or another run in this one, holds it."""
        if self.path in self._held:
            return
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if make else 0)
        try:
            descriptor = os.open(self.path, flags, 0o644)
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputError(
                f"--adapter-path {self.path.parent}: {NAME} cannot be opened ({error.strerror}); "
                f"{'remove it' if os.path.lexists(self.path) else 'make room there'}, or give another path"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = self._holder(descriptor)
            os.close(descriptor)
            raise InputError(
                f"--adapter-path {self.path.parent}: another run is writing there (process {holder}); "
                "wait for it, stop it, or give another path"
            ) from error
        except OSError as error:
            if error.errno not in CANNOT_LOCK:
                os.close(descriptor)
                raise InputError(
                    f"--adapter-path {self.path.parent}: {NAME} cannot be locked ({error.strerror}); give another path"
                ) from error
            rprint(
                f"Warning: --adapter-path {self.path.parent}: that file system knows no locks ({error.strerror}), so "
                "nothing keeps a second run out of there; start none"
            )
        self._held[self.path] = descriptor
        with suppress(OSError):  # it only tells whose the lock is, and the disk may be full
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def hold(self, path: Path, where: str) -> None:
        """Lock another file that the run writes, made if it is missing, for as long; where locks are unknown, nothing.

        Raises:
            InputError: when another run holds it; ``where`` names it.
        """
        if path.resolve() in self._held:
            return
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise InputError(f"{where}: another run is writing to it; wait for it, or give another path") from error
        except OSError:
            os.close(descriptor)
            return
        self._held[path.resolve()] = descriptor

    @staticmethod
    def _holder(descriptor):
        with suppress(OSError):
            return os.pread(descriptor, 20, 0).decode("ascii", "replace").strip() or "unknown"
        return "unknown"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()
