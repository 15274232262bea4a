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
The functions are those of ``ember_mlx/optimizers/sage.py``, line against line.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from cuda_ref import triton_body
from cuda_ref.optimizers.base import State
from cuda_ref.optimizers.body import BodyOptimizer
from cuda_ref.optimizers.ember import bias_correction, blocks
from cuda_ref.optimizers.ember import update_second_moment as running_mean
from cuda_ref.sharding import RowShards
from ember_mlx.shared.ember_options import check_switch
from ember_mlx.shared.errors import InputError

__all__ = ["SAGE", "column_damper", "mean_magnitudes", "sage_step", "update_parameter"]


def sage_step(
    w: torch.Tensor,
    g: torch.Tensor,
    m: torch.Tensor,
    s: torch.Tensor,
    t: torch.Tensor,
    learning_rate: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    still_rows: bool = True,
    magnitudes_of: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
    update: Callable[..., Any] | None = None,
    shards: RowShards | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step of SAGE on one parameter. All arithmetic is float32, whatever the dtypes of ``w`` and ``g``.

    Args:
        w (Tensor): The table (V, D), or a vector (D,).
        g (Tensor): Its gradient, in the shape of ``w``.
        m (Tensor): The momentum, in the shape of ``w``, float32.
        s (Tensor): Running mean of the magnitudes of the columns, (D,) float32.
        t (Tensor): The number of this step, from 1.
        learning_rate, weight_decay (Tensor or float): :math:`\\eta` and the decoupled :math:`\\lambda`.
        beta1, beta2, eps (float): :math:`\\beta_1`, :math:`\\beta_2` and :math:`\\epsilon`.
        still_rows (bool): Leave a row of ``w`` as it is where its gradient is all zero; a vector is one row.
        magnitudes_of, update (callable, optional): In the places of ``mean_magnitudes`` and ``update_in_place``.
        shards (RowShards, optional): Of a parameter that lies on several ranks; ``w``, ``g`` and ``m`` are this rank's.

    Returns:
        ``w`` and ``m``, overwritten, and the new ``s``.
    """
    magnitudes, has_gradient = (magnitudes_of or mean_magnitudes)(g)
    if shards is not None and g.ndim > 1:
        magnitudes = shards.mean_over_all_rows(magnitudes)
    elif shards is not None:
        magnitudes = shards.all_rows(magnitudes)
        has_gradient = (magnitudes != 0).any(dim=0, keepdim=True)
    s = running_mean(s, magnitudes, beta2)
    h = column_damper(magnitudes, s / bias_correction(t, beta2), eps)
    if shards is not None and g.ndim < 2:
        h = h[shards.first_row : shards.first_row + shards.rows]
    moves = has_gradient if still_rows else None
    (update or update_in_place)(w, g, m, h, moves, learning_rate, beta1, beta2, weight_decay)
    return w, m, s


def mean_magnitudes(g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of the magnitudes of ``g`` over the rows, (D,) float32, and which rows are not all zero, (V, 1) or (1,)."""
    if g.ndim == 1:
        magnitudes = torch.abs(g.to(torch.float32))
        return magnitudes, (magnitudes != 0).any(dim=0, keepdim=True)
    sums, largest = [], []
    for rows in blocks(g):
        magnitudes = torch.abs(g[rows].to(torch.float32))
        sums.append(magnitudes.sum(dim=0))
        largest.append(magnitudes.amax(dim=1, keepdim=True))
    return torch.stack(sums).sum(dim=0) / g.shape[0], torch.cat(largest) != 0


def column_damper(magnitudes: torch.Tensor, averaged: torch.Tensor, eps: float) -> torch.Tensor:
    """H, (D,), by the magnitudes of this step and their corrected running mean: at most 1, less for loud columns."""
    return torch.minimum(rms(averaged) / (averaged + eps), rms(magnitudes) / (magnitudes + eps)).clamp(max=1)


def rms(x: torch.Tensor) -> torch.Tensor:
    """Root mean square, as a multiple of the largest: the squares of 1e-20 are no float32."""
    largest = torch.clamp(x.max(), min=1e-30)
    return largest * torch.sqrt(torch.mean(torch.square(x / largest)))


def update_parameter(
    w: torch.Tensor,
    g: torch.Tensor,
    m: torch.Tensor,
    h: torch.Tensor,
    moves: torch.Tensor | None,
    learning_rate: float | torch.Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The new ``w``, rounded once to its dtype, and the new ``m``."""
    g = g.to(torch.float32)
    decayed = (1 - learning_rate * weight_decay) * w.to(torch.float32)
    update = torch.sign(running_mean(m, g, beta1)) * h
    new = (decayed - learning_rate * update).to(w.dtype)
    return new if moves is None else torch.where(moves, new, w), running_mean(m, g, beta2)


def update_in_place(
    w: torch.Tensor,
    g: torch.Tensor,
    m: torch.Tensor,
    h: torch.Tensor,
    moves: torch.Tensor | None,
    learning_rate: float | torch.Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    """As ``update_parameter``, block by block, so that no second copy of anything is needed."""
    w, g, m = (torch.atleast_2d(x) for x in (w, g, m))
    for rows in blocks(w):
        of_rows = None if moves is None else moves[rows]
        w[rows], m[rows] = update_parameter(
            w[rows], g[rows], m[rows], h, of_rows, learning_rate, beta1, beta2, weight_decay
        )


class SAGE(BodyOptimizer):
    r"""The SAGE optimizer [1], for embedding tables, LM heads, norms and biases.

    For a parameter of shape (V, D) or (D,) it keeps the momentum ``m`` in its shape, and ``s`` of shape (D,), both
    float32. The formula stands at the top of this file. The authors pair it with SinkGD on the matrices.

    [1]: arXiv 2604.07663.

    Args:
        params (iterable): As any PyTorch optimizer takes them.
        lr (float or Tensor): :math:`\eta`, the largest step of an element. A tenth to all of AdamW's.
        betas (tuple): :math:`(\beta_1, \beta_2)`. For the authors' ``UniSAGE`` give ``(0.891, 0.99)``, which is its
            ``(0.9, 0.99)`` in the paper's order. Default: ``(0.9, 0.99)``.
        eps (float): :math:`\epsilon`. Default: ``1e-8``.
        weight_decay (float): The decoupled :math:`\lambda`. Default: ``0.01``.
        still_rows (bool): Leave rows without a gradient as they are, weight decay included; their momentum fades.
            ``False`` is the published rule. Default: ``True``.
        decay_vectors (bool): Let norms and biases decay too. Default: ``False``.
        implementation (str): ``"triton"`` for the kernels, ``"eager"`` for the functions of this file, ``"auto"`` for
            the kernels where a parameter is on a CUDA device and Triton is installed. Default: ``"auto"``.

    Raises:
        InputError: (a ``ValueError``) for a value out of range, for a parameter that is not 1-D or 2-D and floating,
            for state that is not of these parameters, for a DTensor that is not sharded by rows, and for ranks that
            disagree; nothing is written then.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        still_rows: bool = True,
        decay_vectors: bool = False,
        implementation: str = "auto",
    ):
        check_switch("SAGE", "still_rows", still_rows)
        self.still_rows = still_rows
        super().__init__(params, lr, betas, eps, weight_decay, decay_vectors, implementation)

    kept = (*BodyOptimizer.kept, "still_rows")

    def _check_weight(self, name, w):
        super()._check_weight(name, w)
        if w.ndim not in (1, 2):
            raise InputError(
                f"SAGE: {name} has shape {tuple(w.shape)} and dtype {w.dtype}; SAGE takes 2-D and 1-D parameters only, "
                "since its damper is of columns: give this one to SinkGD or AdamMini"
            )

    def state_of(self, w: torch.Tensor, group: dict[str, Any]) -> State:
        return {"m": (tuple(w.shape), torch.float32), "s": (tuple(w.shape[-1:]), torch.float32)}

    def whole_state_of(self, w: torch.Tensor) -> tuple[str, ...]:
        return ("s",)

    def step_weight(
        self,
        w: torch.Tensor,
        g: torch.Tensor,
        state: dict[str, torch.Tensor],
        group: dict[str, Any],
        shards: RowShards | None,
    ) -> None:
        kernels = {}
        if self.by_triton(w):
            kernels = {"magnitudes_of": triton_body.mean_magnitudes, "update": triton_body.update_parameter}
        options = group["lr"], *group["betas"], group["eps"], self.weight_decay_of(w, group), self.still_rows
        _, _, s = sage_step(w, g, state["m"], state["s"], state["step"], *options, shards=shards, **kernels)
        state["s"].copy_(s)
