"""Which rows, columns and tokens are measured, and how many the memory allows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "CLASSES",
    "MEMORY_SHARE",
    "Sizes",
    "choose_hidden",
    "choose_tokens",
    "count_tokens",
    "frequency_classes",
    "sizes",
]

MEMORY_SHARE = 0.05  # of the table's bytes: what measuring may take
CLASSES = ("frequent", "middle", "rare", "never")
# The tokens that make up the first half of the training text, the next 40 %, and the last 10 %.
FREQUENT_UP_TO, MIDDLE_UP_TO = 0.5, 0.9
MOST_ROWS_COUNTED = 20_000  # of the training set: enough to rank tokens, and soon done
BLOCK_COLUMNS = 4  # of all columns, in many rows; few rows have all columns
PATH_ROWS = 48  # they lie on disk, so the memory does not limit them
HIDDEN_MATRICES = 6  # among which the hidden rows are spread, from the first layer to the last


def count_tokens(rows: Sequence[Any], vocabulary: int, max_seq_length: int) -> np.ndarray:
    """How often each token stands in the training set, (vocabulary,) int64.

    Args:
        rows: mlx-lm's data set: ``rows[i][0]`` is a list of tokens. Of more than MOST_ROWS_COUNTED, every n-th.
        max_seq_length (int): What is beyond is not trained on.
    """
    counts = np.zeros(vocabulary, np.int64)
    for i in range(0, len(rows), -(-len(rows) // MOST_ROWS_COUNTED)):
        np.add.at(counts, np.asarray(rows[i][0][:max_seq_length], np.int64), 1)
    return counts


def frequency_classes(counts: np.ndarray) -> np.ndarray:
    """The class of each token, an index into CLASSES, uint8: by the share of the text that it and all more frequent
    ones make up."""
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    total = max(counts.sum(), 1)
    classes = np.empty(len(counts), np.uint8)
    classes[order] = np.searchsorted([FREQUENT_UP_TO * total, MIDDLE_UP_TO * total], before, side="right")
    classes[counts == 0] = CLASSES.index("never")
    return classes


def choose_tokens(
    classes: np.ndarray, counts: np.ndarray, number: int, with_never: bool, rng: np.random.Generator
) -> np.ndarray:
    """About the same number of tokens from each class; within one rather the frequent ones, which are seen more often.

    Args:
        with_never (bool): Whether tokens that the text never has count: their rows of an embedding have no gradient.

    Returns:
        Token ids, ascending, at most ``number``.
    """
    wanted = range(4 if with_never else 3)
    there = [np.flatnonzero(classes == kind) for kind in wanted]
    there = [tokens for tokens in there if tokens.size]
    chosen = []
    for left, tokens in zip(range(len(there), 0, -1), sorted(there, key=len), strict=True):
        take = min(len(tokens), (number - len(chosen)) // left)  # small classes first: what they lack, others get
        weights = np.maximum(counts[tokens], 1)
        chosen.extend(rng.choice(tokens, take, replace=False, p=weights / weights.sum()))
    return np.sort(np.array(chosen, np.int32))


@dataclass(frozen=True)
class Sizes:
    """How much of one table is measured; see :func:`sizes` for the bytes of each."""

    rows: int  # whose gradients are read with all columns
    batch_tokens: int  # of a batch, whose steps are measured
    block_entries: int  # of the gradient, in BLOCK_COLUMNS columns
    hidden_rows: int


def sizes(shape: tuple[int, int], table_bytes: int, shared_bytes: int) -> Sizes:
    """As much as MEMORY_SHARE of the table allows, but never less than what makes a report at all.

    A row of D columns takes 12 D bytes for its gradient, its dense moment and two directions, and 12 D more of scratch
    together with a token of the batch; a hidden row, of about D columns, 6 D; an entry of the block 32.

    Args:
        shape (tuple): (V, D).
        table_bytes (int): What the table itself takes.
        shared_bytes (int): Of the allowance, what is taken already.
    """
    rows, columns = shape
    left = MEMORY_SHARE * table_bytes - shared_bytes
    number = int(np.clip(0.7 * left / (24 * columns), 6, min(256, rows)))
    entries = int(np.clip(0.1 * left / 32, 64, min(8192, rows * BLOCK_COLUMNS)))
    hidden = int(np.clip(0.15 * left / (6 * columns), HIDDEN_MATRICES, 96))
    return Sizes(number, number, entries, hidden)


def choose_hidden(shapes: dict[str, tuple[int, int]], number: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Rows of some matrices, spread evenly from the first to the last.

    Args:
        shapes (dict): path -> (rows, columns).
        number (int): Rows in all.

    Returns:
        A dict, path -> row numbers, ascending.
    """
    if not shapes:
        return {}
    # One of each part by chance: every n-th would be of one kind, as the layers repeat.
    some = [str(rng.choice(part)) for part in np.array_split(list(shapes), min(HIDDEN_MATRICES, len(shapes)))]
    each = max(number // len(some), 1)
    return {
        path: np.sort(rng.choice(shapes[path][0], min(each, shapes[path][0]), replace=False)).astype(np.int32)
        for path in some
    }
