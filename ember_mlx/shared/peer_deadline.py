"""A worker that waits in vain for another ends itself, with exit code 75: the same for MLX and for PyTorch.

Of a cut cable or a host that vanished no backend says anything; they wait for ever. So a thread looks at the time since
all workers last met. Nothing is saved, because half an update may have reached the weights.
"""

import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, Protocol

__all__ = ["EXIT_CODE", "PeerDeadline", "leave"]

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
SECONDS_AFTER_SIGNAL = 30


class HasRank(Protocol):
    """Of ``size`` workers the one of this rank."""

    rank: int
    size: int


class PeerDeadline:
    """Within ``with``, ends the process when :meth:`passed` was not called for too long; for one worker does nothing.

    Too long is ``seconds``, or 20 mean intervals if that is more; before the first call ten times ``seconds``, since a
    model may have to be fetched first. After a signal it is 30 seconds, or three mean intervals.

    Args:
        workers: Of the run.
        seconds (int): The limit that the user gave.
        line (callable): What is printed, of the words that say who waited for how long.
    """

    def __init__(self, workers: HasRank, seconds: int, line: Callable[[str], str]):
        self.workers = workers
        self.seconds = seconds
        self.signalled: Callable[[], bool] = lambda: False
        self._line = line
        self._began = self._last = time.monotonic()
        self._intervals = None
        self._alone = False
        self._ended = threading.Event()

    def passed(self) -> None:
        """All workers have met."""
        self._last = time.monotonic()
        if self._intervals is None:
            self._began, self._intervals = self._last, 0
        else:
            self._intervals += 1

    def limit(self) -> float:
        """How many seconds may pass without a meeting, now."""
        if self._intervals is None:
            return 10 * self.seconds
        mean = (self._last - self._began) / max(self._intervals, 1)
        if self.signalled():
            return max(min(SECONDS_AFTER_SIGNAL, self.seconds), 3 * mean)
        return max(self.seconds, 20 * mean)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within, this worker waits for no other, as while it saves, and may take as long as it needs."""
        self._alone = True
        try:
            yield
        finally:
            self._last = time.monotonic()
            self._alone = False

    def __enter__(self):
        if self.workers.size > 1:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._ended.set()

    def _watch(self):
        while not self._ended.wait(min(1, self.seconds / 4)):
            limit = self.limit()
            if not self._alone and time.monotonic() - self._last > limit:
                who = f"worker {self.workers.rank}"
                leave(self._line(f"{who}: waited {limit:.0f} s for another worker, which is lost or stands still"))


def leave(line: str) -> NoReturn:
    """Print a line and end the process at once: what a backend still waits for would hold up an orderly end."""
    try:
        if select.select([], [2], [], 1)[1]:  # a pipe or a terminal that nobody reads would hold it up for ever
            os.write(2, f"{line}\n".encode())  # the main thread may hold the lock of sys.stderr
    finally:  # also where stderr is closed, or its reader gone
        os._exit(EXIT_CODE)
