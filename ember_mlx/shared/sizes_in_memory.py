"""How much of a step is in memory at a time: training and the planner, which needs no MLX, ask here."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

__all__ = [
    "CHUNKED_LOGITS",
    "GRADIENTS_TOGETHER",
    "TARGETS_AT_ONCE",
    "HeadBlocks",
    "blocks_of_a_head",
    "bytes_ahead",
    "bytes_of_kept_logits",
    "sent_together",
    "words_of_a_sharded_head",
]

CHUNKED_LOGITS = 2**23  # of --chunked-loss, tokens times words; an array of them is 34 MB in float32
SHARDED_SLICES = 4  # of --shard-tables; a GPU waits for the host at each
GRADIENTS_TOGETHER = 2**25  # bytes of them that go over the wire at once, as of mlx.nn.average_gradients

# Of a streamed step:
LEAST_AHEAD, SHARE_AHEAD, LITTLE_STATE = 2**25, 64, 8
SHARE_OF_LOGITS = 8
BLOCKS = 36  # of a head, or more
LOGITS_AT_ONCE = 2**24
# A GPU waits for the host at each block, so it has fewer, as large as their scratch may be. It makes logits anew.
SHARE_OF_SCRATCH, MOST_SCRATCH = 8, 2**29
SHARE_THAT_WAITS = 4  # of the scratch, for new rows that are not yet written
FEWEST_BLOCKS = 4
# Numbers that a layer's backward pass holds, for each output of its linears and each feature: measured, and by plan.
HELD_ON_A_CPU, HELD_ON_A_GPU = 4, 5
TARGETS_AT_ONCE = 512  # tokens; each meets the rows of all the others' targets; and rows that were looked up


def sent_together(nbytes: Mapping[str, float], at_once: int) -> Iterator[tuple[str, ...]]:
    """The names of gradients of one dtype that are sent as one array.

    Large ones go alone, so that they can go as soon as they are there. Small ones are joined until they are ``at_once``
    bytes or more.
    """
    some, size = [], 0
    for name, of_one in nbytes.items():
        if of_one >= at_once:
            yield (name,)
            continue
        some.append(name)
        size += of_one
        if size >= at_once:
            yield tuple(some)
            some, size = [], 0
    if some:
        yield tuple(some)


def words_of_a_sharded_head(rows: int, tokens: int, chunked: bool) -> int:
    """How many words of a sharded head have their logits at a time.

    A quarter of them has, in float32, no more bytes than an ordinary step's logits in 16 bits.

    Args:
        rows: Of the head, on one worker.
        tokens: Of all workers.
        chunked: Whether there may be no more logits than with --chunked-loss.
    """
    words = max(CHUNKED_LOGITS // tokens, 1)
    return words if chunked else max(words, -(-rows // SHARDED_SLICES))


def bytes_ahead(weights: float, state: float) -> float:
    """How many bytes of new weights and state a GPU is run ahead.

    Twice as many where there is little state: the kernels of optimizers that have it take copies of gradients, too.

    Args:
        weights, state: Bytes of all weights, and of the optimizer's state on this machine.
    """
    ahead = max(LEAST_AHEAD, weights // SHARE_AHEAD)
    return 2 * ahead if LITTLE_STATE * state <= weights else ahead


def bytes_of_kept_logits(weights: float, on_a_gpu: bool) -> float:
    """Up to how many bytes logits are kept between the passes over the head, for so many bytes of weights."""
    return 0 if on_a_gpu else weights // SHARE_OF_LOGITS


class HeadBlocks(NamedTuple):
    """How a head is cut.

    Attributes:
        rows: Of a block in the passes that only read the head, a multiple of 128.
        stepped: Of a block in the pass that steps the rows, and wherever the logits are kept.
        waiting: Bytes of new rows that may wait to be written.
        keeps_gradient: Whether its gradient is made once and kept, from its statistics to its step, and not made twice.
    """

    rows: int
    stepped: int
    waiting: int
    keeps_gradient: bool


def blocks_of_a_head(
    vocabulary: int,
    features: int,
    width: float,
    tokens: int,
    weights: float,
    on_a_gpu: bool,
    *,
    tokens_of_a_layer: int = 0,
    outputs_of_a_layer: int = 0,
) -> HeadBlocks:
    """How a head of (V, D) is cut.

    Where a layer's backward pass holds more than the passes over the head take, it is the peak, not they. So those that
    only read may take as much, and the gradient is kept where it fits into that with its scratch. Few tokens have their
    statistics from quadratic forms, without it.

    Args:
        vocabulary, features: V and D.
        width: Bytes of a number of the hidden states.
        tokens: Of a step.
        weights: Bytes of all weights.
        on_a_gpu: Whether blocks cost time by their number.
        tokens_of_a_layer: Of the largest micro-batch, which a layer's backward pass takes at a time.
        outputs_of_a_layer: Numbers of a token that its linears give together; 0 where no layer has a backward pass.
    """
    has_gradient = tokens > features // 2  # else there are quadratic forms
    held = HELD_ON_A_GPU if on_a_gpu else HELD_ON_A_CPU
    of_a_layer = held * (outputs_of_a_layer + features) * tokens_of_a_layer * width

    def keeps(stepped):
        taken = vocabulary * features * width + stepped * (3 * 4 * tokens + 4 * features)
        return bool(outputs_of_a_layer) and has_gradient and taken <= of_a_layer

    least = min(max(128, LOGITS_AT_ONCE // tokens // 128 * 128), _multiple(-(-vocabulary // BLOCKS)))
    if not on_a_gpu:
        return HeadBlocks(least, least, 0, keeps(least))
    scratch = int(min(weights // SHARE_OF_SCRATCH, MOST_SCRATCH))
    waiting = scratch // SHARE_THAT_WAITS
    of_logits = 3 * 4 * tokens  # bytes of a row: the logits in 16 bits, and what is made of them in float32
    squared = 4 * features if has_gradient else 0
    stepped = 2 * width * features  # the gradient and the new row

    def rows(nbytes, of_a_row):
        most = max(least, nbytes // (of_logits + of_a_row))
        return _multiple(-(-vocabulary // max(FEWEST_BLOCKS, -(-vocabulary // most))))  # of one size

    of_the_step = rows(scratch - waiting, int(stepped))
    return HeadBlocks(rows(max(scratch, int(of_a_layer)), squared), of_the_step, waiting, keeps(of_the_step))


def _multiple(rows):
    return -(-rows // 128) * 128
