r"""Adam-mini: AdamW with one second moment a block of weights.

The rule is from "Adam-mini" (arXiv 2406.16793), as version 1.1.1 of the authors' code has it. For a weight :math:`w`
with gradient :math:`g` at step :math:`t = 1, 2, ...`, and every block :math:`b` of it

.. math::

    m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
    v_{b,t} &= \beta_2 v_{b,t-1} + (1 - \beta_2) \, \text{mean}_b \, g_t^2 \\
    w_t &= (1 - \eta \lambda) w_{t-1}
           - \eta \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_{b,t} / (1 - \beta_2^t)} + \epsilon}

The blocks are ours, from modules and shapes: the authors' go by parts of names, and take half a head for a head where
head_dim is not the width over the heads. The shape of ``v`` says them: along each dimension, how many.
"""

import math
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ember_mlx import kernels
from ember_mlx.optimizers import adam_mini_kernel, module_roles
from ember_mlx.optimizers.body import BodyOptimizer, Rate, Tree, rows_of_block
from ember_mlx.optimizers.companded import GROUP, decode_momentum, encode_momentum, groups_of
from ember_mlx.optimizers.ember import LEAST_BETA, bias_correction, mean_squares, update_second_moment
from ember_mlx.optimizers.guarded import applied_if
from ember_mlx.optimizers.in_float32 import kernel_of_its_own
from ember_mlx.shared.ember_options import check_word

__all__ = ["AdamMini", "adam_mini_step", "block_mean_squares", "blocks_of", "update_weights"]


def adam_mini_step(
    w: mx.array,
    g: mx.array,
    m: mx.array | tuple[mx.array, mx.array],
    v: mx.array,
    t: mx.array,
    learning_rate: float | mx.array,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float | mx.array,
) -> tuple[mx.array, mx.array | tuple[mx.array, mx.array], mx.array]:
    """One step of Adam-mini on one weight. All arithmetic is float32, whatever the dtypes of ``w`` and ``g``.

    Args:
        w (array): The weight, of any shape.
        g (array): Its gradient.
        m (array or tuple): First moment, float32; or its codes (groups, 32) int8 and scales (groups,) float32.
        v (array): Second moment of the blocks, float32: of as many dimensions as ``w``, in each the number of blocks.
        t (array): The number of this step, from 1.
        learning_rate, weight_decay (array or float): :math:`\\eta` and the decoupled :math:`\\lambda`.
        beta1, beta2, eps (float): :math:`\\beta_1`, :math:`\\beta_2` and :math:`\\epsilon`.

    Returns:
        The new ``w`` in its own dtype, and the new ``m`` and ``v``.
    """
    if kernel_takes(w, g, m, v, beta1, beta2):
        return step_by_kernel(w, g, m, v, t, learning_rate, beta1, beta2, eps, weight_decay)
    v = update_second_moment(v, block_mean_squares(g, v.shape), beta2)
    denominator = mx.sqrt(v / bias_correction(t, beta2)) + eps
    rates = spread(learning_rate / bias_correction(t, beta1) / denominator, w.shape)
    rows, decay = as_rows(w), 1 - learning_rate * weight_decay
    update = update_weights if isinstance(m, mx.array) else update_in_pieces
    w_new, m = update(rows, as_rows(g), m if isinstance(m, tuple) else as_rows(m), rates, beta1, decay)
    return w_new.reshape(w.shape), m if isinstance(m, tuple) else m.reshape(w.shape), v


def kernel_takes(
    w: mx.array, g: mx.array, m: mx.array | tuple[mx.array, mx.array], v: mx.array, beta1: float, beta2: float
) -> bool:
    """Whether there is a GPU kernel for such a step: rows of one rate, which 8-bit momentum fills with whole groups."""
    fits = v.shape[-1:] in ((), (1,)) and (isinstance(m, mx.array) or as_rows(w).shape[1] % GROUP == 0)
    usual = w.dtype != mx.float16 and min(beta1, beta2) >= LEAST_BETA
    return fits and usual and kernels.usable(adam_mini_kernel, w.dtype, g.dtype)


def step_by_kernel(
    w: mx.array,
    g: mx.array,
    m: mx.array | tuple[mx.array, mx.array],
    v: mx.array,
    t: mx.array,
    learning_rate: float | mx.array,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float | mx.array,
    finite: mx.array | None = None,
) -> tuple[mx.array, mx.array | tuple[mx.array, mx.array], mx.array]:
    """As ``adam_mini_step``, each weight read and written once; where blocks are no rows, after their means.

    Where ``finite``, if given, is False, all three are what they were, whatever ``g`` holds.
    """
    rows_are_blocks = v.shape[:-1] == w.shape[:-1]
    if not rows_are_blocks:
        new_v = update_second_moment(v, block_mean_squares(g, v.shape), beta2)
        v = new_v if finite is None else mx.where(finite, new_v, v)
    numbers = adam_mini_kernel.Numbers(
        learning_rate / bias_correction(t, beta1),
        1 - learning_rate * weight_decay,
        1 - beta1,
        1 - beta2,
        bias_correction(t, beta2),
        eps,
    )
    codes, scales = m if isinstance(m, tuple) else (as_rows(m), None)
    of_rows = spread(v, w.shape).reshape(-1)
    new, codes, scales, of_rows = adam_mini_kernel.step_rows(
        as_rows(w), as_rows(g), codes, scales, of_rows, numbers, rows_are_blocks, finite
    )
    m = codes.reshape(w.shape) if scales is None else (codes, scales)
    return new.reshape(w.shape), m, of_rows.reshape(v.shape) if rows_are_blocks else v


