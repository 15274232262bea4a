"""Every optimizer of the family in the steps that train with it: the guarded one, and the streamed one."""

import math
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss
from tiny_models import tiny_llama

from ember_mlx import Ember, PairedOptimizer
from ember_mlx.finetune.step import Step
from ember_mlx.optimizers import SAGE, AdamMini, FlashAdamW, FlashLion, SinkGD, SplitWeights
from ember_mlx.streaming import StreamedStep

pytestmark = [pytest.mark.usefixtures("eager"), pytest.mark.filterwarnings("ignore:.*is rounded away")]

RATE, STEPS = 1e-3, 2
BATCH = mx.random.randint(0, 170, (2, 7), key=mx.random.key(3)), mx.array([[0, 6], [1, 5]])
# What trains the tables and what trains the rest, called with the model.
PAIRS = {
    "AdamMini": (Ember, lambda model: AdamMini(RATE, model=model)),
    "AdamMini int8": (Ember, lambda model: AdamMini(RATE, model=model, momentum="int8")),
    "SinkGD": (Ember, lambda model: SinkGD(RATE, passes=2)),
    "SAGE and SinkGD": (SAGE, lambda model: SinkGD(RATE, passes=2)),
    "FlashAdamW": (FlashAdamW, lambda model: FlashAdamW(RATE)),
    "FlashAdamW bf16+int8": (Ember, lambda model: FlashAdamW(RATE, weights="bf16+int8")),
    "FlashLion bf16+int8": (Ember, lambda model: FlashLion(RATE, weights="bf16+int8")),
    "SplitWeights": (lambda rate: SplitWeights(Ember(rate)), lambda model: SplitWeights(AdamMini(RATE, model=model))),
}


@pytest.fixture(params=PAIRS)
def made(request):
    """A new pair of model and optimizer a call, always the same."""
    tables, rest = PAIRS[request.param]

    def make():
        model = tiny_llama(seed=1).train()
        model.set_dtype(mx.bfloat16 if "bf16" in request.param or "Split" in request.param else mx.float32)
        return model, PairedOptimizer(model, tables(RATE), rest(model), skip_nonfinite=True)

    return make


def everything(model, optimizer):
    arrays = {"weights": model.trainable_parameters(), "state": optimizer.state}
    return {name: mx.array(array) for name, array in tree_flatten(arrays)}


def differing(a, b):
    return [name for name in a if not mx.array_equal(a[name], b[name])]


def scaled(model, batch, lengths, scale):
    loss, tokens = default_loss(model, batch, lengths)
    return loss.astype(mx.float32) * scale, tokens


def test_a_bad_step_changes_nothing_and_the_run_goes_on_as_if_it_had_not_been(made):
    ends = []
    for scales in ([1.0, 1.0], [1.0, math.nan, 1.0]):
        model, optimizer = made()
        step = Step(model, optimizer, scaled)
        for scale in scales:
            before = everything(model, optimizer)
            result = step((*BATCH, mx.array(scale)))
            after = everything(model, optimizer)
            assert result.nonfinite == math.isnan(scale)
            if result.nonfinite:
                assert differing(before, after) == ["state.nonfinite_steps"]
        ends.append(after)
    assert differing(*ends) == ["state.nonfinite_steps"]


def test_a_streamed_step_trains_as_an_ordinary_one(made):
    """The loss says so: after a step that went elsewhere it is another, by more than sums of another order are."""
    (plain, ordinary), (model, optimizer) = made(), made()
    step = StreamedStep(model, optimizer)
    start = everything(model, optimizer)
    within = 1e-4 if plain.lm_head.weight.dtype == mx.float32 else 2.0**-8
    for _ in range(STEPS):
        (loss, _), gradients = nn.value_and_grad(plain, default_loss)(plain, *BATCH)
        ordinary.update(plain, gradients)
        mx.eval(plain.parameters(), ordinary.state)
        assert step(*BATCH)[0] == pytest.approx(loss.item(), rel=within)
    found, expected = everything(model, optimizer), everything(plain, ordinary)
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
        name: (x.shape, x.dtype) for name, x in expected.items()
    }
    assert found["state.rest.step"].item() == STEPS
    weights = [name for name in found if name.startswith("weights.")]
    assert len(set(weights) & set(differing(start, found))) > len(weights) // 2


def test_a_streamed_step_without_a_loss_changes_nothing(made):
    model, optimizer = made()
    step = StreamedStep(model, optimizer, partial(scaled, scale=mx.array(math.nan)))
    before = everything(model, optimizer)
    assert step.accumulated([BATCH]).nonfinite == ("loss",)
    assert differing(before, everything(model, optimizer)) == ["state.nonfinite_steps"]
