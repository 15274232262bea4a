r"""SAGE: Lion's direction with a damper for each column, for token tables, heads and 1-D parameters.

The rule is from arXiv 2604.07663 (naubull2/SAGE-optimizer at 8b6b2c8). For a table :math:`w` of V tokens by D features
with gradient :math:`g` at step :math:`t = 1, 2, ...`

.. math::

    s_j &= \text{mean}_i |g_{ij}| \\
    S_t &= \beta_2 S_{t-1} + (1 - \beta_2) s, \quad \hat S = S_t / (1 - \beta_2^t) \\
    H_j &= \min\left(\frac{\text{rms}(\hat S)}{\hat S_j + \epsilon}, \frac{\text{rms}(s)}{s_j + \epsilon}, 1\right) \\
    w_t &= (1 - \eta \lambda) w_{t-1} - \eta \, \text{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g) \, H \\
    m_t &= \beta_2 m_{t-1} + (1 - \beta_2) g

A 1-D parameter has :math:`s = |g|`, element by element. The momentum is a whole table, float32: 4 bytes a weight.

Two things differ from the authors' code. A row whose gradient is all zero stands still here: the sign of a momentum
never ends, and a token seen once went on for 940 learning rates. And their ``UniSAGE`` takes the gradient into the
momentum before the sign, which is the rule above with :math:`\beta_1 \beta_2` in the place of :math:`\beta_1`.
"""

import mlx.core as mx
from mlx.utils import tree_flatten

from ember_mlx import kernels
from ember_mlx.optimizers.body import BodyOptimizer, Rate, Tree, rows_of_block
from ember_mlx.optimizers.ember import bias_correction, blocks
from ember_mlx.optimizers.ember import update_second_moment as running_mean
from ember_mlx.shared.ember_options import check_switch
from ember_mlx.shared.errors import InputError

__all__ = ["SAGE", "column_damper", "mean_magnitudes", "sage_step", "update_parameter"]


def sage_step(
    w: mx.array,
    g: mx.array,
    m: mx.array,
    s: mx.array,
    t: mx.array,
    learning_rate: float | mx.array,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float | mx.array,
    still_rows: bool = True,
) -> tuple[mx.array, mx.array, mx.array]:
    """One step of SAGE on one parameter. All arithmetic is float32, whatever the dtypes of ``w`` and ``g``.

    Args:
        w (array): The table (V, D), or a vector (D,).
        g (array): Its gradient, in the shape of ``w``.
        m (array): The momentum, in the shape of ``w``, float32.
        s (array): Running mean of the magnitudes of the columns, (D,) float32.
        t (array): The number of this step, from 1.
        learning_rate, weight_decay (array or float): :math:`\\eta` and the decoupled :math:`\\lambda`.
        beta1, beta2, eps (float): :math:`\\beta_1`, :math:`\\beta_2` and :math:`\\epsilon`.
        still_rows (bool): Leave a row of ``w`` as it is where its gradient is all zero; a vector is one row.

    Returns:
        The new ``w`` in its own dtype, and the new ``m`` and ``s``.
    """
    magnitudes, has_gradient = mean_magnitudes(g)
    s = running_mean(s, magnitudes, beta2)
    h = column_damper(magnitudes, s / bias_correction(t, beta2), eps)
    moves = has_gradient if still_rows else None
    return *update_parameter(w, g, m, h, moves, learning_rate, beta1, beta2, weight_decay), s


def mean_magnitudes(g: mx.array) -> tuple[mx.array, mx.array]:
    """Means of the magnitudes of ``g`` over the rows, (D,) float32, and which rows are not all zero, (V, 1) or (1,)."""
    if g.ndim == 1:
        magnitudes = mx.abs(g.astype(mx.float32))
        return magnitudes, (magnitudes != 0).any(keepdims=True)
    if kernels.usable(kernels.statistics, g.dtype):
        row_means, column_means = kernels.statistics.mean_magnitudes(g)
        return column_means, row_means[:, None] != 0
    parts = [g[rows] for rows in blocks(g, rows_of_block(g))]
    # Two readings of each block: MLX would keep all magnitudes until the last of two uses.
    has_gradient = mx.concatenate([(part != 0).any(axis=1, keepdims=True) for part in parts])
    return sum_of([mx.abs(part.astype(mx.float32)).sum(axis=0) for part in parts]) / g.shape[0], has_gradient


