"""Gradients that a streamed step has made, seen by an optimizer that notes them and changes nothing."""

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.trainer import default_loss


class Spy(Optimizer):
    """Keeps each weight's gradient as its state."""

    def init_single(self, parameter, state):
        state["gradient"] = mx.full(parameter.shape, mx.nan)

    def apply_single(self, gradient, parameter, state):
        state["gradient"] = gradient
        return parameter

    def gradients(self, names):
        flat = dict(tree_flatten(self.state))
        return {name: flat[f"{name}.gradient"] for name in names}


def randomized(model, seed=0):
    """Some heads and gains start at zero, which would hide every gradient behind them."""
    mx.random.seed(seed)
    floating = [(n, p) for n, p in tree_flatten(model.parameters()) if mx.issubdtype(p.dtype, mx.floating)]
    model.update(tree_unflatten([(n, p + 0.05 * mx.random.normal(p.shape).astype(p.dtype)) for n, p in floating]))
    mx.eval(model.parameters())
    return model


def ordinary(model, batch, lengths, loss=default_loss):
    """The loss and all gradients, flat, of an ordinary step."""
    (value, _), gradients = nn.value_and_grad(model, loss)(model, batch, lengths)
    gradients = dict(tree_flatten(gradients))
    mx.eval(value, gradients)
    return value.item(), gradients


def worst_difference(found, expected):
    """Over all arrays, in the largest element of each; an array whose gradient is zero must be left alone, or zero.

    What is below 2e-7 of the largest gradient of the model, two eps, is rounding, which hangs on the library of the
    products: a scale before a norm, a gate that cancels.
    """
    worst, least = (0.0, None), 2e-3 * max(mx.abs(gradient).max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        error = mx.abs(mx.nan_to_num(found[name], nan=0.0) - gradient).max().item()
        worst = max(worst, (error / max(mx.abs(gradient).max().item(), least), name), key=lambda pair: pair[0])
    return worst
