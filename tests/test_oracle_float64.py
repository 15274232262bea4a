"""The oracle against arithmetic done by hand, and the streams and bounds that the optimizers are tested with."""

import numpy as np
import pytest

from ember_mlx.parity.gradient_streams import RARE_EVERY, SILENT_STEPS, STREAMS, gradient_stream, round_to_bfloat16
from ember_mlx.parity.oracle_float64 import EmberOracle
from ember_mlx.parity.tolerances import TOLERANCES, worst
from ember_mlx.shared.float_formats import FORMATS, unit_in_the_last_place


def test_two_steps_of_a_2_by_2_table_are_as_computed_by_hand():
    oracle = EmberOracle((2, 2), beta2=0.5, eps=1.0)
    weights = [[1, 2], [3, -1]]

    # Step 1, gradient [[1, -2], [2, 4]], squares [[1, 4], [4, 16]].
    #   r = 0.5 * [2.5, 10] = [1.25, 5]        c = 0.5 * [2.5, 10] = [1.25, 5]        s = 3.125
    #   s * (1 - 0.5) = 1.5625
    #   v_hat = [[1.5625, 6.25], [6.25, 25]] / 1.5625 = [[1, 4], [4, 16]], its root [[1, 2], [2, 4]]
    #   gradient / (root + 1) = [[1/2, -2/3], [2/3, 4/5]]
    #   times 0.6: [[0.3, -0.4], [0.4, 0.48]]
    #   1 - 0.6 * 0.5 = 0.7, times the weights: [[0.7, 1.4], [2.1, -0.7]]
    weights = oracle.step(weights, [[1, -2], [2, 4]], learning_rate=0.6, weight_decay=0.5)
    np.testing.assert_allclose(oracle.row_mean_square, [1.25, 5], rtol=1e-15)
    np.testing.assert_allclose(oracle.column_mean_square, [1.25, 5], rtol=1e-15)
    np.testing.assert_allclose(weights, [[0.4, 1.8], [1.7, -1.18]], rtol=1e-15)

    # Step 2, gradient [[1, -4], [8, 2]], squares [[1, 16], [64, 4]].
    #   r = 0.5 * [1.25, 5] + 0.5 * [8.5, 34] = [4.875, 19.5]
    #   c = 0.5 * [1.25, 5] + 0.5 * [32.5, 10] = [16.875, 7.5]        s = 12.1875
    #   s * (1 - 0.25) = 9.140625
    #   v_hat = [[82.265625, 36.5625], [329.0625, 146.25]] / 9.140625 = [[9, 4], [36, 16]], its root [[3, 2], [6, 4]]
    #   gradient / (root + 1) = [[1/4, -4/3], [8/7, 2/5]]
    #   times 0.84: [[0.21, -1.12], [0.96, 0.336]]
    #   1 - 0.84 * 0.25 = 0.79, times the weights: [[0.316, 1.422], [1.343, -0.9322]]
    weights = oracle.step(weights, [[1, -4], [8, 2]], learning_rate=0.84, weight_decay=0.25)
    np.testing.assert_allclose(oracle.row_mean_square, [4.875, 19.5], rtol=1e-15)
    np.testing.assert_allclose(oracle.column_mean_square, [16.875, 7.5], rtol=1e-15)
    np.testing.assert_allclose(weights, [[0.106, 2.542], [0.383, -1.2682]], rtol=1e-14)


def test_the_oracle_divides_by_the_floor_where_all_squares_are_below_it():
    # Gradient 1e-20, so r = c = s = 0.5 * 1e-40 = 5e-41, far below 1e-30: v_hat = 25e-82 / (1e-30 * 0.5) = 5e-51.
    oracle = EmberOracle((1, 1), beta2=0.5, eps=0.0)
    np.testing.assert_allclose(oracle.change([[1e-20]], learning_rate=1.0), [[1e-20 / np.sqrt(5e-51)]], rtol=1e-14)


def test_the_oracle_leaves_the_weights_alone_at_a_zero_gradient():
    weights = EmberOracle((2, 3)).step(np.full((2, 3), 0.1), np.zeros((2, 3)), learning_rate=1.0)
    np.testing.assert_array_equal(weights, np.full((2, 3), 0.1))


