"""What a streamed step refuses before it begins, each in one line."""

import mlx.core as mx
import mlx.nn as nn

from ember_mlx.shared.errors import InputError
from ember_mlx.streaming.units import is_leaf, put_back_random_state
from ember_mlx.streaming.weights import Weights

__all__ = ["check_at_least_one", "check_differentiable", "refuse_a_trace", "some_tokens"]


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


def refuse_a_trace(weights: Weights) -> None:
    """Inside a trace MLX keeps the graph of what is evaluated: this would be a plain step, in more memory.

    Raises:
        InputError: inside a trace, and for a model with nothing to train.
    """
    weight = weights.first_trainable()
    if weight is None:
        raise InputError("StreamedStep: nothing in the model is trainable: unfreeze something")
    derived = weight.reshape(-1)[:1] * 1
    try:
        mx.eval(derived)
        inside = not is_leaf(derived)
    except (RuntimeError, ValueError):
        inside = True
    if inside:
        raise InputError(
            "StreamedStep: it was called inside nn.value_and_grad, mx.grad or mx.compile, where nothing can be "
            "freed: call it by itself; it makes the gradients and the update"
        )
