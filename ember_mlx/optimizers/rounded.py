"""Stochastic rounding for the weights of any MLX optimizer that looks at one array at a time.

At usual learning rates most bfloat16 weights do not move at all to nearest. Here the optimizer computes in float32, and
the new weight is rounded once, by bits that are keyed as those of token tables: by (seed, step, row, column).
"""

import itertools
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.optimizers import Adam, AdamW, MultiOptimizer, Optimizer
from mlx.utils import tree_flatten, tree_map

from ember_mlx import kernels
from ember_mlx.kernels.stochastic_rounding import DROPPED_BITS, bit_keys, table_seed
from ember_mlx.optimizers import adam_kernel, sinkgd_kernel
from ember_mlx.optimizers.ember import bias_correction, update_table
from ember_mlx.optimizers.guarded import applied_if
from ember_mlx.optimizers.in_float32 import adam_moments, wide_step
from ember_mlx.optimizers.sinkgd import SinkGD, sinkhorn_factors
from ember_mlx.shared.errors import InputError

__all__ = ["StochasticRounding", "round_step"]


def round_step(w: mx.array, new: mx.array, seed: mx.array, t: mx.array) -> mx.array:
    """A 16-bit array stepped to ``w - (w - new)``, computed in float32 and rounded stochastically.

    The difference is what the step is, and what the kernel for tables takes as a gradient.

    Args:
        w: The old values, bfloat16 or float16, of any shape.
        new: The new ones, of the same shape, float32.
        seed, t: Of ``w`` and of this step, uint32: they key the random bits, by all axes but the last, and that one.

    Returns:
        The new values, in the shape and dtype of ``w``.
    """
    step = w.astype(mx.float32) - new
    rows, columns = math.prod(w.shape[:-1]), w.shape[-1] if w.ndim else 1
    if kernels.usable(kernels.weight_rounding, w.dtype):
        values = (w.astype(mx.float32) - step).reshape(rows, columns)
        return kernels.weight_rounding.round_weights(values, seed, t, w.dtype).reshape(w.shape)
    keys, ones = bit_keys(seed, t, rows, columns), (mx.ones((rows,)), mx.ones((columns,)))
    w_rows, step = w.reshape(rows, columns), step.reshape(rows, columns)
    return update_table(w_rows, step, *ones, 1.0, 0.0, 0.0, keys).reshape(w.shape)


