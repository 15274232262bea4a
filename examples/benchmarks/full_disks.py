"""Saves onto disks that are full: the campaign ``disk`` of interruptions.py."""

import errno
import io
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path

from interrupted_runs import KINDS, SAVE_EVERY, FileCalls, contents, train, train_words, unfinished

from ember_mlx.finetune import checkpoints
from ember_mlx.finetune.saving import Saving
from ember_mlx.shared.errors import InputError

SECOND, THIRD = 2 * SAVE_EVERY, 3 * SAVE_EVERY
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
SAVED = "saved all the same, and loads"
# Of one save that said that something is missing: whether its checkpoint is there, and its adapter
SAID = {
    (False, False): "not saved and said so, the one of before loads",
    (True, False): "the checkpoint saved and loads, the adapter not and said so",
    (False, True): "the adapter saved, the checkpoint not and said so, the one of before loads",
    (True, True): "saved and loads, but not all flushed to the disk and said so",
}
# Of a run
WENT_ON = "not saved and said so, the one of before loads, the next save took all"
GAVE_UP = "nothing could be saved any more and the run said so, the one of before loads"
UNHARMED = "saved all the same"


def disk(folder: Path, runs: int, rng: random.Random, tell, kinds=("lora", "full")):
    """Refuse each call of a second save in turn, then some within whole runs, then fill a tmpfs under ``runs`` runs."""
    counts, broken, calls_of = Counter(), [], {}
    for kind in kinds:
        outcomes = []
        with _at_second_save(lambda *save, kept=outcomes: kept.extend(_each_call_refused(*save))):
            train(train_words(folder, folder / kind, *KINDS[kind], "--iters", THIRD))
        calls_of[kind] = [name for name, for_good, _ in outcomes if not for_good]
        tell(f"{kind}: a save makes {len(calls_of[kind])} calls: {dict(Counter(calls_of[kind]))}")
        for number, (name, for_good, outcome) in enumerate(outcomes):
            what = f"one save, {'full from a call on' if for_good else 'one call refused'}"
            counts[f"{what}: {outcome}"] += 1
            if outcome not in (SAVED, *SAID.values()):
                broken.append(f"{kind}, {what}, {number % len(calls_of[kind]) + 1}, {name}: {outcome}")
                tell(broken[-1])
    tell(str(dict(counts)))
    for _ in range(runs):
        kind, for_good, number = rng.choice(list(calls_of)), rng.random() < 0.5, rng.choice(ERRORS)
        at = rng.randint(1, len(calls_of[kind]))
        what = f"a run, {'full to its end' if for_good else 'one call refused'}"
        outcome = _run_refused(folder, kind, FileCalls(at, partial(_refuse, number), for_good))
        counts[f"{what}: {outcome}"] += 1
        tell(f"{kind}, {what}, {errno.errorcode[number]} from call {at}, {calls_of[kind][at - 1]}: {outcome}")
        if outcome not in (WENT_ON, GAVE_UP, UNHARMED):
            broken.append(f"{kind}, {what}, call {at}: {outcome}")
    return {
        "calls_of_a_save": {kind: len(calls) for kind, calls in calls_of.items()},
        "counts": dict(counts),
        "tmpfs": _tmpfs(folder, runs, rng, tell, broken) if runs else "not asked for",
        "broken": broken,
    }


def _refuse(number=errno.ENOSPC):
    raise OSError(number, os.strerror(number))


@contextmanager
def _at_second_save(first):
    """Call ``first`` with the arguments of the second save before it is done."""
    save = Saving.save

    def with_first(saving, steps_done, position):
        if steps_done == SECOND:
            Saving.save = save
            first(saving, steps_done, position)
        return save(saving, steps_done, position)

    Saving.save = with_first
    try:
        yield
    finally:
        Saving.save = save


def _each_call_refused(saving, steps_done, position):
    """A save within a real run, tried again and again, with another call refused each time."""
    before = saving.folder.with_name("before")
    shutil.copytree(saving.folder, before)
    expected = contents(checkpoints.find(saving.folder, True))
    own, adapter_saved = list(saving.checkpoints.own), saving.adapter.saved
    for for_good in (False, True):
        refused, at = True, 0
        while refused:
            at += 1
            calls, said = FileCalls(at, _refuse, for_good), io.StringIO()
            with redirect_stdout(said), calls.during_saves(lambda _: True):
                try:
                    outcome = saving.save(steps_done, position)
                except Exception as error:  # whatever it is, it is counted
                    outcome = f"{type(error).__name__}: {error}"
            refused = len(calls.made) >= at
            if refused:
                if isinstance(outcome, bool):
                    outcome = _of_one_save(saving, outcome, said.getvalue(), expected, position.step)
                yield calls.made[at - 1], for_good, outcome
            shutil.rmtree(saving.folder)
            shutil.copytree(before, saving.folder)
            saving.checkpoints.own, saving.adapter.saved = list(own), adapter_saved
    saving.failed.clear()
    shutil.rmtree(before)


