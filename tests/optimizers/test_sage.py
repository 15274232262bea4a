"""SAGE against its float64 oracle, and what it does with rows that have no gradient."""

import mlx.core as mx
import numpy as np
import pytest
from optimizers.tables import as_float64, random_table

from ember_mlx.optimizers import SAGE
from ember_mlx.parity.gradient_streams import gradient_stream
from ember_mlx.parity.oracle_sage_float64 import SageOracle, unisage
from ember_mlx.shared.errors import InputError

AGREEMENT = 2e-6  # of the longest way gone
STREAMS = ["zero", "ones", "constant", "random", "one rare row", "tiny", "huge", "bfloat16-rounded"]


def way_apart(weights, gradients, **options):
    """How far optimizer and oracle are apart after all gradients, and the longest way, both in learning rates."""
    optimizer, oracle = (
        SAGE(1e-3, decay_vectors=True, **options),
        SageOracle(weights.shape, still_rows=options.get("still_rows", True)),
    )
    decay = options.get("weight_decay", 0.01)
    found, start = {"w": weights}, as_float64(weights)
    expected = start
    for gradient in gradients:
        found = optimizer.apply_gradients({"w": mx.array(gradient)}, found)
        expected = oracle.step(expected, gradient, 1e-3, decay)
    return np.abs(as_float64(found["w"]) - expected).max() / 1e-3, np.abs(expected - start).max() / 1e-3


# From weights of zero, since else a float32 weight of 0.02 rounds a way of 20 learning rates to 1e-7 of it, each step.
@pytest.mark.parametrize("still_rows", [True, False])
@pytest.mark.parametrize("stream", STREAMS)
def test_twenty_steps_agree_with_float64(stream, still_rows):
    shape = (24, 8)
    gradients = list(gradient_stream(stream, shape, 20))
    error, way = way_apart(mx.zeros(shape), gradients, still_rows=still_rows)
    assert error <= AGREEMENT * way
    assert (way > 0) == (stream != "zero")


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e4])
def test_a_vector_agrees_with_float64(scale):
    random = np.random.RandomState(0)
    gradients = [(scale * random.uniform(-1, 1, size=33)).astype(np.float32) for _ in range(20)]
    error, way = way_apart(mx.zeros((33,)), gradients)
    assert error <= AGREEMENT * way


def test_the_authors_order_of_the_momentum_is_the_papers_with_another_beta1():
    gradients = [g.astype(np.float64) for g in gradient_stream("random", (24, 8), 20)]
    oracle = SageOracle((24, 8), betas=(0.9 * 0.99, 0.99), still_rows=False)
    weights = np.zeros((24, 8))
    for gradient in gradients:
        weights = oracle.step(weights, gradient, 1e-3)
    theirs = unisage(np.zeros((24, 8)), gradients, 1e-3)
    assert np.abs(weights - theirs).max() <= 1e-12 * np.abs(theirs).max()
    paper = SageOracle((24, 8), still_rows=False)
    weights = np.zeros((24, 8))
    for gradient in gradients:
        weights = paper.step(weights, gradient, 1e-3)
    assert np.abs(weights - theirs).max() > 0.01 * np.abs(theirs).max()


def rows_after_one_gradient(still_rows, steps=200, learning_rate=1e-3):
    """How far, in learning rates, a row goes that has a gradient in the first step alone, among rows that always do."""
    random = np.random.RandomState(0)
    optimizer = SAGE(learning_rate, weight_decay=0.0, still_rows=still_rows)
    table = {"w": mx.zeros((16, 8))}
    for t in range(steps):
        gradient = random.uniform(-1, 1, size=(16, 8)).astype(np.float32)
        gradient[0] *= t == 0
        table = optimizer.apply_gradients({"w": mx.array(gradient)}, table)
    return np.abs(as_float64(table["w"][0])).mean() / learning_rate


def test_a_token_seen_once_takes_one_step_and_by_the_published_rule_goes_on_for_ever():
    assert rows_after_one_gradient(still_rows=True) <= 1
    assert rows_after_one_gradient(still_rows=False) > 150


def test_weight_decay_leaves_a_row_without_a_gradient_as_it_is():
    w = random_table((4, 3))
    gradient = mx.ones((4, 3)) * mx.array([[0.0], [1], [1], [1]])
    new = SAGE(0.1, weight_decay=0.5).apply_gradients({"w": gradient}, {"w": w})["w"]
    assert mx.array_equal(new[0], w[0])
    published = SAGE(0.1, weight_decay=0.5, still_rows=False).apply_gradients({"w": gradient}, {"w": w})["w"]
    assert mx.allclose(published[0], 0.95 * w[0], rtol=1e-6)


def test_many_rows_are_averaged_in_blocks():
    gradient = np.random.RandomState(0).uniform(-1, 1, size=(9001, 3)).astype(np.float32)
    error, way = way_apart(mx.zeros((9001, 3)), [gradient, gradient[::-1].copy()])
    assert error <= AGREEMENT * way


def test_experts_are_refused_by_name_and_told_who_takes_them():
    with pytest.raises(InputError, match=r"mlp\.experts.*SinkGD or AdamMini"):
        SAGE(1e-3).init({"mlp": {"experts": mx.zeros((2, 3, 4))}})


def test_state_of_another_optimizer_is_refused():
    optimizer = SAGE(1e-3)
    optimizer.state = {"step": mx.array(1, mx.uint64), "learning_rate": mx.array(1e-3), "w": {"r": mx.zeros((4,))}}
    with pytest.raises(InputError, match="the state has no m for w"):
        optimizer.init({"w": mx.zeros((4, 3))})


def test_a_nan_stays_in_its_column_and_is_not_hidden():
    gradient = mx.ones((4, 3))
    gradient[1, 2] = mx.nan
    optimizer = SAGE(1e-3)
    new = optimizer.apply_gradients({"w": gradient}, {"w": mx.zeros((4, 3))})["w"]
    assert mx.isnan(new).any().item()
    assert mx.isnan(optimizer.state["w"]["m"]).tolist()[1] == [False, False, True]
