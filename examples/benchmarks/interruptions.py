"""What breaks `ember-mlx train` off, done to it on purpose, many times: does it lose anything?

    python examples/benchmarks/interruptions.py kill   --runs 25  --seed 0 --out interruptions.json
    python examples/benchmarks/interruptions.py kill-streamed --runs 50 --seed 0 --out streamed_interruptions.json
    python examples/benchmarks/interruptions.py flips  --runs 500 --seed 0 --out interruptions.json
    python examples/benchmarks/interruptions.py disk   --runs 8   --seed 0 --out interruptions.json
    python examples/benchmarks/interruptions.py saving --runs 1   --seed 0 --out interruptions.json

kill: SIGKILL at random moments, a third of them when an unfinished checkpoint shows and a third at a call to the file
system inside a save; each run is resumed until done and must end with the weights and the optimizer state of the run
that nobody killed, bit for bit. SIGKILL is no power cut: what the kernel holds is not lost.
kill-streamed: the same to runs with --stream, where a random moment lies inside a step that is half applied.
flips: bits flipped, ends cut off, pages zeroed in checkpoint files; each is found, or changes nothing that is loaded.
disk: ENOSPC at every call to the file system of a save in turn, once and for good; on Linux as root, also a small
tmpfs that really fills up. The checkpoint of before must load, and the run go on and say so.
saving: what saving costs the demo, and the size of Ember's state of a large table.

All on MLX's CPU backend, but for saving; results of the four gather in one file. Exit code 1 if anything was lost.
"""

import argparse
import json
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
from benchmarking import machine, write
from full_disks import disk
from interrupted_runs import (
    KINDS,
    SAVE_EVERY,
    STREAMED,
    Broken,
    adapter_bytes,
    contents,
    iters_of,
    prepare,
    train,
    train_alone,
    train_words,
    trained,
    unfinished,
)
from mlx.utils import tree_flatten

from ember_mlx import Ember
from ember_mlx.finetune import checkpoints, safe_writing
from ember_mlx.finetune.batches import TrainingBatches
from ember_mlx.finetune.saving import Saving
from ember_mlx.shared.errors import InputError

# The children are many and their imports slow: forked, where that is safe, from a server that has imported all.
CONTEXT = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
CONTEXT.set_forkserver_preload(["ember_mlx.finetune.run"])
TABLE = (151_936, 1024)
ORDINARY = tuple(kind for kind in KINDS if kind not in STREAMED)
WAYS = ("at a random time", "when an unfinished checkpoint shows", "at a call in a save")


def kill(folder: Path, runs: int, rng: random.Random, tell, kinds=ORDINARY, ways=WAYS):
    """Kill each of ``runs`` runs, some of them again after they were resumed, and compare what they end with."""
    wholes, report = {}, {"rows": [], "broken": []}
    for number in range(runs):
        kind = kinds[number % len(kinds)]
        if kind not in wholes:
            adapter = folder / f"whole {len(wholes)}"
            seconds = _killed_or_done(train_words(folder, adapter, *KINDS[kind]), adapter, None, None, rng)["seconds"]
            wholes[kind] = adapter, trained(checkpoints.find(adapter, True)), seconds
        way = ways[number % len(ways)]
        row = {"kind": kind, "way": way, "kills": []}
        report["rows"].append(row)
        try:
            _killed_and_resumed(folder, folder / f"killed {number}", row, wholes[kind], rng)
        except Broken as error:
            row["broken"] = str(error)
            report["broken"].append(f"run {number}: {error}")
        shutil.rmtree(folder / f"killed {number}", ignore_errors=True)
        steps = [f"{entry['resumed_after']}{'*' if entry['in_save'] else ''}" for entry in row["kills"]]
        tell(f"{number:>3} {kind:<22} {way:<38} resumed after {', '.join(steps)}: {row.get('broken', 'bitwise equal')}")
    kills = [entry for row in report["rows"] for entry in row["kills"]]
    report["counts"] = {
        "runs": runs,
        "bitwise_equal": sum("broken" not in row for row in report["rows"]),
        "kills": len(kills),
        "kills_in_a_save": sum(entry["in_save"] for entry in kills),
        "kills_before_the_first_checkpoint": sum(entry["resumed_after"] == 0 for entry in kills),
    }
    return report


