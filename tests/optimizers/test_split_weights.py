"""bfloat16 weights with an int8 rest: the format, and steps that bfloat16 alone would round away."""

import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from ember_mlx.optimizers import SAGE, Ember, FlashAdamW, SplitWeights
from ember_mlx.optimizers.split_weights import half_unit, join, split
from ember_mlx.parity import oracle_flash_float64 as oracle
from ember_mlx.shared.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:.*is rounded away")


def as_float64(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def test_half_a_unit_is_right_for_every_bfloat16_whose_half_unit_is_a_normal_float32():
    every = mx.arange(2**16).astype(mx.uint16).view(mx.bfloat16)
    with np.errstate(invalid="ignore"):  # NaNs
        values = as_float64(every)
    normal = np.isfinite(values) & (np.abs(values) >= 2.0**-118) & (np.abs(values) < 3.3e38)
    assert normal.sum() > 60_000
    assert np.array_equal(as_float64(half_unit(every))[normal], oracle.half_unit(values[normal]))


def test_weights_come_back_within_the_resolution_of_the_rest():
    random = np.random.RandomState(0)
    exact = random.uniform(-1, 1, size=4096) * 10.0 ** random.randint(-20, 20, size=4096)
    w = mx.array(exact.astype(np.float32))
    low, rest = split(w)
    assert (low.dtype, rest.dtype) == (mx.bfloat16, mx.int8)
    assert mx.array_equal(low, w.astype(mx.bfloat16))
    assert np.array_equal(as_float64(rest), oracle.split_rest(as_float64(w), as_float64(low)))
    # Half a step of the rest is 1/254 of half a unit, which is up to 2^-8 of the weight; float32 rounds once more.
    assert np.abs(as_float64(join(low, rest)) / as_float64(w) - 1).max() <= 2.0**-8 / 254 + 2.0**-23


def test_a_rest_of_zero_is_the_bfloat16_itself_and_infinity_and_nan_stay():
    every = mx.arange(2**16).astype(mx.uint16).view(mx.bfloat16)
    joined = join(every, mx.zeros(every.shape, mx.int8))
    assert mx.array_equal(joined, every.astype(mx.float32), equal_nan=True)
    low, rest = split(joined)
    assert mx.array_equal(low, every, equal_nan=True)
    assert not rest.any().item()


OPTIMIZERS = {
    "Ember": Ember,
    "SAGE": lambda rate: SAGE(rate, weight_decay=0.0),
    "AdamW of MLX": lambda rate: mlx.optimizers.AdamW(rate, bias_correction=True, weight_decay=0.0),
}


def correlation(make, rate, split_them):
    """Of 50 steps of bfloat16 weights with the exact ones."""
    start = mx.array(np.random.RandomState(0).normal(scale=0.02, size=(128, 64))).astype(mx.bfloat16)
    exact, found = {"w": start.astype(mx.float32)}, {"w": start}
    one, other = make(rate), SplitWeights(make(rate)) if split_them else make(rate)
    random = np.random.RandomState(1)
    for _ in range(50):
        gradient = {"w": mx.array(random.normal(0.3, 1, size=start.shape)).astype(mx.bfloat16)}
        exact, found = one.apply_gradients(gradient, exact), other.apply_gradients(gradient, found)
        mx.eval(exact, found, one.state, other.state)
    assert found["w"].dtype == mx.bfloat16
    w = join(found["w"], other.state["w"]["rest"]) if split_them else found["w"]
    return np.corrcoef(*((as_float64(x) - as_float64(start)).ravel() for x in (w, exact["w"])))[0, 1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_at_1e_5_that_bfloat16_rounds_away_add_up(name):
    assert correlation(OPTIMIZERS[name], 1e-5, split_them=False) < 0.5
    assert correlation(OPTIMIZERS[name], 1e-5, split_them=True) > 0.999


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_array_by_array_it_makes_the_bits_of_the_whole_tree(name):
    """As a streamed step goes through the weights."""
    random = np.random.RandomState(4)
    weights = {path: mx.array(random.normal(size=(16, 8))).astype(mx.bfloat16) for path in ("a", "b")}
    gradients = {path: mx.array(random.normal(size=(16, 8))).astype(mx.bfloat16) for path in weights}
    whole, single = (SplitWeights(OPTIMIZERS[name](1e-3)) for _ in range(2))
    single.init(weights)
    expected = whole.apply_gradients(gradients, weights)
    single.state["step"] = single.step + 1
    for path, weight in weights.items():
        assert mx.array_equal(single.apply_single(gradients[path], weight, single.state[path]), expected[path])
        for key, array in whole.state[path].items():
            assert mx.array_equal(single.state[path][key], array), key


def test_the_rest_is_saved_and_resumed_bit_for_bit_and_other_dtypes_have_none(tmp_path):
    random = np.random.RandomState(2)
    start = {"a": {"w": mx.array(random.normal(size=(8, 6))).astype(mx.bfloat16)}, "b": mx.ones((4, 6))}

    def steps(optimizer, weights, count, seed):
        random = np.random.RandomState(seed)
        for _ in range(count):
            gradients = {"a": {"w": mx.array(random.normal(size=(8, 6)))}, "b": mx.array(random.normal(size=(4, 6)))}
            weights = optimizer.apply_gradients(gradients, weights)
        return weights

    straight, before, after = (SplitWeights(Ember(1e-5)) for _ in range(3))
    expected = steps(straight, steps(straight, start, 3, 0), 3, 1)
    half_way = steps(before, start, 3, 0)
    mx.save_safetensors(str(tmp_path / "state.safetensors"), dict(tree_flatten(before.state)))
    after.state = tree_unflatten(list(mx.load(str(tmp_path / "state.safetensors")).items()))
    found = steps(after, half_way, 3, 1)
    found, expected = (dict(tree_flatten(pair)) for pair in ((found, after.state), (expected, straight.state)))
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[path], expected[path]) for path in found)
    assert after.state["a"]["w"]["rest"].dtype == mx.int8
    assert "rest" not in after.state["b"]


