"""What each of two workers does in test_workers.py.

``worker_checks.py FOLDER WORDS``, WORDS options of ``train``, writes what it found to FOLDER as JSON; at its end the
second worker is killed. ``worker_checks.py FOLDER WORDS stands-still`` only trains; in the first step of a second run
the second worker sleeps.
"""

import errno
import io
import json
import os
import shutil
import signal
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
from finetune.streamed_runs import SHORT, STREAMED, without_compilation
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten

from ember_mlx.shared.replacing import replaced, torch_hidden

with torch_hidden():
    from ember_mlx import cli
    from ember_mlx.finetune import options, resume, step, workers
    from ember_mlx.finetune import run as run_module
    from ember_mlx.finetune.adapter_saving import Saver
    from ember_mlx.finetune.batches import TrainingBatches
    from ember_mlx.finetune.folder_lock import FolderLock
    from ember_mlx.finetune.resume import weights_checksum
    from ember_mlx.finetune.run import run
    from ember_mlx.finetune.step import Step
    from ember_mlx.finetune.watchers import Watcher
    from ember_mlx.shared.errors import InputError


def outcome(check):
    """None, or in words how ``check()`` ended."""
    try:
        check()
    except InputError as error:
        return f"InputError: {error}"
    except SystemExit as error:
        return f"SystemExit: {error.code}"
    return None


def refuses(here, who):
    with here.one_outcome():
        if here.rank == who:
            raise InputError(f"refused by {who}")


def mixed_gradients(rank):
    """A tree of two dtypes, other numbers on each worker."""
    mx.random.seed(rank)
    layers = [{"a": mx.random.normal((3, 5)), "b": mx.random.normal((7,))} for _ in range(6)]
    return {"layers": layers, "table": mx.random.normal((11, 4)).astype(mx.bfloat16), "half": mx.ones(2, mx.bfloat16)}


def same_averages(rank):
    """Whether these are the bits of MLX's averages, and how many calls they took."""
    gradients, calls = mixed_gradients(rank), []
    expected = average_gradients(gradients)
    all_sum = mx.distributed.all_sum
    mx.distributed.all_sum = lambda *arguments, **options: calls.append(1) or all_sum(*arguments, **options)
    found = workers.Averages(dict(tree_flatten(gradients))).means
    mx.distributed.all_sum = all_sum
    pairs = zip(found.items(), tree_flatten(expected), strict=True)
    return [all(name == other and mx.array_equal(a, b).item() for (name, a), (other, b) in pairs), len(calls)]


@contextmanager
def counting_numbers():
    """A list of how many numbers each update within sends, outside of what is compiled."""
    sent, all_sum = [], mx.distributed.all_sum
    before = Step.__init__.__defaults__

    def counted(gradients, rows=None):
        sizes = []
        with replaced(mx.distributed, "all_sum", lambda x, **how: sizes.append(x.size) or all_sum(x, **how)):
            averaged = workers.Averages(gradients, rows)
        sent.append(sum(sizes))
        return averaged

    with replaced(Step.__init__, "__defaults__", (*before[:-1], counted)):
        yield sent


@contextmanager
def noting_keys():
    """A list of MLX's random state at the beginning of each step within."""
    keys, take = [], Step.__call__
    noting = lambda *arguments, **more: keys.append(mx.random.state[0].tolist()) or take(*arguments, **more)  # noqa: E731
    with replaced(Step, "__call__", noting):
        yield keys


def arrays_from_leader(here):
    """Whether rank 0's bits arrive: -0.0 and NaN, and sizes of one, two, four and eight bytes."""
    arrays = [mx.array([-0.0, mx.nan, 1.5]), mx.array([-0.0], mx.bfloat16), mx.array(7, mx.uint64), mx.array([True])]
    own = [array if here.leads else mx.zeros_like(array) for array in arrays]
    received = [here.array_of_leader(array) for array in own]
    bits = [(a.reshape(-1).view(mx.uint8), b.reshape(-1).view(mx.uint8)) for a, b in zip(arrays, received, strict=True)]
    return all(mx.array_equal(a, b).item() for a, b in bits)