def _killed_and_resumed(folder, adapter, row, whole, rng):
    whole_adapter, expected, seconds = whole
    words = train_words(folder, adapter, *KINDS[row["kind"]])
    # Half of the runs are killed once more after they were resumed.
    kills_wanted = 1 + (rng.random() < 0.5)
    while True:
        way = row["way"] if len(row["kills"]) < kills_wanted else None
        there = checkpoints.in_folder(adapter)
        ended = _killed_or_done(words + ["--resume"] * bool(there), adapter, way, seconds, rng)
        if ended["said"] == "done":
            if way is None or row["kills"]:
                break
            shutil.rmtree(adapter)  # it was faster than the kill: another moment
            continue
        if ended["said"] is not None:
            raise Broken(f"the run did not go on: {ended['said']}")
        there = checkpoints.in_folder(adapter)
        for path in there:
            try:
                checkpoints.read(path)
            except InputError as error:
                raise Broken(f"a kill left a damaged checkpoint: {error}") from error
        step = checkpoints.read(there[-1]).position.step if there else 0
        left = unfinished(adapter)
        # Before its first and after its last call a save leaves nothing; but calls are counted in saves only.
        in_save = bool(left) or way == "at a call in a save"
        row["kills"].append({"resumed_after": step, "in_save": in_save, "left": left})
    if trained(checkpoints.find(adapter, True)) != expected:
        raise Broken("weights, optimizer state or position are not those of the uninterrupted run")
    if adapter_bytes(adapter) != adapter_bytes(whole_adapter):
        raise Broken("the adapter files are not those of the uninterrupted run")
    if unfinished(adapter):
        raise Broken(f"after its end there still is {', '.join(unfinished(adapter))}")


def _killed_or_done(words, adapter, way, seconds, rng):
    """Run a child until it is done or killed; what it ``said`` at its end (None: killed), and its seconds."""
    receive, send = CONTEXT.Pipe(duplex=False)
    iters = iters_of(words)
    at = (rng.randrange(iters), rng.randint(1, 250)) if way == "at a call in a save" else ()
    child = CONTEXT.Process(target=train_alone, args=(words, send, *at))
    child.start()
    send.close()
    lock = adapter / ".lock"  # taken before the model is loaded, or if it was not there right before the first step
    while child.is_alive() and not (lock.exists() and lock.read_text().strip() == str(child.pid)):
        time.sleep(1e-3)
    start = time.perf_counter()
    if way == "at a random time":
        child.join(rng.uniform(0, seconds))
        child.kill()
    elif way == "when an unfinished checkpoint shows":
        first = f"{safe_writing.PARTIAL}step-{rng.randrange(iters):07d}"
        while child.is_alive() and not any(
            p.name >= first for p in adapter.glob(f"checkpoints/{safe_writing.PARTIAL}*")
        ):
            pass
        time.sleep(rng.uniform(0, 0.01))
        child.kill()
    child.join()
    said = None
    with suppress(EOFError):
        said = receive.recv()
    if said is None and child.exitcode != -signal.SIGKILL:
        said = f"exit code {child.exitcode}"
    return {"said": said, "seconds": time.perf_counter() - start}


def flips(folder: Path, runs: int, rng: random.Random, tell):
    """Damage the newest of three checkpoints at ``runs`` places, one at a time, and look what is loaded."""
    adapter = folder / "adapter"
    train(train_words(folder, adapter, "--iters", 3 * SAVE_EVERY))
    paths = checkpoints.in_folder(adapter)
    *_, older, newest = good = [contents(checkpoints.read(path)) for path in paths]
    if len(good) != 3 or older == newest:
        raise Broken("the run did not leave three different checkpoints")
    counts, broken, by_file = Counter(), [], {}
    for _ in range(runs):
        file = rng.choice(sorted(paths[-1].iterdir()))
        data = file.read_bytes()
        what, damaged = _damage(data, rng)
        if damaged == data:
            outcome = "harmless"  # zeros upon zeros
        else:
            file.write_bytes(damaged)
            outcome = _loaded(adapter, paths, older, newest)
            file.write_bytes(data)
        counts[f"{what.split()[0]}: {outcome}"] += 1
        by_file.setdefault(file.name, Counter())[outcome] += 1
        if outcome not in ("detected, the older one taken", "harmless"):
            broken.append(f"{file.name}: {what}: {outcome}")
            tell(broken[-1])
    if contents(checkpoints.read(paths[-1])) != newest:
        raise Broken("the campaign itself left the checkpoint damaged")
    totals = Counter()
    for outcomes in by_file.values():
        totals.update(outcomes)
    tell(f"{runs} places: {dict(totals)}")
    return {"counts": {"places": runs, **totals, **dict(sorted(counts.items()))}, "files": by_file, "broken": broken}


def _damage(data, rng):
    """One damage to a file, in words and done."""
    at, damaged = rng.randrange(len(data)), bytearray(data)
    kind = rng.choice(("bit", "bit", "end", "page"))
    if kind == "bit":
        bit = rng.randrange(8)
        damaged[at] ^= 1 << bit
        return f"bit {bit} of byte {at}", bytes(damaged)
    if kind == "end":
        return f"end cut off at byte {at}", data[:at]
    end = min(at + 4096, len(data))
    damaged[at:end] = bytes(end - at)
    return f"page zeroed from byte {at}", bytes(damaged)


