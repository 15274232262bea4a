"""The small runs that interruptions.py disturbs, what disturbs them, and what is compared afterwards."""

import io
import os
import signal
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import numpy as np

from ember_mlx.demo import MODEL
from ember_mlx.finetune import checkpoints, options, safe_writing
from ember_mlx.finetune.run import run
from ember_mlx.finetune.saving import Saving
from ember_mlx.shared.errors import InputError

SAVE_EVERY = 4
ITERS = 40
CONFIG = """
lora_parameters: {rank: 4, scale: 10.0, dropout: 0.3}
lr_schedule: {name: cosine_decay, warmup: 3, arguments: [1e-3, 40, 1e-6]}
"""
KINDS = {
    "lora": [],
    "lora, 3 accumulated": ["--grad-accumulation-steps", 3, "--clip-grad-norm", 1],
    "dora, 2 accumulated": ["--fine-tune-type", "dora", "--grad-accumulation-steps", 2],
    "full": ["--fine-tune-type", "full"],
    "full, 3 accumulated": ["--fine-tune-type", "full", "--grad-accumulation-steps", 3, "--on-nonfinite", "skip"],
}
STREAMED = {  # the bundled model, whose bfloat16 weights are rounded stochastically
    "streamed": ["--fine-tune-type", "full"],
    "streamed, adamw, 3 accumulated": ["--fine-tune-type", "full", "--optimizer", "adamw",
                                       "--grad-accumulation-steps", 3],
    "streamed, sinkgd, clipped": ["--fine-tune-type", "full", "--optimizer", "sinkgd", "--clip-grad-norm", 1],
    "streamed, lora": ["--keep-inputs", 2],
    "streamed, adafactor, skip": ["--fine-tune-type", "full", "--optimizer", "adafactor", "--on-nonfinite", "skip"],
}  # fmt: skip
KINDS |= {kind: ["--model", MODEL, "--stream", "--iters", 20, *words] for kind, words in STREAMED.items()}


class Broken(Exception):
    """Something was lost that must not be."""


def prepare(folder: Path):
    """A model of two narrow layers with the demo's tokenizer, and a few rows of the demo's data."""
    from mlx_lm.models import llama
    from mlx_lm.utils import save

    from ember_mlx.commands.demo import _write_data
    from ember_mlx.finetune.base_models import load_base

    _, tokenizer, config = load_base(MODEL)
    config |= {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "head_dim": 8}
    mx.random.seed(0)
    save(folder / "model", MODEL, llama.Model(llama.ModelArgs.from_dict(config)), tokenizer, config)
    _write_data(folder / "data")
    for file, rows in (("train.jsonl", 24), ("valid.jsonl", 4)):
        path = folder / "data" / file
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:rows]))
    write_config(folder)


def write_config(folder: Path):
    """The YAML file of the runs: dropout, and a schedule."""
    (folder / "config.yaml").write_text(CONFIG)


def train_words(folder: Path, adapter: Path, *more):
    """The words of `ember-mlx train` for a run of seconds; 24 rows are 12 batches an epoch."""
    given = {
        **{"--model": folder / "model", "--data": folder / "data", "--config": folder / "config.yaml"},
        **{"--adapter-path": adapter, "--iters": ITERS, "--save-every": SAVE_EVERY, "--batch-size": 2},
        "--keep-checkpoints": 3,
        **{"--max-seq-length": 16, "--val-batches": 1, "--steps-per-eval": 7, "--steps-per-report": 1},
    }
    return [str(word) for pair in given.items() for word in pair] + [str(word) for word in more]


def iters_of(words):
    """How many steps a run of these words has: the last of two equal flags counts."""
    return int(words[len(words) - words[::-1].index("--iters")])


def train(words, callback=None):
    """Train in this process, quietly; what it said."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        run(options.parse(words), callback)
    return said.getvalue()


def train_alone(words, result, die_from_step=None, die_at_call=None):
    """Train in a process of its own, which may kill itself at a call to the file system in a save."""
    mx.set_default_device(mx.cpu)
    calls = FileCalls(die_at_call, lambda: os.kill(os.getpid(), signal.SIGKILL))
    try:
        with calls.during_saves(lambda step: die_from_step is not None and step >= die_from_step):
            train(words)
        result.send("done")
    except InputError as error:
        result.send(str(error))


class FileCalls:
    """Counts what saves do to files; at call ``at`` (from 1), ``instead`` is called first.

    Half of the data of a write are written before that, as a disk does that fills up.
    """

    FUNCTIONS = ("open", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
    NEED_NO_ROOM = ("open", "unlink", "rmdir")  # os.open is not for new files here

    def __init__(self, at=None, instead=None, for_good=False):
        self.at = at
        self.instead = instead
        self.for_good = for_good
        self.made = []
        self.active = False

    def __call__(self, name):
        if not self.active:
            return
        self.made.append(name)
        again = self.for_good and len(self.made) > self.at and name not in self.NEED_NO_ROOM
        if len(self.made) == self.at or again:
            self.instead()

    @contextmanager
    def during_saves(self, wanted):
        """Count during the saves of the steps that are ``wanted``."""
        saved, calls = Saving.save, self

        def save(saving, steps_done, position):
            calls.active = bool(wanted(steps_done))
            try:
                return saved(saving, steps_done, position)
            finally:
                calls.active = False

        class CountedFile(io.BufferedWriter):
            def write(self, data):
                data = bytes(data)
                super().write(data[: len(data) // 2])
                calls("write")
                super().write(data[len(data) // 2 :])
                return len(data)

            def flush(self):
                if not self.closed:
                    calls("flush")
                super().flush()

        def counted(name, function):
            def call(*arguments, **keywords):
                calls(name)
                return function(*arguments, **keywords)

            return call

        def counted_open(path, mode):
            calls("create")
            return CountedFile(io.FileIO(path, mode.replace("b", "")))

        before = {name: getattr(os, name) for name in self.FUNCTIONS}
        Saving.save, safe_writing.open = save, counted_open
        for name, function in before.items():
            setattr(os, name, counted(name, function))
        try:
            yield self
        finally:
            for name, function in before.items():
                setattr(os, name, function)
            Saving.save = saved
            del safe_writing.open


def contents(checkpoint):
    """All that is loaded of a checkpoint, as bytes: equal only if bitwise equal."""
    arrays = {}
    for kind in ("weights", "optimizer"):
        for name, array in getattr(checkpoint, kind).items():
            raw = np.array(array.reshape(-1).view(mx.uint8))
            arrays[f"{kind}: {name}"] = (array.shape, str(array.dtype), raw.tobytes())
    # repr tells -0.0 from 0.0, and 1 from 1.0 and True
    return arrays, repr([asdict(checkpoint.position), checkpoint.options, checkpoint.made_of, checkpoint.versions])


def trained(checkpoint):
    """What must be that of the uninterrupted run: weights, state, random states, losses; not the name of the folder."""
    return contents(checkpoint)[0], repr(asdict(checkpoint.position))


def adapter_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors") if path.name[0] in "at"}


def unfinished(folder):
    """What a save leaves behind that did not come to its end."""
    hidden = (safe_writing.PARTIAL, safe_writing.REMOVED)
    left = [path.name for path in (*folder.glob(".*"), *folder.glob("checkpoints/.*")) if path.name.startswith(hidden)]
    return left + [path.name for path in folder.glob(f"checkpoints/*{checkpoints.REPLACED}")]
