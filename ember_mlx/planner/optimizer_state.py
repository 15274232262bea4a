"""What each optimizer keeps of a weight: one line an optimizer."""

from collections.abc import Callable
from math import prod

__all__ = ["STATE", "Kept", "state_of"]

FLOAT32 = 4
GROUP = 32  # of ember_mlx.optimizers.companded
Kept = list[tuple[int, int]]
"""Of each array of state: how many numbers, and bytes of each."""


def _adafactor(shape, width):
    return [(size, width) for size in shape] if len(shape) > 1 else [(shape[0], width)]


def _rows(shape):
    """A second moment for each row; queries and keys, whose blocks are heads, have fewer."""
    return (shape[0] if len(shape) > 1 else 1, FLOAT32)


def _eight_bits(shape):
    """Codes in whole groups of 32, and a scale for each group."""
    groups = -(-prod(shape) // GROUP)
    return [(GROUP * groups, 1), (groups, FLOAT32)]


STATE: dict[str, Callable[[tuple[int, ...], int], Kept]] = {
    "ember": lambda shape, width: [(sum(shape), FLOAT32)],  # r and c
    "adam": lambda shape, width: [(prod(shape), width)] * 2,
    "adamw": lambda shape, width: [(prod(shape), width)] * 2,
    "sgd": lambda shape, width: [(prod(shape), width)],  # kept, though there is no momentum
    "muon": lambda shape, width: [(prod(shape), width)],
    "adafactor": _adafactor,
    "adam-mini": lambda shape, width: [(prod(shape), FLOAT32), _rows(shape)],
    "adam-mini int8": lambda shape, width: [*_eight_bits(shape), _rows(shape)],
    "sinkgd": lambda shape, width: [] if len(shape) > 1 else [(prod(shape), FLOAT32)] * 2,
    "flash-adamw": lambda shape, width: _eight_bits(shape) * 2,
    "flash-lion": lambda shape, width: _eight_bits(shape),
    "sage": lambda shape, width: [(prod(shape), FLOAT32), (shape[-1], FLOAT32)],
}
"""By the name of the option: from the shape of a weight and the bytes of its numbers."""
SPLIT = " bf16+int8"  # after a name: an int8 rest of each bfloat16 weight


def state_of(optimizer: str, shape: tuple[int, ...], width: int) -> Kept:
    """What ``optimizer`` keeps of a weight of that shape and so many bytes a number.

    The name is that of the option, with the marks of :func:`ember_mlx.finetune.optimizer_names.planned`.
    """
    name = optimizer.removesuffix(SPLIT)
    return STATE[name](shape, width) + ([(prod(shape), 1)] if name != optimizer and width == 2 else [])
