"""How far a row steps that was silent or is quiet, and the limits of it: row_clip and row_floor."""

import math

import mlx.core as mx
import numpy as np
import pytest
from optimizers.tables import SHAPE, as_float64, random_table

from ember_mlx.optimizers import Ember
from ember_mlx.parity.gradient_streams import SILENT_STEPS, gradient_stream


def after_silence_of_the_first_row(optimizer):
    """A table of zeros after one step of ones, before which the first row alone had no gradients."""
    zeros, others = mx.zeros(SHAPE), mx.ones(SHAPE)
    others[0] = 0
    for _ in range(SILENT_STEPS):
        optimizer.apply_gradients({"table": others}, {"table": zeros})
    return optimizer.apply_gradients({"table": mx.ones(SHAPE)}, {"table": zeros})["table"]


def test_a_row_seen_late_makes_a_first_step_of_many_learning_rates():
    # The known weakness of the rule. The row's own mean square is cold: after 1000 silent steps the root is too small
    # by sqrt((1 - 0.999^1001) / (1 - 0.999)) = 25.1, which tends to 31.6.
    stepped = after_silence_of_the_first_row(Ember(1.0))
    expected = math.sqrt((1 - 0.999**1001) / 0.001)
    np.testing.assert_allclose(-as_float64(stepped[0]), expected, rtol=1e-3)
    np.testing.assert_allclose(-as_float64(stepped[1:]), 1.0, rtol=0.05)


@pytest.mark.parametrize("row_clip", [0.5, 1.0, 3.0])
def test_row_clip_limits_the_step_of_a_row_seen_late(row_clip):
    stepped = after_silence_of_the_first_row(Ember(1.0, row_clip=row_clip))
    np.testing.assert_allclose(-as_float64(stepped[0]), row_clip, rtol=1e-5)
    np.testing.assert_allclose(-as_float64(stepped[1:]), min(1.0, row_clip), rtol=0.05)


def test_row_clip_is_exact_where_squares_lie_over_the_columns_as_c_does():
    # Rank one squares, rows by turns: each row's step has the same size in every column, cold or not.
    columns = mx.array([0.1, 1.0, 7.0, 30.0])
    optimizer, zeros = Ember(1.0, row_clip=2.0), mx.zeros((5, 4))
    for t in range(50):
        rows = mx.where(mx.arange(5) == t % 5, 10.0 ** (t % 7 - 3), 0.0)
        stepped = optimizer.apply_gradients({"table": rows[:, None] * columns}, {"table": zeros})["table"]
        assert np.sqrt(np.square(as_float64(stepped)).mean(axis=1)).max() <= 2.0 * (1 + 1e-5)


def test_row_clip_leaves_rows_that_step_less_as_they_were():
    table, gradients = random_table(SHAPE), list(gradient_stream("random", SHAPE, steps=5))
    optimizers = Ember(1.0), Ember(1.0, row_clip=50.0)
    for gradient in gradients:
        plain, clipped = (o.apply_gradients({"table": mx.array(gradient)}, {"table": table}) for o in optimizers)
        assert mx.array_equal(plain["table"], clipped["table"])


def test_row_floor_lets_quiet_rows_step_in_proportion_to_their_gradients_and_leaves_the_others():
    sizes = np.array([10.0, 3.0, 1.0, 1e-2, 1e-5])  # of the gradients, row by row
    table_size = np.sqrt(np.square(sizes).mean())
    optimizers, zeros = (Ember(1.0), Ember(1.0, row_floor=0.5)), mx.zeros((5, 4))
    for _ in range(3):
        signs = mx.where(mx.random.bernoulli(shape=(5, 4)), 1.0, -1.0)
        gradient = mx.array(sizes.astype(np.float32))[:, None] * signs
        plain, floored = (o.apply_gradients({"table": gradient}, {"table": zeros})["table"] for o in optimizers)
        np.testing.assert_allclose(np.abs(plain), 1.0, rtol=2e-3)
        expected = np.minimum(1.0, sizes / (0.5 * table_size))[:, None] * np.ones(4)
        np.testing.assert_allclose(np.abs(floored), expected, rtol=2e-3)


def test_row_clip_limits_what_row_floor_leaves():
    optimizer, gradient = Ember(1.0, row_clip=0.5, row_floor=1.0), mx.array([[1.0, 1.0], [1e-3, 1e-3]])
    stepped = optimizer.apply_gradients({"table": gradient}, {"table": mx.zeros((2, 2))})["table"]
    np.testing.assert_allclose(-as_float64(stepped), [[0.5, 0.5], [2**0.5 * 1e-3] * 2], rtol=1e-4)


@pytest.mark.parametrize("least", ["row_clip", "row_floor"])
def test_the_outermost_limits_of_rows_make_no_nan_of_a_column_without_gradients(least):
    gradient = mx.array([[1.0, 0.0], [0.0, 0.0], [1e-3, 0.0]])
    optimizer = Ember(1.0, **{least: 1e-30 if least == "row_clip" else 1e30})
    stepped = optimizer.apply_gradients({"table": gradient}, {"table": mx.zeros((3, 2))})["table"]
    np.testing.assert_allclose(as_float64(stepped), 0.0, atol=1e-29)
