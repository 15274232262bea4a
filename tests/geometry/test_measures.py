"""The measures against gradients whose shape is known."""

import numpy as np
import pytest

from ember_mlx.geometry import measures


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def moments(scale, steps, rng, beta2=0.99):
    """Ember's r, c and the dense v after ``steps`` of normal gradients with this standard deviation, (V, D)."""
    r, c, v = np.zeros(len(scale)), np.zeros(scale.shape[1]), np.zeros(scale.shape)
    for _ in range(steps):
        g = scale * rng.standard_normal(scale.shape)
        r, c = (moment + (1 - beta2) * (np.square(g).mean(axis) - moment) for moment, axis in ((r, 1), (c, 0)))
        measures.update_dense_second_moment(v, g, beta2)
    return r, c, v


@pytest.mark.parametrize("beta2", [0.0, 1e-30, 1e-9, 0.1, 0.5, 0.999, 1 - 2.0**-24])
def test_a_dense_second_moment_is_right_for_every_beta2(rng, beta2):
    v, exact = np.zeros(100, np.float32), np.zeros(100)
    for step, size in enumerate([1, 1e-3, 1e-6, 1e-6, 1e3], start=1):
        g = (size * rng.standard_normal(100)).astype(np.float32)
        measures.update_dense_second_moment(v, g, beta2)
        exact = beta2 * exact + (1 - beta2) * np.square(g, dtype=np.float64)
        # Three roundings a step, each of at most half a unit: of the square, of the product, of the sum.
        np.testing.assert_allclose(v, exact, rtol=4 * step * 2.0**-24)


def test_the_log_error_of_a_rank_one_moment_is_the_noise_of_the_dense_one_and_of_another_is_more(rng):
    rows, columns = np.exp(rng.standard_normal((200, 1))), np.exp(0.5 * rng.standard_normal((1, 64)))
    steps = 30
    spreads = {}
    for name, scale in {
        "rank one": rows * columns,
        "not": rows * columns * np.exp(rng.standard_normal((200, 64))),
    }.items():
        r, c, v = moments(scale, steps, rng)
        spreads[name] = measures.summary(measures.log_error(r[:, None], c, c.mean(), v))
    noise = measures.summary(measures.noise_of_dense(np.full(200, steps), 100, rng))
    assert noise["p10"] == pytest.approx(spreads["rank one"]["p10"], abs=0.04)
    assert noise["p90"] == pytest.approx(spreads["rank one"]["p90"], abs=0.04)
    # exp(2 x normal) has a log spread of 2.56 x 2 between its 10 % and 90 %.
    assert spreads["not"]["p90"] - spreads["not"]["p10"] > 3 * (noise["p90"] - noise["p10"])


def test_where_nothing_was_seen_there_is_no_error():
    errors = measures.log_error(np.array([[0.0], [2.0]]), np.array([1.0, 3.0]), 2.0, np.array([[0.0, 0.0], [1.0, 0.0]]))
    assert np.isnan(errors).tolist() == [[True, True], [False, True]]
    assert errors[1, 0] == 0


def test_one_large_gradient_among_small_ones_counts_as_one():
    seen = measures.SquaresSeen(2)
    for step in range(10):
        seen.add(np.array([1.0, 1.0 if step == 3 else 1e-6]), beta2=1 - 1e-6)
    assert seen.count() == pytest.approx([10, 1], rel=1e-3)


def test_cosines_of_rows():
    a = measures.unit_rows(np.array([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0], [1e-30, 0.0]]))
    b = measures.unit_rows(np.array([[6.0, 8.0], [0.0, -5.0], [1.0, 1.0], [1.0, 1.0]]))
    assert measures.cosines(a, b) == pytest.approx([1, -1, np.nan, np.sqrt(0.5)], abs=1e-3, nan_ok=True)


def test_a_line_a_walk_and_a_corner(rng):
    line = np.outer([1, 2, 5, 7], rng.standard_normal(16))
    assert measures.share_of_first_direction(line) == pytest.approx(1)
    assert measures.straightness(line) == pytest.approx(1)
    corner = np.array([[1.0, 0.0], [1.0, 1.0]])
    assert measures.straightness(corner) == pytest.approx(np.sqrt(2) / 2)
    # Brownian motion from its start has 8 / pi^2 of its variance on its first direction.
    walks = measures.random_walks(np.ones(400), 4096, 10, rng)
    assert walks.shape == (10, 400, measures.WALK_DIMENSIONS)
    shares = [measures.share_of_first_direction(walk) for walk in walks]
    assert np.mean(shares) == pytest.approx(8 / np.pi**2, abs=0.015)
    assert measures.step_lengths(walks[0]) == pytest.approx(np.ones(400))


def test_quantiles_of_a_histogram_are_those_of_the_values(rng):
    values = rng.uniform(0.1, 10, 5000)
    histogram = measures.Histogram(np.geomspace(1e-3, 1e3, 241))
    for part in np.split(values, 5):
        histogram.add(np.append(part, np.nan))
    for name, value in measures.summary(values).items():
        assert histogram.summary()[name] == pytest.approx(value, rel=0.06), name
    assert histogram.share_above(1.0) == pytest.approx((values > 1).mean(), abs=1e-3)
