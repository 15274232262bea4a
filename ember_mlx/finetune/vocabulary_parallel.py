"""Embedding and cross entropy of tables whose rows lie on several workers, each of which has its own tokens.

Tokens' ids, hidden states and their gradients go round; rows and their gradients never do. Every worker computes for
the tokens of all, with its own rows. So a row's gradient is whole where it is made: it is that of the mean of the
workers' losses, as ``finetune/workers.py`` makes it of all other gradients.

All workers must exchange in one order. So each makes the same graph, with as many slices, whatever its rows.
"""

import itertools
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ember_mlx.finetune.chunked_loss import backward_in_slices, forward_in_slices, loss_of
from ember_mlx.optimizers.row_shards import RowShards, places_among
from ember_mlx.shared.sizes_in_memory import words_of_a_sharded_head
from ember_mlx.streaming.head_module import Head

__all__ = ["ShardedEmbedding", "look_up", "sharded_cross_entropy", "sharded_loss"]


class ShardedEmbedding(nn.Embedding):
    """An embedding of whose rows some are here, as ``shards`` says; the class of a module that was whole before."""

    shards: RowShards

    def __call__(self, ids: mx.array) -> mx.array:
        return look_up(self.weight, ids, self.shards)


def look_up(weight: mx.array, ids: mx.array, shards: RowShards) -> mx.array:
    """The rows (B, T, D) of the whole table for this worker's ids (B, T), to the bit.

    Args:
        weight: The rows here, (rows, D).
        ids: Of one shape on all workers.
        shards: Of the table.
    """
    place, inside = places_among(shards.gather(ids), shards.first_row, shards.rows)
    inside = inside[..., None]

    @mx.custom_function
    def rows(weight):
        return shards.sum_scatter(mx.where(inside, weight[place], 0))

    @rows.vjp
    def gradient(weight, cotangent, _):
        every = mx.where(inside, shards.gather(cotangent) / shards.size, 0)
        return mx.zeros_like(weight).at[place].add(every.astype(weight.dtype))

    return rows(weight)


def sharded_loss(head: Head, shards: RowShards, *, chunked: bool = False) -> Callable:
    """The loss of :func:`ember_mlx.finetune.chunked_loss.chunked_loss`, whose ``head`` has the words of the rows here.

    All workers call it together, with batches of one shape; each gets the mean over its own tokens. With
    ``chunked`` there are as few logits at a time as with ``--chunked-loss``.
    """
    return loss_of(head, lambda hidden, targets: sharded_cross_entropy(head, shards, hidden, targets, chunked))


def sharded_cross_entropy(
    head: Head, shards: RowShards, hidden: mx.array, targets: mx.array, chunked: bool
) -> mx.array:
    """Of each token of this worker, (B, T) float32, over the words of all workers.

    Args:
        head: Its words are the rows here.
        shards: Of its table.
        hidden, targets: This worker's: the head's input (B, T, D), and the targets (B, T).
        chunked: Whether there are as few logits at a time as with ``--chunked-loss``.
    """
    targets = shards.gather(targets) - shards.first_row
    words = words_of_a_sharded_head(shards.most_rows, targets.size, chunked)
    number = min(-(-shards.most_rows // words), shards.total_rows // shards.size)
    bounds = [i * shards.rows // number for i in range(number + 1)]
    slices = list(itertools.pairwise(bounds))

    @mx.custom_function
    def cross_entropy(hidden, weights):
        every_hidden = shards.gather(mx.depends(hidden, [targets]))
        of_own_words = mx.stack(forward_in_slices(head, every_hidden, weights, targets, slices))
        of_workers = shards.gather(of_own_words[None])  # (N, 2, N * B, T)
        log_sum_exp, chosen = mx.logsumexp(of_workers[:, 0], axis=0), of_workers[:, 1].sum(axis=0)
        return shards.own_part(log_sum_exp - chosen), log_sum_exp, every_hidden

    @cross_entropy.vjp
    def gradients(primals, cotangents, outputs):
        hidden, weights = primals
        _, log_sum_exp, every_hidden = outputs
        cotangent = shards.gather(cotangents[0]) / shards.size
        every, d_weights = backward_in_slices(head, every_hidden, weights, targets, slices, cotangent, log_sum_exp)
        return shards.sum_scatter((every * shards.size).astype(hidden.dtype)), d_weights

    return cross_entropy(hidden, head.weights())[0]
