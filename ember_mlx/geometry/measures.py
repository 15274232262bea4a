"""What is measured, as pure functions of NumPy arrays. No MLX in here."""

import math

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "Histogram",
    "SquaresSeen",
    "cold_step",
    "cosines",
    "log_error",
    "noise_of_dense",
    "random_walks",
    "share_of_first_direction",
    "step_lengths",
    "straightness",
    "summary",
    "unit_rows",
    "update_dense_second_moment",
]

# Beyond so many dimensions, steps in random directions are as good as orthogonal: shares change by less than 0.01.
WALK_DIMENSIONS = 256


def update_dense_second_moment(v: np.ndarray, g: np.ndarray, beta2: float) -> None:
    """Adam's dense second moment, in place: ``v <- beta2 v + (1 - beta2) g^2``, computed as Ember's own moments are.

    A step towards the square keeps the digits of a beta2 near 1; near 0 it would cancel.

    Args:
        v (ndarray): What was kept so far, float32, zeros at first.
        g (ndarray): The gradient at the same places.
        beta2 (float): Ember's own, so that both moments average over the same steps.
    """
    if beta2 < 0.5:
        v *= beta2
        v += (1 - beta2) * np.square(g)
    else:
        v += (1 - beta2) * (np.square(g) - v)


def log_error(r: np.ndarray | float, c: np.ndarray | float, s: np.ndarray | float, v: np.ndarray | float) -> np.ndarray:
    """``ln(r c / s) - ln(v)``: by how much the factored second moment differs from the dense one.

    The bias correction is the same on both sides and cancels. An error e makes Ember's step exp(-e / 2) times that of
    an optimizer with the dense moment.

    Args:
        r, c (ndarray): The row's and the column's second moment at each place of ``v``, or broadcasting to it.
        s (float): The mean of all of c.
        v (ndarray): The dense second moment.

    Returns:
        An array of ``v``'s shape, NaN where one of the two is 0: there nothing was seen.
    """
    factored = np.asarray(r, np.float64) * np.asarray(c, np.float64) / max(float(s), 1e-30)
    seen = (factored > 0) & (v > 0)
    return np.log(factored, where=seen, out=np.full(v.shape, np.nan)) - np.log(v, where=seen, out=np.zeros(v.shape))


class SquaresSeen:
    """How many equally large squares a row's second moment is worth: Kish's effective sample size.

    ``k = (sum w m)^2 / sum (w m)^2`` over the steps, with the weight ``w`` that each has in the moment and the mean
    square ``m`` of the row's gradient: one large gradient among many small ones counts as one.
    """

    def __init__(self, rows: int):
        self.sum, self.sum_of_squares = np.zeros(rows), np.zeros(rows)

    def add(self, mean_square: np.ndarray, beta2: float) -> None:
        weighted = (1 - beta2) * mean_square
        self.sum = beta2 * self.sum + weighted
        self.sum_of_squares = beta2**2 * self.sum_of_squares + np.square(weighted)

    def count(self) -> np.ndarray:
        return np.divide(self.sum**2, self.sum_of_squares, out=np.zeros_like(self.sum), where=self.sum_of_squares > 0)