def block_mean_squares(g: mx.array, blocks: tuple[int, ...]) -> mx.array:
    """Means of ``g`` squared over each block, float32, of the shape ``blocks``."""
    rows = as_rows(g)
    row_means, column_means = means_by_pieces(rows)
    if rows.shape[1] > 1 and blocks and blocks[-1] == rows.shape[1]:
        return column_means.reshape(blocks)
    split = [part for n, length in zip(blocks[:-1], g.shape[:-1], strict=True) for part in (n, length // n)]
    return row_means.reshape(split or [1]).mean(axis=tuple(range(1, len(split), 2)) or None).reshape(blocks)


def means_by_pieces(g: mx.array) -> tuple[mx.array, mx.array]:
    """As Ember's ``mean_squares``, but as plain operations in small pieces, for matrices of fewer rows than tables."""
    if kernels.usable(kernels.statistics, g.dtype):
        return kernels.statistics.mean_squares(g)
    means = [mean_squares(g[rows]) for rows in pieces(g)]
    shares = [rows.stop - rows.start for rows in pieces(g)]
    column_means = sum(columns * (share / len(g)) for (_, columns), share in zip(means, shares, strict=True))
    return mx.concatenate([rows for rows, _ in means]), column_means


def spread(of_blocks: mx.array, shape: tuple[int, ...]) -> mx.array:
    """A number a block as one of each row of ``as_rows``, (rows, 1), or of each column, (1, columns)."""
    if len(shape) < 2:
        return of_blocks.reshape(1, -1)
    for axis, length in enumerate(shape[:-1]):
        if 1 < of_blocks.shape[axis] < length:
            of_blocks = mx.repeat(of_blocks, length // of_blocks.shape[axis], axis=axis)
    if of_blocks.shape[-1] > 1:
        return of_blocks.reshape(1, -1)
    return mx.broadcast_to(of_blocks, (*shape[:-1], 1)).reshape(-1, 1)


def update_weights(
    w: mx.array, g: mx.array, m: mx.array, rates: mx.array, beta1: float, decay: float | mx.array
) -> tuple[mx.array, mx.array]:
    """The new weights, rounded once to their dtype, and the new momentum: ``rates`` has the denominators in it.

    Each from a kernel of its own, which may then write over the old ones, where nobody holds them.
    """
    m = kernel_of_its_own(update_second_moment(m, g.astype(mx.float32), beta1))
    return (decay * w.astype(mx.float32) - rates * m).astype(w.dtype), m


def update_in_pieces(
    w: mx.array, g: mx.array, m: tuple[mx.array, mx.array], rates: mx.array, beta1: float, decay: float | mx.array
) -> tuple[mx.array, tuple[mx.array, mx.array]]:
    """As ``update_weights`` with ``m`` as codes and scales: whole in float32 for a few rows at a time alone."""
    columns, new, part = w.shape[1], mx.array(w), w
    for rows in pieces(w):
        part, _ = update_weights(*piece_of(w, g, m, rates, rows, part), beta1, decay)
        new[rows] = part
    # The momentum once more, from the codes on: MLX would keep the new codes until all weights are new.
    w, g, rates, *m = mx.depends([w, g, rates, *m], [new])
    codes, scales = mx.array(m[0]), mx.array(m[1])
    for rows in pieces(w):
        groups = slice(rows.start * columns // GROUP, groups_of(rows.stop * columns))
        _, part = update_weights(*piece_of(w, g, m, rates, rows, part), beta1, decay)
        part, scales[groups] = encode_momentum(part)
        codes[groups] = part
    return new, (codes, scales)


def piece_of(
    w: mx.array, g: mx.array, m: tuple[mx.array, mx.array], rates: mx.array, rows: slice, before: mx.array
) -> list[mx.array]:
    """Some rows of the weights, of their gradient, of their momentum in float32, and of the rates: after ``before``."""
    groups = slice(rows.start * w.shape[1] // GROUP, groups_of(rows.stop * w.shape[1]))
    arrays = [w[rows], g[rows], m[0][groups], m[1][groups], rates[rows] if len(rates) > 1 else rates]
    w, g, *m, rates = mx.depends(arrays, [before])
    return [w, g, decode_momentum(*m, w.shape), rates]


def pieces(w: mx.array) -> list[slice]:
    """Slices of its rows, which are whole groups of 32 elements."""
    whole_groups = GROUP // math.gcd(w.shape[1], GROUP)
    piece = max(1, rows_of_block(w) // whole_groups) * whole_groups
    return [slice(first, min(first + piece, len(w))) for first in range(0, len(w), piece)]


def as_rows(x: mx.array) -> mx.array:
    """(rows, columns): the last dimension, and all others together; one row for a vector."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1] if x.ndim else 1)


def blocks_of(
    path: str, shape: tuple[int, ...], heads: dict[str, int], by_column: set[str], by_first: set[str]
) -> tuple[int, ...]:
    """How many blocks a weight has along each dimension.

    Args:
        path (str): Of the weight.
        shape (tuple of int): Its shape. A vector is one block, and every row of all else: (outputs, inputs), token
            tables (V, D), experts (E, outputs, inputs).
        heads (dict): Path -> number of heads, of queries and keys, each a block.
        by_column, by_first (set): Paths of weights whose columns, and whose slices along the first dimension, are.
    """
    if len(shape) < 2:
        return (1,) * len(shape)
    if path in heads:
        return (heads[path], 1)
    if path in by_column:
        return (1, shape[1])
    if path in by_first:
        return (shape[0], *(1,) * (len(shape) - 1))
    return (*shape[:-1], 1)


class AdamMini(BodyOptimizer):
    r"""The Adam-mini optimizer [1], for the body of a model, at the learning rates of AdamW.

    State of a weight: ``m``, float32 of its shape, and ``v``, float32, one number a block: 4 bytes a weight. With
    ``momentum="int8"``, ``m`` is codes (groups, 32) int8 and ``m_scales`` (groups,) float32: 1.13 bytes. Of
    the shape such state tells ``v``'s alone: load the weights first. The formula stands at the top of this file.

    [1]: Adam-mini: Use Fewer Learning Rates To Gain More. arXiv 2406.16793.

    Args:
        learning_rate (float or callable): The learning rate :math:`\eta`, as AdamW's.
        betas (tuple of float): :math:`(\beta_1, \beta_2)`. Default: ``(0.9, 0.999)``.
        eps (float): The term :math:`\epsilon` added to the denominator. Default: ``1e-8``.
        weight_decay (float or callable): The decoupled weight decay :math:`\lambda`. Default: ``0.0``.
        model (mlx.nn.Module, optional): For blocks that shapes do not show: queries and keys by head, LoRA's factors by
            rank and by output, convolutions by output channel. Give it with its adapters. Default: all by row.
        momentum (str): ``"float32"``, or ``"int8"``, companded in groups of 32. Default: ``"float32"``.
        decay_vectors (bool): Let norms and biases decay too. Default: ``False``.

    A callable is a schedule: it gets the number of steps done and returns the value for the next one. On token tables
    use :class:`ember_mlx.Ember`: there one rate a row costs quality.

    Raises:
        InputError: (a ``ValueError``) for a value out of range, for a schedule that gives anything but one number,
            and, when it first sees the parameters, for one that is not floating or does not fit the loaded state.
    """

    def __init__(
        self,
        learning_rate: Rate,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: Rate = 0.0,
        *,
        model: nn.Module | None = None,
        momentum: str = "float32",
        decay_vectors: bool = False,
    ):
        super().__init__(learning_rate, betas, eps, weight_decay, decay_vectors)
        check_word("AdamMini", "momentum", momentum, ("float32", "int8"))
        self.momentum = momentum
        self._heads = module_roles.attention_heads(model) if model else {}
        self._by_column = module_roles.lora_factors(model) if model else set()
        self._by_first = module_roles.convolutions(model) if model else set()

    def init(self, parameters: Tree) -> None:
        super().init(parameters)
        kernels.try_all(kernels.statistics, parameters)
        for dtype in {parameter.dtype for _, parameter in tree_flatten(parameters)} - {mx.float16}:
            kernels.usable(adam_mini_kernel, dtype, dtype)

    def state_of(self, path: str, parameter: mx.array) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
        shape, size = parameter.shape, parameter.size
        blocks = blocks_of(path, shape, self._heads, self._by_column, self._by_first)
        state = {"m": (shape, mx.float32), "v": (blocks, mx.float32)}
        if self.momentum == "int8":
            groups = groups_of(size)
            state |= {"m": ((groups, GROUP), mx.int8), "m_scales": ((groups,), mx.float32)}
        return state

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        return self._stepped(adam_mini_step, gradient, parameter, state)

    def apply_single_if(
        self, finite: mx.array, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]
    ) -> mx.array:
        """As :meth:`apply_single` where ``finite``, a bool array (), else nothing changes; a kernel selects itself."""
        if kernel_takes(parameter, gradient, self._momentum(state), state["v"], *self.betas):
            return self._stepped(partial(step_by_kernel, finite=finite), gradient, parameter, state)
        return applied_if(finite, self.apply_single, gradient, parameter, state)

    def _momentum(self, state):
        return state["m"] if self.momentum == "float32" else (state["m"], state["m_scales"])

    def _stepped(self, step, gradient, parameter, state):
        new, m, state["v"] = step(
            parameter,
            gradient,
            self._momentum(state),
            state["v"],
            self.step,
            self.learning_rate,
            *self.betas,
            self.eps,
            self.weight_decay_of(parameter),
        )
        if self.momentum == "float32":
            state["m"] = m
        else:
            state["m"], state["m_scales"] = m
        return new
