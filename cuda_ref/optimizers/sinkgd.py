r"""SinkGD: matrices without any state, their gradients brought to rows and columns of one size.

The rule is from "Gradient Multi-Normalization" (arXiv 2502.06742). Of the gradient :math:`g` of a matrix (m, n),
:math:`L` times

.. math::

    x_{i \cdot} \leftarrow \sqrt{n} \, \frac{x_{i \cdot}}{\lVert x_{i \cdot} \rVert + \epsilon}, \quad
    x_{\cdot j} \leftarrow \sqrt{m} \, \frac{x_{\cdot j}}{\lVert x_{\cdot j} \rVert + \epsilon}

and then :math:`w \leftarrow (1 - \eta \lambda) w - \eta x`. The root mean square of :math:`x` is 1, so :math:`\eta` is
that of a step. The paper's is 0.02 times 0.05, which is 1e-3.

Only rows and columns are scaled, so :math:`x_{ij} = a_i g_{ij} b_j` always: factors are computed, and no other matrix.
The functions are those of ``ember_mlx/optimizers/sinkgd.py``, line against line.
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
from cuda_ref.optimizers.body import BodyOptimizer, adamw_step
from cuda_ref.optimizers.ember import blocks
from cuda_ref.sharding import RowShards
from ember_mlx.shared.errors import InputError

__all__ = ["Norms", "SinkGD", "sinkgd_step", "sinkhorn_factors", "update_matrix"]

Norms = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From factors (a, b) to the next a, and the norms of the columns of the gradient times it."""


def sinkgd_step(
    w: torch.Tensor,
    g: torch.Tensor,
    learning_rate: float | torch.Tensor,
    passes: int,
    eps: float,
    weight_decay: float | torch.Tensor,
    norms: Callable[[torch.Tensor, float], Norms] | None = None,
    rescale: Callable[..., torch.Tensor] | None = None,
    update: Callable[..., Any] | None = None,
    shards: RowShards | None = None,
) -> torch.Tensor:
    """One step of SinkGD. All arithmetic is float32, whatever the dtypes of ``w`` and ``g``.

    Args:
        w (Tensor): The matrix, (m, n), or several of one shape, (..., m, n), each by itself.
        g (Tensor): Its gradient.
        learning_rate, weight_decay (Tensor or float): :math:`\\eta` and the decoupled :math:`\\lambda`.
        passes (int): :math:`L`. 2 bring the rows within 0.3 % of one size, 3 within 0.01 %.
        eps (float): :math:`\\epsilon`.
        norms, rescale, update (callable, optional): In the places of ``norms_by_products``, ``rescaled`` and
            ``update_matrix``.
        shards (RowShards, optional): Of a matrix whose rows lie on several ranks; ``w`` and ``g`` are this rank's.

    Returns:
        ``w``, overwritten.
    """
    a, b = sinkhorn_factors(g, passes, eps, norms or norms_by_products, shards, rescale)
    return (update or update_matrix)(w, g, a, b, learning_rate, weight_decay)


