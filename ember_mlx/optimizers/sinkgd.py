r"""SinkGD: matrices without any state, their gradients brought to rows and columns of one size.

The rule is from "Gradient Multi-Normalization" (arXiv 2502.06742). Of the gradient :math:`g` of a matrix (m, n),
:math:`L` times

.. math::

    x_{i \cdot} \leftarrow \sqrt{n} \, \frac{x_{i \cdot}}{\lVert x_{i \cdot} \rVert + \epsilon}, \quad
    x_{\cdot j} \leftarrow \sqrt{m} \, \frac{x_{\cdot j}}{\lVert x_{\cdot j} \rVert + \epsilon}

and then :math:`w \leftarrow (1 - \eta \lambda) w - \eta x`. The root mean square of :math:`x` is 1, so :math:`\eta` is
that of a step. The paper's is 0.02 times 0.05, which is 1e-3.

Only rows and columns are scaled, so :math:`x_{ij} = a_i g_{ij} b_j` always: factors are computed, and no other matrix.
"""

import math

import mlx.core as mx
import mlx.nn as nn

from ember_mlx import kernels
from ember_mlx.optimizers import module_roles
from ember_mlx.optimizers.body import BodyOptimizer, Rate, Tree, adamw_step, rows_of_block
from ember_mlx.shared.errors import InputError

__all__ = ["SinkGD", "sinkgd_step", "sinkhorn_factors", "update_matrix"]


def sinkgd_step(
    w: mx.array, g: mx.array, learning_rate: float | mx.array, passes: int, eps: float, weight_decay: float | mx.array
) -> mx.array:
    """One step of SinkGD. All arithmetic is float32, whatever the dtypes of ``w`` and ``g``.

    Args:
        w (array): The matrix, (m, n), or several of one shape, (..., m, n), each by itself.
        g (array): Its gradient.
        learning_rate, weight_decay (array or float): :math:`\\eta` and the decoupled :math:`\\lambda`.
        passes (int): :math:`L`. 2 bring the rows within 0.3 % of one size, 3 within 0.01 %.
        eps (float): :math:`\\epsilon`.

    Returns:
        The new ``w`` in its own dtype.
    """
    a, b = sinkhorn_factors(g, passes, eps)
    return update_matrix(w, g, a, b, learning_rate, weight_decay)


def sinkhorn_factors(g: mx.array, passes: int, eps: float) -> tuple[mx.array, mx.array]:
    """Factors a, (..., m), and b, (..., n), of the rows and columns of ``g``, float32.

    A row or column of zeros, or of squares that float32 rounds to zero, has the factor 0: it stands still.
    """
    if kernels.usable(kernels.sinkhorn, g.dtype):
        a, b = kernels.sinkhorn.factors(g.reshape(-1, *g.shape[-2:]), passes, eps)
        return a.reshape(g.shape[:-1]), b.reshape(*g.shape[:-2], g.shape[-1])
    a, b = mx.ones(g.shape[:-1], mx.float32), mx.ones((*g.shape[:-2], g.shape[-1]), mx.float32)
    for _ in range(passes):
        a, b = one_pass(g, a, b, eps)
    return a, b


