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
The functions are those of ``ember_mlx/optimizers/adam_mini.py``, line against line.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from cuda_ref import triton_body
from cuda_ref.optimizers import module_roles
from cuda_ref.optimizers.base import State
from cuda_ref.optimizers.body import BodyOptimizer
from cuda_ref.optimizers.companded import GROUP, decode_momentum, encode_momentum, groups_of
from cuda_ref.optimizers.ember import bias_correction, blocks, mean_squares, update_second_moment
from cuda_ref.sharding import RowShards, groups_on_all_ranks
from ember_mlx.shared.ember_options import check_word

__all__ = ["AdamMini", "adam_mini_step", "block_mean_squares", "blocks_of", "update_weights"]

# Of a weight with 8-bit momentum: a few float32 copies of a piece are alive together.
PIECES, SMALLEST_PIECE = 32, 2**20


def adam_mini_step(
    w: torch.Tensor,
    g: torch.Tensor,
    m: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    v: torch.Tensor,
    t: torch.Tensor,
    learning_rate: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    means: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]] = mean_squares,
    rates_of: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
    update: Callable[..., Any] | None = None,
    shards: RowShards | None = None,
) -> tuple[torch.Tensor, torch.Tensor | tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """One step of Adam-mini on one weight. All arithmetic is float32, whatever the dtypes of ``w`` and ``g``.

    Args:
        w (Tensor): The weight, of any shape.
        g (Tensor): Its gradient.
        m (Tensor or tuple): First moment, float32; or its codes (groups, 32) int8 and scales (groups,) float32.
        v (Tensor): Second moment of the blocks, float32: of as many dimensions as ``w``, in each the number of blocks.
        t (Tensor): The number of this step, from 1.
        learning_rate, weight_decay (Tensor or float): :math:`\\eta` and the decoupled :math:`\\lambda`.
        beta1, beta2, eps (float): :math:`\\beta_1`, :math:`\\beta_2` and :math:`\\epsilon`.
        means, rates_of, update (callable): In the places of ``mean_squares``, of ``rates_of_blocks`` and of the updates
            below, as Triton has them.
        shards (RowShards, optional): Of a weight with blocks that lie on several ranks: a vector, or heads of rows.
            ``w``, ``g`` and ``m`` are this rank's, ``v`` is that of all.

    Returns:
        ``w`` and ``m``, overwritten, and the new ``v``.
    """
    squares = block_mean_squares(g, tuple(v.shape), means, shards)
    v, rates = (rates_of or rates_of_blocks)(v, squares, t, learning_rate, beta1, beta2, eps)
    if shards is None or w.ndim < 2:
        rates = spread(rates, w.shape)
    else:
        of_all_rows = spread(rates, (shards.total_rows, *w.shape[1:]))
        rates = of_all_rows[shards.first_row : shards.first_row + shards.rows]
    if not w.numel():  # of a sharded weight a rank may have nothing
        return w, m, v
    rows, decay = as_rows(w), 1 - learning_rate * weight_decay
    update = update or (update_in_place if isinstance(m, torch.Tensor) else update_in_pieces)
    update(rows, as_rows(g), m if isinstance(m, tuple) else as_rows(m), rates, beta1, decay)
    if w.ndim != 2 and not w.is_contiguous():  # then its rows are a copy
        w.copy_(rows.reshape(w.shape))
    return w, m, v


def block_mean_squares(
    g: torch.Tensor,
    blocks: tuple[int, ...],
    means: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]] = mean_squares,
    shards: RowShards | None = None,
) -> torch.Tensor:
    """Means of ``g`` squared over each block, float32, of the shape ``blocks``."""
    rows, shape = as_rows(g), g.shape
    row_means, column_means = means(rows)
    if shards is not None and g.ndim < 2:
        return shards.mean_over_all_rows(row_means).reshape(blocks)
    if shards is not None:
        row_means, shape = shards.all_rows(row_means), (shards.total_rows, *g.shape[1:])
    if rows.shape[1] > 1 and blocks and blocks[-1] == rows.shape[1]:
        return column_means.reshape(blocks)
    if row_means.numel() == math.prod(blocks):  # rows are blocks
        return row_means.reshape(blocks)
    split = [part for n, length in zip(blocks[:-1], shape[:-1], strict=True) for part in (n, length // max(n, 1))]
    return row_means.reshape(split or [1]).mean(dim=tuple(range(1, len(split), 2)) or None).reshape(blocks)


def rates_of_blocks(
    v: torch.Tensor,
    squares: torch.Tensor,
    t: torch.Tensor,
    learning_rate: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The new ``v``, and the rate of each block: its momentum times that is the step."""
    v = update_second_moment(v, squares, beta2)
    denominator = torch.sqrt(v / bias_correction(t, beta2)) + eps
    return v, learning_rate / bias_correction(t, beta1) / denominator


def spread(of_blocks: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A number a block as one of each row of ``as_rows``, (rows, 1), or of each column, (1, columns)."""
    if len(shape) < 2:
        return of_blocks.reshape(1, -1)
    for axis, length in enumerate(shape[:-1]):
        if 1 < of_blocks.shape[axis] < length:
            of_blocks = torch.repeat_interleave(of_blocks, length // of_blocks.shape[axis], dim=axis)
    if of_blocks.shape[-1] > 1:
        return of_blocks.reshape(1, -1)
    return torch.broadcast_to(of_blocks, (*shape[:-1], 1)).reshape(-1, 1)


def update_weights(
    w: torch.Tensor, g: torch.Tensor, m: torch.Tensor, rates: torch.Tensor, beta1: float, decay: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The new weights, rounded once to their dtype, and the new momentum: ``rates`` has the denominators in it."""
    m = update_second_moment(m, g.to(torch.float32), beta1)
    return (decay * w.to(torch.float32) - rates * m).to(w.dtype), m


def update_in_place(
    w: torch.Tensor, g: torch.Tensor, m: torch.Tensor, rates: torch.Tensor, beta1: float, decay: float | torch.Tensor
) -> None:
    """As ``update_weights``, block by block, so that no second copy of anything is needed."""
    for rows in blocks(w):
        of_rows = rates[rows] if len(rates) > 1 else rates
        w[rows], m[rows] = update_weights(w[rows], g[rows], m[rows], of_rows, beta1, decay)


def update_in_pieces(
    w: torch.Tensor,
    g: torch.Tensor,
    m: tuple[torch.Tensor, torch.Tensor],
    rates: torch.Tensor,
    beta1: float,
    decay: float | torch.Tensor,
) -> None:
    """As ``update_weights`` with ``m`` as codes and scales: in float32 for a few rows at a time alone."""
    columns = w.shape[1]
    whole_groups = GROUP // math.gcd(columns, GROUP)  # so many rows are whole groups
    piece = max(SMALLEST_PIECE, w.numel() // PIECES) // columns
    piece = max(1, piece // whole_groups) * whole_groups
    codes, scales = m
    for first in range(0, len(w), piece):
        rows = slice(first, min(first + piece, len(w)))
        groups = slice(first * columns // GROUP, groups_of(rows.stop * columns))
        old = decode_momentum(codes[groups], scales[groups], (rows.stop - first, columns))
        of_rows = rates[rows] if len(rates) > 1 else rates
        w[rows], momentum = update_weights(w[rows], g[rows], old, of_rows, beta1, decay)
        codes[groups], scales[groups] = encode_momentum(momentum)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(rows, columns): the last dimension, and all others together; one row for a vector."""
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1] if x.ndim else 1)


def blocks_of(w: torch.Tensor, heads: dict[torch.Tensor, int], by_first: set[torch.Tensor]) -> tuple[int, ...]:
    """How many blocks a weight has along each dimension.

    Args:
        w (Tensor): The weight. A vector is one block, and every row of all else: (outputs, inputs), tables (V, D),
            experts (E, outputs, inputs), both factors of LoRA.
        heads (dict): Weight -> number of heads, of queries and keys, each a block.
        by_first (set): Weights whose slices along the first dimension are blocks.
    """
    shape = tuple(w.shape)
    if len(shape) < 2:
        return (1,) * len(shape)
    if w in heads:
        return (heads[w], 1)
    if w in by_first:
        return (shape[0], *(1,) * (len(shape) - 1))
    return (*shape[:-1], 1)


class AdamMini(BodyOptimizer):
    r"""The Adam-mini optimizer [1], for the body of a model, at the learning rates of AdamW.

    State of a weight: ``m``, float32 of its shape, and ``v``, float32, one number a block: 4 bytes a weight. With
    ``momentum="int8"``, ``m`` is codes (groups, 32) int8 and ``m_scales`` (groups,) float32: 1.13 bytes. Of
    the shape such state tells ``v``'s alone: load the weights first. The formula stands at the top of this file.

    [1]: Adam-mini: Use Fewer Learning Rates To Gain More. arXiv 2406.16793.

    Args:
        params (iterable): The weights, or groups of them, or named weights, as any PyTorch optimizer takes them.
        lr (float or Tensor): The learning rate :math:`\eta`, as AdamW's.
        betas (tuple of float): :math:`(\beta_1, \beta_2)`. Default: ``(0.9, 0.999)``.
        eps (float): The term :math:`\epsilon` added to the denominator. Default: ``1e-8``.
        weight_decay (float): The decoupled weight decay :math:`\lambda`. Default: ``0.0``.
        model (nn.Module, optional): For blocks that shapes do not show: queries and keys by head, convolutions by
            output channel. Default: all by row.
        momentum (str): ``"float32"``, or ``"int8"``, companded in groups of 32. Default: ``"float32"``.
        decay_vectors (bool): Let norms and biases decay too. Default: ``False``.
        implementation (str): ``"triton"`` for the kernel, ``"eager"`` for the functions of this file, ``"auto"`` for
            the kernel where a weight is on a CUDA device and Triton is installed. Default: ``"auto"``.

    Raises:
        InputError: (a ``ValueError``) for a value out of range, a weight that is not of those dtypes, a gradient that
            is sparse or of another shape, state of another model, a DTensor that is not sharded by rows, ranks that
            disagree; nothing is written then.
    """

    kept = ("decay_vectors", "implementation", "momentum", "_heads", "_by_first")

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        model: nn.Module | None = None,
        momentum: str = "float32",
        decay_vectors: bool = False,
        implementation: str = "auto",
    ):
        check_word("AdamMini", "momentum", momentum, ("float32", "int8"))
        self.momentum = momentum
        self._heads = module_roles.attention_heads(model) if model is not None else {}
        self._by_first = module_roles.convolutions(model) if model is not None else set()
        super().__init__(params, lr, betas, eps, weight_decay, decay_vectors, implementation)

    def state_of(self, w: torch.Tensor, group: dict[str, Any]) -> State:
        state = {"m": (tuple(w.shape), torch.float32), "v": (blocks_of(w, self._heads, self._by_first), torch.float32)}
        if self.momentum == "int8":
            groups = groups_on_all_ranks(w, self._shards.get(w))
            state |= {"m": ((groups, GROUP), torch.int8), "m_scales": ((groups,), torch.float32)}
        return state

    def whole_state_of(self, w: torch.Tensor) -> tuple[str, ...]:
        of_rows = w.ndim > 1 and blocks_of(w, self._heads, self._by_first)[0] == w.shape[0]
        return () if of_rows else ("v",)

    def step_weight(
        self,
        w: torch.Tensor,
        g: torch.Tensor,
        state: dict[str, torch.Tensor],
        group: dict[str, Any],
        shards: RowShards | None,
    ) -> None:
        if w.ndim > 1 and len(state["v"]) == len(w):
            shards = None  # rows are blocks: each lies on one rank
        kernels = {}
        if self.by_triton(w) and w.is_contiguous() and g.is_contiguous():
            kernels = {"means": triton_body.row_mean_squares, "rates_of": triton_body.rates_of_blocks}
            kernels["update"] = triton_body.update_flat
        m = state["m"] if self.momentum == "float32" else (state["m"], state["m_scales"])
        options = group["lr"], *group["betas"], group["eps"], self.weight_decay_of(w, group)
        _, _, v = adam_mini_step(w, g, m, state["v"], state["step"], *options, shards=shards, **kernels)
        if v is not state["v"]:
            state["v"].copy_(v)
