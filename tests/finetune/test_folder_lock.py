"""Two runs in one folder: one of them is refused, whenever it comes."""

import errno
import fcntl
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
from processes import without_torch

from ember_mlx import InputError
from ember_mlx.finetune import given
from ember_mlx.finetune.folder_lock import FolderLock
from ember_mlx.finetune.run import run

pytestmark = pytest.mark.usefixtures("eager")


def test_the_second_run_in_a_folder_is_refused_and_a_dead_one_leaves_no_lock(parse, tmp_path):
    folder = tmp_path / "adapters"
    folder.mkdir()
    program = (
        "import sys, time; from pathlib import Path; from ember_mlx.finetune.folder_lock import FolderLock\n"
        "FolderLock(Path(sys.argv[1])).take(make=True); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, folder]
    process = subprocess.Popen(command, env=without_torch(), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"another run is writing there \\(process {process.pid}\\)"):
        run(parse())
    process.kill()
    process.wait()
    run(parse())
    with FolderLock(folder) as lock:
        lock.take(make=False)
        with pytest.raises(InputError, match="another run is writing there"), FolderLock(folder) as second:
            second.take(make=True)


def test_a_run_that_was_done_in_a_new_folder_while_this_one_loaded_its_model_is_kept(parse, tmp_path, monkeypatch):
    load_base = given.load_base

    def load_while_the_other_runs(*arguments, **options):
        monkeypatch.undo()
        run(parse("--seed", 1))
        return load_base(*arguments, **options)

    monkeypatch.setattr(given, "load_base", load_while_the_other_runs)
    with pytest.raises(InputError, match="already holds another run"):
        run(parse("--seed", 2))
    assert '"seed": 1' in (tmp_path / "adapters" / "adapter_config.json").read_text()


def test_a_file_system_without_locks_costs_a_warning(parse, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    run(parse())
    assert capsys.readouterr().out.count("knows no locks (No locks available)") == 1
    assert (tmp_path / "adapters" / "adapters.safetensors").exists()


def test_a_lock_that_cannot_be_made_is_told_with_the_remedy(tmp_path, monkeypatch):
    lock = FolderLock(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(os, "open", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(InputError, match=r"\.lock cannot be opened \(No space left on device\); make room"):
            lock.take(make=True)
    monkeypatch.setattr(os, "pwrite", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    lock.take(make=True)  # whose it is cannot be told, but it is held
    with pytest.raises(InputError, match="another run is writing there \\(process unknown\\)"):
        FolderLock(tmp_path).take(make=True)
