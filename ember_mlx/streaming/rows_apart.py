"""Attention within each row of a pack: the masks that mlx-lm's models make are block-diagonal for that time.

All models of mlx-lm ask one function for their masks, ``create_attention_mask``, which they import by name. Rotary
positions are relative, so those of a row may begin anywhere. What else a model has, such as a state that runs through
all tokens or positions that are added, is found by trying it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ember_mlx.shared.errors import InputError
from ember_mlx.streaming.head_module import evaluating, find_head
from ember_mlx.streaming.marks import are_packed, row_numbers
from ember_mlx.token_tables import find_token_tables

__all__ = ["block_diagonal", "check_rows_stay_apart", "rows_apart"]

MAKES_MASKS = "create_attention_mask"
REMEDY = "train without --packing"
ROUNDING = 1e-3  # of a token's norm. Products round up to 6e-7 otherwise, models that mix rows move it by 0.05 or more


def block_diagonal(rows: mx.array, window: int | None = None) -> mx.array:
    """Which tokens (B, 1, T, T) bool each token attends to: those of its row that are not after it.

    Args:
        rows: (B, T), the number of each token's row.
        window: How many tokens back it sees, itself among them; None for all.
    """
    places = mx.arange(rows.shape[1])
    behind = places[:, None] - places
    mask = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
    return (mask & (rows[:, :, None] == rows[:, None, :]))[:, None]


@contextmanager
def rows_apart(model: nn.Module, learned: mx.array) -> Iterator[None]:
    """Within, a call of the model with ``tokens[:, :-1]`` attends within rows, if they are packed.

    Args:
        model: Of mlx-lm's.
        learned: What is learned of the batch, see :mod:`ember_mlx.streaming.marks`.
    """
    if not are_packed(learned):
        yield
        return
    rows = row_numbers(learned)[:, :-1]

    def mask(h, cache=None, window_size=None, return_array=False):
        return block_diagonal(rows, window_size)

    before = [(names, names[MAKES_MASKS]) for names in _names_that_calls_see(model) if MAKES_MASKS in names]
    for names, _ in before:
        names[MAKES_MASKS] = mask
    try:
        yield
    finally:
        for names, own in before:
            names[MAKES_MASKS] = own


def _names_that_calls_see(model):
    """The global names of each file that has a class of the model's."""
    classes = {own for module in model.modules() for own in type(module).__mro__}
    calls = [vars(own).get("__call__") for own in classes]
    return {id(call.__globals__): call.__globals__ for call in calls if hasattr(call, "__globals__")}.values()


def check_rows_stay_apart(model: nn.Module, length: int) -> None:
    """Run two rows as one pack, beside another first row, and alone: the second must not know the difference.

    Args:
        model: As it will train. It is run once on 2 x ``length`` tokens and once on half of one, without gradients.
        length: Tokens of a pack; what a window sees hangs on it.

    Raises:
        InputError: for a model in which it does.
    """
    where = f"--packing: {type(model).__module__}"
    half = max(length // 2, 2)
    tables = find_token_tables(model)
    first, other, second = np.random.RandomState(0).randint(0, min(t.shape[0] for t in tables), (3, half)).tolist()
    packs = mx.array([first + second, other + second])
    marks = mx.broadcast_to(mx.array([2] * half + [4] * (half + 1), mx.uint32), (2, 2 * half + 1))
    with evaluating(model):
        run = _before_the_head(model)
        alone = run(mx.array([second]))[0]
        eps, alone = mx.finfo(alone.dtype).eps, alone.astype(mx.float32)
        mx.eval(alone)
        try:
            with rows_apart(model, marks):
                packed = run(packs)[:, half:].astype(mx.float32)
            apart, moved = _distance(packed[0], packed[1]), _distance(packed[0], alone)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{where} takes no mask for rows in a pack ({reason}); {REMEDY}") from error
    # A product may round a row otherwise beside other rows: some libraries do, and a mixture of experts.
    if not apart <= max(4 * eps, ROUNDING):
        raise InputError(f"{where} does not keep the rows of a pack apart: one changes the next; {REMEDY}")
    # Rotary angles are rounded otherwise elsewhere; positions that are added, or a bias, differ as a whole.
    if not moved <= max(32 * eps, ROUNDING):
        raise InputError(f"{where} reads where in a pack a row stands: its positions are not relative; {REMEDY}")


def _before_the_head(model) -> Callable[[mx.array], mx.array]:
    try:
        return find_head(model).hidden
    except InputError:
        return model


def _distance(found, expected):
    """The largest of a token's distances, by the norm of what is expected."""
    norms = mx.linalg.norm(found - expected, axis=-1) / mx.linalg.norm(expected, axis=-1)
    return norms.max().item()
