"""Which tokens of a batch are learned: by mlx-lm's lengths, or by a mark for each token.

Marks are (B, T), as the tokens. Bit 0 says whether the token is learned. The other bits are the number of its row, from
1; padding is 0. Marks are uint8 where every row is alone, and uint32 where rows are packed.
"""

import mlx.core as mx
import numpy as np

__all__ = [
    "are_marks",
    "are_packed",
    "marks_of",
    "marks_of_pack",
    "marks_that_learn_all",
    "row_numbers",
    "target_mask",
]


def marks_of(length: int, spans: list[tuple[int, int]]) -> np.ndarray:
    """The marks of a row that is alone, (length,) uint8.

    Args:
        length: Tokens of the row.
        spans: The first and the one after the last of the tokens that are learned. The first of a row never is, since
            none predicts it.
    """
    marks = np.full(length, 2, np.uint8)
    for start, end in spans:
        marks[max(start, 1) : end] |= 1
    return marks


def marks_of_pack(rows: list[tuple[int, list[tuple[int, int]]]]) -> np.ndarray:
    """The marks of rows that are packed, uint32, from the length and the spans of each."""
    return np.concatenate([marks_of(*row).astype(np.uint32) + 2 * i for i, row in enumerate(rows)])


def are_marks(learned: mx.array) -> bool:
    """Whether these are marks; mlx-lm's lengths, (B, 2), are signed."""
    return learned.dtype in (mx.uint8, mx.uint32)


def are_packed(learned: mx.array) -> bool:
    """Whether these are marks of rows that are packed."""
    return learned.dtype == mx.uint32


def row_numbers(marks: mx.array) -> mx.array:
    """Which row of its pack a token is of, from 1; 0 for padding."""
    return marks >> 1


def marks_that_learn_all(marks: mx.array) -> mx.array:
    """The same rows, all of whose tokens are learned."""
    return marks | 1


def target_mask(tokens: mx.array, learned: mx.array) -> mx.array:
    """Which of the targets, ``tokens[:, 1:]``, have a loss: (B, T - 1) bool.

    Args:
        tokens: (B, T) token ids.
        learned: Marks; or mlx-lm's lengths, the first and the last that count in each row.
    """
    if are_marks(learned):
        return (learned[:, 1:] & 1).astype(mx.bool_)
    steps = mx.arange(1, tokens.shape[1])
    return mx.logical_and(steps >= learned[:, 0:1], steps <= learned[:, 1:])