class StochasticRounding(Optimizer):
    """Any MLX optimizer, with its 16-bit weights rounded stochastically; float32 weights are stepped as ever.

    State is made in the dtype of the weights, as MLX makes it, but for float16 weights in float32. It goes wherever the
    optimizer goes, in ordinary and in streamed steps:
    ``PairedOptimizer(model, tables=Ember(...), rest=StochasticRounding(AdamW(1e-5)))``.

    Args:
        optimizer (Optimizer): One that looks at one array at a time, made.
        seed (int): From 0 to 2^32 - 1; another one than that of the tables' Ember.

    Raises:
        InputError: (a ``ValueError``) for a ``MultiOptimizer``, whose parts are to be wrapped instead, and for anything
            that is no optimizer or no such seed.
    """

    def __init__(self, optimizer: Optimizer, seed: int = 0):
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, MultiOptimizer):
            raise InputError(
                f"StochasticRounding({type(optimizer).__name__}): must be an mlx.optimizers.Optimizer, made; wrap the "
                "parts of a MultiOptimizer one by one"
            )
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise InputError(f"StochasticRounding(seed={seed!r}): must be a whole number from 0 to 4294967295")
        super().__init__()
        self.optimizer = optimizer
        self.seed = seed
        self._schedulers = optimizer._schedulers

    def init(self, parameters: Mapping[str, Any]) -> None:
        """Make the state of a tree of parameters, and a seed of each 16-bit one."""
        for dtype in {array.dtype for _, array in tree_flatten(parameters)} & set(DROPPED_BITS):
            moments = mx.bfloat16 if dtype == mx.bfloat16 else mx.float32
            kernels.usable(kernels.weight_rounding, dtype)  # tried now: a first step may be one that MLX traces
            if type(self.optimizer) is SinkGD:
                kernels.usable(kernels.sinkhorn, dtype)
                kernels.usable(sinkgd_kernel, dtype, dtype)
            else:
                kernels.usable(adam_kernel, dtype, dtype, moments)
        # In float16 a second moment below 6e-8 is 0, and so is Adam's eps: see in_float32.py.
        float16_as_wide = tree_map(lambda w: w.astype(mx.float32) if w.dtype == mx.float16 else w, parameters)
        self.optimizer.init(float16_as_wide)
        number = itertools.count()

        def give_a_seed(parameter, state):
            if parameter.dtype in DROPPED_BITS:
                state.setdefault("seed", table_seed(self.seed, next(number)))

        tree_map(give_a_seed, parameters, self.state)
        self._initialized = True

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        """The parameter after one step, in its own shape and dtype; ``state`` is stepped in place."""
        if (step := self._kernel_for(gradient, parameter, state)) is not None:
            return step(gradient, parameter, state)
        if parameter.dtype not in DROPPED_BITS:
            return self.optimizer.apply_single(gradient, parameter, state)
        seed, t = state["seed"], self.step.astype(mx.uint32)
        if self._is_adam:
            # The moments are computed twice, for the weight of views: what two kernels read, mx.compile makes by one
            # more, and in float32. So there are three, and what rounds.
            w, g, m, v = parameter, gradient, state["m"], state["v"]
            stock = partial(type(self.optimizer).apply_single, self.optimizer)
            new = wide_step(stock, g[None], w[None], {"m": m[None], "v": v[None]})
            state["m"], state["v"] = adam_moments(g, m, v, self.optimizer.betas, mx.float32)
            return round_step(w[None], new, seed, t).squeeze(0)
        inside = {name: value for name, value in state.items() if name != "seed"}
        new = wide_step(self.optimizer.apply_single, gradient, parameter, inside)
        state.update(inside)
        return round_step(parameter, new.astype(mx.float32), seed, t)

    def apply_single_if(
        self, finite: mx.array, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]
    ) -> mx.array:
        """As :meth:`apply_single` where ``finite``, a bool array (), else nothing changes; a kernel selects itself."""
        if (step := self._kernel_for(gradient, parameter, state)) is not None:
            return step(gradient, parameter, state, finite)
        return applied_if(finite, self.apply_single, gradient, parameter, state)

    @property
    def _is_adam(self):
        return type(self.optimizer) in (Adam, AdamW)

    def _kernel_for(self, gradient, parameter, state):
        """What makes the whole step by one kernel on a GPU, or None."""
        if parameter.dtype not in DROPPED_BITS:
            return None
        is_sinkgd = type(self.optimizer) is SinkGD
        if is_sinkgd and "m" not in state:
            return self._step_sinkgd if kernels.usable(sinkgd_kernel, parameter.dtype, gradient.dtype) else None
        if is_sinkgd or self._is_adam:
            dtypes = parameter.dtype, gradient.dtype, state["m"].dtype
            return self._step_adam if kernels.usable(adam_kernel, *dtypes) else None
        return None

    def _step_adam(self, gradient, parameter, state, finite=None):
        optimizer, (b1, b2) = self.optimizer, self.optimizer.betas
        rate, correction = optimizer.learning_rate.astype(mx.float32), 1.0
        decay = 1 - rate * self._decay_of(parameter)
        if type(optimizer) is SinkGD:
            rate, correction = rate / bias_correction(self.step, b1), 1 / mx.sqrt(bias_correction(self.step, b2))
        elif optimizer.bias_correction:
            rate, correction = rate / (1 - b1**self.step), mx.rsqrt(1 - b2**self.step)
        new, state["m"], state["v"] = adam_kernel.step_weight(
            parameter, gradient, state["m"], state["v"], state["seed"], self.step.astype(mx.uint32),
            learning_rate=rate, decay=decay, correction=correction, betas=optimizer.betas, eps=optimizer.eps,
            finite=finite,
        )  # fmt: skip
        return new

    def _step_sinkgd(self, gradient, parameter, state, finite=None):
        """Of a matrix or matrices, (..., m, n)."""
        optimizer, flat = self.optimizer, lambda x, axes: x.reshape(-1, *x.shape[x.ndim - axes :])
        a, b = sinkhorn_factors(gradient, optimizer.passes, optimizer.eps)
        rate = optimizer.learning_rate.astype(mx.float32)
        arrays = flat(parameter, 2), flat(gradient, 2), flat(a, 1), flat(b, 1)
        rates = {"learning_rate": rate, "decay": 1 - rate * self._decay_of(parameter), "finite": finite}
        new = sinkgd_kernel.update_matrix(*arrays, state["seed"], self.step.astype(mx.uint32), **rates)
        return new.reshape(parameter.shape)

    def _decay_of(self, parameter):
        if type(self.optimizer) is SinkGD:
            return self.optimizer.weight_decay_of(parameter)
        return getattr(self.optimizer, "weight_decay", 0.0)

    @property
    def state(self) -> dict[str, Any]:
        """That of the wrapped optimizer, with the seeds."""
        return self.optimizer.state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._initialized = False
        self.optimizer.state = state
