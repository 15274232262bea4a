"""Checkpoints on disk: whole or not there, damage found, nothing touched outside their folder."""

import errno
import io
import json
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import mlx.core as mx
import pytest

from ember_mlx import InputError
from ember_mlx.finetune import checkpoints, safe_writing
from ember_mlx.finetune.checkpoints import Checkpoints
from ember_mlx.finetune.position import Position, numpy_random
from ember_mlx.finetune.run import run


def position(step):
    state = numpy_random()
    return Position(step, 0, state, state, [0, step], None, {"losses": {}, "trained_tokens": 0})


def save(store, step, shape=(6, 4)):
    weights, optimizer = (
        {"w": mx.full(shape, step, mx.bfloat16)},
        {"w.r": mx.full(shape[:1], step), "step": mx.array(step)},
    )
    return store.save(position(step), weights, optimizer, {"iters": 9}, {"data": "d"}, {"mlx": "1"})


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_it_is_read_as_it_was_written_and_the_newest_are_kept(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 10_000_000):
        written = save(store, step)
    assert names(tmp_path) == ["step-0000002", "step-10000000"]
    found = checkpoints.find(tmp_path, True)
    assert found.folder == written == store.newest
    assert found.position.step == 10_000_000
    assert mx.array_equal(found.weights["w"], mx.full((6, 4), 10_000_000, mx.bfloat16))
    assert (found.weights["w"].dtype, found.options, found.made_of) == (mx.bfloat16, {"iters": 9}, {"data": "d"})


def test_the_first_save_of_a_run_removes_those_of_the_run_that_it_replaces(tmp_path):
    old = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        save(old, step)
    new = Checkpoints(tmp_path, keep=3)
    assert names(tmp_path) == ["step-0000001", "step-0000002", "step-0000003"]
    save(new, 2, shape=(3, 3))
    assert names(tmp_path) == ["step-0000002"]
    assert checkpoints.find(tmp_path, True).weights["w"].shape == (3, 3)


def test_the_state_of_a_large_table_takes_under_700_kb(tmp_path):
    store = Checkpoints(tmp_path, keep=1)
    state = {"t.r": mx.zeros((151936,)), "t.c": mx.zeros((1024,)), "step": mx.array(1, mx.uint64)}
    folder = store.save(position(1), {}, state, {}, {}, {})
    assert sum(path.stat().st_size for path in folder.iterdir()) < 700_000


def test_every_flipped_bit_and_every_truncation_is_found_or_harmless(tmp_path):
    folder = save(Checkpoints(tmp_path, keep=1), 5)
    good = checkpoints.read(folder)
    mx.eval(good.weights, good.optimizer)
    chance = random.Random(0)
    found = 0
    for _ in range(150):
        path = folder / chance.choice([checkpoints.INDEX, checkpoints.WEIGHTS, checkpoints.OPTIMIZER])
        data = path.read_bytes()
        at = chance.randrange(len(data))
        cut = chance.random() < 0.2
        path.write_bytes(
            data[:at] if cut else data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
        )
        try:
            read = checkpoints.read(folder)
            assert path.name == checkpoints.INDEX  # white space there is of no account
            assert read.position == good.position
            assert all(mx.array_equal(array, good.weights[name]) for name, array in read.weights.items())
        except InputError:
            found += 1
        path.write_bytes(data)
    assert found > 130


class FullDisk:
    """Lets ``allowed`` calls that write through, then fails each with "no space left"."""

    error = OSError(errno.ENOSPC, "No space left on device")

    def __init__(self, monkeypatch, allowed):
        self.left = allowed
        for owner, name in (
            (os, "fsync"),
            (os, "rename"),
            (os, "replace"),
            (Path, "mkdir"),
            (safe_writing._Hashed, "write"),
        ):
            self.wrap(monkeypatch, owner, name)
        monkeypatch.setattr("builtins.open", self.opening(io.open))

    def spend(self):
        self.left -= 1
        if self.left < 0:
            raise self.error

    def wrap(self, monkeypatch, owner, name):
        real = getattr(owner, name)

        def call(*arguments, **options):
            self.spend()
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    def opening(self, real):
        def call(file, mode="r", *arguments, **options):
            if mode != "r":
                self.spend()
            return real(file, mode, *arguments, **options)

        return call


