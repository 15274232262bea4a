"""A worker that is lost, or stands still, ends the others: one line, exit code 75, and nothing saved.

MLX's ring reports a peer whose process died. Of a cut cable or a host that vanished it says nothing, and waits for
ever; so a thread looks at the time since the last step ended. Nothing is saved, because half an update may have
reached the weights: the newest checkpoint is what counts.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ember_mlx.finetune.workers import Workers

__all__ = ["EXIT_CODE", "PeerDeadline", "PeerLost", "leave", "reporting_lost_peers"]

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again
BACKENDS = ("[ring]", "[jaccl]", "[nccl]", "[mpi]")  # with which MLX begins what its collectives report
SECONDS_AFTER_SIGNAL = 30
REMEDY = "start all workers again; --resume continues from the newest checkpoint"


class PeerLost(RuntimeError):
    """A collective failed, since another worker is gone; the command line prints it and exits with 75."""


@contextmanager
def reporting_lost_peers(workers: Workers) -> Iterator[None]:
    """Turn what MLX raises for a lost worker into :class:`PeerLost`."""
    try:
        yield
    except RuntimeError as error:
        if workers.size == 1 or not any(backend in str(error) for backend in BACKENDS):
            raise
        raise PeerLost(f"worker {workers.rank}: another worker is lost ({error}); {REMEDY}") from error


class PeerDeadline:
    """Within ``with``, ends the process when :meth:`passed` was not called for too long; for one worker does nothing.

    Too long is ``seconds``, or 20 mean intervals if that is more; before the first call ten times ``seconds``, since a
    model may have to be fetched first. After a signal it is 30 seconds, or three mean intervals.

    Args:
        workers: Of the run.
        seconds (int): ``--peer-timeout``.
    """

    def __init__(self, workers: Workers, seconds: int):
        self.workers = workers
        self.seconds = seconds
        self.signalled: Callable[[], bool] = lambda: False
        self._began = self._last = time.monotonic()
        self._intervals = None
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

    def __enter__(self):
        if self.workers.size > 1:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._ended.set()

    def _watch(self):
        while not self._ended.wait(min(1, self.seconds / 4)):
            limit = self.limit()
            if time.monotonic() - self._last > limit:
                waited = f"worker {self.workers.rank}: waited {limit:.0f} s for another worker, which is lost or stands"
                line = f"ember-mlx train: error: {waited} still (--peer-timeout {self.seconds}); {REMEDY}\n"
                os.write(2, line.encode())  # the main thread may hold the lock of sys.stderr
                os._exit(EXIT_CODE)


def leave(lost: PeerLost) -> None:
    """Print it and end the process at once: what MLX still waits for would hold up an orderly end."""
    sys.stdout.flush()
    print(f"ember-mlx train: error: {lost}", file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)
