"""The optimizers that the benchmark puts on the body of a model, by name.

Bodies in bfloat16 are float32 tensors here that hold bfloat16 numbers, so that all of them share one compiled model.
:class:`Rounded` rounds gradients before a step and weights after it. That is what a bfloat16 weight would be, bit for
bit: autocast rounds weights for every product, and all optimizers but mlx-lm's compute in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from table_rules import Lion, MLXAdamW
from torch.optim import AdamW

from cuda_ref import AdamMini, FlashAdamW, SinkGD
from cuda_ref.optimizers.body import adamw_step
from cuda_ref.optimizers.sinkgd import sinkgd_step
from cuda_ref.optimizers.split_weights import join, split
from cuda_ref.optimizers.stochastic_rounding import bit_keys, random_bits, round_stochastically, table_seed

__all__ = ["BODY_BETAS", "BODY_RULES", "BodyRule", "Rounded", "SinkGDByShape", "make_body", "restart"]

BODY_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class BodyRule:
    """``build(groups, lr, model)`` makes it; ``guess`` is where its search begins, in half decades from AdamW's."""

    build: Callable | None
    words: str
    guess: int = 0
    rounding: str | None = None  # of bfloat16 weights: "nearest", "stochastic", or "rest" for an int8 rest
    clipped: bool = True  # the norm of its gradient
    decay: float = 1.0  # times AdamW's weight decay: Lion's is larger, since its rate is smaller (arXiv 2302.06675)


class Rounded:
    """An optimizer whose weights are bfloat16: float32 inside a step, rounded at its end in one of three ways.

    With "rest" a weight is bfloat16 between steps and has an int8 rest, as in ``cuda_ref.SplitWeights``, which no CUDA
    graph can hold. "stochastic" takes the bits of Ember's stochastic rounding, as if all weights were one row.
    """

    def __init__(self, optimizer, rounding, seed=0):
        self.optimizer, self.rounding = optimizer, rounding
        self.weights = [w for group in optimizer.param_groups for w in group["params"]]
        flat = self._flat(self.weights)
        self.t = torch.zeros((), device=flat.device)
        self.seed = table_seed(seed, 0).to(flat.device)
        self.rest = torch.zeros_like(flat, dtype=torch.int8) if rounding == "rest" else None
        self._write(self.weights, flat.to(torch.bfloat16))

    @torch.no_grad()
    def step(self):
        gradients = [w.grad for w in self.weights]
        self._write(gradients, self._flat(gradients).to(torch.bfloat16))
        if self.rounding == "rest":
            self._write(self.weights, join(self._flat(self.weights).to(torch.bfloat16), self.rest))
        self.optimizer.step()
        self.t += 1
        flat = self._flat(self.weights)
        if self.rounding == "rest":
            low, rest = split(flat)
            self.rest.copy_(rest)
        elif self.rounding == "stochastic":
            random = random_bits(*bit_keys(self.seed, self.t, 1, len(flat)))
            low = round_stochastically(flat, random[0], torch.bfloat16)
        else:
            low = flat.to(torch.bfloat16)
        self._write(self.weights, low)

    @staticmethod
    def _flat(tensors):
        """All of them in one: some dozens of operations a step instead of thousands."""
        return torch.cat([x.detach().flatten() for x in tensors])

    @staticmethod
    @torch.no_grad()
    def _write(tensors, flat):
        parts = flat.float().split([x.numel() for x in tensors])
        torch._foreach_copy_(tensors, [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)])

    def restart(self):
        self.t.zero_()
        if self.rest is not None:
            self.rest.zero_()
        restart(self.optimizer)


