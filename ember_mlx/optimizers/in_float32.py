"""MLX's own optimizers made fit for 16-bit weights, and for memory: float32 arithmetic, Adam's state updated in place.

What has which precision in ``ember-mlx train``:

========  ====================================  ==============================
weights   arithmetic                            state (Ember's: float32 always)
========  ====================================  ==============================
float32   float32                               float32
bfloat16  float32; bfloat16, as stock mlx-lm,   bfloat16, as stock mlx-lm
          for the body with --train-tables none
float16   float32                               float32
========  ====================================  ==============================

In float16 Adam's eps of 1e-8 is 0, and a second moment below 6e-8 too: its first step is NaN.
"""

from collections.abc import Callable
from functools import partial

import mlx.core as mx
from mlx.optimizers import Adam, AdamW, MultiOptimizer, Optimizer

__all__ = ["adam_moments", "adam_step", "in_float32", "in_place", "kernel_of_its_own", "stock_in_float32", "wide_step"]

TOO_SMALL = 2**19  # elements, whose memory is not worth a launch


def stock_in_float32(optimizer: Optimizer) -> None:
    """Have MLX's own optimizers compute in float32, in a ``MultiOptimizer`` too; others are left as they are."""
    if isinstance(optimizer, MultiOptimizer):
        for part in optimizer.optimizers:
            stock_in_float32(part)
    elif type(optimizer).__module__ == Optimizer.__module__:
        in_float32(optimizer)


def in_float32(optimizer: Optimizer, but: mx.Dtype | None = None) -> Optimizer:
    """The same optimizer, which computes in float32 for 16-bit weights and rounds once, to nearest, at the end.

    Args:
        optimizer (Optimizer): Of ``mlx.optimizers``, and not a ``MultiOptimizer``; its state must not be made yet.
        but (Dtype, optional): Weights of this dtype are left as the optimizer has them.
    """
    if "init_single" in vars(optimizer):  # it does already
        return optimizer
    init_single, apply_single = optimizer.init_single, in_place(optimizer).apply_single
    widens_itself = type(optimizer) in (Adam, AdamW)

    def init_wide(parameter, state):
        init_single(parameter.astype(mx.float32) if parameter.dtype == mx.float16 else parameter, state)

    def apply_wide(gradient, parameter, state):
        if but is not None and parameter.dtype == but:
            return apply_single(gradient, parameter, state)
        if widens_itself:
            return apply_single(gradient, _wide(parameter), state).astype(parameter.dtype)
        return wide_step(apply_single, gradient, parameter, state).astype(parameter.dtype)

    optimizer.init_single, optimizer.apply_single = init_wide, apply_wide
    return optimizer


def in_place(optimizer: Optimizer) -> Optimizer:
    """The same optimizer with the same bits; inside ``mx.compile`` Adam and AdamW then reuse the memory of their state.

    ``mx.compile`` makes one kernel of all that belongs together, and never reuses the inputs of a kernel with several
    outputs. So each of the three arrays gets a kernel of its own; but of a LoRA adapter three launches take longer.
    """
    if type(optimizer) not in (Adam, AdamW):
        return optimizer

    stock = partial(type(optimizer).apply_single, optimizer)

    def apply(gradient, parameter, state):
        if parameter.size <= TOO_SMALL and gradient.dtype == parameter.dtype == state["m"].dtype:
            return stock(gradient, parameter, state)
        parameter, state["m"], state["v"] = adam_step(
            parameter,
            gradient,
            state["m"],
            state["v"],
            optimizer.step,
            learning_rate=optimizer.learning_rate.astype(parameter.dtype),
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=getattr(optimizer, "weight_decay", None),
            bias_correction=optimizer.bias_correction,
        )
        return parameter

    optimizer.apply_single = apply
    return optimizer


def adam_step(
    w: mx.array,
    g: mx.array,
    m: mx.array,
    v: mx.array,
    t: mx.array,
    *,
    learning_rate: mx.array,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | None,
    bias_correction: bool,
) -> tuple[mx.array, mx.array, mx.array]:
    """MLX's Adam or, with a ``weight_decay``, AdamW, operation by operation; new ``w``, ``m`` and ``v``, of one shape.

    Args:
        w, g (array): A parameter and its gradient. All is computed in the dtype of ``w``.
        m, v (array): First and second moment. In a dtype narrower than that of ``w``, the step is made of them as they
            are kept, rounded: so no wide copy of them exists.
        t (array): The number of this step, from 1.
        learning_rate (array), betas, eps, weight_decay, bias_correction: As in ``mlx.optimizers``.
    """
    dtype = w.dtype
    if weight_decay is not None:
        w = w * (1 - learning_rate * weight_decay)
    new_m, new_v = map(kernel_of_its_own, adam_moments(g, m, v, betas, dtype))
    m, v = new_m.astype(dtype), new_v.astype(dtype)
    if not bias_correction:
        return w - learning_rate * m / (mx.sqrt(v) + eps), new_m, new_v
    c1 = (learning_rate / (1 - betas[0] ** t)).astype(dtype)
    c2 = mx.rsqrt(1 - betas[1] ** t).astype(dtype)
    return w - c1 * m / (mx.sqrt(v) * c2 + eps), new_m, new_v


def adam_moments(
    g: mx.array, m: mx.array, v: mx.array, betas: tuple[float, float], dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Adam's new moments, each in its own dtype, computed in ``dtype`` of a gradient of any.

    The second is made of a view: what two kernels read, ``mx.compile`` widens by a kernel, and into a copy, of its own.
    """
    b1, b2 = betas
    g_of_m, g_of_v = g.astype(dtype), kernel_of_its_own(g).astype(dtype)
    new_m = (b1 * m.astype(dtype) + (1 - b1) * g_of_m).astype(m.dtype)
    return new_m, (b2 * v.astype(dtype) + (1 - b2) * mx.square(g_of_v)).astype(v.dtype)


def wide_step(apply_single: Callable, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
    """The new parameter in float32, of an ``apply_single`` that gets all in float32; ``state`` keeps its dtypes."""
    new_state = {name: _wide(array) for name, array in state.items()}
    new = apply_single(_wide(gradient), _wide(parameter), new_state)
    for name, array in new_state.items():
        state[name] = array.astype(state[name].dtype) if name in state else array
    return new


def _wide(array):
    return array.astype(mx.float32) if array.dtype in (mx.float16, mx.bfloat16) else array


def kernel_of_its_own(array: mx.array) -> mx.array:
    """The same array, made by a kernel of its own: views cost nothing, and ``mx.compile`` fuses nothing across them."""
    return array[None].squeeze(0)