def sum_of(sums: list[mx.array]) -> mx.array:
    """Of many arrays, in pairs of pairs: the error grows with the logarithm of their number."""
    while len(sums) > 1:
        sums = [sum(sums[i : i + 2]) for i in range(0, len(sums), 2)]
    return sums[0]


def column_damper(magnitudes: mx.array, averaged: mx.array, eps: float) -> mx.array:
    """H, (D,), by the magnitudes of this step and their corrected running mean: at most 1, less for loud columns."""
    return mx.minimum(mx.minimum(rms(averaged) / (averaged + eps), rms(magnitudes) / (magnitudes + eps)), 1)


def rms(x: mx.array) -> mx.array:
    """Root mean square, as a multiple of the largest: the squares of 1e-20 are no float32."""
    largest = mx.maximum(x.max(), 1e-30)
    return largest * mx.sqrt(mx.mean(mx.square(x / largest)))


def update_parameter(
    w: mx.array,
    g: mx.array,
    m: mx.array,
    h: mx.array,
    moves: mx.array | None,
    learning_rate: float | mx.array,
    beta1: float,
    beta2: float,
    weight_decay: float | mx.array,
) -> tuple[mx.array, mx.array]:
    """The new ``w``, rounded once to its dtype, and the new ``m``: at once where ``mx.compile`` fuses all of it."""
    decayed = (1 - learning_rate * weight_decay) * w.astype(mx.float32)
    update = mx.sign(running_mean(m, g.astype(mx.float32), beta1)) * h
    new = (decayed - learning_rate * update).astype(w.dtype)
    # By -g, the same number: MLX would else keep g - m in float32, a table, for its two uses.
    negative = (-g).astype(mx.float32)
    m = beta2 * m - (1 - beta2) * negative if beta2 < 0.5 else m - (1 - beta2) * (m + negative)
    return new if moves is None else mx.where(moves, new, w), m


class SAGE(BodyOptimizer):
    r"""The SAGE optimizer [1], for embedding tables, LM heads, norms and biases.

    For a parameter of shape (V, D) or (D,) it keeps the momentum ``m`` in its shape, and ``s`` of shape (D,), both
    float32. The formula stands at the top of this file. The authors pair it with SinkGD on the matrices.

    [1]: arXiv 2604.07663.

    Args:
        learning_rate (float or callable): :math:`\eta`, the largest step of an element. A tenth to all of AdamW's.
        betas (tuple): :math:`(\beta_1, \beta_2)`. For the authors' ``UniSAGE`` give ``(0.891, 0.99)``, which is its
            ``(0.9, 0.99)`` in the paper's order. Default: ``(0.9, 0.99)``.
        eps (float): :math:`\epsilon`. Default: ``1e-8``.
        weight_decay (float or callable): The decoupled :math:`\lambda`. Default: ``0.01``.
        still_rows (bool): Leave rows without a gradient as they are, weight decay included; their momentum fades.
            ``False`` is the published rule. Default: ``True``.
        decay_vectors (bool): Let norms and biases decay too. Default: ``False``.

    A callable is a schedule: it gets the number of steps done and returns the value for the next one. Before
    ``mx.compile``, call ``init``.

    Raises:
        InputError: (a ``ValueError``) for a value out of range, for a parameter that is not 1-D or 2-D and floating,
            and for state that is not of these parameters.
    """

    def __init__(
        self,
        learning_rate: Rate,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: Rate = 0.01,
        *,
        still_rows: bool = True,
        decay_vectors: bool = False,
    ):
        super().__init__(learning_rate, betas, eps, weight_decay, decay_vectors)
        check_switch("SAGE", "still_rows", still_rows)
        self.still_rows = still_rows

    def init(self, parameters: Tree) -> None:
        for path, parameter in tree_flatten(parameters):
            if parameter.ndim not in (1, 2):
                raise InputError(
                    f"SAGE: {path} has shape {parameter.shape} and dtype {parameter.dtype}; SAGE takes 2-D and 1-D "
                    "parameters only, since its damper is of columns: give this one to SinkGD or AdamMini"
                )
        super().init(parameters)
        kernels.try_all(kernels.statistics, parameters)

    def state_of(self, path: str, parameter: mx.array) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
        return {"m": (parameter.shape, mx.float32), "s": (parameter.shape[-1:], mx.float32)}

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        parameter, state["m"], state["s"] = sage_step(
            parameter,
            gradient,
            state["m"],
            state["s"],
            self.step,
            self.learning_rate,
            *self.betas,
            self.eps,
            self.weight_decay_of(parameter),
            self.still_rows,
        )
        return parameter