def _of_one_save(saving, adapter_saved, said, expected, step):
    told = []
    found = checkpoints.find(saving.folder, True, told.append)
    if told:
        return f"a damaged checkpoint was left: {told}"
    checkpoint_saved = found.position.step == step
    if not checkpoint_saved and contents(found) != expected:
        return "the one of before loads wrong"
    if "not saved" not in said:
        return SAVED if checkpoint_saved and adapter_saved else "not saved, and nothing said"
    if saving.newest.name not in said:
        return f"said of it: {said}"
    return SAID[checkpoint_saved, adapter_saved]


def _run_refused(folder, kind, calls):
    """A run whose second save is refused a call, or all from there to its end."""
    adapter, seen = folder / "refused", {}
    shutil.rmtree(adapter, ignore_errors=True)
    words = train_words(folder, adapter, *KINDS[kind], "--iters", THIRD)
    with calls.during_saves(lambda step: step == SECOND or (calls.for_good and step > SECOND)):
        return _of_a_run(adapter, words, _Looks(adapter, seen), seen)


class _Looks:
    """A training callback that looks, after the second save, which checkpoints can be read."""

    def __init__(self, adapter, seen):
        self.adapter, self.seen = adapter, seen

    def on_train_loss_report(self, info):
        if info["iteration"] == SECOND + 1:
            self.seen["steps"] = [checkpoints.read(path).position.step for path in checkpoints.in_folder(self.adapter)]

    def on_val_loss_report(self, info):
        pass


def _of_a_run(adapter, words, callback, seen):
    """What a run does whose second save of three was disturbed."""
    try:
        said = train(words, callback)
    except InputError as error:
        said = str(error)
        if "could not be saved" not in said:
            return f"InputError: {error}"
    except Exception as error:  # whatever it is, it is counted
        return f"{type(error).__name__}: {error}"
    if SAVE_EVERY not in seen["steps"]:
        return f"the one of before is gone: {seen}"
    newest = checkpoints.find(adapter, True).position.step
    if "could not be saved" in said:
        return GAVE_UP if newest in (SAVE_EVERY, SECOND) else f"the newest is {newest}"
    if newest != THIRD:
        return f"the newest is {newest}"
    if "not saved" not in said.lower():
        return UNHARMED if SECOND in seen["steps"] else "not saved, and nothing said"
    return f"left {unfinished(adapter)}" if unfinished(adapter) else WENT_ON


def _tmpfs(folder, runs, rng, tell, broken):
    """The same with a small file system that really fills up."""
    mounted = folder / "tmpfs"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(mounted)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True, check=False).returncode:
        tell("no tmpfs: mounting needs Linux and root")
        return "not done: mounting needs Linux and root"
    counts = Counter()
    try:
        for number in range(runs):
            adapter = mounted / f"adapter {number}"
            callback = _Fills(adapter, mounted, rng.random())
            words = train_words(folder, adapter, *KINDS["full"], "--iters", THIRD)
            outcome = _of_a_run(adapter, words, callback, callback.seen)
            tell(f"tmpfs with {callback.room} bytes of room: {outcome}")
            counts[outcome] += 1
            if outcome != WENT_ON:
                broken.append(f"tmpfs with {callback.room} bytes of room: {outcome}")
            callback.filler.unlink(missing_ok=True)
            shutil.rmtree(adapter)
    finally:
        subprocess.run(["umount", str(mounted)], check=True)
    return dict(counts)


class _Fills(_Looks):
    """Leaves the second save a part of the room that the first one took, and all of it to the third."""

    def __init__(self, adapter, mounted, part):
        super().__init__(adapter, {})
        self.filler, self.part, self.room = mounted / "filler", part, None

    def on_train_loss_report(self, info):
        super().on_train_loss_report(info)
        if info["iteration"] == SECOND:
            saved = sum(path.stat().st_size for path in self.adapter.rglob("*") if path.is_file())
            self.room = int(saved * self.part)
            with open(self.filler, "wb") as filler:
                os.posix_fallocate(filler.fileno(), 0, shutil.disk_usage(self.filler).free - self.room)
        elif info["iteration"] == SECOND + 1:
            self.filler.unlink()
