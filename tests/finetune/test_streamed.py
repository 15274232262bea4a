"""`train --stream`: the same run as without it, or one line that says why not."""

import numpy as np
import pytest

from ember_mlx.finetune.run import run

FULL = ["--fine-tune-type", "full"]


class Losses:
    """A training callback that keeps the reports."""

    def __init__(self):
        self.train, self.valid = [], []

    def on_train_loss_report(self, info):
        self.train.append((info["iteration"], info["train_loss"], info["trained_tokens"]))

    def on_val_loss_report(self, info):
        self.valid.append((info["iteration"], info["val_loss"]))


def losses(parse, *arguments, **where):
    heard = Losses()
    run(parse(*arguments, **where), training_callback=heard)
    return heard


RUNS = {
    "full": FULL,
    "full, tied": [*FULL, "tied"],
    "lora": ["--fine-tune-type", "lora"],
    "dora, one table": ["--fine-tune-type", "dora", "--train-tables", "head"],
    "last layer": [*FULL, "--num-layers", 1],
    "inputs made again": [*FULL, "--keep-inputs", 2, "deeper"],
    "clipped": [*FULL, "--clip-grad-norm", 0.5],
    "masked": [*FULL, "--mask-prompt"],
    "no tables": [*FULL, "--train-tables", "none"],
    "AdamW on tables": [*FULL, "--table-optimizer", "adamw"],
    **{name: [*FULL, "--optimizer", name] for name in ("sgd", "adafactor", "muon", "adam-mini", "sinkgd")},
}


@pytest.mark.parametrize("name", RUNS)
def test_its_losses_are_those_of_the_ordinary_run(parse, name):
    words = RUNS[name]
    where = {"model": words[-1]} if words[-1] in ("tied", "deeper") else {}
    words = words[:-1] if where else words
    common = ["--iters", 6, "--steps-per-eval", 3, "--learning-rate", 1e-3, "--table-learning-rate", 1e-3]
    plain_words = [word for word in words if word not in ("--keep-inputs", 2)]
    streamed = losses(parse, *common, *words, "--stream", adapter="streamed", **where)
    plain = losses(parse, *common, *plain_words, "--no-stream", adapter="plain", **where)
    for kind in ("train", "valid"):
        np.testing.assert_allclose(getattr(streamed, kind), getattr(plain, kind), rtol=1e-5, atol=0)
    assert plain.train[-1][1] < plain.train[0][1]
