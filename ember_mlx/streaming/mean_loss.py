"""The loss of a batch: mlx-lm's, which takes marks and packed rows too."""

import mlx.core as mx
import mlx.nn as nn

from ember_mlx.streaming.marks import target_mask
from ember_mlx.streaming.rows_apart import rows_apart

__all__ = ["mean_loss"]


def mean_loss(model: nn.Module, tokens: mx.array, learned: mx.array) -> tuple[mx.array, mx.array]:
    """``mlx_lm.tuner.trainer.default_loss``, to the bit with its lengths.

    Args:
        model: Of mlx-lm's.
        tokens, learned: A batch, as :func:`ember_mlx.streaming.marks.target_mask` takes it.

    Returns:
        The mean cross entropy of the targets that have a loss, in nats, float32; and how many these are.
    """
    with rows_apart(model, learned):
        logits = model(tokens[:, :-1])
    mask = target_mask(tokens, learned)
    ce = nn.losses.cross_entropy(logits, tokens[:, 1:]) * mask
    count = mask.sum()
    return ce.astype(mx.float32).sum() / count, count
