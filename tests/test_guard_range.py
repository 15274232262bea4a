"""The guard's range: what it lets through leaves finite weights and a finite state, with every optimizer there is."""

import itertools

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

from ember_mlx import Ember
from ember_mlx.optimizers import SAGE, AdamMini, FlashAdamW, FlashLion, SinkGD
from ember_mlx.optimizers.guarded import SAFE_NORM, SAFE_RATE, GuardedOptimizer, all_finite, global_norm, norm_is_safe
from ember_mlx.optimizers.in_float32 import stock_in_float32

OPTIMIZERS = {
    "adam": optim.Adam,
    "corrected adam": lambda rate: optim.Adam(rate, bias_correction=True),
    "adamw": lambda rate: optim.AdamW(rate, weight_decay=1e-10),
    "sgd": lambda rate: optim.SGD(rate, momentum=0.9),
    "muon": lambda rate: optim.Muon(rate, weight_decay=1e-10),
    "ember": Ember,
    "stochastic ember": lambda rate: Ember(rate, rounding="stochastic", beta2=lambda step: 1 - (step + 1) ** -0.8),
    "adam-mini": lambda rate: AdamMini(rate, weight_decay=1e-10),
    "compact adam-mini": lambda rate: AdamMini(rate, momentum="int8"),
    "sinkgd": SinkGD,
    "sage": SAGE,
    "flash-adamw": FlashAdamW,
    "flash-lion": FlashLion,
}
SHAPE = (6, 32)
LARGEST = SAFE_NORM / 2  # of a weight; the norm of all gradients is SAFE_NORM at most


def gradient(size, kind, dtype):
    """Of a global norm just within the range, or ``size`` times that."""
    drawn = mx.random.normal(SHAPE, key=mx.random.key(3))
    if kind == "one element":
        drawn = mx.zeros(SHAPE).at[2, 5].add(1.0)
    return (drawn / mx.sqrt(mx.square(drawn).sum()) * (0.99 * SAFE_NORM * size)).astype(dtype)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_it_lets_through_stays_finite(name, dtype):
    sizes = [(1, 1), (1, 1e-38), (1e-38, 1), (1e-18, 0), (0, 1)]
    for (first, second), kind in itertools.product(sizes, ("dense", "one element")):
        optimizer = OPTIMIZERS[name](SAFE_RATE)
        stock_in_float32(optimizer)
        for size in (first, second, first):
            w = (LARGEST * mx.random.uniform(-1, 1, SHAPE, key=mx.random.key(4))).astype(dtype)
            g = gradient(size, kind, dtype)
            assert norm_is_safe(global_norm({"w": g})).item()
            new = optimizer.apply_gradients({"w": g}, {"w": w})["w"]
            floats = [x for _, x in tree_flatten(optimizer.state) if mx.issubdtype(x.dtype, mx.floating)]
            mx.eval(new, floats)
            for array in (new, *floats):
                assert mx.isfinite(array).all().item(), (first, second, size, kind)


@pytest.mark.parametrize("compiled", [False, True])
def test_adafactor_that_overflows_within_the_range_is_judged_by_what_comes_out(compiled):
    # A row of zeros has a moment of 1e-30, which over the mean of all rows is 0 in float32.
    w, g = mx.ones(SHAPE), gradient(1, "one element", mx.float32)
    plain = optim.Adafactor(1e-3, relative_step=False)
    assert not mx.isfinite(plain.apply_gradients({"w": g}, {"w": w})["w"]).all().item()
    optimizer = GuardedOptimizer({"w": w}, optim.Adafactor(1e-3, relative_step=False), skip_nonfinite=True)

    def step(w):
        return optimizer.apply_gradients({"w": g}, {"w": w})["w"]

    if compiled:
        step = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
    assert mx.array_equal(step(w), w)
    assert optimizer.nonfinite_steps.item() == 1


@pytest.mark.parametrize("make", [optim.SGD, optim.Adam, Ember])
@pytest.mark.parametrize("bad", [1e38, float("inf"), float("nan")])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_rate_beyond_is_a_step_that_changes_nothing(make, bad, compiled):
    w, g = mx.ones(SHAPE), mx.ones(SHAPE)
    optimizer = GuardedOptimizer({"w": w}, make(lambda step: mx.where(step == 1, bad, 1e-3)), skip_nonfinite=True)

    def step(w):
        return optimizer.apply_gradients({"w": g}, {"w": w})["w"]

    if compiled:
        step = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
    first = step(w)
    mx.eval(first, optimizer.state)
    assert optimizer.nonfinite_steps.item() == 0
    before = {name: mx.array(array) for name, array in tree_flatten(optimizer.state)}
    second = step(first)
    mx.eval(second, optimizer.state)
    assert optimizer.nonfinite_steps.item() == 1
    assert mx.array_equal(first, second)
    after = dict(tree_flatten(optimizer.state))
    assert [name for name in after if not mx.array_equal(before[name], after[name])] == ["nonfinite_steps"]
    assert all_finite([first]).item()