class SinkGDByShape(SinkGD):
    """SinkGD on all weights of one shape at once: dozens of kernels a step instead of thousands, for CUDA graphs."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape = {}
            for w in group["params"]:
                by_shape.setdefault(w.shape, []).append(w)
            for weights in by_shape.values():
                w, g = torch.stack([w.detach() for w in weights]), torch.stack([w.grad for w in weights])
                torch._foreach_copy_(weights, list(self._step_stack(w, g, weights[0], group).unbind()))

    def _step_stack(self, w, g, first, group):
        """The new weights; ``first`` is the one whose state is that of all."""
        lr, eps, decay = group["lr"], group["eps"], self.weight_decay_of(first, group)
        if first.ndim > 1:
            return sinkgd_step(w, g, lr, self.passes, eps, decay)
        state = self.state[first]
        if not state:
            state |= {"step": torch.zeros((), device=w.device), "m": torch.zeros_like(w), "v": torch.zeros_like(w)}
        state["step"] += 1
        w, m, v = adamw_step(w, g, state["m"], state["v"], state["step"], lr, *group["betas"], eps, decay)
        state["m"].copy_(m), state["v"].copy_(v)
        return w


def restart(optimizer):
    """Every state as before the first step: zeros, for every rule here, but for the seed of stochastic rounding."""
    if isinstance(optimizer, Rounded):
        optimizer.restart()
        return
    for state in optimizer.state.values():
        for value in (value for name, value in state.items() if name != "seed"):
            value.zero_()


def _adamw(groups, lr, model):
    return AdamW(groups, lr=lr, betas=BODY_BETAS, fused=True, capturable=lr.is_cuda)


def _adam_mini(groups, lr, model, momentum="float32"):
    return AdamMini(groups, lr=lr, betas=BODY_BETAS, model=model, momentum=momentum)


def _flash(groups, lr, model):
    return FlashAdamW(groups, lr=lr, betas=BODY_BETAS)


def _sinkgd(groups, lr, model):
    return SinkGDByShape(groups, lr=lr, betas=BODY_BETAS)


BODY_RULES = {
    "adamw": BodyRule(_adamw, "AdamW"),
    "adamw-bf16": BodyRule(_adamw, "AdamW, bf16 nearest", rounding="nearest"),
    "adamw-bf16-stochastic": BodyRule(_adamw, "AdamW, bf16 stochastic", rounding="stochastic"),
    "adamw-bf16-rest": BodyRule(_adamw, "AdamW, bf16 + int8 rest", rounding="rest"),
    "adamw-bf16-mlx": BodyRule(lambda groups, lr, model: MLXAdamW(groups, lr), "mlx-lm's AdamW, bf16",
                               rounding="nearest", clipped=False),
    "adam-mlx": BodyRule(lambda groups, lr, model: MLXAdamW(groups, lr, dtype=torch.float32),
                         "MLX's Adam, float32, not corrected", clipped=False),
    "flash": BodyRule(_flash, "FlashAdamW, bf16 + int8 rest", rounding="rest"),
    "flash-float32": BodyRule(_flash, "FlashAdamW, float32"),
    "adam-mini": BodyRule(_adam_mini, "Adam-mini"),
    "adam-mini-int8": BodyRule(partial(_adam_mini, momentum="int8"), "Adam-mini, int8 momentum"),
    "sinkgd": BodyRule(_sinkgd, "SinkGD", guess=-1),
    "sinkgd-bf16": BodyRule(_sinkgd, "SinkGD, bf16 nearest", guess=-1, rounding="nearest"),
    "sinkgd-bf16-stochastic": BodyRule(_sinkgd, "SinkGD, bf16 stochastic", guess=-1, rounding="stochastic"),
    "sinkgd-bf16-rest": BodyRule(_sinkgd, "SinkGD, bf16 + int8 rest", guess=-1, rounding="rest"),
    "lion": BodyRule(lambda groups, lr, model: Lion(groups, lr), "Lion", guess=-2, decay=10.0),
    "frozen": BodyRule(None, "nothing trained"),
}  # fmt: skip


def make_body(name, model, lr, weight_decay):
    """The optimizer of that name for a model's body, or None for "frozen"; ``lr`` is a 0-dim tensor."""
    rule = BODY_RULES[name]
    if rule.build is None:
        return None
    matrices = [p for p in model.body().values() if p.ndim > 1]
    vectors = [p for p in model.body().values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": rule.decay * weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = rule.build([group for group in groups if group["params"]], lr, model)  # LoRA has no vectors
    return Rounded(optimizer, rule.rounding) if rule.rounding else optimizer
