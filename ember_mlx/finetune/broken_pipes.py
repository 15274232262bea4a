"""Telling, when nobody may be listening any more: a log that cannot be written must not cost the run."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

__all__ = ["lead_nowhere", "outliving_its_readers"]


def lead_nowhere(stream: TextIO) -> None:
    """For a stream that has lost its reader: what is still buffered would raise once more at Python's end."""
    with suppress(OSError, ValueError, AttributeError):  # of a stream without a descriptor
        descriptor = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


@contextmanager
def outliving_its_readers(reader_gone: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within ``with``, nothing that is told raises: what stdout and stderr do not take is let go.

    In ``ember-mlx train | tee log``, tee may die of the same Ctrl-C; rich, which mlx-lm tells with, would then exit.

    Args:
        reader_gone (callable): Called when a pipe turns out to have lost its reader.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and _Outliving(stream, reader_gone) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream:
                stream.flush()
        sys.stdout, sys.stderr = before


class _Outliving:
    """A text stream that lets go what cannot be written."""

    def __init__(self, stream, reader_gone):
        self._stream = stream
        self._reader_gone = reader_gone

    def write(self, text):
        self._try(self._stream.write, text)
        return len(text)

    def flush(self):
        self._try(self._stream.flush)

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def _try(self, function, *arguments):
        try:
            function(*arguments)
        except BrokenPipeError:
            lead_nowhere(self._stream)
            self._reader_gone()
        except OSError:  # a disk that is full, say: when there is room again, the rest is taken
            pass
