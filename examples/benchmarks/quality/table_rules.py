"""The optimizers that the benchmark puts on the token tables, by name.

Library code wherever it can run in a CUDA graph and does what the literature calls it: Ember is ``cuda_ref.Ember``,
AdamW is PyTorch's. The rest is :class:`FactoredRule`, one rule of which Adafactor, rows alone, columns alone and the
steps from Ember to Adafactor are settings, and :class:`SGD`. ``torch.optim.Adafactor`` is not used: it multiplies the
learning rate with the RMS of the table and cuts it at 1 / sqrt(t), and reads numbers back from the GPU in every step.
"""

from functools import partial

import torch
from torch.optim import AdamW, Optimizer

from cuda_ref import SAGE, AdamMini, Ember, FlashAdamW

__all__ = ["SGD", "TABLE_RULES", "FactoredRule", "Lion", "MLXAdamW", "make"]


def factored_update(g, r, c, t, statistics="both", beta2=0.999, clip=None, eps=1e-8):
    """Ember's update and the rules around it, in float32.

    Args:
        g (Tensor): The gradient, (V, D).
        r, c (Tensor): Second moments of rows, (V,), and columns, (D,); overwritten.
        t (Tensor): The number of this step, from 1.
        statistics (str): "both": outer(r, c) / mean(c); "rows": r alone; "columns": c alone.
        beta2 (float or str): A number, with Adam's bias correction, or "adafactor" for 1 - t^-0.8, which needs none.
        clip (None or str): "table": the root mean square of the whole update is at most 1 (Adafactor, d = 1).
        eps (float): Added to the denominator.

    Returns:
        Tensor: What is to be subtracted from the table, over the learning rate; (V, D).
    """
    g = g.float()
    squares = g.square()
    forget = t**-0.8 if beta2 == "adafactor" else torch.full_like(t, 1 - beta2)
    correction = 1.0 if beta2 == "adafactor" else -torch.expm1(t * torch.log1p(-forget))
    r.lerp_(squares.mean(dim=1), forget)
    c.lerp_(squares.mean(dim=0), forget)
    row, column = (r / correction).sqrt()[:, None], (c / correction).sqrt()
    if statistics == "both":
        row = (r / (c.mean() * correction).clamp(min=1e-30)).sqrt()[:, None]
        denominator = row * c.sqrt()
    else:
        denominator = row if statistics == "rows" else column
    update = g / (denominator + eps)
    if clip == "table":
        update /= update.square().mean().sqrt().clamp(min=1.0)
    return update


class FactoredRule(Optimizer):
    """:func:`factored_update` as an optimizer that a CUDA graph can hold; ``options`` are its keywords.

    With ``beta2="adafactor", clip="table"`` it is Adafactor at a fixed learning rate: MLX's with
    ``relative_step=False, scale_parameter=False``.
    """

    def __init__(self, params, lr, **options):
        super().__init__(params, {"lr": lr, "options": options})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for w in group["params"]:
                state = self.state[w]
                if not state:
                    state["step"] = torch.zeros((), device=w.device)
                    state["r"] = torch.zeros(w.shape[0], device=w.device)
                    state["c"] = torch.zeros(w.shape[1], device=w.device)
                state["step"] += 1
                update = factored_update(w.grad, state["r"], state["c"], state["step"], **group["options"])
                w.copy_(w.float() - group["lr"] * update)


class SGD(Optimizer):
    """SGD with momentum as ``torch.optim.SGD`` has it, for a learning rate that is a tensor in a CUDA graph."""

    def __init__(self, params, lr, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for w in group["params"]:
                buffer = self.state[w].setdefault("buffer", torch.zeros_like(w))
                buffer.mul_(group["momentum"]).add_(w.grad)
                w.sub_(group["lr"] * buffer)


class Lion(Optimizer):
    """Lion (arXiv 2302.06675) in float32; no library at hand has it for a rate that is a tensor in a CUDA graph."""

    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for w in group["params"]:
                m = self.state[w].setdefault("m", torch.zeros_like(w))
                direction = torch.lerp(w.grad, m, beta1).sign()
                w.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * direction)
                m.lerp_(w.grad, 1 - beta2)


class MLXAdamW(Optimizer):
    """``mlx.optimizers.AdamW`` as mlx-lm makes it: no bias correction, and every result in ``dtype``, the weights'.

    In bfloat16 Python's numbers are bfloat16 too, and 0.999 is 1: the second moment forgets nothing. The weights may be
    float32 tensors that hold bfloat16 numbers. Weight decay is left out: 1 - lr * 0.01 is 1 in bfloat16. In float32 it
    is therefore ``mlx.optimizers.Adam``.
    """

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8, dtype=torch.bfloat16):
        super().__init__(params, {"lr": lr})
        device = self.param_groups[0]["params"][0].device
        numbers = (betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps)
        self.numbers = [torch.tensor(number, dtype=dtype, device=device) for number in numbers]

    @torch.no_grad()
    def step(self, closure=None):
        keep1, add1, keep2, add2, eps = self.numbers
        for group in self.param_groups:
            weights, rate = group["params"], group["lr"].to(keep1.dtype)
            w, g = (torch.cat([x.detach().to(keep1.dtype).flatten() for x in xs])
                    for xs in (weights, [w.grad for w in weights]))  # fmt: skip
            state = self.state[weights[0]]  # of all of them, so that a step is some kernels instead of thousands
            if not state:
                state["m"], state["v"] = torch.zeros_like(g), torch.zeros_like(g)
            m, v = keep1 * state["m"] + add1 * g, keep2 * state["v"] + add2 * g.square()
            state["m"].copy_(m), state["v"].copy_(v)
            new = (w - rate * m / (v.sqrt() + eps)).split([w.numel() for w in weights])
            torch._foreach_copy_(weights, [part.view(w.shape) for part, w in zip(new, weights, strict=True)])


