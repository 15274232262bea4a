"""The guard: what is finite, how large the gradients are together, and steps that change nothing, bit for bit."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from ember_mlx import InputError
from ember_mlx.optimizers.guarded import (
    GuardedOptimizer,
    all_finite,
    clip_by_norm,
    global_norm,
    spoil_gradients_of_nonfinite,
)

DTYPES = [mx.float32, mx.bfloat16, mx.float16]
NONFINITE = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (33,), (1000,), (67, 130), (2, 3, 5), (300, 301)])
def test_no_nan_and_no_infinity_is_overlooked(dtype, shape):
    clean = mx.random.normal(shape, key=mx.random.key(0)).astype(dtype)
    assert all_finite([clean, clean]).item()
    for value in NONFINITE:
        for position in (0, clean.size // 2, clean.size - 1):
            planted = clean.flatten()
            planted[position] = value
            planted = planted.reshape(shape)
            # A gradient of an untied head lies transposed in memory.
            for array in (planted, mx.contiguous(planted.T).T):
                assert not all_finite([clean, array]).item()
                assert not mx.isfinite(global_norm({"a": clean, "b": [array]})).item()


def test_of_many_small_arrays_none_is_overlooked():
    for bad in range(11):
        arrays = [mx.full((4, 3) if i % 2 else (3,), i, DTYPES[i % 3]) for i in range(11)]
        assert all_finite(arrays).item()
        arrays[bad][-1] = float("-inf")
        assert not all_finite(arrays).item()


def test_infinities_of_both_signs_do_not_cancel():
    array = mx.array([1.0, float("inf"), float("-inf")])
    assert not all_finite([array]).item()


@pytest.mark.parametrize(("dtype", "large"), [(mx.float32, 3.4e38), (mx.bfloat16, 3.3e38), (mx.float16, 6e4)])
def test_large_is_not_infinite(dtype, large):
    assert all_finite([mx.full((300, 300), large, dtype)]).item()
    assert all_finite([mx.full((30, 30), large, dtype)] * 5).item()


def random_gradients(scale, dtype):
    random = np.random.RandomState(0)
    shapes = {"table": (700, 48), "weight": (48, 31), "bias": (31,), "scalar": (), "filters": (4, 3, 3, 5)}
    return {name: mx.array(scale * random.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_clipping_is_pytorchs_in_float32_whatever_the_dtype(dtype, scale):
    torch = pytest.importorskip("torch")
    gradients = random_gradients(scale, dtype)
    theirs = [torch.nn.Parameter(torch.zeros(g.shape)) for g in gradients.values()]
    for parameter, gradient in zip(theirs, gradients.values(), strict=True):
        parameter.grad = torch.from_numpy(np.array(gradient.astype(mx.float32)))
    exact = np.sqrt(sum((parameter.grad.numpy().astype(np.float64) ** 2).sum() for parameter in theirs))
    torch.nn.utils.clip_grad_norm_(theirs, 2.0)
    norm = global_norm(gradients)
    assert norm.dtype == mx.float32
    assert norm.item() == pytest.approx(exact, rel=1e-6)
    clipped = clip_by_norm(gradients, norm, 2.0)
    for parameter, gradient in zip(theirs, clipped.values(), strict=True):
        assert gradient.dtype == dtype
        rounding = mx.finfo(dtype).eps
        np.testing.assert_allclose(
            np.array(gradient.astype(mx.float32)), parameter.grad.numpy(), rtol=max(rounding, 4e-6), atol=1e-7
        )


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_the_norm_of_very_small_and_very_large_gradients_is_exact_too(scale):
    gradients = random_gradients(scale, mx.float32) | {"table": mx.full((30_000, 64), scale)}
    exact = np.sqrt(sum((np.array(g, np.float64) ** 2).sum() for g in gradients.values()))
    assert global_norm(gradients).item() == pytest.approx(exact, rel=1e-5)


def test_gradients_within_the_norm_keep_their_bits():
    gradients = random_gradients(1e-3, mx.bfloat16)
    clipped = clip_by_norm(gradients, global_norm(gradients), 1e3)
    assert all(mx.array_equal(clipped[name], gradients[name]) for name in gradients)
    nothing = {"a": mx.zeros((3, 4))}
    assert mx.array_equal(clip_by_norm(nothing, global_norm(nothing), 1.0)["a"], nothing["a"])


def schedule(step):
    return 1e-2 / (1 + step.astype(mx.float32))


OPTIMIZERS = {
    "adamw": lambda: optim.AdamW(schedule, bias_correction=True),
    "adafactor": lambda: optim.Adafactor(schedule, relative_step=False, beta_1=0.9),
    "momentum": lambda: optim.SGD(schedule, momentum=0.9, weight_decay=0.1),
    "muon": lambda: optim.Muon(schedule),
    "several": lambda: optim.MultiOptimizer(
        [optim.Muon(schedule), optim.AdamW(schedule)], [lambda path, _: path == "weight"]
    ),
}


def parameters():
    return {"weight": mx.ones((6, 4)), "norm": mx.zeros(5), "inner": {"bias": mx.ones(3)}}


def gradients(seed, bad=None, value=float("nan")):
    drawn = {"weight": mx.random.normal((6, 4), key=mx.random.key(seed)), "norm": mx.full(5, 0.5 + seed)}
    drawn["inner"] = {"bias": mx.array([1.0, 0.0, -1.0])}
    if bad:
        drawn[bad][1:2] = value
    return drawn


def steps(optimizer, many, compiled):
    """Weights and state after each step, and how often it was traced."""
    model = parameters()
    traced, states = [], []

    def step(gradients):
        traced.append(gradients)
        model.update(optimizer.apply_gradients(gradients, model))

    if compiled:
        held = [model, optimizer.state]
        step = partial(mx.compile, inputs=held, outputs=held)(step)
    for some in many:
        step(some)
        mx.eval(model, optimizer.state)
        states.append(dict(tree_flatten({"model": model, "state": optimizer.state})))
    return states, len(traced)


def differing(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not mx.array_equal(a[name], b[name])]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_step_with_a_nan_changes_nothing_and_the_next_ones_go_on_as_if_it_had_not_been(name, clip, compiled):
    def make():
        return GuardedOptimizer(parameters(), OPTIMIZERS[name](), skip_nonfinite=True, clip_grad_norm=clip)

    good = [gradients(seed) for seed in range(3)]
    first, inf = gradients(7, "weight"), gradients(8, "norm", float("-inf"))
    clean, _ = steps(make(), good, compiled)
    optimizer = make()
    begin = dict(tree_flatten({"model": parameters(), "state": optimizer.state}))
    mixed, traced = steps(optimizer, [first, good[0], good[1], inf, first, good[2]], compiled)
    assert traced == (1 if compiled else 6)
    count = "state.nonfinite_steps"
    assert differing(begin, mixed[0]) == [count]
    assert differing(mixed[2], mixed[3]) == differing(mixed[3], mixed[4]) == [count]
    assert differing(clean[-1], mixed[-1]) == [count]
    assert [state[count].item() for state in mixed] == [1, 1, 1, 2, 3, 3]
    assert optimizer.nonfinite_steps.item() == 3
    assert optimizer.step.item() == 3
    # The states are compared, so there must be some that a step would have changed.
    assert len(differing(mixed[0], mixed[1])) > 3


def test_off_it_computes_nothing_and_keeps_nothing(monkeypatch):
    for name in ("all_finite", "global_norm", "clip_by_norm"):
        monkeypatch.setattr(f"ember_mlx.optimizers.guarded.{name}", None)
    optimizer = GuardedOptimizer(parameters(), OPTIMIZERS["adamw"]())
    after, _ = steps(optimizer, [gradients(0, "norm")], compiled=False)
    assert list(optimizer.state) == ["rest"]
    assert optimizer.nonfinite_steps is None
    assert mx.isnan(after[0]["model.norm"]).any()


def test_a_state_goes_over_with_the_counter_and_without():
    plain = GuardedOptimizer(parameters(), OPTIMIZERS["adamw"]())
    guarded = GuardedOptimizer(parameters(), OPTIMIZERS["adamw"](), skip_nonfinite=True)
    steps(plain, [gradients(0)], compiled=False)
    guarded.state = plain.state
    assert guarded.nonfinite_steps.item() == 0
    assert not differing(dict(tree_flatten(plain.state["rest"])), dict(tree_flatten(guarded.state["rest"])))
    steps(guarded, [gradients(1), gradients(2, "norm")], compiled=False)
    again = GuardedOptimizer(parameters(), OPTIMIZERS["adamw"](), skip_nonfinite=True)
    again.state = dict(tree_flatten(guarded.state))
    assert not differing(dict(tree_flatten(again.state)), dict(tree_flatten(guarded.state)))
    assert again.nonfinite_steps.item() == 1
    plain.state = guarded.state
    assert "nonfinite_steps" not in plain.state


@pytest.mark.parametrize("norm", [0, -1.0, float("nan"), float("inf"), "1", True])
def test_a_norm_that_cannot_be_is_refused(norm):
    with pytest.raises(InputError, match="GuardedOptimizer.clip_grad_norm=.*finite number above 0"):
        GuardedOptimizer(parameters(), optim.SGD(1.0), clip_grad_norm=norm)


def test_state_that_there_was_no_old_of_is_refused_by_name():
    class Late(optim.SGD):
        def apply_single(self, gradient, parameter, state):
            state["late"] = gradient
            return super().apply_single(gradient, parameter, state)

    optimizer = GuardedOptimizer(parameters(), Late(1.0), skip_nonfinite=True)
    with pytest.raises(InputError, match="first makes rest.weight.late in a step"):
        optimizer.apply_gradients(gradients(0), parameters())


def test_a_loss_that_is_no_number_spoils_its_gradients_and_one_that_is_keeps_its_bits():
    model = nn.Linear(3, 2)

    def loss(model, x, offset):
        return (model(x) ** 2).mean() + offset, mx.array(7)

    x = mx.random.normal((5, 3), key=mx.random.key(1))
    plain = nn.value_and_grad(model, loss)
    spoiling = nn.value_and_grad(model, spoil_gradients_of_nonfinite(loss))
    before, after = plain(model, x, 1.0), spoiling(model, x, 1.0)
    assert not differing(dict(tree_flatten(before)), dict(tree_flatten(after)))
    for value in NONFINITE:
        # By themselves these gradients are finite: the offset has no part in them.
        assert all_finite([g for _, g in tree_flatten(plain(model, x, value)[1])]).item()
        (found, count), spoilt = spoiling(model, x, value)
        assert not mx.isfinite(found).item()
        assert count.item() == 7
        assert not all_finite([g for _, g in tree_flatten(spoilt)]).item()
    alone = spoil_gradients_of_nonfinite(lambda x: x * 2)
    assert alone(mx.array(1.5)).item() == 3.0
