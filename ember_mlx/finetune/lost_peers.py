"""A worker that is lost, or stands still, ends the others: one line, exit code 75, and nothing saved.

MLX's ring reports a peer whose process died. Of a cut cable or a host that vanished it says nothing, and waits for
ever; so there is a deadline. Nothing is saved, because half an update may have reached the weights: the newest
checkpoint is what counts.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ember_mlx.finetune.workers import Workers
from ember_mlx.shared import peer_deadline

__all__ = ["PeerDeadline", "PeerLost", "leave", "reporting_lost_peers"]

BACKENDS = ("[ring]", "[jaccl]", "[nccl]", "[mpi]")  # with which MLX begins what its collectives report
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


class PeerDeadline(peer_deadline.PeerDeadline):
    """That of a run of ``ember-mlx train``, whose ``--peer-timeout`` is ``seconds``."""

    def __init__(self, workers: Workers, seconds: int):
        super().__init__(workers, seconds, lambda waited: _line(f"{waited} (--peer-timeout {seconds}); {REMEDY}"))


def leave(lost: PeerLost) -> None:
    """Print it and end the process at once."""
    line = _line(lost)
    held_up = threading.Timer(5, peer_deadline.leave, [line])  # by a pipe that nobody reads
    held_up.daemon = True
    held_up.start()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    peer_deadline.leave(line)


def _line(text):
    return f"ember-mlx train: error: {text}"
