"""What each of two MLX workers does for two_gpus.py and two_macs.py, which start it.

    two_workers.py PART FOLDER [NAME=VALUE ...]

MLX's variables say who the others are; without them it is one worker alone. What it found goes to
FOLDER/found<rank>.json, and the checkpoints of rank 0 under FOLDER.
"""

import json
import os
import signal
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten

from ember_mlx.shared.errors import InputError
from ember_mlx.shared.replacing import replaced, torch_hidden

with torch_hidden():
    from mlx_lm.tuner.callbacks import TrainingCallback

    from ember_mlx.demo import MODEL
    from ember_mlx.finetune import options, run, step
    from ember_mlx.finetune.resume import weights_checksum
    from ember_mlx.finetune.watchers import Watcher
    from ember_mlx.finetune.workers import Averages, Workers

BEGUN = time.perf_counter()
BATCH, ITERS = 4, 20
MIXED = "lora, --mask-prompt, rows without anything to learn"
SHARDED = "lora, --shard-tables"
STREAMED = "full, --stream"
SHARED_OUT = "full, --stream, --shard-optimizer"
RUNS = {
    "lora": [],
    "full": ["--fine-tune-type", "full"],
    MIXED: ["--data", "uneven", "--mask-prompt", "--on-nonfinite", "skip", "--max-seq-length", "48"],
    "full, clipped, 2 accumulated": ["--fine-tune-type", "full", "--clip-grad-norm", "1",
                                     "--grad-accumulation-steps", "2"],
    "lora, --chunked-loss, added tokens": ["--chunked-loss", "--add-tokens", "tokens.txt"],
    "full, bfloat16, stochastic rounding": ["--model", str(MODEL), "--fine-tune-type", "full",
                                            "--table-rounding", "stochastic"],
    SHARDED: ["--shard-tables"],
    STREAMED: ["--fine-tune-type", "full", "--stream", "--optimizer", "adamw"],
    SHARED_OUT: ["--fine-tune-type", "full", "--stream", "--optimizer", "adamw", "--shard-optimizer"],
}  # fmt: skip


def prepare(folder):
    """A narrow model, a few rows of the demo, and rows of very different lengths, made from nothing."""
    from interrupted_runs import prepare

    mx.set_default_device(mx.cpu)
    prepare(folder)
    # Words of prompt and completion; a run cuts rows at 48 tokens. mlx-lm's batches are of rows of about one length:
    # the second has tokens to learn for one of two workers alone, the third for none.
    sizes = [(3, 2), (5, 3), (2, 1), (4, 9), (10, 30), (59, 1), (1, 60), (61, 1), (90, 1), (91, 2), (92, 3), (93, 1)]
    rows = [json.dumps({"prompt": "for " * asked, "completion": "list " * told}) for asked, told in sizes]
    (folder / "tokens.txt").write_text("<note>\n")
    (folder / "uneven").mkdir()
    for name in ("train", "valid"):
        (folder / "uneven" / f"{name}.jsonl").write_text("\n".join(rows) + "\n")


def words_of(folder, name, adapter, *more):
    """The words of ``ember-mlx train`` for a run of RUNS, from what ``prepare`` made in ``folder``."""
    given = {"--model": folder / "model", "--data": folder / "data", "--adapter-path": adapter, "--iters": ITERS}
    given |= {"--batch-size": BATCH, "--max-seq-length": 32, "--val-batches": 1, "--steps-per-report": 1}
    given |= {"--steps-per-eval": 1000, "--save-every": 4, "--keep-checkpoints": 10}
    own = [str(folder / word) if word in ("uneven", "tokens.txt") else word for word in RUNS[name]]
    return [*(str(word) for pair in given.items() for word in pair), *own, *map(str, more)]


def has_option(flag):
    """Whether this release has an option that another brings."""
    return flag.removeprefix("--").replace("-", "_") in options.defaults()


class Remembers(Watcher, TrainingCallback):
    """The weights before a run, and its losses."""

    def before_training(self, model, optimizer, tables, rows):
        self.model, self.optimizer, self.losses = model, optimizer, []
        self.begun = {name: np.array(array.astype(mx.float32)) for name, array in self._weights()}

    def _weights(self):
        return tree_flatten(self.model.trainable_parameters())

    def on_train_loss_report(self, train_info):
        self.losses.append(train_info["train_loss"])

    def on_val_loss_report(self, val_info):
        self.losses.append(val_info["val_loss"])

    def updates(self):
        """How far each weight has gone, float32."""
        return {name: np.array(array.astype(mx.float32)) - self.begun[name] for name, array in self._weights()}

    def checksums(self):
        trees = {"weights": self.model.parameters(), "state": self.optimizer.state, "random": mx.random.state[0]}
        return {name: weights_checksum(tree) for name, tree in trees.items()}

    def left_out(self):
        return sum(array.item() for name, array in tree_flatten(self.optimizer.state) if "nonfinite" in name)