class Remembers(Watcher):
    """Keeps the model, the optimizer, validation losses, steps left out, and the collectives between steps."""

    def __init__(self):
        self.met, self._calls = {}, []
        self.validated, self.left_out = [], []

    def before_step(self, step, batch):
        self.met[step - 1], self._calls = self._calls, []

    def after_step(self, step, result):
        self._calls = []
        self.left_out += [step] * result.nonfinite

    def after_validation(self, step, value):
        self.validated.append(str(value))

    @contextmanager
    def counting(self):
        """Within, collectives are noted."""

        def noting(name, original):
            return lambda *arguments, **how: self._calls.append(name) or original(*arguments, **how)

        with ExitStack() as stack:
            for name in ("all_max", "all_sum", "all_gather"):
                noted = noting(name, getattr(mx.distributed, name))
                stack.enter_context(replaced(mx.distributed, name, noted))
            yield

    def before_training(self, model, optimizer, tables, rows):
        self.model, self.optimizer = model, optimizer

    def checksums(self):
        trees = (self.model.parameters(), self.optimizer.state, {"random": mx.random.state[0]})
        return [weights_checksum(tree) for tree in trees]


def trained(folder, words, watcher=None):
    """Train, each worker into a folder of its own; the checksums of weights, optimizer and random state."""
    watcher = watcher or Remembers()
    with watcher.counting():
        run(options.parse([*map(str, words), "--adapter-path", str(folder)]), watchers=[watcher])
    return watcher.checksums()


def own_part_of_sum(here):
    """What MLX's ring lacks."""
    return lambda array: mx.split(mx.distributed.all_sum(array), here.size)[here.rank]


def sharded(own, words):
    """The checksums of a run whose optimizer state is shared out, and of one that goes on from its checkpoint."""
    at_once = trained(own / "sharded", words)
    checkpoint = own / "sharded" / "checkpoints" / "step-0000002"  # on rank 0 alone
    return at_once, trained(own / "sharded_resumed", [*words, "--resume", checkpoint])


def over_memory(folder, words):
    """Of a run of which worker 1 takes too much in its third step: the exit code, lines of errors, and collectives."""
    draw, peak, calls = TrainingBatches.draw, [0], []

    def draw_and_take(self):
        calls.append(self.step)
        peak[0] = 2 * 10**12 if self.step == 2 and self.workers.rank == 1 else peak[0]
        return draw(self)

    def met(*arguments, **how):
        calls.append("all_max")
        return all_max(*arguments, **how)

    all_max = mx.distributed.all_max
    words = [*words, "--memory-limit", "1000GB", "--save-every", "9", "--val-batches", "1", "--sample-tokens", "1"]
    with ExitStack() as stack:
        stack.enter_context(replaced(TrainingBatches, "draw", draw_and_take))
        stack.enter_context(replaced(mx, "get_peak_memory", lambda: peak[0]))
        stack.enter_context(replaced(mx.distributed, "all_max", met))
        ended = lines_of([*words, "--adapter-path", folder])
    return [*ended, calls.index(2) - calls.index(1) - 1]  # from batch to batch: the second step


def accumulated(folder, words):
    """The checksums of a run of two batches an update, and how many numbers it sends."""
    with counting_numbers() as sent:
        return trained(folder, [*words, *SHORT, "--grad-accumulation-steps", "2"]), sum(sent)


def dropped(here):
    """What dropout leaves of ones on this worker, and the random state that all go on with."""
    mx.random.seed(7)
    with here.own_randomness():
        left = nn.Dropout(0.5)(mx.ones(64)).tolist()
    return [left, mx.random.state[0].tolist()]


def command(words):
    """The exit code of ``ember-mlx train``."""
    sys.argv[1:] = ["train", *map(str, words)]
    try:
        cli.main()
    except SystemExit as error:
        return error.code