def _adamw(tables, lr, betas=(0.9, 0.999), weight_decay=0.0):
    return AdamW(tables, lr=lr, betas=betas, weight_decay=weight_decay, fused=True, capturable=lr.is_cuda)


def growing_beta2(step):
    """Adafactor's beta2 of the step after ``step`` steps."""
    return 1 - (step + 1) ** -0.8


# name -> (what makes the optimizer, the learning rate to try first as a power of sqrt(10), what it is, in words)
TABLE_RULES = {
    "ember": (Ember, -5, "Ember"),
    "adamw": (_adamw, -4, "AdamW"),
    "adafactor": (partial(FactoredRule, beta2="adafactor", clip="table", eps=1e-30), -5, "Adafactor, fixed rate"),
    "rows": (partial(FactoredRule, statistics="rows"), -5, "row statistics alone"),
    "columns": (partial(FactoredRule, statistics="columns"), -4, "column statistics alone"),
    "sgd": (SGD, 0, "SGD, momentum 0.9"),
    "frozen": (None, 0, "tables not trained"),
    "adamw-0.99": (partial(_adamw, betas=(0.9, 0.99)), -4, "AdamW, beta2 0.99"),
    "adamw-0.95": (partial(_adamw, betas=(0.9, 0.95)), -3, "AdamW, beta2 0.95, as the body's"),
    "adamw-b1=0": (partial(_adamw, betas=(0.0, 0.999)), -4, "AdamW without momentum"),
    "adamw-decay": (partial(_adamw, weight_decay=0.1), -4, "AdamW, decay 0.1"),
    "ember-0.95": (partial(Ember, beta2=0.95), -5, "Ember, beta2 0.95"),
    "ember-0.99": (partial(Ember, beta2=0.99), -5, "Ember, beta2 0.99"),
    "ember-0.9999": (partial(Ember, beta2=0.9999), -5, "Ember, beta2 0.9999"),
    "ember-clip1": (partial(Ember, row_clip=1.0), -5, "Ember, row_clip 1"),
    "ember-clip3": (partial(Ember, row_clip=3.0), -5, "Ember, row_clip 3"),
    "ember-floor1": (partial(Ember, row_floor=1.0), -5, "Ember, row_floor 1"),
    "ember-floor3": (partial(Ember, row_floor=3.0), -4, "Ember, row_floor 3"),
    "ember-floor10": (partial(Ember, row_floor=10.0), -3, "Ember, row_floor 10"),
    "ember-floor30": (partial(Ember, row_floor=30.0), -2, "Ember, row_floor 30"),
    "ember-floor100": (partial(Ember, row_floor=100.0), -1, "Ember, row_floor 100"),
    "ember-0.99-clip3": (partial(Ember, beta2=0.99, row_clip=3.0), -5, "Ember, beta2 0.99, row_clip 3"),
    "ember-growing": (partial(Ember, beta2=growing_beta2), -5, "Ember, beta2 1 - t^-0.8"),
    "ember-growing-clip3": (
        partial(Ember, beta2=growing_beta2, row_clip=3.0),
        -5,
        "Ember, beta2 1 - t^-0.8, row_clip 3",
    ),
    "ember-decay": (partial(Ember, weight_decay=0.1), -5, "Ember, decay 0.1"),
    "ember-tableclip": (partial(FactoredRule, clip="table"), -5, "Ember, Adafactor's clipping"),
    "ember-bf16": (Ember, -5, "Ember, tables in bf16, nearest"),
    "ember-bf16-stochastic": (partial(Ember, rounding="stochastic"), -5, "Ember, tables in bf16, stochastic"),
    "ember-bf16-stochastic-floor3": (
        partial(Ember, rounding="stochastic", row_floor=3.0),
        -4,
        "Ember, tables in bf16, stochastic, row_floor 3",
    ),
    "adamw-bf16": (_adamw, -4, "AdamW, tables in bf16, nearest"),
    "adamw-bf16-mlx": (MLXAdamW, -4, "mlx-lm's AdamW, tables in bf16"),
    "adam-mini": (partial(AdamMini, betas=(0.9, 0.999)), -4, "Adam-mini"),
    "flash-bf16": (partial(FlashAdamW, weights="bf16+int8"), -4, "FlashAdamW, tables in bf16 with int8 rest"),
    "sage": (partial(SAGE, weight_decay=0.0), -5, "SAGE"),
    "lion": (Lion, -6, "Lion"),
}


def make(name, tables, learning_rate):
    """The optimizer of that name for a list of tables, or None for "frozen"; ``learning_rate`` is a 0-dim tensor."""
    build = TABLE_RULES[name][0]
    return build(tables, lr=learning_rate) if build else None