def outcome(check):
    """None, or in words how ``check()`` ended."""
    try:
        check()
    except InputError as error:
        return str(error)
    except SystemExit as error:
        return f"exit code {error.code}"
    return None


def compare(ours, theirs, our_losses, their_losses):
    """How far two runs went apart: of all updates the relative L2, of the losses the most, relative."""
    squares = [(np.square(ours[name] - theirs[name]).sum(), np.square(theirs[name]).sum()) for name in theirs]
    pairs = zip(our_losses, their_losses, strict=True)
    return float(np.sqrt(np.divide(*np.sum(squares, axis=0)))), max(abs(a / b - 1) for a, b in pairs if b == b)


def part_streams(here, folder, cpu=""):
    """The collectives that a run needs, on the stream that MLX chooses or on the CPU's."""
    stream = mx.cpu if cpu else None
    ones = mx.ones((1, 3))
    return {
        "all_sum": mx.distributed.all_sum(ones, stream=stream).sum().item(),
        "all_max": mx.distributed.all_max(mx.array(2**40 + here.rank, mx.int64), stream=stream).item() - 2**40,
        "all_gather": [
            mx.distributed.all_gather(ones.astype(dtype), stream=stream).shape for dtype in (mx.uint8, mx.uint32)
        ],
    }


def part_bandwidth(here, folder, rows="151936", columns="1024"):
    """Milliseconds of a sum over the workers, of a table in bfloat16 and of one number, in median."""
    found = {}
    for shape in ((int(rows), int(columns)), (1,)):
        array, seconds = mx.ones(shape, mx.bfloat16), []
        for _ in range(12):
            mx.eval(array)
            start = time.perf_counter()
            mx.eval(mx.distributed.all_sum(array))
            seconds.append(time.perf_counter() - start)
        found[f"{array.nbytes:,} bytes"] = round(1e3 * statistics.median(seconds[2:]), 3)
    return found


