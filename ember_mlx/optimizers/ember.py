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

import itertools
import math
from collections.abc import Callable

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from ember_mlx import kernels
from ember_mlx.kernels.stochastic_rounding import (
    DROPPED_BITS,
    bit_keys,
    random_bits,
    round_stochastically,
    table_seed,
)
from ember_mlx.optimizers import checks
from ember_mlx.optimizers.row_shards import RowShards
from ember_mlx.shared.ember_options import (
    BETA2_RANGE,
    STEPS_TO_LOOK_AT,
    check_beta2_schedule,
    check_rounding,
    check_row_limit,
    warn,
)
from ember_mlx.shared.float_formats import ROUNDS_TO_INFINITY, SMALLEST_NORMAL

__all__ = [
    "LEAST_BETA",
    "Ember",
    "bias_correction",
    "blocks",
    "denominator_factors",
    "ember_step",
    "mean_squares",
    "update_rows",
    "update_second_moment",
    "update_table",
]

Real = float | mx.array
Keys = tuple[mx.array, mx.array] | None

# From here on r + (1 - beta) * (x - r) serves. With u = 2^-24 it is off by at most 3 u (1 - beta) |x - r| + u of the
# result. Of same-signed terms that is u (1 + 3 (1 - beta) / beta) of the result: 4 u at 0.5, without bound towards 0.
LEAST_BETA = 0.5

# A float32 sum down 150,000 rows drifts by 1e-4; sums of blocks, summed, stay within 4e-6.
ROWS_PER_BLOCK = 4096
SMALL_BLOCK = 512  # rows, where each needs several float32 copies of itself