def one_pass(g: mx.array, a: mx.array, b: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """The next factors, by the norms of rows and then of columns: products with ``g`` squared, block by block."""
    (m, n), block = g.shape[-2:], rows_of_block(g)
    new_a, sums = [], mx.zeros(b.shape)
    for first in range(0, m, block):
        rows = slice(first, first + block)
        # The sums of the block before come first: one block of squares is alive at a time.
        (part,) = mx.depends([g[..., rows, :]], [sums])
        squares = mx.square(part.astype(mx.float32))
        row_norms = mx.sqrt((squares @ mx.square(b)[..., None])[..., 0])
        new_a.append(rescaled(a[..., rows], row_norms, n, eps))
        sums = sums + (mx.square(new_a[-1])[..., None, :] @ squares)[..., 0, :]
    return mx.concatenate(new_a, axis=-1), rescaled(b, mx.sqrt(sums), m, eps)


def rescaled(factor: mx.array, norms: mx.array, length: int, eps: float) -> mx.array:
    """``factor`` for lines of the norm sqrt(length), where now theirs are ``factor * norms``."""
    return mx.where(norms == 0, 0.0, factor * math.sqrt(length) / (factor * norms + eps))


def update_matrix(
    w: mx.array, g: mx.array, a: mx.array, b: mx.array, learning_rate: float | mx.array, weight_decay: float | mx.array
) -> mx.array:
    """The step itself, in float32, with one rounding at the end to the dtype of ``w``."""
    x = a[..., None] * g.astype(mx.float32) * b[..., None, :]
    return ((1 - learning_rate * weight_decay) * w.astype(mx.float32) - learning_rate * x).astype(w.dtype)


class SinkGD(BodyOptimizer):
    r"""The SinkGD optimizer [1], for the matrices of a model; its vectors, norms and biases, train by AdamW.

    A matrix has no state; a vector has ``m`` and ``v``, float32. The formula stands at the top of this file. Arrays
    of more dimensions are matrices in their last two, as experts are, (E, outputs, inputs), each by itself.

    [1]: Gradient Multi-Normalization for Stateless and Scalable LLM Training. arXiv 2502.06742.

    Args:
        learning_rate (float or callable): The root mean square of a step, :math:`\eta`; of vectors, AdamW's.
        passes (int): :math:`L`; 2 give the same training as 5, in half the time. Default: ``5``, as published.
        betas (tuple of float): Of vectors, :math:`(\beta_1, \beta_2)`. Default: ``(0.9, 0.999)``.
        eps (float): The term :math:`\epsilon` added to norms and denominators. Default: ``1e-8``.
        weight_decay (float or callable): The decoupled weight decay :math:`\lambda`. Default: ``0.0``.
        model (mlx.nn.Module, optional): Its convolutions and token tables train by AdamW, as vectors do. Without it
            they are taken for matrices, which blows rare tokens up to full steps: give tables to another optimizer.
        decay_vectors (bool): Let norms and biases decay too. Default: ``False``.

    A callable is a schedule: it gets the number of steps done and returns the value for the next one. Elements below
    1e-22 count as zero.

    Raises:
        InputError: (a ``ValueError``) for a value out of range, for a schedule that gives anything but one number,
            and, when it first sees the parameters, for one that is not floating or does not fit the loaded state.
    """

    def __init__(
        self,
        learning_rate: Rate,
        passes: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Rate = 0.0,
        *,
        model: nn.Module | None = None,
        decay_vectors: bool = False,
    ):
        super().__init__(learning_rate, betas, eps, weight_decay, decay_vectors)
        if type(passes) is not int or not 1 <= passes <= 100:
            raise InputError(f"SinkGD(passes={passes!r}): must be a whole number from 1 to 100, usually 5 or 2")
        self.passes = passes
        self._by_adamw = module_roles.convolutions(model) | module_roles.token_tables(model) if model else set()

    def init(self, parameters: Tree) -> None:
        super().init(parameters)
        kernels.try_all(kernels.sinkhorn, parameters)

    def state_of(self, path: str, parameter: mx.array) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
        if parameter.ndim > 1 and path not in self._by_adamw:
            return {}
        return {"m": (parameter.shape, mx.float32), "v": (parameter.shape, mx.float32)}

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        rate, decay = self.learning_rate, self.weight_decay_of(parameter)
        if "m" not in state:
            return sinkgd_step(parameter, gradient, rate, self.passes, self.eps, decay)
        new, state["m"], state["v"] = adamw_step(
            parameter, gradient, state["m"], state["v"], self.step, rate, *self.betas, self.eps, decay
        )
        return new
