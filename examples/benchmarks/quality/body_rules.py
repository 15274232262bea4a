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
from cuda_ref.optimizers.split_weights import join, split
from cuda_ref.optimizers.stochastic_rounding import bit_keys, random_bits, round_stochastically, table_seed

__all__ = ["BODY_BETAS", "BODY_RULES", "BodyRule", "Rounded", "make_body", "restart"]

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
    graph can hold. "stochastic" takes the random bits of Ember's stochastic rounding.
    """

    def __init__(self, optimizer, rounding, seed=0):
        self.optimizer, self.rounding = optimizer, rounding
        self.weights = [w for group in optimizer.param_groups for w in group["params"]]
        device = self.weights[0].device
        self.t = torch.zeros((), device=device)
        self.seeds = [table_seed(seed, number).to(device) for number in range(len(self.weights))]
        self.rests = [torch.zeros_like(w, dtype=torch.int8) for w in self.weights if rounding == "rest"]
        with torch.no_grad():
            for w in self.weights:
                w.copy_(w.to(torch.bfloat16))

    @torch.no_grad()
    def step(self):
        for w in self.weights:
            w.grad.copy_(w.grad.to(torch.bfloat16))
        for w, rest in zip(self.weights, self.rests, strict=False):
            w.copy_(join(w.to(torch.bfloat16), rest))
        self.optimizer.step()
        self.t += 1
        if self.rounding == "rest":
            for w, rest in zip(self.weights, self.rests, strict=True):
                low, new = split(w)
                w.copy_(low), rest.copy_(new)
            return
        for w, seed in zip(self.weights, self.seeds, strict=True):
            w.copy_(w.to(torch.bfloat16) if self.rounding == "nearest" else self._by_chance(w, seed))

    def _by_chance(self, w, seed):
        rows = w if w.ndim == 2 else w[None]
        random = random_bits(*bit_keys(seed, self.t, *rows.shape))
        return round_stochastically(rows, random, torch.bfloat16).view(w.shape)

    def restart(self):
        for state in (self.t, *self.rests):
            state.zero_()
        restart(self.optimizer)


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
    return SinkGD(groups, lr=lr, betas=BODY_BETAS)


BODY_RULES = {
    "adamw": BodyRule(_adamw, "AdamW"),
    "adamw-bf16": BodyRule(_adamw, "AdamW, bf16 weights, nearest", rounding="nearest"),
    "adamw-bf16-stochastic": BodyRule(_adamw, "AdamW, bf16 weights, stochastic", rounding="stochastic"),
    "adamw-bf16-rest": BodyRule(_adamw, "AdamW, bf16 weights with int8 rest", rounding="rest"),
    "adamw-bf16-mlx": BodyRule(lambda groups, lr, model: MLXAdamW(groups, lr), "mlx-lm's AdamW, all in bf16",
                               rounding="nearest", clipped=False),
    "flash": BodyRule(_flash, "FlashAdamW, bf16 weights with int8 rest", rounding="rest"),
    "adam-mini": BodyRule(_adam_mini, "Adam-mini"),
    "adam-mini-int8": BodyRule(partial(_adam_mini, momentum="int8"), "Adam-mini, int8 momentum"),
    "sinkgd": BodyRule(_sinkgd, "SinkGD", guess=-1),
    "sinkgd-bf16": BodyRule(_sinkgd, "SinkGD, bf16 weights, nearest", guess=-1, rounding="nearest"),
    "sinkgd-bf16-stochastic": BodyRule(_sinkgd, "SinkGD, bf16 weights, stochastic", guess=-1, rounding="stochastic"),
    "sinkgd-bf16-rest": BodyRule(_sinkgd, "SinkGD, bf16 weights with int8 rest", guess=-1, rounding="rest"),
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
