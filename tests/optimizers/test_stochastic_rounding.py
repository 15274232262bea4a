"""Stochastic rounding: the right bits, without bias, other ones everywhere, and what it does for a training run."""

import warnings

import mlx.core as mx
import numpy as np
import pytest

from ember_mlx import Ember
from ember_mlx.kernels.stochastic_rounding import bit_keys, random_bits, round_stochastically, table_seed
from ember_mlx.parity import stochastic_rounding as reference

DTYPES = ["bfloat16", "float16"]
SHAPE = (512, 512)
FRACTION_BITS = {"bfloat16": 7, "float16": 10}


def bits(seed=0, number=0, step=1, shape=SHAPE):
    return random_bits(*bit_keys(table_seed(seed, number), mx.array(step, mx.uint64), *shape))


def as_float64(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seed", "number", "step"), [(0, 0, 1), (2**32 - 1, 3, 70_000)])
def test_it_is_the_reference_to_the_bit(dtype, seed, number, step):
    random = np.random.RandomState(0)
    values = (random.standard_normal((90, 41)) * np.exp2(random.randint(-40, 18, (90, 41)))).astype(np.float32)
    edges = [np.nan, np.inf, -np.inf, 0.0, -1e-40, 65504, 65520, -65535, -3.4e38, 2**-14, -(2**-14), 2**-24, -(2**-26)]
    values.flat[: len(edges)] = edges
    drawn = bits(seed, number, step, values.shape)
    wanted_bits = reference.random_bits(seed, number, step, np.arange(90), np.arange(41))
    np.testing.assert_array_equal(np.array(drawn), wanted_bits)
    rounded = round_stochastically(mx.array(values), drawn, getattr(mx, dtype))
    np.testing.assert_array_equal(as_float64(rounded), reference.round_stochastically(values, wanted_bits, dtype))


def errors_of_the_mean(round_values, dtype, drawn):
    """In standard deviations, for values at several parts of the way from a number of ``dtype`` to the next."""
    lower_ones = {"bfloat16": [1.0, -1.9921875, 3e-5], "float16": [1.0, -1.9990234375, 2.0**-20]}[dtype]
    for lower in lower_ones:
        lower = as_float64(mx.array(lower).astype(getattr(mx, dtype))).item()
        unit = 2.0 ** (max(np.frexp(abs(lower))[1] - 1, -14 if dtype == "float16" else -126) - FRACTION_BITS[dtype])
        for part in (1 / 300, 0.25, 0.5, 0.7, 1 - 1 / 300):
            value = np.float32(lower + np.copysign(part * unit, lower))
            chance = abs(float(value) - lower) / unit  # what float32 makes of it
            mean = as_float64(round_values(mx.full(SHAPE, value.item()), drawn, getattr(mx, dtype))).mean()
            deviation = np.sqrt(chance * (1 - chance) / drawn.size)
            yield (abs(mean - lower) / unit - chance) / deviation


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_kept_on_average(dtype):
    for seed in (0, 1):
        assert max(map(abs, errors_of_the_mean(round_stochastically, dtype, bits(seed)))) < 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "biased",
    [
        lambda values, drawn, dtype: values.astype(dtype),
        lambda values, drawn, dtype: round_stochastically(values, mx.zeros_like(drawn), dtype),
        lambda values, drawn, dtype: round_stochastically(values, drawn & 0xFF000000, dtype),
        lambda values, drawn, dtype: round_stochastically(values, drawn | 0x80000000, dtype),
    ],
    ids=["to nearest", "cut off", "8 random bits", "the upper half of the chances"],
)
def test_a_biased_rounding_is_found(dtype, biased):
    assert max(map(abs, errors_of_the_mean(biased, dtype, bits()))) > 20


def test_neighbours_steps_tables_and_seeds_have_bits_of_their_own():
    drawn = np.array(bits())
    others = {
        "the next column": np.roll(drawn, 1, axis=1),
        "the next row": np.roll(drawn, 1, axis=0),
        "row and column changed over": drawn.T.copy(),
        "the next step": np.array(bits(step=2)),
        "another table": np.array(bits(number=1)),
        "another seed": np.array(bits(seed=1)),
    }
    np.fill_diagonal(others["row and column changed over"], 0)
    for name, other in others.items():
        # Each of the 32 bits agrees in half of the elements, within 5 standard deviations.
        for place in range(32):
            same = np.mean((drawn ^ other) >> place & 1)
            assert abs(same - 0.5) < 5 * 0.5 / np.sqrt(drawn.size) + 1 / SHAPE[0], (name, place)
    assert len(np.unique(drawn)) > drawn.size * (1 - 2**-14) - 10  # as many as of 2^18 drawn from 2^32


def test_small_steps_add_up_where_rounding_to_nearest_takes_them_back():
    # A step of 1e-4 of a weight of 1 is a 39th of the distance to its lower neighbour in bfloat16.
    ones, gradient = mx.ones((64, 64), mx.bfloat16), mx.ones((64, 64), mx.bfloat16)
    trained = {}
    for rounding in ("nearest", "stochastic"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer, trained[rounding] = Ember(1e-4, rounding=rounding), ones
            for _ in range(100):
                trained[rounding] = optimizer.apply_gradients({"w": gradient}, {"w": trained[rounding]})["w"]
    assert mx.array_equal(trained["nearest"], ones)
    moved = 1 - as_float64(trained["stochastic"])
    # 100 choices of chance 0.0256 and size 2^-8, of 4096 elements.
    assert abs(moved.mean() - 0.01) < 5 * 2**-8 * np.sqrt(100 * 0.0256 / moved.size)


def test_tables_of_one_optimizer_round_by_bits_of_their_own_and_a_seed_repeats_them():
    zeros, gradient = mx.zeros((32, 32), mx.bfloat16), mx.array(np.random.RandomState(0).uniform(1, 2, (32, 32)))

    def stepped(seed):
        tables = {name: zeros for name in ("a", "b")}
        new = Ember(1e-3, rounding="stochastic", seed=seed).apply_gradients(dict.fromkeys(tables, gradient), tables)
        return new["a"], new["b"]

    first, second = stepped(5)
    assert not mx.array_equal(first, second)
    assert all(mx.array_equal(*pair) for pair in zip(stepped(5), (first, second), strict=True))
    assert not mx.array_equal(stepped(6)[0], first)


def test_a_state_from_before_gets_its_seeds():
    w = {"w": mx.zeros((4, 2), mx.bfloat16)}
    before, after, fresh = Ember(1e-3), *(Ember(1e-3, rounding="stochastic") for _ in range(2))
    before.init(w)
    after.state = {"step": mx.array(0, mx.uint64), "learning_rate": mx.array(1e-3), "weight_decay": mx.array(0.0)} | {
        "w": {name: before.state["w"][name] for name in "rc"}
    }
    fresh.init(w)
    after.apply_gradients(w, w)
    assert after.state["w"]["seed"].item() == fresh.state["w"]["seed"].item()
