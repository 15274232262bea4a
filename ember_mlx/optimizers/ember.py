r"""Ember: a factored second moment for token tables, without momentum.

The rule is from "Token Geometry" (arXiv 2607.01455), as the author's code has it since 2026-07-20. For a table
:math:`w` of V tokens by D features with gradient :math:`g` at step :math:`t = 1, 2, ...`

.. math::

    r_t &= \beta_2 r_{t-1} + (1 - \beta_2) \, \text{mean}_j \, g_{ij}^2 \\
    c_t &= \beta_2 c_{t-1} + (1 - \beta_2) \, \text{mean}_i \, g_{ij}^2 \\
    \hat v_t &= \frac{r_t c_t^\top}{\text{mean}(c_t) \, (1 - \beta_2^t)} \\
    w_t &= (1 - \eta \lambda) w_{t-1} - \eta \frac{g_t}{\sqrt{\hat v_t} + \epsilon}

It is Adafactor's factored second moment with Adam's constant beta2 and bias correction: V + D numbers of state.
"""

import math

import mlx.core as mx
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten

from ember_mlx import kernels
from ember_mlx.errors import InputError

__all__ = ["Ember", "denominator_factors", "ember_step", "mean_squares", "update_second_moment", "update_table"]

# A float32 sum down 150,000 rows drifts by 1e-4; sums of blocks, summed, stay within 4e-6.
ROWS_PER_BLOCK = 4096
SMALLEST_NORMAL = 2.0**-126  # float32; GPUs may round anything below to zero


def ember_step(w, g, r, c, t, learning_rate, beta2, eps, weight_decay):
    """One step of Ember on one table. All arithmetic is float32, whatever the dtypes of ``w`` and ``g``.

    Args:
        w (array): The table, (V, D).
        g (array): Its gradient, (V, D).
        r (array): Second moment of the rows, (V,) float32.
        c (array): Second moment of the columns, (D,) float32.
        t (array): The number of this step, from 1.
        learning_rate, weight_decay (array or float): :math:`\\eta` and the decoupled :math:`\\lambda`.
        beta2, eps (float): :math:`\\beta_2` and :math:`\\epsilon`.

    Returns:
        The new ``w`` in its own dtype, and the new ``r`` and ``c``.
    """
    row_mean, column_mean = mean_squares(g)
    r = update_second_moment(r, row_mean, beta2)
    c = update_second_moment(c, column_mean, beta2)
    a, b = denominator_factors(r, c, t, beta2)
    return update_table(w, g, a, b, learning_rate, eps, weight_decay), r, c


def mean_squares(g):
    """Means of ``g`` squared: over the columns, (V,), and over the rows, (D,), float32."""
    if kernels.usable(g.dtype):
        return kernels.mean_squares(g)
    row_means, column_sums = [], []
    for rows in blocks(g):
        g2 = mx.square(g[rows].astype(mx.float32))
        row_means.append(g2.mean(axis=1))
        column_sums.append(g2.sum(axis=0))
    return mx.concatenate(row_means), mx.stack(column_sums).sum(axis=0) / g.shape[0]


def update_second_moment(moment, mean_square, beta2):
    """``beta2 * moment + (1 - beta2) * mean_square``, as a step towards it: 0.999 has no exact float32, 0 has."""
    return moment + (1 - beta2) * (mean_square - moment)


def denominator_factors(r, c, t, beta2):
    """Factors a, (V,), and b, (D,), with ``outer(a, b) == sqrt(v_hat)``: no square root per element of the table."""
    log_beta2 = math.log(beta2) if beta2 > 0 else -math.inf
    # 1 - beta2 ** t loses four digits in float32 at t = 1; expm1 loses none.
    bias_correction = -mx.expm1(t.astype(mx.float32) * log_beta2)
    s = mx.maximum(c.mean(), 1e-30)
    return mx.sqrt(r / (s * bias_correction)), mx.sqrt(c)


def update_table(w, g, a, b, learning_rate, eps, weight_decay):
    """The step itself, in float32, with one cast at the end to the dtype of ``w``."""
    decayed = (1 - learning_rate * weight_decay) * w.astype(mx.float32)
    update = g.astype(mx.float32) / (a[:, None] * b + eps)
    return (decayed - learning_rate * update).astype(w.dtype)


