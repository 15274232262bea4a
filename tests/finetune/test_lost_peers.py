"""A worker that gives up is gone with exit code 75, whatever nobody reads; one that saves does not give up."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from ember_mlx.finetune.lost_peers import PeerDeadline
from ember_mlx.finetune.run import run
from ember_mlx.finetune.saving import Saving
from ember_mlx.finetune.watchers import Watcher
from ember_mlx.finetune.workers import Workers
from ember_mlx.shared import peer_deadline

LEAVE = "from ember_mlx.shared.peer_deadline import leave; leave('the line')"


class Interrupting(Watcher):
    """Ctrl-C in the second step."""

    def after_step(self, step, result):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("errors", ["read", "closed", "gone", "full"])
def test_who_leaves_is_gone_whatever_becomes_of_the_line(errors):
    """Its launcher may be dead, or stand still with a pipe that is full: that must not keep the worker."""
    reader, writer = os.pipe()
    if errors == "full":
        os.set_blocking(writer, False)
        with suppress(BlockingIOError):
            while os.write(writer, bytes(4096)):
                pass
        os.set_blocking(writer, True)
    if errors == "gone":
        os.close(reader)
    command = [sys.executable, "-c", LEAVE]
    if errors == "closed":
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    try:
        assert subprocess.run(command, stderr=writer, timeout=30, check=False).returncode == 75
        if errors == "read":
            assert os.read(reader, 100) == b"the line\n"
    finally:
        os.close(writer)
        if errors != "gone":
            os.close(reader)


def test_whoever_works_alone_waits_for_nobody(monkeypatch):
    left = threading.Event()
    monkeypatch.setattr(peer_deadline, "leave", lambda line: left.set())
    with peer_deadline.PeerDeadline(Workers(0, 2), 0.02, str) as deadline:
        deadline.passed()
        with deadline.alone():
            time.sleep(0.1)
            assert not left.is_set()
        assert left.wait(10)


def test_every_save_of_a_run_is_work_alone(parse, monkeypatch):
    """However long it takes: after a signal, too, which leaves the others 30 seconds."""
    alone, seen = [], set()

    @contextmanager
    def noted(deadline):
        alone.append(True)
        yield
        alone.pop()

    def watched(name, save):
        def watching(*arguments):
            seen.add((name, bool(alone)))
            return save(*arguments)

        return watching

    monkeypatch.setattr(PeerDeadline, "alone", noted)
    for name in ("save", "save_best", "save_checkpoint"):
        monkeypatch.setattr(Saving, name, watched(name, getattr(Saving, name)))
    args = parse("--iters", "3", "--save-every", "1", "--steps-per-eval", "1", "--keep-best")
    with pytest.raises(KeyboardInterrupt):
        run(args, watchers=[Interrupting()])
    assert seen == {("save", True), ("save_best", True), ("save_checkpoint", True)}