@contextmanager
def spoiled():
    """Within, the second batch and every validation loss of this worker are NaN, where there is anything to learn."""
    draw, choose = TrainingBatches.draw, run_module.choose_loss

    def draw_nan(self):
        tokens, learned, share, rows = draw(self)
        return tokens, learned, share * (mx.nan if self.step == 2 else 1), rows

    def choose_nan(args, model):
        loss = choose(args, model)

        def nan_when_evaluated(model, *batch):
            value, count = loss(model, *batch)
            return value * (1 if model.training else mx.nan), count

        return nan_when_evaluated

    with replaced(TrainingBatches, "draw", draw_nan), replaced(run_module, "choose_loss", choose_nan):
        yield


def with_nan(own, words, rank):
    """Of a run in which worker 1 meets NaNs: what is left out and saved, how often reports begin, and how it stops."""
    words, watcher, reports = [*words, "--iters", "3", "--seed", "3"], Remembers(), []
    reporting = replaced(run_module, "get_reporting_callbacks", lambda *_, **__: reports.append(1))
    with spoiled() if rank == 1 else nullcontext():
        with reporting:
            checksums = trained(own / "nan", [*words, "--log-jsonl", own / "log.jsonl"], watcher)
        stopped = lines_of([*words, "--on-nonfinite", "stop", "--adapter-path", own / "nan_stops"])
    told = {"checksums": checksums, "left out": watcher.left_out, "validated": watcher.validated, "stopped": stopped}
    return told | {"reports": len(reports), "logs": (own / "log.jsonl").exists()}


def lines_of(words):
    """The exit code of ``ember-mlx train``, and its lines of errors."""
    with redirect_stderr(io.StringIO()) as told:
        code = command(words)
    return [code, [line for line in told.getvalue().splitlines() if "error" in line or "Traceback" in line]]


def disturbed(folder, words, rank, step, happens):
    """The exit code of a run in which ``happens()`` on the worker of this rank as it draws ``step``."""
    draw = TrainingBatches.draw

    def draw_and_suffer(self):
        if self.step == step - 1 and self.workers.rank == rank:
            happens()
        return draw(self)

    with replaced(TrainingBatches, "draw", draw_and_suffer):
        return command([*words, "--adapter-path", folder])


def refused(own, words, rank):
    """By what is wrong on one worker: exit code and lines of errors on this one."""
    data, model = (Path(words[words.index(name) + 1]) for name in ("--data", "--model"))
    if rank == 1:
        shutil.copytree(data, own / "data")
        with open(own / "data" / "train.jsonl", "a") as rows:
            rows.write(json.dumps({"prompt": "q", "completion": "a"}) + "\n")
        shutil.copytree(model, own / "model")
        changed = own / "model" / "model.safetensors"
        weights = bytearray(changed.read_bytes())
        weights[-3] ^= 1
        changed.write_bytes(weights)
        (own / "tokens.txt").write_text("<note>\n")
    else:
        shutil.copytree(own / "at_once", own / "damaged")
        newest = own / "damaged" / "checkpoints" / "step-0000006" / "weights.safetensors"
        newest.write_bytes(newest.read_bytes()[:-100])
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    found = {}
    for name, (whose, more, fault) in {
        "--seed": (1, ["--seed", "2"], None),
        "--iters": (1, ["--iters", "7"], None),
        "--batch-size": (1, ["--batch-size", "4"], None),
        "--add-tokens": (1, ["--add-tokens", own / "tokens.txt"], None),
        "another row": (1, ["--data", own / "data"], None),
        "other weights": (1, ["--model", own / "model"], None),
        "another version": (1, [], replaced(resume, "version", lambda name: "9")),
        "no sum_scatter": (None, ["--stream", "--shard-optimizer"], None),
        "no options": (1, ["--config", own / "none.yaml"], None),
        "no data": (1, ["--data", own / "none" / "rows.jsonl"], None),
        "no model": (1, ["--model", own / "none"], None),
        "a full disk": (0, [], replaced(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))),
        "a disk that fills": (0, [], replaced(Saver, "save", raising(full))),
        "a folder that is taken": (0, ["--adapter-path", own / "at_once"], None),
        "a folder that is locked": (0, [], locked(own / "a folder that is locked")),
        "a damaged checkpoint": (0, ["--resume", own / "damaged" / "checkpoints" / "step-0000006"], None),
    }.items():
        words_here = [*words, "--adapter-path", own / name, *(more if whose in (rank, None) else [])]
        if name == "a damaged checkpoint" and rank != whose:
            words_here += ["--resume", "elsewhere"]
        with fault if fault and rank == whose else nullcontext():
            found[name] = lines_of(words_here)
    return found