class Killed(FullDisk):
    """From a call on nothing is done any more, be it writing or removing."""

    error = KeyboardInterrupt()

    def __init__(self, monkeypatch, allowed):
        super().__init__(monkeypatch, allowed)
        for name in ("unlink", "rmdir"):
            self.wrap(monkeypatch, os, name)


class OneFailure(FullDisk):
    def spend(self):
        self.left -= 1
        if self.left == -1:
            raise self.error


OLD, NEW = (6, 4), (3, 3)


@pytest.mark.parametrize("breaks", [FullDisk, OneFailure, Killed])
@pytest.mark.parametrize("goes_back", [True, False])
def test_while_a_run_is_replaced_either_it_or_the_new_one_is_gone_on_from(tmp_path, breaks, goes_back):
    before = Checkpoints(tmp_path / "before", keep=3)
    first, *_ = (save(before, step, OLD).name for step in (1, 2, 3))
    failures, seen = 0, []
    while True:
        folder = shutil.copytree(tmp_path / "before", tmp_path / str(failures))
        store = Checkpoints(folder, keep=3, resumed=folder / "checkpoints" / first if goes_back else None)
        with pytest.MonkeyPatch.context() as monkeypatch:
            disk = breaks(monkeypatch, failures)
            with suppress(OSError, KeyboardInterrupt):
                save(store, 2, NEW)
        found = checkpoints.find(folder, True, tell=pytest.fail)
        outcome = found.position.step, found.weights["w"].shape
        seen += [outcome] if outcome not in seen[-1:] else []
        if breaks is OneFailure:
            assert found.folder.name == f"step-{outcome[0]:07d}"  # what stepped aside is back
        save(Checkpoints(folder, keep=1, resumed=found.folder), 4)  # goes on, and leaves nothing of it
        assert names(folder) == ["step-0000004"]
        if disk.left >= 0:
            break
        failures += 1
    between = [(1, OLD)] if goes_back and breaks is not OneFailure else []
    assert seen == [(3, OLD), *between, (2, NEW)]
    assert failures > 15