def blocks(table):
    """Slices of its rows."""
    return [slice(first, first + ROWS_PER_BLOCK) for first in range(0, len(table), ROWS_PER_BLOCK)]


class Ember(Optimizer):
    r"""The Ember optimizer [1], for embedding tables and LM heads.

    For a table of shape (V, D) in float32, bfloat16 or float16 it keeps ``r`` of shape (V,) and ``c`` of shape (D,),
    float32 always. The formula stands at the top of this file.

    [1]: Token Geometry. arXiv 2607.01455.

    Args:
        learning_rate (float or callable): The learning rate :math:`\eta`, about the size of an element's step.
        beta2 (float): The decay :math:`\beta_2` of the second moment. Default: ``0.999``.
        eps (float): The term :math:`\epsilon` added to the denominator. Default: ``1e-8``.
        weight_decay (float or callable): The decoupled weight decay :math:`\lambda`. Default: ``0.0``.

    A callable is a schedule: it gets the number of steps done and returns the value for the next one. Before
    ``mx.compile``, call ``init``: state that first appears in the first step is compiled for anew in the second.

    Raises:
        InputError: (a ``ValueError``) for a value out of range, and, when it first sees the parameters, for one that
            is not a 2-D floating table or does not fit the loaded state.
    """

    def __init__(self, learning_rate, beta2=0.999, eps=1e-8, weight_decay=0.0):
        super().__init__()
        kernels.usable()  # tries them now: a first step may be one that MLX is tracing
        _check("beta2", beta2, 0, 1, "at least 0 and below 1, usually 0.999")
        _check("eps", eps, SMALLEST_NORMAL, math.inf, "a positive number, usually 1e-8")
        self.beta2 = beta2
        self.eps = eps
        self._schedule("learning_rate", learning_rate)
        self._schedule("weight_decay", weight_decay)

    def init(self, parameters):
        for path, parameter in tree_flatten(parameters):
            if parameter.ndim != 2 or not parameter.size or not mx.issubdtype(parameter.dtype, mx.floating):
                raise InputError(
                    f"Ember: {path} has shape {parameter.shape} and dtype {parameter.dtype}; Ember takes 2-D floating "
                    "token tables only: give this parameter to another optimizer, for example with PairedOptimizer"
                )
        super().init(parameters)
        self._check_state(parameters)

    def init_single(self, parameter, state):
        """Zeros of (V,) and (D,), float32 whatever the dtype: a bfloat16 moment would never decay by 0.999."""
        rows, columns = parameter.shape
        state["r"] = mx.zeros((rows,), mx.float32)
        state["c"] = mx.zeros((columns,), mx.float32)

    def apply_single(self, gradient, parameter, state):
        parameter, state["r"], state["c"] = ember_step(
            parameter,
            gradient,
            state["r"],
            state["c"],
            self.step,
            self.learning_rate,
            self.beta2,
            self.eps,
            self.state["weight_decay"],
        )
        return parameter

    def _schedule(self, name, value):
        """As ``_maybe_schedule``, with float32 whatever a schedule returns: another type would be compiled anew."""
        if callable(value):
            self._maybe_schedule(name, lambda step: mx.array(value(step), mx.float32))
        else:
            _check(name, value, 0, math.inf, "a finite number, zero or more, or a schedule")
            self._maybe_schedule(name, float(value))

    def _check_state(self, parameters):
        """State that was loaded from a file must be of the same tables."""
        state = dict(tree_flatten(self.state))
        for path, parameter in tree_flatten(parameters):
            for name, length in zip(("r", "c"), parameter.shape, strict=True):
                found = state.get(f"{path}.{name}")
                if found is None or found.shape != (length,) or found.dtype != mx.float32:
                    has = f"no {name}" if found is None else f"{name} of shape {found.shape} and dtype {found.dtype}"
                    raise InputError(
                        f"Ember: the state has {has} for {path} of shape {parameter.shape}, which needs {name} of "
                        f"shape ({length},) and dtype float32: load the state of this model"
                    )


def _check(name, value, least, below, in_words):
    try:
        allowed = least <= value < below
    except TypeError:
        allowed = False
    if not allowed:
        raise InputError(f"Ember({name}={value!r}): must be {in_words}")
