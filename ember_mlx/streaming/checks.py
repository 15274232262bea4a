"""What a streamed step refuses before it begins, each in one line."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ember_mlx.shared.errors import InputError
from ember_mlx.streaming.marks import are_marks, target_mask
from ember_mlx.streaming.units import is_leaf, put_back_random_state
from ember_mlx.streaming.weights import Weights

__all__ = [
    "check_batches",
    "check_differentiable",
    "check_ids",
    "check_keep_inputs",
    "check_model",
    "extremes_of",
    "refuse_a_trace",
    "refuse_nothing_learned",
    "some_tokens",
]


def some_tokens() -> mx.array:
    """Six tokens, (1, 6), that every vocabulary has."""
    return mx.arange(1, 7)[None]


def check_keep_inputs(value: int) -> None:
    """Refuse anything but a whole number from 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(
            f"StreamedStep(keep_inputs={value!r}): must be a whole number, 1 or more; leave it out for all"
        )


def check_model(model: nn.Module) -> None:
    """Refuse what is no module, and a model with nothing to train."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"StreamedStep(model of type {type(model).__name__}): must be an mlx.nn.Module; the model comes first, "
            "then the optimizer"
        )
    try:
        trainable = tree_flatten(model.trainable_parameters())
    except AttributeError:  # of a module that never called Module.__init__: check_differentiable says so
        return
    if not trainable:
        raise InputError("StreamedStep: nothing in the model is trainable: unfreeze something")


def check_batches(batches: Sequence[tuple]) -> None:
    """Refuse batches that are not ``(tokens, lengths)``; nothing is evaluated.

    Tokens are (B, T + 1), T from 1, of whole numbers. Lengths are (B, 2), or marks of the tokens' shape.
    """
    if not batches:
        raise InputError("StreamedStep: no batch is given: a step takes one or more")
    for batch in batches:
        if len(batch) != 2:
            raise InputError(f"StreamedStep: a batch of {len(batch)} arrays: must be (tokens, lengths)")
        tokens, learned = batch
        for name, array in {"tokens": tokens, "lengths": learned}.items():
            if not isinstance(array, mx.array) and (array is not None or name == "tokens" or tokens.ndim == 2):
                raise InputError(f"StreamedStep: {name} of type {type(array).__name__}: must be an mlx.core.array")
        rows, columns = tokens.shape if tokens.ndim == 2 else (0, 0)
        if not rows or columns < 2 or not mx.issubdtype(tokens.dtype, mx.integer):
            remedy = "; give tokens[None]" if tokens.ndim == 1 else ""
            raise InputError(
                f"StreamedStep: tokens of shape {tokens.shape} and {tokens.dtype}: must be whole numbers of shape "
                f"(rows, 2 or more), the last of a row only predicted{remedy}"
            )
        shape = tokens.shape if are_marks(learned) else (rows, 2)
        if learned.shape != shape or not mx.issubdtype(learned.dtype, mx.integer):
            raise InputError(
                f"StreamedStep: lengths of shape {learned.shape} and {learned.dtype}: must be {(rows, 2)} and signed, "
                f"the first and the last that count in each row; or marks, {tokens.shape} of uint8 or uint32; targets "
                "are the tokens themselves: leave lengths out to learn all"
            )


def extremes_of(batches: Sequence[tuple]) -> list[mx.array]:
    """The smallest and the largest token id of each batch, not evaluated."""
    return [extreme for tokens, _ in batches for extreme in (tokens.min(), tokens.max())]


def check_ids(extremes: Sequence[mx.array], vocabulary: int) -> None:
    """Refuse ids that no row is of: their rows would be read, and written, outside the table.

    Args:
        extremes: Of :func:`extremes_of`, evaluated.
        vocabulary: How many rows the longest token table has.
    """
    found = [extreme.item() for extreme in extremes]
    if min(found) < 0 or max(found) >= vocabulary:
        raise InputError(
            f"StreamedStep: token ids from {min(found)} to {max(found)}: must be from 0 to {vocabulary - 1}, the rows "
            "of the model's tables; take its own tokenizer, and lengths, not -100, for what is not learned"
        )


def refuse_nothing_learned(batches: Sequence[tuple]) -> None:
    """Refuse a batch in which no token counts: the mean over none is NaN."""
    for number, (tokens, learned) in enumerate(batches, 1):
        if target_mask(tokens, learned).any().item():
            continue
        of = f" {number} of {len(batches)}" if len(batches) > 1 else ""
        given, remedy = "marks without bit 0 after the first token", "set it"
        if not are_marks(learned):
            given = f"lengths of {learned[0].tolist()}{' and others' if len(learned) > 1 else ''}"
            remedy = f"first <= last must hold, within 1 to {tokens.shape[1] - 1}"
        raise InputError(f"StreamedStep: batch{of} with {given}: no token counts; {remedy} in a row or more")


def check_differentiable(model: nn.Module) -> None:
    """Build the gradients' graph on six tokens and compute nothing of it.

    Raises:
        InputError: for a model that MLX cannot differentiate.
    """
    key = mx.random.state[0]
    try:
        nn.value_and_grad(model, lambda model: model(some_tokens()).sum())(model)
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"StreamedStep: MLX cannot differentiate {type(model).__module__} ({reason}): no training step works; "
            "freeze the part, or take another model"
        ) from None
    finally:
        put_back_random_state(key)


def refuse_a_trace(weights: Weights, batches: Sequence[tuple]) -> None:
    """Inside a trace MLX keeps the graph of what is evaluated: this would be a plain step, in more memory.

    Raises:
        InputError: inside a trace, and for a model with nothing to train.
    """
    weight = weights.first_trainable()
    if weight is None:
        raise InputError("StreamedStep: nothing in the model is trainable: unfreeze something")
    derived = weight.reshape(-1)[:1] * 1
    try:
        mx.eval(derived, [array for batch in batches for array in batch if isinstance(array, mx.array)])
        inside = not is_leaf(derived)
    except (RuntimeError, ValueError):
        inside = True
    if inside:
        raise InputError(
            "StreamedStep: it was called inside nn.value_and_grad, mx.grad or mx.compile, where nothing can be "
            "freed: call it by itself; it makes the gradients and the update"
        )
