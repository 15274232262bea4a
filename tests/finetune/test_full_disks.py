"""A disk that fills up at any byte of any write: one line, and what was there is unchanged.

The limit of a process on the size of its files stands for the disk. It holds for writes of Python, of MLX and of the
tokenizers alike.
"""

import errno
import os
import resource
import signal
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import mlx.core as mx
import pytest

from ember_mlx import cli
from ember_mlx.commands import fuse as command
from ember_mlx.finetune import adapters, checkpoints, safe_writing
from ember_mlx.finetune.run import run

pytestmark = pytest.mark.usefixtures("eager")


@contextmanager
def files_of_at_most(nbytes):
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def command_line(monkeypatch, capsys, *words):
    """Exit code and the lines of the standard error."""
    monkeypatch.setattr(sys, "argv", ["ember-mlx", *map(str, words)])
    capsys.readouterr()
    try:
        cli.main()
    except SystemExit as stopped:
        return stopped.code, capsys.readouterr().err.splitlines()
    return 0, []


@pytest.fixture
def fuse_words(parse, folders, tmp_path):
    run(parse("--iters", 1))
    place = tmp_path / "place"
    place.mkdir()
    paths = {"--model": folders["untied"], "--adapter-path": tmp_path / "adapters", "--save-path": place / "fused"}
    return ["fuse", *(word for pair in paths.items() for word in pair), "--overwrite"], place


@pytest.mark.parametrize("there_before", [False, True])
def test_fuse_writes_all_or_nothing(fuse_words, monkeypatch, capsys, there_before):
    words, place = fuse_words
    if there_before:
        assert command_line(monkeypatch, capsys, *words) == (0, [])
        (place / "fused" / "mine.txt").write_text("mine")
    before = contents(place)
    for limit in (0, 100, 500, 3000, 6000, 20_000, 100_000):
        with files_of_at_most(limit):
            code, errors = command_line(monkeypatch, capsys, *words)
        assert (code, len(errors)) == (2, 1), limit
        assert f"--save-path {place / 'fused'}: could not be written (" in errors[0]
        assert contents(place) == before
        assert [path.name for path in place.iterdir()] == ["fused"] * there_before
    with files_of_at_most(10**7):
        assert command_line(monkeypatch, capsys, *words) == (0, [])


class Refusing:
    """Makes the n-th call of some functions raise, as a full disk does."""

    def __init__(self, monkeypatch, at, functions):
        self.left = at
        for owner, name in functions:
            monkeypatch.setattr(owner, name, self._instead(getattr(owner, name)))

    def _instead(self, function):
        def call(*arguments, **options):
            self.left -= 1
            if self.left == -1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments, **options)

        return call


def test_fuse_whose_last_moves_are_refused_leaves_what_was_there(fuse_words, monkeypatch, capsys):
    words, place = fuse_words
    assert command_line(monkeypatch, capsys, *words) == (0, [])
    (place / "fused" / "mine.txt").write_text("mine")
    before, at, refused = contents(place), 0, True
    while refused:
        with monkeypatch.context() as broken:
            functions = [(os, "rename"), (safe_writing, "sync_folder"), (Path, "mkdir"), (command, "save")]
            disk = Refusing(broken, at, functions)
            code, errors = command_line(broken, capsys, *words)
        refused = disk.left < 0
        if code:
            assert (code, len(errors)) == (2, 1)
            assert "No space left on device" in errors[0]
        assert contents(place / "fused").keys() == {path.relative_to("fused") for path in before}
        assert (place / "fused" / "mine.txt").read_text() == "mine"
        # What could not be removed is hidden, and the next one removes it.
        assert {path.name for path in place.iterdir()} <= {"fused", ".removed-fused"}
        at += 1
    assert at > 10


@pytest.mark.parametrize("limit", [0, 300, 3000, 30_000])
@pytest.mark.parametrize("there_before", [False, True])
def test_a_run_ends_in_one_line_and_every_file_is_whole(parse, tmp_path, monkeypatch, capsys, limit, there_before):
    words = ["--iters", 2, "--save-every", 1, "--log-jsonl", tmp_path / "log.jsonl", "--overwrite"]
    adapter = tmp_path / "adapters"
    if there_before:
        run(parse(*words))
    before = contents(adapter)
    args = parse(*words)
    monkeypatch.setattr("ember_mlx.finetune.options.parse_given", lambda *_, **__: (args, frozenset()))
    with files_of_at_most(limit):
        code, errors = command_line(monkeypatch, capsys, "train")
    assert (code, len(errors)) == (2, 1)
    assert "could not be saved: adapter of step 2 (File too large)" in errors[0]
    after = contents(adapter)
    new = after.keys() - before.keys()
    assert all(path.parts[0] == checkpoints.FOLDER for path in new)  # a checkpoint may be smaller than the adapter
    assert all(after[path] == data for path, data in before.items() if path in after)
    for path in checkpoints.in_folder(adapter):
        checkpoints.read(path)
    if there_before:
        for name in (adapters.ADAPTERS, adapters.TABLES):
            mx.eval(adapters.read_arrays(adapter / name))
    log = tmp_path / "log.jsonl"
    assert not log.exists() or not log.stat().st_size or log.read_bytes().endswith(b"\n")


def kept(path):
    return path.name == "mine.txt"


@pytest.mark.parametrize("state", ["aside", "between", "not kept yet", "partial"])
def test_whatever_a_kill_leaves_the_next_folder_has_what_is_kept(tmp_path, state):
    path, aside = tmp_path / "model", tmp_path / ".removed-model"
    there = aside if state in ("aside", "between", "not kept yet") else path
    there.mkdir()
    (there / "old.safetensors").write_text("old")
    (there / "mine.txt").write_text("mine")
    if state == "not kept yet":
        path.mkdir()
        (path / "new.safetensors").write_text("of the run that was killed")
    if state in ("between", "partial"):
        (tmp_path / ".partial-model").mkdir()
        (tmp_path / ".partial-model" / "half").write_text("half")
    with suppress(ZeroDivisionError), safe_writing.new_folder(path, kept) as partial:
        (partial / "half").write_text(str(1 / 0))
    assert (path / "mine.txt").read_text() == "mine"
    with safe_writing.new_folder(path, kept) as partial:
        (partial / "newest.safetensors").write_text("newest")
    assert {file.name: file.read_text() for file in path.iterdir()} == {
        "newest.safetensors": "newest",
        "mine.txt": "mine",
    }
    assert [each.name for each in tmp_path.iterdir()] == ["model"]
