"""How much of a step is in memory at a time: training and the planner, which needs no MLX, ask here."""

__all__ = [
    "CHUNKED_LOGITS",
    "TARGETS_AT_ONCE",
    "bytes_ahead",
    "bytes_of_kept_logits",
    "rows_of_a_block",
]

CHUNKED_LOGITS = 2**23  # of --chunked-loss, tokens times words; an array of them is 34 MB in float32

# Of a streamed step:
LEAST_AHEAD, SHARE_AHEAD = 2**25, 64
SHARE_OF_LOGITS = 8
BLOCKS, BLOCKS_ON_A_GPU = 36, 18  # there each costs launches and a wait
LOGITS_AT_ONCE = 2**24  # or more blocks, of so many logits
TARGETS_AT_ONCE = 256  # tokens; each meets the rows of all the others' targets


def bytes_ahead(weights: float, layer: float = float("inf")) -> float:
    """How many bytes of new weights and state a GPU is run ahead.

    Args:
        weights: Bytes of all weights.
        layer: Bytes of the weights and the state of the largest layer. Small layers go as one piece, two at a time.
    """
    ahead = max(LEAST_AHEAD, weights // SHARE_AHEAD)
    return 2 * ahead if layer <= ahead else ahead


def bytes_of_kept_logits(weights: float) -> float:
    """Up to how many bytes logits are kept between the passes over the head, for so many bytes of weights."""
    return weights // SHARE_OF_LOGITS


def rows_of_a_block(vocabulary: int, tokens: int, on_a_gpu: bool) -> int:
    """Rows of the head at a time: a multiple of 128."""
    share = -(-vocabulary // (BLOCKS_ON_A_GPU if on_a_gpu else BLOCKS))
    return min(max(128, LOGITS_AT_ONCE // tokens // 128 * 128), -(-share // 128) * 128)
