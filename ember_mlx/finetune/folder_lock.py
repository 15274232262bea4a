"""One run at a time in a folder."""

import fcntl
import os
from pathlib import Path

from ember_mlx.errors import InputError

NAME = ".lock"


class FolderLock:
    """Held from ``take`` until the end of its ``with``, or of the process, however that ends.

    The file stays; the lock on it does not. ``take(make=False)`` takes it only where the file is there already, so that
    a second run can be refused before it does anything, and nothing is written by one that is refused for its input.
    """

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self._descriptor = None

    def take(self, make: bool):
        """Raises InputError when another process, or another run in this one, holds it."""
        if self._descriptor is not None:
            return
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if make else 0)
        try:
            descriptor = os.open(self.path, flags, 0o644)
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputError(
                f"--adapter-path {self.path.parent}: {NAME} cannot be opened ({error}); remove it"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise InputError(
                f"--adapter-path {self.path.parent}: another run is writing there (process {holder or 'unknown'}); "
                "wait for it, stop it, or give another path"
            ) from error
        self._descriptor = descriptor
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