def noise_of_dense(k: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """The log error that a second moment of exactly rank one would show, because the dense one is made of few squares.

    Were the gradients normal, the dense moment would be the truth times chi-squared(k) / k.

    Args:
        k (ndarray): Squares seen, of any shape, above 0.
        draws (int): How many errors to draw for each.

    Returns:
        An array of shape (*k.shape, draws).
    """
    k = np.asarray(k, np.float64)[..., None]
    return -np.log(np.maximum(rng.chisquare(np.broadcast_to(k, (*k.shape[:-1], draws))), 1e-300) / k)


def cold_step(bias_correction: float, beta2: float) -> float:
    """About the largest step of a row, in learning rates: that of one whose every earlier gradient was 0.

    Its moment is ``(1 - beta2) g^2``, over the bias correction ``1 - beta2^t``: sqrt(t) at first, and 31.6 in a long
    run with 0.999. "About", since the columns in which its gradient lies may be those that others have little in.
    """
    return math.sqrt(bias_correction / (1 - beta2))


def unit_rows(g: np.ndarray) -> np.ndarray:
    """Each row over its length, float16: a direction needs no more; zeros stay zeros."""
    largest = np.abs(g).max(axis=1, keepdims=True)
    g = np.divide(g, largest, out=np.zeros(g.shape, np.float32), where=largest > 0)  # squares of 1e-30 would vanish
    return (g / np.maximum(np.linalg.norm(g, axis=1, keepdims=True), 1)).astype(np.float16)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cosine between each row of ``a`` and ``b``, which :func:`unit_rows` made; NaN where one of them is 0.

    Between independent directions in D dimensions it is 0 give or take 1 / sqrt(D).
    """
    a, b = a.astype(np.float32), b.astype(np.float32)
    return np.where(a.any(axis=1) & b.any(axis=1), (a * b).sum(axis=1), np.nan)


def share_of_first_direction(path: np.ndarray) -> float:
    """How much of a path lies on one line through its start: the first squared singular value over all of them.

    Args:
        path (ndarray): Displacements from the start, (points, D), the start itself left out.

    Returns:
        From 1 / points to 1; NaN for a path that never moves.
    """
    path = path.astype(np.float64)
    squares = np.linalg.eigvalsh(path @ path.T)
    return squares[-1] / squares.sum() if squares.sum() > 0 else np.nan


def straightness(path: np.ndarray) -> float:
    """The length of the displacement over the length of the way: 1 for a straight line, NaN for no move."""
    way = step_lengths(path).sum()
    return np.linalg.norm(path[-1].astype(np.float64)) / way if way > 0 else np.nan


def step_lengths(path: np.ndarray) -> np.ndarray:
    """The lengths of the moves between the points, the first from the start."""
    return np.linalg.norm(np.diff(path.astype(np.float64), axis=0, prepend=0), axis=1)


def random_walks(lengths: np.ndarray, dimensions: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Paths with these moves, each in a direction of its own at random: what is compared with.

    A random walk is no ray, and yet its first direction has a large share: 8 / pi^2 = 0.81 for many equal steps in
    many dimensions, for that is the first eigenvalue of Brownian motion from its start.

    Returns:
        An array (draws, points, min(dimensions, WALK_DIMENSIONS)).
    """
    moves = rng.standard_normal((draws, len(lengths), min(dimensions, WALK_DIMENSIONS)))
    moves *= lengths[:, None] / np.linalg.norm(moves, axis=2, keepdims=True)
    return np.cumsum(moves, axis=1)


def summary(values: ArrayLike) -> dict[str, float]:
    """``{"count", "p10", "median", "p90"}`` of the finite values; only the count if there is none."""
    values = np.asarray(values)[np.isfinite(values)]
    if not values.size:
        return {"count": 0}
    p10, median, p90 = np.quantile(values, [0.1, 0.5, 0.9])
    return {"count": int(values.size), "p10": float(p10), "median": float(median), "p90": float(p90)}


class Histogram:
    """Counts of values in bins, for quantiles of any number of values in little memory.

    Values outside count in the first or the last bin.

    Quantiles are interpolated within a bin, so they are as exact as a bin is wide.
    """

    def __init__(self, edges: np.ndarray):
        self.edges = np.asarray(edges)
        self.counts = np.zeros(len(edges) - 1, np.int64)

    def add(self, values: ArrayLike) -> None:
        values = np.asarray(values)[np.isfinite(values)]
        self.counts += np.histogram(np.clip(values, self.edges[0], self.edges[-1]), self.edges)[0]

    def quantile(self, q: float) -> float:
        below = np.concatenate([[0], np.cumsum(self.counts)])
        return float(np.interp(q * below[-1], below, self.edges))

    def share_above(self, value: float) -> float:
        """The share of the values above one, which should be an edge."""
        return float(self.counts[self.edges[:-1] >= value].sum() / max(self.counts.sum(), 1))

    def summary(self) -> dict[str, float]:
        count = int(self.counts.sum())
        if not count:
            return {"count": 0}
        return {"count": count} | {name: self.quantile(q) for name, q in (("p10", 0.1), ("median", 0.5), ("p90", 0.9))}
