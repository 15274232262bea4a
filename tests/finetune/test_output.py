"""Telling that must not cost the run."""

import os
import sys
from pathlib import Path

import pytest

from ember_mlx.finetune.broken_pipes import outliving_its_readers


def test_a_reader_that_is_gone_is_told_of_and_its_pipe_leads_nowhere(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        gone = []
        with outliving_its_readers(lambda: gone.append(1)):
            print("said to nobody")
            print("and more")
            assert sys.stdout.encoding == stream.encoding
        assert sys.stdout is stream
        assert gone == [1]
        stream.flush()  # as Python does at its end


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_log_on_a_full_disk_raises_nothing_and_stops_nothing(monkeypatch):
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stderr", os.fdopen(os.dup(full.fileno()), "w", buffering=1))
        with outliving_its_readers(lambda: pytest.fail("nobody is gone")):
            print("too much", file=sys.stderr)
        with pytest.raises(OSError, match="No space"):
            sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