def sinkhorn_factors(
    g: torch.Tensor,
    passes: int,
    eps: float,
    norms: Callable[[torch.Tensor, float], Norms],
    shards: RowShards | None = None,
    rescale: Callable[..., torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors a, (..., m), and b, (..., n), of the rows and columns of ``g``, float32.

    A row or column of zeros, or of squares that float32 rounds to zero, has the factor 0: it stands still.
    """
    m, n = (g.shape[-2] if shards is None else shards.total_rows), g.shape[-1]
    a, b = (torch.ones(*shape, dtype=torch.float32, device=g.device) for shape in (g.shape[:-1], (*g.shape[:-2], n)))
    one_pass = norms(g, eps)
    for _ in range(passes):
        a, column_norms = one_pass(a, b)
        if shards is not None:
            column_norms = torch.sqrt(shards.sum_over_ranks(torch.square(column_norms)))
        b = (rescale or rescaled)(b, column_norms, m, eps)
    return a, b


def norms_by_products(g: torch.Tensor, eps: float) -> Norms:
    """(a, b) -> the next a, and the norms of the columns of g times it; two products with g squared, a float32 copy."""
    squares = torch.square(g.to(torch.float32))

    def one_pass(a, b):
        row_norms = torch.sqrt((squares @ torch.square(b)[..., None])[..., 0])
        a = rescaled(a, row_norms, g.shape[-1], eps)
        return a, torch.sqrt((torch.square(a)[..., None, :] @ squares)[..., 0, :])

    return one_pass


def rescaled(factor: torch.Tensor, norms: torch.Tensor, length: int, eps: float) -> torch.Tensor:
    """``factor`` for lines of the norm sqrt(length), where now theirs are ``factor * norms``."""
    return torch.where(norms == 0, 0.0, factor * math.sqrt(length) / (factor * norms + eps))


def update_matrix(
    w: torch.Tensor,
    g: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    learning_rate: float | torch.Tensor,
    weight_decay: float | torch.Tensor,
) -> torch.Tensor:
    """The matrix, overwritten block by block, with one rounding to its dtype, so that no second one is needed."""
    for rows in blocks(w):
        x = a[rows][..., None] * g[rows].to(torch.float32) * (b[..., None, :] if w.ndim == 2 else b[rows][..., None, :])
        w[rows] = ((1 - learning_rate * weight_decay) * w[rows].to(torch.float32) - learning_rate * x).to(w.dtype)
    return w


class SinkGD(BodyOptimizer):
    r"""The SinkGD optimizer [1], for the matrices of a model; its vectors, norms and biases, train by AdamW.

    A matrix has no state but the number of steps; a vector has ``m`` and ``v``, float32. The formula stands at the top
    of this file. Arrays of more dimensions are matrices in their last two, as experts are, (E, outputs, inputs).

    [1]: Gradient Multi-Normalization for Stateless and Scalable LLM Training. arXiv 2502.06742.

    Args:
        params (iterable): The weights, or groups of them, or named weights, as any PyTorch optimizer takes them.
        lr (float or Tensor): The root mean square of a step, :math:`\eta`; of vectors, AdamW's.
        passes (int): :math:`L`; 2 give the same training as 5, in half the time. Default: ``5``, as published.
        betas (tuple of float): Of vectors, :math:`(\beta_1, \beta_2)`. Default: ``(0.9, 0.999)``.
        eps (float): The term :math:`\epsilon` added to norms and denominators. Default: ``1e-8``.
        weight_decay (float): The decoupled weight decay :math:`\lambda`. Default: ``0.0``.
        model (nn.Module, optional): Its convolutions and token tables train by AdamW, as vectors do. Without it they
            are taken for matrices, which blows rare tokens up to full steps: give tables to another optimizer.
        decay_vectors (bool): Let norms and biases decay too. Default: ``False``.
        implementation (str): ``"triton"`` for the kernels, ``"eager"`` for the functions of this file, ``"auto"`` for
            the kernels where a weight is on a CUDA device and Triton is installed. Default: ``"auto"``.

    Elements below 1e-22 count as zero.

    Raises:
        InputError: (a ``ValueError``) for a value out of range, a weight that is not of those dtypes, a gradient that
            is sparse or of another shape, state of another model, a DTensor that is not sharded by rows, ranks that
            disagree; nothing is written then.
    """

    kept = ("decay_vectors", "implementation", "passes", "_by_adamw")

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        passes: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        model: nn.Module | None = None,
        decay_vectors: bool = False,
        implementation: str = "auto",
    ):
        if type(passes) is not int or not 1 <= passes <= 100:
            raise InputError(f"SinkGD(passes={passes!r}): must be a whole number from 1 to 100, usually 5 or 2")
        self.passes = passes
        self._by_adamw = (
            module_roles.convolutions(model) | module_roles.token_tables(model) if model is not None else set()
        )
        super().__init__(params, lr, betas, eps, weight_decay, decay_vectors, implementation)

    def state_of(self, w: torch.Tensor, group: dict[str, Any]) -> State:
        if w.ndim > 1 and w not in self._by_adamw:
            return {}
        return {"m": (tuple(w.shape), torch.float32), "v": (tuple(w.shape), torch.float32)}

    def step_weight(
        self,
        w: torch.Tensor,
        g: torch.Tensor,
        state: dict[str, torch.Tensor],
        group: dict[str, Any],
        shards: RowShards | None,
    ) -> None:
        lr, eps, decay = group["lr"], group["eps"], self.weight_decay_of(w, group)
        if "m" not in state:
            kernels = {}
            if self.by_triton(w):
                kernels = {"norms": triton_body.norms, "rescale": triton_body.rescaled}
                kernels["update"] = triton_body.update_matrix
            shards = shards if w.ndim == 2 else None  # else whole matrices
            sinkgd_step(w, g, lr, self.passes, eps, decay, shards=shards, **kernels)
            return
        old = w, state["m"], state["v"]
        new = adamw_step(w, g, state["m"], state["v"], state["step"], lr, *group["betas"], eps, decay)
        for before, after in zip(old, new, strict=True):
            before.copy_(after)