def ember_step(
    w: mx.array,  # (V, D), the table
    g: mx.array,  # (V, D), its gradient
    r: mx.array,  # (V,) float32, second moment of the rows
    c: mx.array,  # (D,) float32, second moment of the columns
    t: mx.array,  # (), the number of this step, from 1
    *,
    learning_rate: Real,
    beta2: Real,
    eps: float,
    weight_decay: Real,
    q: mx.array | None = None,  # (), the bias correction
    row_clip: float | None = None,
    row_floor: float | None = None,
    seed: mx.array | None = None,  # (), uint32
    shards: RowShards | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    """One step of Ember on one table. All arithmetic is float32, whatever the dtypes of ``w`` and ``g``.

    Args:
        learning_rate, weight_decay: :math:`\\eta` and the decoupled :math:`\\lambda`.
        beta2: :math:`\\beta_2`; on a schedule an array, with its bias correction ``q``.
        row_clip: The most learning rates that a row's step may have as its root mean square.
        row_floor: How large a row's gradients must be, over the table's, for whole steps.
        seed: Of the table, for stochastic rounding. Without it: to nearest.
        shards: Of a table whose rows lie on several workers; ``w``, ``g`` and ``r`` are this worker's.

    Returns:
        The new ``w`` in its own dtype, and the new ``r`` and ``c``.
    """
    row_mean, column_mean = mean_squares(g)
    if shards is not None:
        column_mean = shards.mean_over_all_rows(column_mean)
    r = update_second_moment(r, row_mean, beta2)
    c = update_second_moment(c, column_mean, beta2)
    q = bias_correction(t, beta2) if q is None else q
    a, b = denominator_factors(r, c, q, row_mean, row_clip, row_floor)
    first_row = 0 if shards is None else shards.first_row
    keys = bit_keys(seed, t, *w.shape, first_row) if seed is not None and w.dtype in DROPPED_BITS else None
    return update_table(w, g, a, b, learning_rate, eps, weight_decay, keys), r, c


def mean_squares(g: mx.array) -> tuple[mx.array, mx.array]:
    """Means of ``g`` squared: over the columns, (V,), and over the rows, (D,), float32."""
    if kernels.usable(kernels.statistics, g.dtype):
        return kernels.statistics.mean_squares(g)
    row_means, column_sums = [], []
    for rows in blocks(g):
        block = g[rows]
        if row_means:  # both sums of the block before come first: one block of squares is alive at a time
            block = mx.depends(block, [row_means[-1], column_sums[-1]])
        g2 = mx.square(block.astype(mx.float32))
        row_means.append(g2.mean(axis=1))
        column_sums.append(g2.sum(axis=0))
    return mx.concatenate(row_means), mx.stack(column_sums).sum(axis=0) / g.shape[0]


def update_second_moment(moment: mx.array, mean_square: mx.array | float, beta2: Real) -> mx.array:
    """``beta2 * moment + (1 - beta2) * mean_square``, written for both ends of the range from 0 to 1.

    0.999 has no exact float32, and as a step towards the mean square that does not add up; near 0 such a step cancels.
    """
    as_written = beta2 * moment + (1 - beta2) * mean_square
    towards = moment + (1 - beta2) * (mean_square - moment)
    if isinstance(beta2, mx.array):
        return mx.where(beta2 < LEAST_BETA, as_written, towards)
    return as_written if beta2 < LEAST_BETA else towards


def bias_correction(t: mx.array, beta2: float) -> mx.array:
    """``1 - beta2 ** t``, of which float32 loses four digits at t = 1; this way none.

    It is ``-expm1(t log beta2)``, by tanh: what all weights need is one kernel of ``mx.compile`` then. Of expm1, which
    it never takes for equal, it makes one for each weight.
    """
    half = mx.tanh(t.astype(mx.float32) * (-math.log(beta2) / 2 if beta2 > 0 else math.inf))
    return 2 * half / (1 + half)


def denominator_factors(
    r: mx.array,  # (V,)
    c: mx.array,  # (D,)
    q: mx.array,  # ()
    row_mean: mx.array,  # (V,)
    row_clip: float | None,
    row_floor: float | None,
) -> tuple[mx.array, mx.array]:
    """Factors a, (V,), and b, (D,), with ``outer(a, b) == sqrt(v_hat)``: no square root per element of the table."""
    s = mx.maximum(c.mean(), 1e-30)
    a = mx.sqrt(r / (s * q))
    if row_floor is not None:
        a = mx.maximum(a, row_floor / mx.sqrt(q))  # as if r were at least row_floor ** 2 of its mean, s
    if row_clip is not None:
        # By the factors, row i steps sqrt(row_mean / s) / a learning rates: its root mean square over the columns.
        a = mx.maximum(a, mx.sqrt(row_mean / s) / row_clip)
    return a, mx.sqrt(c)


def update_table(
    w: mx.array,  # (V, D)
    g: mx.array,  # (V, D)
    a: mx.array,  # (V,)
    b: mx.array,  # (D,)
    learning_rate: Real,
    eps: float,
    weight_decay: Real,
    keys: Keys = None,  # (V,) and (D,) uint32
) -> mx.array:
    """The new table: at once where ``mx.compile`` fuses all of it, block by block where it does not, with ``keys``."""
    if keys is None:
        return update_rows(w, g, a, b, learning_rate, eps, weight_decay)
    if kernels.usable(kernels.rounding, w.dtype, g.dtype):
        return kernels.rounding.update_table(w, g, a, b, learning_rate, eps, weight_decay, keys)
    new = mx.array(w)
    for rows in blocks(w, SMALL_BLOCK):
        block_keys = keys[0][rows], keys[1]
        new[rows] = update_rows(w[rows], g[rows], a[rows], b, learning_rate, eps, weight_decay, block_keys)
    return new


def update_rows(
    w: mx.array,
    g: mx.array,
    a: mx.array,
    b: mx.array,
    learning_rate: Real,
    eps: float,
    weight_decay: Real,
    keys: Keys = None,
) -> mx.array:
    """The step itself, in float32, with one rounding at the end to the dtype of ``w``: by ``keys``, or to nearest."""
    decayed = (1 - learning_rate * weight_decay) * w.astype(mx.float32)
    update = g.astype(mx.float32) / (a[:, None] * b + eps)
    new = decayed - learning_rate * update
    return new.astype(w.dtype) if keys is None else round_stochastically(new, random_bits(*keys), w.dtype)


def blocks(table: mx.array, block: int = ROWS_PER_BLOCK) -> list[slice]:
    """Slices of its rows."""
    return [slice(first, first + block) for first in range(0, len(table), block)]


class Ember(checks.CheckedOptimizer):
    r"""The Ember optimizer (Token Geometry, arXiv 2607.01455), for embedding tables and LM heads.

    For a table of shape (V, D) in float32, bfloat16 or float16 it keeps ``r`` of shape (V,) and ``c`` of shape (D,),
    float32 always. The formula stands at the top of this file.

    Args:
        learning_rate (float or callable): The learning rate :math:`\eta`, about the size of an element's step.
        beta2 (float or callable): The decay :math:`\beta_2` of the second moment. Adafactor's grows with the steps:
            ``lambda step: 1 - (step + 1) ** -0.8``, whose exponent is at least -1 and below 0. Default: ``0.999``.
        eps (float): The term :math:`\epsilon` added to the denominator. Default: ``1e-8``.
        weight_decay (float or callable): The decoupled weight decay :math:`\lambda`. Default: ``0.0``.
        row_clip (float, optional): The most learning rates that a row's step may have as its root mean square. Without
            it, a token seen late steps by up to 31. Default: ``None``.
        row_floor (float, optional): Rows whose gradients are smaller than this part of the table's (both root mean
            squares) step in proportion to them, so that tokens missing from the data are forgotten less. Use a higher
            learning rate with it. Default: ``None``, whole steps for all.
        rounding (str): ``"nearest"``, or ``"stochastic"`` for 16-bit tables whose steps are too small for them: values
            are then kept on average. Default: ``"nearest"``.
        seed (int): Of stochastic rounding, from 0 to 2^32 - 1; the same seed repeats a run bit for bit. Give two
            optimizers in one run two seeds. Default: ``0``.

    A callable is a schedule: it gets the number of steps done and returns the value for the next one. Before
    ``mx.compile``, call ``init``: state that first appears in the first step is compiled for anew in the second.

    Where several workers share the rows, ``row_shards``, an attribute, says which are here. Set it before the first
    step, with the rows here alone in the parameters and in each ``r``.

    A schedule of ``beta2`` keeps its value and the bias correction, one minus the product of all values, in the state,
    and stochastic rounding a ``seed`` of each table, made from that above and its place among the tables. Where
    ``rounding="nearest"`` would leave most elements of a table as they are in a step, one warning says so.

    Raises:
        InputError: (a ``ValueError``) for a value out of range, for a schedule that gives anything but one number,
            and, when it first sees the parameters, for one that is not a 2-D floating table or does not fit the loaded
            state.
    """

    def __init__(
        self,
        learning_rate: float | Callable[[mx.array], float | mx.array],
        beta2: float | Callable[[mx.array], float | mx.array] = 0.999,
        eps: float = 1e-8,
        weight_decay: float | Callable[[mx.array], float | mx.array] = 0.0,
        row_clip: float | None = None,
        row_floor: float | None = None,
        rounding: str = "nearest",
        seed: int = 0,
    ):
        super().__init__()
        checks.check_number("eps", eps, SMALLEST_NORMAL, ROUNDS_TO_INFINITY, "a positive number, usually 1e-8")
        check_rounding(rounding, seed)
        self.beta2 = beta2
        self.eps = eps
        self.row_clip = check_row_limit("row_clip", row_clip)
        self.row_floor = check_row_limit("row_floor", row_floor)
        self.rounding = rounding
        self.seed = seed
        self.row_shards: RowShards | None = None
        self._warned = False
        self._schedule("learning_rate", learning_rate)
        self._schedule("weight_decay", weight_decay)
        if callable(beta2):
            check_beta2_schedule(
                lambda step: checks.as_number("beta2", beta2(mx.array(step, mx.uint64)), step=step).item()
            )
            self._schedule("beta2", beta2)
            self.state["bias_correction"] = mx.array(0.0)
            self._schedulers["bias_correction"] = self._next_bias_correction  # after beta2, whose value it takes
        else:
            checks.check_number("beta2", beta2, *BETA2_RANGE)
            self.beta2 = float(beta2)

    def init(self, parameters: dict) -> None:
        """Make the state of a tree of tables, or check what was loaded, and try the kernels."""
        checks.check_parameters(parameters)
        for dtype in {parameter.dtype for _, parameter in tree_flatten(parameters)}:
            kernels.usable(kernels.statistics, dtype)  # tried now: a first step may be one that MLX traces
            if self.rounding == "stochastic" and dtype in DROPPED_BITS:
                kernels.usable(kernels.rounding, dtype, dtype)
        super().init(parameters)
        if self.rounding == "stochastic":
            number = itertools.count()
            # A state from before may have none.
            tree_map(lambda _, s: s.setdefault("seed", table_seed(self.seed, next(number))), parameters, self.state)
        checks.check_state(self.state, parameters, callable(self.beta2))
        if not self._warned and (found := checks.warning_of(parameters, self.rounding, self._largest_learning_rate)):
            self._warned = True
            warn(found)

    def init_single(self, parameter: mx.array, state: dict) -> None:
        """Zeros of (V,) and (D,), float32 whatever the dtype: a bfloat16 moment would never decay by 0.999."""
        rows, columns = parameter.shape
        state["r"] = mx.zeros((rows,), mx.float32)
        state["c"] = mx.zeros((columns,), mx.float32)

    def take_statistics(self, state: dict, row_mean: mx.array, column_mean: mx.array) -> tuple[mx.array, mx.array]:
        """Step a table's second moments by its gradient's means of squares, (V,) and (D,), where nobody has it whole.

        Returns:
            The factors of :func:`denominator_factors`, for :meth:`update_block`. The counter has been stepped before.
        """
        beta2 = self.state["beta2"] if callable(self.beta2) else self.beta2
        q = self.state["bias_correction"] if callable(self.beta2) else bias_correction(self.step, beta2)
        state["r"] = update_second_moment(state["r"], row_mean, beta2)
        state["c"] = update_second_moment(state["c"], column_mean, beta2)
        return denominator_factors(state["r"], state["c"], q, row_mean, self.row_clip, self.row_floor)

    def keys(self, state: dict, shape: tuple[int, int]) -> Keys:
        """Keys of the random bits of a table (V, D) in this step: (V,) and (D,) uint32, or None to nearest."""
        return bit_keys(state["seed"], self.step, *shape) if self.rounding == "stochastic" else None

    def update_block(
        self,
        w: mx.array,  # (rows, D)
        g: mx.array,  # (rows, D)
        a: mx.array,  # (rows,)
        b: mx.array,  # (D,)
        learning_rate: Real,
        weight_decay: Real,
        keys: Keys = None,  # (rows,) and (D,) uint32
    ) -> mx.array:
        """The new rows of a table, by their gradient, factors and keys: bit for bit those of a whole step."""
        keys = keys if w.dtype in DROPPED_BITS else None
        return update_table(w, g, a, b, learning_rate, self.eps, weight_decay, keys)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """:func:`ember_step` on a table (V, D) with the options of this optimizer; ``state`` is stepped in place."""
        parameter, state["r"], state["c"] = ember_step(
            parameter,
            gradient,
            state["r"],
            state["c"],
            self.step,
            learning_rate=self.learning_rate,
            beta2=self.state["beta2"] if callable(self.beta2) else self.beta2,
            eps=self.eps,
            weight_decay=self.state["weight_decay"],
            q=self.state["bias_correction"] if callable(self.beta2) else None,
            row_clip=self.row_clip,
            row_floor=self.row_floor,
            seed=state["seed"] if self.rounding == "stochastic" else None,
            shards=self.row_shards,
        )
        return parameter

    def _next_bias_correction(self, step):
        """``1 - prod(beta2)`` is a running mean of ones."""
        return update_second_moment(self.state["bias_correction"], 1.0, self.state["beta2"])

    def _largest_learning_rate(self):
        schedule = self._schedulers.get("learning_rate")
        if schedule is None:
            return self.learning_rate.item()
        return max(schedule(mx.array(step, mx.uint64)).item() for step in STEPS_TO_LOOK_AT)
