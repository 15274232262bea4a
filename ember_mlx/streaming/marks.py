"""Which tokens of a batch are learned: by mlx-lm's lengths, or by a mark for each token.

Marks are (B, T) uint32, as the tokens. Bit 0 says whether the token is learned. The other bits are the number of its
row in what is packed, from 1; padding is 0.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

__all__ = ["are_marks", "marks_of", "marks_that_learn_all", "mean_loss", "row_numbers", "target_mask"]


def marks_of(length: int, spans: list[tuple[int, int]]) -> np.ndarray:
    """The marks of one row, (length,): the spans are learned, but never the first token, which none predicts."""
    marks = np.full(length, 2, np.uint32)
    for start, end in spans:
        marks[start:end] |= 1
    marks[:1] &= ~np.uint32(1)
    return marks


def are_marks(learned: mx.array) -> bool:
    """Whether these are marks; mlx-lm's lengths, (B, 2), are signed."""
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


def mean_loss(model: Callable[[mx.array], mx.array], tokens: mx.array, learned: mx.array) -> tuple[mx.array, mx.array]:
    """``mlx_lm.tuner.trainer.default_loss``, to the bit with its lengths, which takes marks too.

    Args:
        model: Of token ids, (B, T - 1), the logits.
        tokens, learned: As for :func:`target_mask`.

    Returns:
        The mean cross entropy of the targets that have a loss, in nats, float32; and how many these are.
    """
    mask = target_mask(tokens, learned)
    ce = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]) * mask
    count = mask.sum()
    return ce.astype(mx.float32).sum() / count, count
