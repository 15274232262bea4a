"""The optimizers of ``cuda_ref`` for the suite. PyTorch is imported when one is made, not before."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ember_mlx.parity.stepping import Gradients, Stepped, of_weights

if TYPE_CHECKING:
    import torch

__all__ = ["TorchTables", "TorchWeights"]


class TorchTables:
    """``cuda_ref.Ember`` with one of its implementations on a device, the step compiled or not."""

    def __init__(
        self,
        device: str,
        implementation: str,
        compiled: bool,
        shape: tuple[int, int],
        dtype: str,
        learning_rate: float | Callable[[int], float],
        weight_decay: float,
        **options: Any,
    ):
        import torch

        from cuda_ref import Ember

        self.zeros, self.w = (
            torch.nn.Parameter(torch.zeros(shape, dtype=getattr(torch, dtype), device=device)) for _ in range(2)
        )
        settings = {"lr": learning_rate, "weight_decay": weight_decay, "implementation": implementation} | options
        self.optimizer = Ember([self.zeros, self.w], **settings)
        self.optimizer_step = self.optimizer.step
        if compiled:
            # The compiler keeps what it made for all optimizers in one place, and runs uncompiled once that is full.
            torch.compiler.reset()
            torch._logging.set_logs(dynamo=logging.ERROR)  # it warns of the profiler's mark in every PyTorch optimizer
            self.optimizer_step = torch.compile(self.optimizer.step, fullgraph=True)

    def start(self) -> None:
        for tensor in self._state():
            tensor.zero_()

    def steps(self, weights: np.ndarray, gradients: Gradients) -> Stepped:
        import torch

        made = []
        for _ in _give_each(self.zeros, self.w, weights, gradients):
            self.optimizer_step()
            state = self.optimizer.state[self.w]
            read = (state["r"], state["c"], self.zeros.detach(), self.w.detach())
            made.append(torch.cat([tensor.flatten() for tensor in read]))  # float32, as r and c are
        return Stepped.of(torch.stack(made).cpu().numpy(), tuple(self.w.shape))

    def state(self) -> "list[torch.Tensor]":
        return [tensor.clone() for tensor in self._state()]

    def restore(self, state: "list[torch.Tensor]") -> None:
        if not state:  # taken before the first step of all
            self.start()
            return
        # In place: a compiled step holds these very tensors.
        for tensor, before in zip(self._state(), state, strict=True):
            tensor.copy_(before)

    def _state(self):
        """All but the seeds, which are of the tables and not of the steps."""
        states = self.optimizer.state.values()
        return [tensor for state in states for name, tensor in state.items() if name != "seed"]


class TorchWeights:
    """An optimizer of ``cuda_ref.optimizers`` with one of its implementations on a device."""

    def __init__(
        self,
        device: str,
        implementation: str,
        class_name: str,
        shape: tuple[int, ...],
        dtype: str,
        learning_rate: float,
        weight_decay: float,
        **options: Any,
    ):
        import torch

        from cuda_ref import optimizers

        self.zeros, self.w = (
            torch.nn.Parameter(torch.zeros(shape, dtype=getattr(torch, dtype), device=device)) for _ in range(2)
        )
        settings = {"lr": learning_rate, "weight_decay": weight_decay, "implementation": implementation} | options
        self.optimizer = getattr(optimizers, class_name)([self.zeros, self.w], **settings)

    def steps(self, weights: np.ndarray, gradients: Gradients) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        import torch

        made = []
        for _ in _give_each(self.zeros, self.w, weights, gradients):
            self.optimizer.step()
            state = self.optimizer.state[self.w]
            read = (self.zeros.detach().float(), self.w.detach().float(), *state.values())
            made.append([tensor.clone() for tensor in read])
        return of_weights(state, (torch.stack(tensors).cpu().numpy() for tensors in zip(*made, strict=True)))


def _give_each(zeros, w, weights, gradients):
    """Set ``w``, and before each step set ``zeros`` and give both the gradient in its dtype; all is copied there once.

    Each gradient is a tensor of its own: compiled steps and kernels are made for one that begins where all tensors do.
    """
    import torch

    together = torch.from_numpy(np.stack([gradient for gradient, _ in gradients])).to(w.device)
    w.detach().copy_(torch.from_numpy(weights))
    for values, (_, dtype) in zip(together, gradients, strict=True):
        g = values.to(getattr(torch, dtype), copy=True)
        zeros.detach().zero_()
        for table in (w, zeros):
            table.grad = None
            table.grad_dtype = g.dtype  # PyTorch wants that of the table unless told otherwise
            table.grad = g
        yield
