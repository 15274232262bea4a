"""What the optimizers of a model's body share: weights of any shape, two betas, Adam for vectors."""

import reprlib
from numbers import Real
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from cuda_ref import sharding
from cuda_ref.optimizers.base import CheckedOptimizer
from cuda_ref.optimizers.checks import DTYPES, by_triton
from cuda_ref.optimizers.ember import bias_correction, update_second_moment
from cuda_ref.sharding import RowShards
from ember_mlx.shared.ember_options import check_switch
from ember_mlx.shared.float_formats import ROUNDS_TO_ONE

__all__ = ["BodyOptimizer", "adamw_step"]


def adamw_step(
    w: torch.Tensor,
    g: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    t: torch.Tensor,
    learning_rate: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step of AdamW (arXiv 1711.05101) in float32; returns the new ``w`` in its own dtype, ``m`` and ``v``."""
    g = g.to(torch.float32)
    m = update_second_moment(m, g, beta1)
    v = update_second_moment(v, torch.square(g), beta2)
    update = (m / bias_correction(t, beta1)) / (torch.sqrt(v / bias_correction(t, beta2)) + eps)
    new = (1 - learning_rate * weight_decay) * w.to(torch.float32) - learning_rate * update
    return new.to(w.dtype), m, v


class BodyOptimizer(CheckedOptimizer):
    """Weights of any shape, decoupled weight decay, ``betas`` and ``eps``; a subclass says its state and its step.

    A subclass gives ``state_of`` and ``step_weight(parameter, gradient, state, group, shards)``, which writes both. Of
    a weight sharded by FSDP2 that gets the rows here, and ``shards`` where other ranks have more. Vectors (norms,
    biases) get no weight decay unless ``decay_vectors``. ``implementation`` is as Ember's.
    """

    options = ("lr", "betas", "eps", "weight_decay")
    kept = ("decay_vectors", "implementation")

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        decay_vectors: bool,
        implementation: str,
    ):
        check_switch(type(self).__name__, "decay_vectors", decay_vectors)
        self.decay_vectors = decay_vectors
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, implementation)

    def step_weight(
        self,
        w: torch.Tensor,
        g: torch.Tensor,
        state: dict[str, torch.Tensor],
        group: dict[str, Any],
        shards: RowShards | None,
    ) -> None:
        """One step of the rows here; ``state["step"]`` is that of this step."""
        raise NotImplementedError

    def _step_weight(self, w, group):
        state = self.state[w]
        state["step"].add_(1)
        (w, g, *of_state), shards = sharding.parts_here((w, w.grad, *state.values()), self._shards.get(w))
        self.step_weight(w, g, dict(zip(state, of_state, strict=True)), group, shards)

    def weight_decay_of(self, w: torch.Tensor, group: dict[str, Any]) -> float:
        """The weight decay of a parameter: zero for vectors, unless they are to decay."""
        return group["weight_decay"] if w.ndim > 1 or self.decay_vectors else 0.0

    def by_triton(self, w: torch.Tensor) -> bool:
        """Whether the kernels take this weight; of a sharded one a rank may have nothing, on which Triton runs none."""
        return w.numel() > 0 and by_triton(self.implementation, w)

    def _check_group(self, group):
        super()._check_group(group)
        betas = group["betas"]
        in_range = isinstance(betas, tuple | list) and len(betas) == 2
        if not in_range or not all(isinstance(beta, Real) and 0 <= beta < ROUNDS_TO_ONE for beta in betas):
            raise self._error(
                f"(betas={reprlib.repr(betas)}): must be two numbers from 0 to below 1, in float32 too, "
                "usually (0.9, 0.999)"
            )

    def _check_weight(self, name, w):
        if w.dtype not in DTYPES or not w.numel():
            raise self._error(
                f": {name} has shape {tuple(w.shape)} and dtype {w.dtype}; it takes weights with elements, in float32, "
                "bfloat16 or float16: freeze this parameter"
            )
