"""What is kept from step to step of the readings: sums and counts whose size does not grow with the run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ember_mlx.geometry import measures
from ember_mlx.geometry.probe import TableSample
from ember_mlx.geometry.sampling import CLASSES
from ember_mlx.optimizers.ember import blocks
from ember_mlx.streaming.marks import are_marks
from ember_mlx.token_tables import TokenTable

__all__ = ["COLD", "GAPS", "NEW", "OUTSIDE", "GradientRows", "TableRecord", "TokenHistory", "WeightPaths", "as_float32"]

COSINES = np.linspace(-1, 1, 401)
MULTIPLES = np.geomspace(1e-3, 1e3, 241)  # of the learning rate; 40 bins to a factor of 10
# Updates since the token was last in a batch; NEW: never before, OUTSIDE: it is not in this batch at all.
GAPS = ("1", "2-3", "4-7", "8-15", "16-31", "32-63", "64 and more")
NEW, OUTSIDE = "first time", "not in the batch"
COLD = 10  # learning rates: a step that is ten times what the rate promises is worth knowing
LARGEST_STEPS = 12
ROWS_AT_ONCE = 8  # of a path, from the weights to the disk
NOISE_DRAWS = 500
WALK_DRAWS = 20
LEAST_MOVES = 3  # a path of one or two moves lies on a line or nearly, wherever it goes


class TokenHistory:
    """When each token was last in a batch, in updates: (vocabulary,) int32, 0 for never."""

    def __init__(self, vocabulary: int):
        self.last_seen = np.zeros(vocabulary, np.int32)
        self.pending = np.array([], np.int32)  # in the batches since the last update

    def add_batch(self, batch: tuple[mx.array, mx.array]) -> None:
        tokens, learned = map(np.array, batch)
        there = learned > 0 if are_marks(batch[1]) else np.arange(tokens.shape[1]) < learned[:, 1:]
        self.pending = np.union1d(self.pending, tokens[there]).astype(np.int32)

    def end_update(self, update: int) -> None:
        self.last_seen[self.pending] = update
        self.pending = self.pending[:0]


class GradientRows:
    """Successive gradients of some rows: the cosines of each with the one before, by group.

    Args:
        groups (ndarray): The group of each row, an index.
        names (sequence): The names of the groups.
        shape (tuple): (rows, D).
    """

    def __init__(self, groups: np.ndarray, names: Sequence[str], shape: tuple[int, int]):
        self.groups = groups
        self.names = names
        self.before = np.zeros(shape, np.float16)
        self.cosines = [measures.Histogram(COSINES) for _ in names]

    def add(self, directions: np.ndarray, seen: np.ndarray | slice = slice(None)) -> None:
        """Of all rows, or of those that were seen: each with the time that it was seen before."""
        cosines, groups = measures.cosines(directions[seen], self.before[seen]), self.groups[seen]
        for group, histogram in enumerate(self.cosines):
            histogram.add(cosines[groups == group])
        self.before[seen] = directions[seen]

    def summary(self) -> dict[str, dict[str, float]]:
        return {name: cosines.summary() for name, cosines in zip(self.names, self.cosines, strict=True)}


class WeightPaths:
    """Where some rows of a weight are, every few updates; on disk.

    Args:
        file (Path): A new file.
        rows (ndarray): Row numbers.
        weight (array): As it is at the start, (V, D).
    """

    def __init__(self, file: Path, rows: np.ndarray, weight: mx.array):
        self.file = file
        self.rows = rows
        self.columns = weight.shape[1]
        self.points = 0
        self.add(weight)

    def add(self, weight: mx.array) -> None:
        with open(self.file, "ab") as file:
            for first in range(0, len(self.rows), ROWS_AT_ONCE):
                file.write(as_float32(weight[mx.array(self.rows[first : first + ROWS_AT_ONCE])]).tobytes())
        self.points += 1

    def shares(self, rng: np.random.Generator) -> list[dict[str, float]]:
        """For each row ``{"share", "walk_share", "straightness", "walk_straightness", "moves"}``; NaN for too few
        moves."""
        places = np.memmap(self.file, np.float32, "r", shape=(self.points, len(self.rows), self.columns))
        return [_path_numbers(places[1:, i] - places[0, i], rng) for i in range(len(self.rows))]


def _path_numbers(path, rng):
    lengths = measures.step_lengths(path)
    moves = int((lengths > 0).sum())
    if moves < LEAST_MOVES:
        return {"moves": moves} | dict.fromkeys(("share", "walk_share", "straightness", "walk_straightness"), np.nan)
    path, lengths = path[lengths > 0], lengths[lengths > 0]
    walks = measures.random_walks(lengths, path.shape[1], WALK_DRAWS, rng)
    return {
        "moves": moves,
        "share": measures.share_of_first_direction(path),
        "walk_share": float(np.mean([measures.share_of_first_direction(walk) for walk in walks])),
        "straightness": measures.straightness(path),
        "walk_straightness": float(np.mean([measures.straightness(walk) for walk in walks])),
    }


class TableRecord:
    """All that is measured of one table.

    Args:
        table (TokenTable): The table.
        sample (TableSample): What of it.
        classes (ndarray): Each token's frequency class.
        weight (array): The table as it is at the start.
        folder (Path): For what is kept on disk.
    """

    def __init__(self, table: TokenTable, sample: TableSample, classes: np.ndarray, weight: mx.array, folder: Path):
        self.table = table
        self.sample = sample
        self.classes = classes
        columns = table.shape[1]
        groups = classes[sample.rows]
        self.dense_rows = np.zeros((len(sample.rows), columns), np.float32)
        self.dense_block = np.zeros((len(sample.block_rows), len(sample.block_columns)), np.float32)
        self.row_squares = measures.SquaresSeen(len(sample.rows))
        self.block_squares = measures.SquaresSeen(len(sample.block_rows))
        self.block_r = np.zeros(len(sample.block_rows))
        self.successive = GradientRows(groups, CLASSES, (len(sample.rows), columns))
        self.seen_again = GradientRows(groups, CLASSES, (len(sample.rows), columns))
        self.steps = {gap: measures.Histogram(MULTIPLES) for gap in (NEW, *GAPS, OUTSIDE)}
        self.batch_tokens = dict.fromkeys((NEW, *GAPS), 0)  # of all batches, not only those whose steps are measured
        self.largest_steps = []
        self.start = folder / f"{table.path}.start"
        with open(self.start, "wb") as file:
            for rows in blocks(weight):
                file.write(as_float32(weight[rows]).tobytes())
        self.paths = WeightPaths(folder / f"{table.path}.paths", sample.path_rows, weight)

    def choose_tokens(self, history: TokenHistory, rng: np.random.Generator) -> np.ndarray:
        """Whose steps are measured in the step to come: half the tokens that are longest unseen, else any of the batch,
        and in a table whose every row has a gradient some that are not in the batch."""
        number, batch = self.sample.batch_tokens, rng.permutation(history.pending)
        outside = 0 if self.table.role == "embedding" else number // 4
        longest = batch[np.argsort(history.last_seen[batch], kind="stable")][: (number - outside) // 2]
        rest = np.setdiff1d(batch, longest, assume_unique=True)
        rest = rng.permutation(rest)[: number - outside - len(longest)]
        chosen = [*longest, *rest]
        # A batch of few tokens leaves places, which others take.
        return np.array([*chosen, *rng.integers(0, self.table.shape[0], number - len(chosen))], np.int32)

    def add(self, reading: dict[str, Any], r: mx.array, beta2: float, history: TokenHistory, update: int) -> None:
        """Take in what a step left.

        Args:
            reading (dict): Of :class:`~ember_mlx.geometry.probe.Probe`.
            r (array): Ember's second moment of the rows, (V,).
            beta2 (float): Ember's, of this step.
            history (TokenHistory): As it was before this step, its batch pending.
            update (int): The number of this update, from 1.
        """
        g = np.array(reading["rows"])
        measures.update_dense_second_moment(self.dense_rows, g, beta2)
        measures.update_dense_second_moment(self.dense_block, np.array(reading["block"]), beta2)
        self.row_squares.add(np.square(g, dtype=np.float64).mean(axis=1), beta2)
        r = np.array(r[mx.array(self.sample.block_rows)], np.float64)
        # What Ember was given for these rows: its moment, solved for the mean square of this step.
        self.block_squares.add(np.maximum(r - beta2 * self.block_r, 0) / (1 - beta2), beta2)
        self.block_r = r
        directions = measures.unit_rows(g)
        self.successive.add(directions)
        self.seen_again.add(directions, np.isin(self.sample.rows, history.pending))
        self._add_steps(np.array(reading["tokens"]), np.array(reading["moved"]), history, update)

    def second_moment(self, r: mx.array, c: mx.array, rng: np.random.Generator) -> dict[str, Any]:
        """The log errors of the factored second moment, by frequency class: of the sampled rows in all columns, of the
        sampled columns in their rows, and what noise alone would make of it."""
        r, c, sample = np.array(r, np.float64), np.array(c, np.float64), self.sample
        s = c.mean()
        rows = measures.log_error(r[sample.rows, None], c, s, self.dense_rows)
        block = measures.log_error(r[sample.block_rows, None], c[sample.block_columns], s, self.dense_block)
        return {
            name: {
                "rows": _errors(rows, self.dense_rows, self.row_squares, self.classes[sample.rows] == kind, rng),
                "columns": _errors(
                    block, self.dense_block, self.block_squares, self.classes[sample.block_rows] == kind, rng
                ),
            }
            for kind, name in enumerate(CLASSES)
        }

    def rows_moved(self, weight: mx.array) -> tuple[np.ndarray, np.ndarray]:
        """How far each row is from where it was at the start, and how large it was there: root mean squares over the
        row, both (V,) float32."""
        start = np.memmap(self.start, np.float32, "r", shape=self.table.shape)
        moved = [np.sqrt(np.square(as_float32(weight[rows]) - start[rows]).mean(axis=1)) for rows in blocks(weight)]
        sizes = [np.sqrt(np.square(start[rows]).mean(axis=1)) for rows in blocks(weight)]
        return np.concatenate(moved), np.concatenate(sizes)

    @property
    def nbytes(self) -> int:
        arrays = (self.dense_rows, self.dense_block, self.successive.before, self.seen_again.before)
        squares = (self.row_squares.sum, self.block_squares.sum)
        return sum(array.nbytes for array in arrays) + 2 * sum(array.nbytes for array in squares) + self.block_r.nbytes

    def share_of_steps_above(self, multiple: float) -> float:
        """Of the steps of all tokens in all batches, the share of those that moved the row by more learning rates.

        The tokens that are measured are no fair sample, since those long unseen are preferred; within one gap they are.
        """
        above = sum(number * self.steps[gap].share_above(multiple) for gap, number in self.batch_tokens.items())
        return above / max(sum(self.batch_tokens.values()), 1)

    def _add_steps(self, tokens, moved, history, update):
        if not np.isfinite(moved).all():
            return  # the learning rate is 0, as a warm-up may begin
        for gap, number in zip(*np.unique(_gaps(history, history.pending, update), return_counts=True), strict=True):
            self.batch_tokens[gap] += int(number)
        tokens, first = np.unique(tokens, return_index=True)
        moved, inside = moved[first], np.isin(tokens, history.pending)
        gaps = np.where(inside, _gaps(history, tokens, update), OUTSIDE)
        if self.table.role == "embedding":  # a row that is not in the batch has no gradient and does not move
            tokens, moved, gaps = tokens[inside], moved[inside], gaps[inside]
        for gap, histogram in self.steps.items():
            histogram.add(moved[gaps == gap])
        found = zip(moved.tolist(), tokens.tolist(), gaps.tolist(), strict=True)
        largest = [*self.largest_steps, *((size, token, update, gap) for size, token, gap in found)]
        self.largest_steps = sorted(largest, reverse=True)[:LARGEST_STEPS]


def _gaps(history, tokens, update):
    """The names of the numbers of updates since each token was last in a batch."""
    last = history.last_seen[tokens]
    doublings = np.log2(np.maximum(update - last, 1)).astype(int)
    return np.where(last == 0, NEW, np.array(GAPS)[np.minimum(doublings, len(GAPS) - 1)])


def _errors(errors, dense, squares, of_class, rng):
    """Quantiles of the errors of the rows of one class, and of the noise that their number of squares makes."""
    errors, counts = errors[of_class], squares.count()[of_class]
    found = measures.summary(errors)
    if not found["count"]:
        return found
    counts = counts[np.isfinite(errors).any(axis=1) & (counts > 0)]
    noise = measures.summary(measures.noise_of_dense(counts, NOISE_DRAWS, rng).ravel())
    logs = np.log(dense[of_class], where=np.isfinite(errors), out=np.full(errors.shape, np.nan))
    spread = np.nanvar(logs)
    return found | {
        "noise": noise,
        "squares": float(np.median(counts)),
        "explained": float(1 - np.nanvar(errors) / spread) if spread > 0 else None,
    }


def as_float32(array: mx.array) -> np.ndarray:
    """An mx.array of any floating dtype, for NumPy."""
    return np.array(array.astype(mx.float32))
