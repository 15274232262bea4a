"""What each optimizer keeps of a weight: one line an optimizer."""

from collections.abc import Callable
from math import prod

__all__ = ["STATE", "Kept"]

FLOAT32 = 4
Kept = list[tuple[int, int]]
"""Of each array of state: how many numbers, and bytes of each."""


def _adafactor(shape, width):
    return [(size, width) for size in shape] if len(shape) > 1 else [(shape[0], width)]


def _adam_mini(shape, width):
    """A second moment for each row; queries and keys, whose blocks are heads, have fewer."""
    return [(prod(shape), FLOAT32), (shape[0] if len(shape) > 1 else 1, FLOAT32)]


STATE: dict[str, Callable[[tuple[int, ...], int], Kept]] = {
    "ember": lambda shape, width: [(sum(shape), FLOAT32)],  # r and c
    "adam": lambda shape, width: [(prod(shape), width)] * 2,
    "adamw": lambda shape, width: [(prod(shape), width)] * 2,
    "sgd": lambda shape, width: [(prod(shape), width)],  # kept, though there is no momentum
    "muon": lambda shape, width: [(prod(shape), width)],
    "adafactor": _adafactor,
    "adammini": _adam_mini,
    "sinkgd": lambda shape, width: [] if len(shape) > 1 else [(prod(shape), FLOAT32)] * 2,
}
"""By the name of the option: from the shape of a weight and the bytes of its numbers."""