@contextmanager
def locked(folder):
    """Within, another run writes there."""
    folder.mkdir(parents=True)
    with FolderLock(folder) as lock:
        lock.take(make=True)
        yield


def raising(error):
    """A function that raises it."""

    def raises(*arguments):
        raise error

    return raises


def send(number):
    """A function that sends this process a signal."""
    return lambda: os.kill(os.getpid(), number)


def main():
    here = workers.Workers.join(60)
    if sys.argv[-1] == "stands-still":
        folder, words = Path(sys.argv[1]) / f"host{here.rank}", sys.argv[2:-1]
        checksums = trained(folder, words)
        (folder.parent / f"found{here.rank}.json").write_text(json.dumps(checksums))
        disturbed(folder / "stands-still", [*words, "--peer-timeout", "2"], 1, 1, lambda: time.sleep(60))
    found = {
        "rank": here.rank,
        "refusals": [outcome(lambda who=who: refuses(here, who)) for who in (None, 0, 1)],
        "agreement": [
            outcome(lambda: here.agree({"--a": 1, "--b": [2]})),
            outcome(lambda: here.agree({"--a": here.rank, "--b": 2})),
            outcome(lambda: here.agree({f"--{here.rank}": 1})),
        ],
        "averages": same_averages(here.rank),
        "arrays": arrays_from_leader(here),
        "text": here.text_of_leader(f"é{here.rank}"),
        "dropped": dropped(here),
    }
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    own = folder / f"host{here.rank}"
    with counting_numbers() as found["sent"], noting_keys() as found["keys"]:
        found["trained"] = trained(own / "at_once", words, watcher := Remembers())
    found["met"] = watcher.met
    with counting_numbers() as found["dense_sent"], replaced(step, "_looked_up_by_tokens", lambda model: {}):
        found["dense"] = trained(own / "dense", words)
    with without_compilation():
        for name, more in STREAMED.items():
            found[name] = trained(own / name, [*words, *more])
        with replaced(mx.distributed, "sum_scatter", own_part_of_sum(here)):
            found["sharded"] = sharded(own, [*words, *STREAMED["streamed_full"], "--shard-optimizer"])
            shares = [*words, "--stream", "--shard-optimizer"]
            found["over_memory_shared"] = over_memory(own / "over_memory_shared", shares)
        found["accumulated"] = [accumulated(own / "rows", words)]
        with replaced(step, "_looked_up_by_tokens", lambda model: {}):
            found["accumulated"].append(accumulated(own / "all_rows", words))
        found["nan"] = with_nan(own, words, here.rank)
    checkpoint = own / "at_once" / "checkpoints" / "step-0000004"  # on rank 0 alone
    found["checkpoint"] = checkpoint.exists()
    found["resumed"] = trained(own / "resumed", [*words, "--resume", str(checkpoint)])
    found["refused"] = refused(own, words, here.rank)
    found["over_memory"] = over_memory(own / "over_memory", words)
    found["signalled"] = disturbed(own / "signalled", [*words, "--table-row-floor", 0], 1, 4, send(signal.SIGTERM))
    found["goes on"] = command([*words, "--resume", own / "signalled", "--iters", 5, "--adapter-path", own / "goes_on"])
    (folder / f"found{here.rank}.json").write_text(json.dumps(found))
    disturbed(own / "killed", words, 1, 4, send(signal.SIGKILL))


if __name__ == "__main__":
    main()