def part_averages(here, folder):
    """Test 3: averages by dtype have the bits of MLX's, in few calls."""
    mx.random.seed(here.rank)
    adapters = {f"lora{number}": mx.random.normal((32, 64)) for number in range(224)}
    tables = {f"table{number}": mx.random.normal((512, 64)).astype(mx.bfloat16) for number in range(2)}
    gradients, calls, all_sum = adapters | tables, [], mx.distributed.all_sum
    expected = average_gradients(gradients)
    with replaced(mx.distributed, "all_sum", lambda *arrays, **how: calls.append(1) or all_sum(*arrays, **how)):
        found = Averages(gradients).means
    same = all(mx.array_equal(found[name], expected[name]).item() for name in gradients)
    most = -(-sum(array.nbytes for array in gradients.values()) // 2**25) + 2
    return {"arrays": len(gradients), "calls": len(calls), "at most": most, "bits of MLX": same}


def part_runs(here, folder, only=None, seconds="inf"):
    """Test 1: all workers end with the same weights, state and random numbers. For test 2, the updates are kept.

    No run begins on any worker after so many ``seconds`` of the slowest.
    """
    found, begun = {}, time.monotonic()
    for name in sorted(RUNS, key=[MIXED, SHARDED].__contains__, reverse=True):
        if (name == SHARDED and not has_option("--shard-tables")) or only not in (None, name):
            continue
        if name == SHARED_OUT and only is None:  # no backend of a CPU has it
            continue
        with here.one_outcome(lambda: int(time.monotonic() - begun)) as meeting:
            pass
        if meeting.largest > float(seconds):
            break
        words = words_of(folder.parent, name, folder / f"adapter{here.rank}" / str(len(found)))
        watcher, start = Remembers(), time.monotonic()
        result = run.run(options.parse(words), watcher, [watcher])
        checksums = watcher.checksums()
        if name == SHARED_OUT:
            del checksums["state"]  # each has its own part
        differs = None if name == SHARDED else outcome(lambda sums=checksums: here.agree(sums))
        found[name] = {"equal": differs or True, "seconds": round(time.monotonic() - start, 1)}
        found[name] |= {"losses": watcher.losses, "steps left out": watcher.left_out()}
        found[name]["peak bytes"] = result.peak_memory
        if name in (only, MIXED) and here.leads:
            np.savez(folder / "updates.npz", **watcher.updates())
    return found


def part_train(here, folder, name="lora", seconds="0.05", slow="", adapter="adapter", more=""):
    """The command line itself, which says each step; those of worker ``slow``, or of all, take ``seconds`` more."""
    from ember_mlx import cli

    take, train, taken = step.Step.__call__, run.train_model, []

    def paused(*arguments, **keywords):
        if slow in ("", str(here.rank)):
            time.sleep(float(seconds))
        taken.append(take(*arguments, **keywords))
        print(f"step {len(taken)}", flush=True)
        return taken[-1]

    def told(args, choices, model, *rest):
        result = train(args, choices, model, *rest)
        print("weights", weights_checksum(model.trainable_parameters()), flush=True)
        return result

    sys.argv[1:] = ["train", *words_of(folder.parent, name, folder / f"{adapter}{here.rank}", *more.split())]
    with replaced(step.Step, "__call__", paused), replaced(run, "train_model", told):
        cli.main()


def part_die(here, folder, rank="1"):
    """Test 9, of one process: the worker ``rank`` kills itself in its sixth step."""
    take, taken = step.Step.__call__, []

    def deadly(*arguments, **keywords):
        taken.append(1)
        if len(taken) == 6 and here.rank == int(rank):
            os.kill(os.getpid(), signal.SIGKILL)
        return take(*arguments, **keywords)

    with replaced(step.Step, "__call__", deadly):
        part_train(here, folder, more="--peer-timeout 5", adapter="killed")


class Clock(Watcher):
    """When each step ended, told at once: of a run that is not done in time, that is all there is."""

    def before_training(self, *_):
        self.ends = []
        self._tell("before the first step")

    def after_step(self, step, result):
        self.ends.append(time.perf_counter())
        self._tell(f"step {step}")

    def _tell(self, what):
        print(f"{what}: {time.perf_counter() - BEGUN:.1f} s", file=sys.stderr, flush=True)


def part_speed(here, folder, row="qwen3-0.6b/tied/lora/4x1024/ember", steps="12", more=""):
    """Tokens a second of all workers, through the whole of ``ember-mlx train``: the median step after a warm-up."""
    from ember_mlx import train

    model, tokenizer, config, rows = shapes_of(row, batches=4, workers=here.size)
    batch, length = (int(number) for number in row.split("/")[3].split("x"))
    clock = Clock()
    flags = {flag.removeprefix("--").replace("-", "_"): True for flag in more.split()}
    with quiet():
        result = train(
            (model, tokenizer, config), (rows, []), watchers=[clock], adapter_path=folder / f"speed{here.rank}",
            overwrite=True, iters=int(steps), batch_size=batch * here.size, max_seq_length=length, num_layers=-1,
            steps_per_report=int(steps), save_every=10**6, auto_savings=False, optimizer="adamw", **flags,
        )  # fmt: skip
    warm = int(steps) // 3
    seconds = statistics.median(np.diff(clock.ends)[warm:].tolist())
    return {
        "row": row, "workers": here.size, "rows a step": batch * here.size, "seconds a step": round(seconds, 5),
        "tokens a second": round(batch * here.size * (length - 1) / seconds),
        "peak bytes": result.peak_memory, "losses": result.train_losses,
    }  # fmt: skip


def shapes_of(row, batches, workers):
    """A model of a row's shapes with random weights, a tokenizer of as many words, and rows of random ones."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from mlx_lm.utils import _get_classes
    from tokenizers import Tokenizer, models, pre_tokenizers
    from training_memory_rows import config_of
    from transformers import PreTrainedTokenizerFast

    config, (batch, length) = config_of(row), (int(number) for number in row.split("/")[3].split("x"))
    make, arguments = _get_classes(config)
    mx.random.seed(0)
    model = make(arguments.from_dict(config))
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    vocabulary = {f"w{number}": number for number in range(config["vocab_size"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1"))
    ids = np.random.default_rng(0).integers(2, config["vocab_size"], (batches * batch * workers, length - 1))
    return model, tokenizer, config, [{"text": " ".join(f"w{number}" for number in of)} for of in ids]


@contextmanager
def quiet():
    """Workers but the first say nothing anyway; the first prints much."""
    with open(os.devnull, "w") as nowhere, replaced(sys, "stdout", nowhere):
        yield


PARTS = {name.removeprefix("part_"): function for name, function in globals().items() if name.startswith("part_")}


def main():
    part, folder, *settings = sys.argv[1:]
    here, folder = Workers.join(60), Path(folder)
    found = PARTS[part](here, folder, **dict(setting.split("=", 1) for setting in settings))
    (folder / f"found{here.rank}.json").write_text(json.dumps(found, default=str))


if __name__ == "__main__":
    main()
