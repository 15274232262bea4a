"""A loss, a gradient or a norm that is not finite: what a streamed step leaves alone, and what it names."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from streaming.small_steps import SHORT, arrays_of, batch_of, bits, llama, paired

from ember_mlx.optimizers import AdamMini, FlashAdamW, FlashLion, SinkGD
from ember_mlx.optimizers.rounded import StochasticRounding
from ember_mlx.streaming import StreamedStep
from ember_mlx.streaming.updates import Updates

pytestmark = pytest.mark.usefixtures("eager")


@pytest.mark.parametrize("tied", [False, True])
def test_a_loss_that_is_not_finite_changes_no_bit(tied):
    model = llama(tied)
    optimizer = paired(model, skip_nonfinite=True)
    step = StreamedStep(model, optimizer)
    step(*batch_of(SHORT))
    token = batch_of(SHORT)[0][0, 2].item()
    model.model.embed_tokens.weight[token] = mx.nan
    before = bits(arrays_of(model, optimizer))
    result = step.accumulated([batch_of(SHORT)])
    assert result.nonfinite == ("loss",)
    assert optimizer.nonfinite_steps.item() == 1
    optimizer.state["nonfinite_steps"] = mx.array(0, mx.uint32)
    assert bits(arrays_of(model, optimizer)) == before


class Poisoned(nn.Module):
    """A layer whose gradient is NaN while ``on`` is."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.use_sliding = False  # asked by mlx-lm's Llama
        self.on = True

    def __call__(self, x, *arguments, **keywords):
        @mx.custom_function
        def same(y):
            return y

        @same.vjp
        def nan(primal, cotangent, output):
            return cotangent * (mx.nan if self.on else 1)

        return same(self.layer(x, *arguments, **keywords))


@pytest.mark.parametrize("tied", [False, True])
def test_a_nan_on_the_way_back_reaches_no_weight_and_is_named(tied):
    model = llama(tied, layers=3)
    model.model.layers[1] = Poisoned(model.model.layers[1])
    optimizer = paired(model, skip_nonfinite=True)
    step = StreamedStep(model, optimizer)
    before = bits(dict(tree_flatten(model.parameters())))
    result = step.accumulated([batch_of(SHORT)])
    arrays = arrays_of(model, optimizer)
    assert all(mx.isfinite(array).all() for array in arrays.values())
    assert result.nonfinite[0].startswith("model.layers.1.layer.")
    assert "model.embed_tokens.weight" in result.nonfinite
    assert optimizer.nonfinite_steps.item() == 1
    after = bits(dict(tree_flatten(model.parameters())))
    changed = {name for name in after if after[name] != before[name]}
    assert changed.isdisjoint(result.nonfinite)
    assert changed | set(result.nonfinite) == set(after)
    assert any(name.startswith("model.layers.2.") for name in changed)

    model.model.layers[1].on = False
    step = StreamedStep(model, optimizer)
    assert step.accumulated([batch_of(SHORT)]).nonfinite == ()


OPTIMIZERS = {
    "SinkGD": lambda: StochasticRounding(SinkGD(0.1)),
    "AdamMini": lambda: AdamMini(0.1),
    "AdamMini int8": lambda: AdamMini(0.1, momentum="int8"),
    "FlashAdamW": lambda: FlashAdamW(0.1),
    "FlashAdamW bf16+int8": lambda: FlashAdamW(0.1, weights="bf16+int8"),
    "FlashLion": lambda: FlashLion(0.1),
}
CASES = [(name, dtype) for name in OPTIMIZERS for dtype in (mx.bfloat16, mx.float16)
         if dtype == mx.bfloat16 or "bf16" not in name]  # fmt: skip


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_a_weight_is_judged_by_its_own_gradient(together, name, dtype):
    model = nn.Linear(4, 3)
    model.set_dtype(dtype)
    optimizer = OPTIMIZERS[name]()
    updates, weights = Updates(optimizer, model), dict(tree_flatten(model.parameters()))
    for wrong, other in (("weight", "bias"), ("bias", "weight")):
        before = bits(dict(tree_flatten((weights, optimizer.state))))
        updates.begin()
        gradients = {path: mx.ones_like(array) * (mx.nan if path == wrong else 1) for path, array in weights.items()}
        new = updates(weights, gradients, together=together)
        assert updates.finish() == [wrong]
        after = bits(dict(tree_flatten(({path: made[0] for path, made in new.items()}, optimizer.state))))
        assert {name for name in after if after[name] != before[name]} == {
            f"0.{other}", "1.step", *(f"1.{other}.{part}" for part in optimizer.state[other] if part != "seed")
        }  # fmt: skip


def test_a_norm_that_is_not_finite_changes_nothing():
    model = llama(layers=3)
    model.model.layers[1] = Poisoned(model.model.layers[1])
    optimizer = paired(model, clip_grad_norm=1.0)
    before = bits(arrays_of(model, optimizer))
    result = StreamedStep(model, optimizer, clip_norm_pass=True).accumulated([batch_of(SHORT)])
    assert result.nonfinite == ("gradient norm",)
    assert bits(arrays_of(model, optimizer)) == before