def test_the_name_of_a_new_folder_lasts_too(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(safe_writing, "sync_folder", synced.append)
    save(Checkpoints(tmp_path / "new" / "adapters", keep=1), 1)
    assert [tmp_path, tmp_path / "new", tmp_path / "new" / "adapters"] == synced[:3]


def test_a_run_that_keeps_none_removes_those_of_before_only_when_its_adapter_is_there(parse, tmp_path, monkeypatch):
    run(parse("--save-every", 2))
    again = parse("--keep-checkpoints", 0, "--overwrite")
    with monkeypatch.context() as broken:
        broken.setattr(safe_writing, "write_arrays", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(InputError, match="could not be saved"):
            run(again)
    assert names(tmp_path / "adapters") == ["step-0000002", "step-0000003"]
    run(again)
    assert names(tmp_path / "adapters") == []


def test_whichever_write_a_full_disk_refuses_the_one_before_is_whole(tmp_path):
    failures = 0
    while True:
        folder = tmp_path / str(failures)
        folder.mkdir()
        store = Checkpoints(folder, keep=1)
        save(store, 1)
        with pytest.MonkeyPatch.context() as monkeypatch:
            disk = FullDisk(monkeypatch, failures)
            with suppress(OSError):
                save(store, 2)
        newest = checkpoints.find(folder, True, tell=pytest.fail)
        if disk.left >= 0:
            break
        assert newest.position.step in ((1, 2) if "step-0000002" in names(folder) else (1,))
        save(store, 3)  # when there is space again
        assert names(folder) == ["step-0000003"]
        failures += 1
    assert newest.position.step == 2
    assert failures > 15


def test_a_run_on_a_full_disk_goes_on_and_says_so_and_ends_well_if_there_is_space_again(parse, tmp_path, capsys):
    store = tmp_path / "adapters" / "checkpoints"

    class Fills:
        def on_train_loss_report(self, info):
            # As if the disk were full: nothing can be made in there while step 4 is saved.
            if info["iteration"] == 4:
                store.rename(store.with_name("away"))
                store.write_text("")
            if info["iteration"] == 5:
                store.unlink()
                store.with_name("away").rename(store)

        def on_val_loss_report(self, info):
            pass

    run(parse("--iters", 6, "--save-every", 2), Fills())
    said = " ".join(capsys.readouterr().out.split())
    assert "not saved checkpoint of step 4 (File exists); " in said
    assert "step-0000002 is unchanged" in said
    assert "Not saved: checkpoint of step 4 (File exists). What was trained is saved." in said
    assert names(tmp_path / "adapters") == ["step-0000002", "step-0000006"]


def test_when_what_was_trained_cannot_be_saved_the_run_says_so_and_fails(parse, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safe_writing, "write_arrays", full)
    with pytest.raises(
        InputError, match=r"what was trained could not be saved: adapter of step 3 \(No space left on device\)"
    ):
        run(parse())


def test_an_adapter_is_saved_where_there_is_no_room_for_a_checkpoint(parse, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Checkpoints, "save", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    run(parse())
    assert "checkpoint of step 3 (No space left on device); no checkpoint exists to resume" in capsys.readouterr().out
    assert (tmp_path / "adapters" / "adapters.safetensors").exists()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(parse, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=40_960))
    with pytest.raises(
        InputError, match=r"40.96 kB are free there, and this run takes .*checkpoints .* at the peak; make roo"
    ):
        run(parse())
    assert not (tmp_path / "adapters").exists()


def test_nothing_outside_is_read_written_or_removed_through_links(parse, tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "adapters"
    outside.mkdir()
    good = save(Checkpoints(outside, keep=1), 7)
    before = {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}
    folder.mkdir()
    (folder / "checkpoints").symlink_to(outside / "checkpoints")
    with pytest.raises(InputError, match=r"checkpoints: is a link, which is not followed"):
        checkpoints.find(folder, True)
    with pytest.raises(InputError, match="is a link, which is not followed; remove it"):
        save(Checkpoints(folder, keep=1), 8)
    (folder / "checkpoints").unlink()
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-0000009").symlink_to(good)
    (folder / "checkpoints" / ".partial-step-0000008").symlink_to(good)
    with pytest.raises(InputError, match="all 1 checkpoints in it are damaged"):
        checkpoints.find(folder, True, tell=lambda _: None)
    (folder / ".partial-adapters.safetensors").symlink_to(good / "weights.safetensors")
    run(parse("--overwrite"))
    assert names(folder) == ["step-0000003"]
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(outside / "new")
    with pytest.raises(InputError, match=r"\.lock cannot be opened"):
        run(parse("--overwrite"))
    assert before == {path: path.read_bytes() for path in outside.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": {"../../secret": {"bytes": 1, "sha256": ""}}}, "files must hold weights.safetensors, optimizer"),
        ({"files": None}, "files must hold"),
        ({"format": 2}, "is of format 2; this release reads format 1"),
        ({"format": True}, "format"),
        ({"options": []}, "options is of type list, not dict"),
        ({"position": {"step": 5}}, "position must hold step, drawn"),
        ({"more": 1}, "must hold format, position"),
    ],
)
def test_an_index_that_says_something_else_is_refused(tmp_path, change, message):
    folder = save(Checkpoints(tmp_path, keep=1), 5)
    content = json.loads((folder / "checkpoint.json").read_text())["content"] | change
    index = {"sha256": checkpoints._checksum(content), "content": content}
    (folder / "checkpoint.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        checkpoints.read(folder)


def test_arrays_that_are_not_those_of_the_run_are_refused_by_name(parse, tmp_path):
    run(parse("--iters", 4))
    folder = tmp_path / "adapters" / "checkpoints" / "step-0000004"
    good = checkpoints.read(folder)
    mx.eval(good.weights)
    head = good.weights["lm_head.weight"]
    for weights, message in (
        ({"lm_head.weight": head[:-1]}, r"lm_head.weight has shape \(259, 32\) and dtype mlx.core.float32, but \(260"),
        ({"lm_head.weight": head.astype(mx.float16)}, "and dtype mlx.core.float16, but"),
        ({"model.norm.weight": head}, "model.norm.weight is not of this run"),
        (None, "is missing"),
    ):
        arrays = good.weights | weights if weights else dict(list(good.weights.items())[1:])
        (folder / "weights.safetensors").unlink()
        described = safe_writing.write_arrays(folder / "weights.safetensors", arrays)
        content = json.loads((folder / "checkpoint.json").read_text())["content"]
        content["files"]["weights.safetensors"] = described
        index = {"sha256": checkpoints._checksum(content), "content": content}
        (folder / "checkpoint.json").write_text(json.dumps(index))
        with pytest.raises(InputError, match=f"weights.safetensors: .*{message}"):
            run(parse("--iters", 5, "--resume"))
