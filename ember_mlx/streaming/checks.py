"""What a streamed step refuses before it begins, each in one line."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ember_mlx.shared.errors import InputError
from ember_mlx.streaming.units import is_leaf, put_back_random_state
from ember_mlx.streaming.weights import Weights

__all__ = [
    "check_at_least_one",
    "check_batches",
    "check_differentiable",
    "check_model",
    "refuse_a_trace",
    "some_tokens",
]


def some_tokens() -> mx.array:
    """Six tokens, (1, 6), that every vocabulary has."""
    return mx.arange(1, 7)[None]


def check_at_least_one(name: str, value: int) -> int:
    """The value of an option that counts something.

    Raises:
        InputError: for anything but a whole number from 1.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"StreamedStep({name}={value!r}): must be a whole number, 1 or more; leave it out for all")
    return value


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
    """Refuse batches that are not ``(tokens, lengths)`` with tokens of shape (B, T + 1), T from 1, of whole numbers."""
    if not batches:
        raise InputError("StreamedStep: no batch is given: a step takes one or more")
    for batch in batches:
        if len(batch) != 2:
            raise InputError(f"StreamedStep: a batch of {len(batch)} arrays: must be (tokens, lengths)")
        tokens = batch[0]
        if not isinstance(tokens, mx.array):
            raise InputError(f"StreamedStep: tokens of type {type(tokens).__name__}: must be an mlx.core.array")
        rows, columns = tokens.shape if tokens.ndim == 2 else (0, 0)
        if not rows or columns < 2 or not mx.issubdtype(tokens.dtype, mx.integer):
            raise InputError(
                f"StreamedStep: tokens of shape {tokens.shape} and {tokens.dtype}: must be whole numbers of shape "
                "(rows, 2 or more), the last of a row only predicted"
            )


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


def refuse_a_trace(weights: Weights, batches: Sequence[tuple] = ()) -> None:
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