def test_no_two_tables_round_by_the_same_bits():
    optimizer = SplitWeights(Ember(1e-3, rounding="stochastic"))
    tables = {name: mx.ones((8, 6), mx.float16) for name in "ab"} | {"c": mx.ones((8, 6), mx.bfloat16)}
    new = optimizer.apply_gradients({name: mx.full((8, 6), 0.3, w.dtype) for name, w in tables.items()}, tables)
    assert not mx.array_equal(new["a"], new["b"]).item()


def test_a_step_compiles_once():
    optimizer, w = SplitWeights(SAGE(1e-4)), {"w": mx.ones((4, 3), mx.bfloat16)}
    optimizer.init(w)
    traces = []

    def step(gradient, w):
        traces.append("traced")
        return optimizer.apply_gradients(gradient, w)

    compiled = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
    for _ in range(3):
        w = compiled({"w": mx.ones((4, 3), mx.bfloat16)}, w)
    assert len(traces) == 1
    assert optimizer.state["w"]["rest"].any().item()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: SplitWeights(Ember(1e-3), weights="int4"), "must be 'bf16\\+int8'"),
        (lambda: SplitWeights("adamw"), "must be an mlx.optimizers.Optimizer"),
        (lambda: SplitWeights(SplitWeights(Ember(1e-3))), "splits weights itself"),
        (lambda: SplitWeights(FlashAdamW(1e-3, weights="bf16+int8")), "splits weights itself"),
        (lambda: SplitWeights(FlashAdamW(1e-3)), "FlashAdamW splits weights itself: .* weights='bf16\\+int8'"),
        (lambda: SplitWeights(mlx.optimizers.MultiOptimizer([Ember(1e-3)])), "split the weights of each"),
        (lambda: SplitWeights(Ember(1e-3)).init({"w": mx.zeros((4, 2))}), "no parameter is bfloat16 .w is .*float32"),
        (lambda: FlashAdamW(1e-3, weights="bf16+int8").init({"w": mx.zeros((4, 2))}), "no parameter is bfloat16"),
    ],
)
def test_where_it_means_nothing_it_is_refused(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_a_rest_of_another_weight_is_refused():
    optimizer = SplitWeights(Ember(1e-3))
    optimizer.init({"w": mx.zeros((4, 2), mx.bfloat16)})
    optimizer.state["w"]["rest"] = mx.zeros((4, 2))
    optimizer.state = optimizer.state
    with pytest.raises(InputError, match="a rest of shape .* for w"):
        optimizer.init({"w": mx.zeros((4, 2), mx.bfloat16)})