def _loaded(adapter, paths, older, newest):
    """What --resume and --resume FOLDER make of a newest checkpoint that was damaged."""
    said = []
    try:
        found = checkpoints.find(adapter, True, said.append)
        loaded = contents(found)
    except Exception as error:  # whatever it is, it is counted
        return f"{type(error).__name__}: {error}"
    if found.folder == paths[-1]:
        return "harmless" if loaded == newest else "LOADED WRONG"
    if found.folder != paths[-2] or loaded != older or not said:
        return "another one was taken, or nothing said"
    try:
        checkpoints.find(adapter, str(paths[-1]))
    except InputError as error:
        return "detected, the older one taken" if paths[-2].name in str(error) else f"names no good one: {error}"
    return "only found with --resume, not with --resume FOLDER"


def saving(folder: Path, runs: int, rng: random.Random, tell):
    """Train as the demo does ``runs`` times and take the time of saving; write Ember's state of a large table."""
    from mlx_lm.utils import save

    from ember_mlx.commands.demo import _train_options, _write_data
    from ember_mlx.demo import MODEL
    from ember_mlx.finetune.base_models import load_base

    del rng
    model, tokenizer, config = load_base(MODEL)
    model.set_dtype(mx.float32)
    save(folder / "demo" / "model", MODEL, model, tokenizer, config, donate_model=False)
    _write_data(folder / "demo" / "data")
    rows = []
    for number in range(runs):
        words = _train_options(folder / "demo", "Ember")
        words[words.index("--adapter-path") + 1] = str(folder / f"saved {number}")
        timed = [_timed(Saving, "save"), _timed(TrainingBatches, "mark")]
        start = time.perf_counter()
        train(words)
        wall = time.perf_counter() - start
        saves, positions = (undo() for undo in timed)
        # A step as the loop makes it, from one of its batches to the next; the first ones compile.
        step = sorted(b - a for (a, _), (b, _) in pairwise(positions[2:]))
        step = step[len(step) // 2]
        save_seconds = sum(seconds for _, seconds in saves)
        row = {
            "wall_seconds": round(wall, 3),
            "saves": len(saves),
            "seconds_in_saves": round(save_seconds, 4),
            "seconds_in_positions": round(sum(seconds for _, seconds in positions), 4),
            "step_seconds_median": round(step, 4),
            "saving_of_run": round((save_seconds + sum(seconds for _, seconds in positions)) / wall, 5),
            "saving_of_100_steps": round(save_seconds / len(saves) / (100 * step), 5),
        }
        tell(str(row))
        rows.append(row)
    newest = checkpoints.in_folder(folder / "saved 0")[-1]
    sizes = {path.name: path.stat().st_size for path in sorted(newest.iterdir())}

    size = table_state_bytes(folder)
    tell(f"Ember's state of a table of {TABLE[0]} x {TABLE[1]}: {size} bytes; the demo's checkpoint: {sizes}")
    broken = [f"saving took {row['saving_of_run']:.1%} of the run" for row in rows if row["saving_of_run"] >= 0.03]
    broken += [f"{size} bytes of state"] if size >= 700_000 else []
    return {"rows": rows, "demo_checkpoint_bytes": sizes, "table_state_bytes": size, "broken": broken}


def table_state_bytes(folder):
    """What Ember's state of a large table takes in a checkpoint."""
    optimizer = Ember(1e-4)
    optimizer.init({"weight": mx.zeros(TABLE, mx.bfloat16)})
    return safe_writing.write_arrays(folder / "table.safetensors", dict(tree_flatten(optimizer.state)))["bytes"]


def _timed(owner, name):
    """Keep start and duration of each call of a method; what is returned ends that and gives them."""
    method, calls = getattr(owner, name), []

    def timed(*arguments, **keywords):
        start = time.perf_counter()
        try:
            return method(*arguments, **keywords)
        finally:
            calls.append((start, time.perf_counter() - start))

    def undo():
        setattr(owner, name, method)
        return calls

    setattr(owner, name, timed)
    return undo


CAMPAIGNS = {
    "kill": (kill, 25),
    "kill-streamed": (partial(kill, kinds=tuple(STREAMED)), 50),
    "flips": (flips, 500),
    "disk": (disk, 8),
    "saving": (saving, 1),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", choices=CAMPAIGNS)
    parser.add_argument("--runs", type=int, help="default: as many as above")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="add the results to this JSON file")
    args = parser.parse_args()
    campaign, runs = CAMPAIGNS[args.campaign]
    runs = args.runs or runs
    if args.campaign != "saving":
        mx.set_default_device(mx.cpu)  # where the promise is bit for bit
    # Opened with a name of its own each time: a folder that is removed is not one of the user's.
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        prepare(Path(folder))
        report = campaign(Path(folder), runs, random.Random(args.seed), lambda text: print(text, flush=True))
    report = {"runs": runs, "seed": args.seed, "seconds": round(time.perf_counter() - start, 1)} | report
    print(json.dumps(report.get("counts", {}), indent=1))
    for broken in report["broken"]:
        print(f"BROKEN: {broken}")
    if args.out:
        there = json.loads(args.out.read_text()) if args.out.exists() else {}
        write(args.out, there | {args.campaign: {"machine": machine()} | report})
    sys.exit(1 if report["broken"] else 0)


if __name__ == "__main__":
    main()
