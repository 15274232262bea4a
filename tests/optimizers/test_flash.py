"""FlashAdamW and FlashLion against the float64 oracle: decoded values, and how many codes a rounding has flipped."""

import mlx.core as mx
import numpy as np
import pytest

from ember_mlx.optimizers import FlashAdamW, FlashLion
from ember_mlx.optimizers.companded import groups_of
from ember_mlx.optimizers.split_weights import join
from ember_mlx.parity import oracle_flash_float64 as oracle
from ember_mlx.shared.errors import InputError

MOST_FLIPPED = 0.02
AGREEMENT = 2e-6  # of the longest way of a step
RATE, DECAY = 1e-3, 0.1
SHAPES = [(64, 40), (7, 9), (33,), (2, 3, 16), (1,)]
OPTIMIZERS = {FlashAdamW: (0.9, 0.999), FlashLion: (0.9, 0.99)}


def as_float64(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def numpy_of(state):
    return {name: np.array(array) for name, array in state.items() if name != "rest"}


def gradients(shape, steps, scale=1.0, seed=0):
    """Over four decades within each group, and all zero in the middle of the run."""
    random = np.random.RandomState(seed)
    decades = 10.0 ** random.randint(-3, 1, size=shape)
    for t in range(steps):
        yield (scale * decades * random.uniform(-1, 1, size=shape) * (t != steps // 2)).astype(np.float32)


def follow(kind, shape, dtype=mx.float32, scale=1.0, steps=20, **options):
    """Take 20 steps; compare each with the oracle's from the same stored state; yield what is to be judged."""
    optimizer = kind(RATE, weight_decay=DECAY, decay_vectors=True, **options)
    random = np.random.RandomState(1)
    w = mx.array(random.uniform(-0.02, 0.02, size=shape)).astype(dtype)
    optimizer.init({"w": w})
    flipped = []
    published = options.get("state_format") == "published"
    for t, gradient in enumerate(gradients(shape, steps, scale), start=1):
        state, rest = numpy_of(optimizer.state["w"]), optimizer.state["w"].get("rest")
        exact = as_float64(w if rest is None else join(w, rest))
        gradient = mx.array(gradient).astype(dtype)
        arguments = as_float64(gradient), state, t, RATE, OPTIMIZERS[kind], 1e-8, DECAY, published
        expected, expected_state = oracle.step(exact, *arguments)
        w = optimizer.apply_gradients({"w": gradient}, {"w": w})["w"]
        found = numpy_of(optimizer.state["w"])
        rest = optimizer.state["w"].get("rest")
        yield exact, expected, as_float64(w if rest is None else join(w, rest))
        for name in {"m", "v"} & found.keys():
            apart = np.abs(found[name].astype(int) - expected_state[name])
            assert apart.max() <= 1
            flipped.append((apart > 0).mean())
            scales = found[f"{name}_scales"], expected_state[f"{name}_scales"]
            np.testing.assert_allclose(*scales, rtol=1e-3 if published else 1e-5)
    assert np.mean(flipped) <= MOST_FLIPPED


# float32 has 24 bits: a dozen roundings of the step, and one of the weight.
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_step_agrees_with_float64_and_few_codes_are_flipped(kind, shape, scale):
    for before, expected, found in follow(kind, shape, scale=scale):
        allowed = AGREEMENT * np.abs(expected - before).max() + 2.0**-23 * np.abs(before)
        assert (np.abs(found - expected) <= allowed).all()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_published_format_too(kind):
    for before, expected, found in follow(kind, (64, 40), state_format="published"):
        allowed = AGREEMENT * np.abs(expected - before).max() + 2.0**-23 * np.abs(before)
        assert (np.abs(found - expected) <= allowed).all()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_split_weights_keep_24_bits(kind):
    for before, expected, found in follow(kind, (64, 40), mx.bfloat16, weights="bf16+int8"):
        # Half a step of the rest, and the roundings of the step.
        size = np.maximum(np.abs(before), np.abs(expected))
        allowed = (2.0**-8 / 254 + 2.0**-22) * size + AGREEMENT * np.abs(expected - before).max()
        assert (np.abs(found - expected) <= allowed).all()


@pytest.mark.parametrize(("kind", "bytes_a_weight"), [(FlashAdamW, 2.25), (FlashLion, 1.125)])
@pytest.mark.parametrize(("split", "more"), [(None, 0), ("bf16+int8", 1)])
def test_the_state_takes_what_is_promised(kind, bytes_a_weight, split, more):
    optimizer = kind(1e-3, weights=split)
    optimizer.init({"w": mx.zeros((64, 64), mx.bfloat16)})
    assert sum(array.nbytes for array in optimizer.state["w"].values()) == (bytes_a_weight + more) * 64 * 64


def sparse_rows(state_format, steps=300):
    """The furthest element, in learning rates, where rows are silent in 80 % of the steps and columns differ."""
    random = np.random.RandomState(0)
    shape = (32, 64)
    columns = 10.0 ** np.linspace(-4, 0, 32)[random.permutation(64) % 32]
    optimizer, w = FlashAdamW(1.0, state_format=state_format), {"w": mx.zeros(shape)}
    for _ in range(steps):
        gradient = random.normal(size=shape) * columns * (random.uniform(size=(32, 1)) < 0.2)
        w = optimizer.apply_gradients({"w": mx.array(gradient.astype(np.float32))}, w)
        mx.eval(w, optimizer.state)
    return mx.abs(w["w"]).max().item()


def test_no_second_moment_is_lost_beside_larger_ones():
    assert sparse_rows("float32") < 300
    assert sparse_rows("published") > 3000


def test_blocks_give_the_same_bits_as_all_at_once(monkeypatch):
    def run():
        optimizer = FlashAdamW(1e-2, weights="bf16+int8")
        w = {"w": mx.array(np.random.RandomState(0).normal(size=(40, 33))).astype(mx.bfloat16)}
        for gradient in gradients((40, 33), 3):
            w = optimizer.apply_gradients({"w": mx.array(gradient)}, w)
        return [w["w"], *optimizer.state["w"].values()]

    at_once = run()
    monkeypatch.setattr("ember_mlx.optimizers.flash_arithmetic.FEWEST_GROUPS", 5)
    monkeypatch.setattr("ember_mlx.optimizers.flash_arithmetic.MOST_BLOCKS", 4)
    assert all(mx.array_equal(*pair) for pair in zip(run(), at_once, strict=True))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_nan_is_not_hidden(kind):
    gradient = mx.ones((4, 32))
    gradient[1, 2], gradient[2, 2] = mx.nan, 0
    optimizer = kind(1e-3)
    new = optimizer.apply_gradients({"w": gradient}, {"w": mx.zeros((4, 32))})["w"]
    assert mx.isnan(new).sum().item() == mx.isnan(new[1, 2]).item() == 1
    assert new[2, 2].item() == 0
    assert mx.isnan(optimizer.state["w"]["m_scales"]).tolist() == [False, True, False, False]


def test_state_of_another_format_is_refused_and_says_what_it_needs():
    saved = FlashAdamW(1e-3, state_format="published")
    saved.init({"w": mx.zeros((4, 8))})
    optimizer = FlashAdamW(1e-3)
    optimizer.state = saved.state
    with pytest.raises(
        InputError, match="m_scales of shape .* and dtype mlx.core.float16 for w .*float32.*these options"
    ):
        optimizer.init({"w": mx.zeros((4, 8))})
    saved = FlashAdamW(1e-3, weights="bf16+int8")
    saved.init({"w": mx.zeros((4, 8), mx.bfloat16)})
    optimizer = FlashAdamW(1e-3)
    optimizer.state = saved.state
    with pytest.raises(InputError, match="its run had weights='bf16.int8'"):
        optimizer.init({"w": mx.zeros((4, 8), mx.bfloat16)})


def test_vectors_do_not_decay_unless_they_are_to():
    w, gradients = {"norm": mx.ones((4,)), "w": mx.ones((2, 4))}, {"norm": mx.zeros((4,)), "w": mx.zeros((2, 4))}
    new = FlashLion(0.5, weight_decay=0.5).apply_gradients(gradients, w)
    assert (new["norm"][0].item(), new["w"][0, 0].item()) == (1.0, 0.75)


def test_groups_are_padded_whatever_the_size():
    assert [groups_of(size) for size in (1, 31, 32, 33)] == [1, 1, 1, 2]
    with pytest.raises(InputError, match="with elements"):
        FlashLion(1e-3).init({"w": mx.zeros((0, 4))})
