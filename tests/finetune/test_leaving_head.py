"""What leaves the head is evaluated before the layers' gradients: the same bits, and no logits while those are made."""

import gc

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten
from tiny_models import HIDDEN, alone, loss, tiny_llama

from ember_mlx import Ember, PairedOptimizer
from ember_mlx.finetune import step as step_module
from ember_mlx.finetune.leaving_head import LeavingHead
from ember_mlx.finetune.step import Step
from ember_mlx.finetune.workers import Workers

VOCABULARY = 4096
BATCHES = [(mx.random.randint(0, VOCABULARY, (2, 65), key=mx.random.key(i)),) for i in range(2)]


def counted(model, tokens):
    return loss(model, tokens), mx.array(tokens.size)


@pytest.mark.parametrize(("tied", "workers"), [(True, 1), (False, 1), (True, 2)])
def test_the_bits_are_the_same_and_the_logits_are_gone(tied, workers, monkeypatch):
    monkeypatch.setattr(Workers, "join", lambda: Workers(0, workers))
    evaluate_paced, active, held, ends = step_module.evaluate_paced, [], [], []

    def noting(groups):
        mx.synchronize()  # MLX gives memory back on a thread of its own
        active.append(mx.get_active_memory())
        evaluate_paced(groups)

    monkeypatch.setattr(step_module, "evaluate_paced", noting)
    for head_first in (False, True):
        model = tiny_llama(tied, vocabulary=VOCABULARY)
        optimizer = PairedOptimizer(model, Ember(1e-3), optim.SGD(1e-3))
        step = Step(model, optimizer, counted, 2, alone, head_first=head_first)
        gc.collect()  # of what was before, too
        before, first = mx.get_active_memory(), len(active)
        losses = [step(batch, last).loss for batch, last in zip(BATCHES, (False, True), strict=True)]
        held.append(active[first] - before)
        ends.append([*losses, *(array for _, array in tree_flatten([model.parameters(), optimizer.state]))])
    assert all(mx.array_equal(a, b) for a, b in zip(*ends, strict=True))
    logits = BATCHES[0][0][:, 1:].size * VOCABULARY * 4
    assert held[1] < held[0] - logits / 2  # the gradient of the head is a quarter


@pytest.mark.parametrize(("tokens", "noted"), [(HIDDEN, 2), (HIDDEN - 1, 0)])
def test_a_head_whose_gradient_is_larger_than_the_logits_waits(tokens, noted):
    model = tiny_llama()
    with LeavingHead(model).noted() as left:
        nn.value_and_grad(model, loss)(model, mx.zeros((1, tokens + 1), mx.int32))
    assert len(left) == noted


class NamesIts(nn.Module):
    """It calls its head by keyword; where ``several``, on no token alone."""

    def __init__(self, several):
        super().__init__()
        self.several = several
        self.embed_tokens, self.lm_head = nn.Embedding(64, 8), nn.Linear(8, 64, bias=False)

    def __call__(self, inputs):
        if self.several and inputs.size == 1:
            raise ValueError("one token alone")
        hidden = self.embed_tokens(inputs)
        return self.lm_head(hidden) if self.several else self.lm_head(x=hidden)


@pytest.mark.parametrize("make", [lambda: nn.Linear(64, 4), lambda: NamesIts(False), lambda: NamesIts(True)])
def test_of_a_model_whose_head_cannot_be_had_nothing_is_noted(make):
    model = make()
    inputs = mx.ones(64) if isinstance(model, nn.Linear) else mx.zeros((1, 9), mx.int32)
    with LeavingHead(model).noted() as left:
        nn.value_and_grad(model, lambda model: model(inputs).sum())(model)
    assert left == []
