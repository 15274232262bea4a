"""Batches that a streamed step refuses, in one line, before anything has changed; and unusual ones that it takes."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from streaming_spy import randomized
from tiny_models import tiny_llama

from ember_mlx import InputError
from ember_mlx.streaming import StreamedStep

IDS = mx.arange(24).reshape(2, 12)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda step: step(IDS[:, :-1], IDS[:, 1:]), r"lengths of shape \(2, 11\) and .*int32: must be \(2, 2\)"),
        (lambda step: step(IDS, mx.array([0, 11])), r"lengths of shape \(2,\) .*must be \(2, 2\)"),
        (lambda step: step(IDS, mx.ones((2, 2))), "float32: must be .2, 2. and signed"),
        (lambda step: step(IDS, mx.ones((2, 11), mx.uint8)), "uint8: must be .*or marks, .2, 12. of uint8 or uint32"),
        (lambda step: step(IDS, [[0, 3]] * 2), "lengths of type list: must be an mlx.core.array"),
        (lambda step: step(IDS[0]), r"tokens of shape \(12,\) .*; give tokens\[None\]"),
        (lambda step: step(IDS.at[0, 0].add(300)), "token ids from 1 to 300: must be from 0 to 259"),
        (lambda step: step(IDS - 100), "token ids from -100 to -77: must be from 0"),
        (lambda step: step.accumulated([(IDS, None)]), "lengths of type NoneType"),
        (lambda step: step(IDS, mx.array([[5, 3], [12, 20]])), r"batch with lengths of \[5, 3\] and others: no token"),
        (lambda step: step(IDS, mx.zeros((2, 12), mx.uint8)), "batch with marks without bit 0 .*no token counts"),
        (lambda step: step.accumulated([(IDS, mx.array([[0, n]] * 2)) for n in (5, 0)]), r"batch 2 of 2 .*no token"),
    ],
)
@pytest.mark.parametrize("head", [True, False], ids=["of the head", "as a whole"])
def test_a_batch_that_cannot_be_is_refused_in_a_line_and_nothing_changes(call, why, head):
    model = randomized(tiny_llama(hidden=64)).train()
    model.layers[0].mlp.up_proj = nn.Sequential(model.layers[0].mlp.up_proj, nn.Dropout(0.5))
    optimizer = optim.Adam(0.1)
    step = StreamedStep(model, optimizer)
    step._head = step._head if head else None  # as of a model whose head is not found

    def everything():
        arrays = tree_flatten({"model": model.parameters(), "optimizer": optimizer.state, "random": mx.random.state})
        return {name: np.array(array).tobytes() for name, array in arrays}

    before = everything()
    with pytest.raises(InputError, match=f"^StreamedStep: .*{why}") as refused:
        call(step)
    assert "\n" not in str(refused.value)
    assert everything() == before


def test_a_share_says_that_the_caller_has_counted_and_a_length_beyond_the_row_is_its_end():
    step = StreamedStep(randomized(tiny_llama(hidden=64)), optim.SGD(0.0))
    empty = (IDS, mx.array([[5, 3]] * 2))
    assert step.accumulated([empty], [1.0]).nonfinite == ("loss",)
    assert step(IDS, mx.array([[0, 99]] * 2)) == step(IDS) == step(IDS, mx.ones((2, 12), mx.uint8))