@pytest.mark.parametrize("shape", [(24, 8), (1, 1), (257, 33)])
@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_gives_the_same_float32_tables_each_time(name, shape):
    first, again = (list(gradient_stream(name, shape, steps=3, seed=5)) for _ in range(2))
    assert len(first) == 3
    for table, same in zip(first, again, strict=True):
        assert table.dtype == np.float32
        assert table.shape == shape
        assert np.isfinite(table).all()
        np.testing.assert_array_equal(table, same)


def test_the_random_numbers_never_change():
    # Recorded once: another value here would silently make every recorded run incomparable.
    table = next(gradient_stream("random", (2, 2), steps=1, seed=0))
    recorded = [[0.17897281050682068, 1.3890069723129272], [0.12356369942426682, -0.9249463677406311]]
    np.testing.assert_array_equal(table, np.array(recorded, dtype=np.float32))


def test_streams_are_what_their_names_say():
    def tables(name, steps=3):
        return np.stack(list(gradient_stream(name, (24, 8), steps)))

    assert not tables("zero").any()
    assert (tables("ones") == 1).all()
    assert (tables("constant") == tables("constant")[0]).all()
    assert (tables("random")[0] != tables("random")[1]).all()
    rare = tables("one rare row", RARE_EVERY + 1)
    assert [step for step, table in enumerate(rare) if table[0].any()] == [0, RARE_EVERY]
    assert rare[:, 1:].all()
    late = tables("row silent then loud", SILENT_STEPS + 1)
    assert not late[:SILENT_STEPS, 0].any()
    assert np.abs(late[SILENT_STEPS, 0]).max() > np.abs(late[:, 1:]).max()
    assert 1e-21 < np.abs(tables("tiny")).max() < 1e-18
    assert 1e14 < np.abs(tables("huge")).max() < 1e17
    rounded = tables("bfloat16-rounded")
    assert not (rounded.view(np.uint32) & 0xFFFF).any()
    np.testing.assert_allclose(rounded, tables("random"), rtol=2**-8)


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1.0, 1.0),
        (1 + 2**-8, 1.0),  # a tie, to the even 1
        (1 + 3 * 2**-8, 1 + 2**-6),  # a tie, to the even neighbour above
        (1 + 2**-8 + 2**-20, 1 + 2**-7),  # just over a tie
        (-(1 + 3 * 2**-8), -(1 + 2**-6)),
        (2 - 2**-10, 2.0),  # into the next power of two
        (2.0**-133, 2.0**-133),  # the smallest there is
        (2.0**-135, 0.0),
        (np.finfo(np.float32).max, np.inf),
        (np.inf, np.inf),
        (np.nan, np.nan),
    ],
)
def test_rounding_to_bfloat16_is_to_nearest_with_ties_to_even(value, rounded):
    np.testing.assert_array_equal(round_to_bfloat16(np.array([value], np.float32)), np.array([rounded], np.float32))


def test_every_bound_has_a_reason_and_a_measurement_within_it():
    assert all(tolerance.reason and 0 < tolerance.measured <= 1 for tolerance in TOLERANCES.values())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_unit_in_the_last_place_is_numpys(dtype):
    values = np.array([1.0, 1.5, 2.0, 0.02, 3e-5, 1e-7, 6e4], dtype)
    np.testing.assert_array_equal(unit_in_the_last_place(values.astype(np.float64), dtype), np.spacing(values))


def test_the_unit_in_the_last_place_of_bfloat16_is_65536_times_that_of_float32():
    values = np.array([1.0, 1.5, 0.02, 1e-30])
    expected = 65536 * unit_in_the_last_place(values, "float32")
    np.testing.assert_array_equal(unit_in_the_last_place(values, "bfloat16"), expected)
    assert unit_in_the_last_place(np.zeros(1), "bfloat16") == 2.0**-133


def test_the_worst_error_is_infinite_where_a_value_is_not_finite():
    assert worst([1.0, 2.5], np.array([1.0, 2.0]), allowed=np.array([1.0, 1.0])) == 0.5
    assert worst([1.0, np.nan], np.array([1.0, 2.0]), allowed=np.array([1.0, 1.0])) == np.inf
    assert set(FORMATS) == {dtype for quantity, dtype in TOLERANCES if quantity == "weight"}
