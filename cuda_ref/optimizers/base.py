"""What SAGE and the Flash optimizers share: checked options, state made from the parameters, and one step of each."""

import math
from numbers import Real

import torch
from torch.optim import Optimizer

from cuda_ref import sharding
from cuda_ref.optimizers.checks import DTYPES, check_keys, name_of
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.float_formats import SMALLEST_NORMAL

__all__ = ["ArrayOptimizer", "bias_correction", "checked", "running_mean"]


class ArrayOptimizer(Optimizer):
    """An optimizer that takes one parameter at a time, with tensors alone in its state.

    A subclass gives ``state_of(w)``, the zeros that a parameter starts from by name, and ``step_parameter``, which
    overwrites a parameter and returns its new state. Parameters without a gradient are left out.

    Raises:
        InputError: (a ``ValueError``) for an option out of range, a parameter that the optimizer does not take, a
            gradient that is sparse or of another shape or device, state of another parameter; nothing is written then.
    """

    def __init__(self, params, lr, betas, eps, weight_decay, decay_vectors):
        self.decay_vectors = decay_vectors
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, defaults if eps is None else defaults | {"eps": eps})

    @property
    def name(self):
        return type(self).__name__

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        try:
            self.check_group(self.param_groups[-1])
        except InputError:
            self.param_groups.pop()
            raise

    def check_group(self, group):
        """The options and the parameters of one group."""
        lr = group["lr"]
        if isinstance(lr, torch.Tensor) and (lr.ndim or lr.dtype != torch.float32):
            raise InputError(f"{self.name}(lr={lr!r}): must be a number, or one float32 number, torch.tensor(1e-3)")
        if not isinstance(lr, torch.Tensor):
            checked(self.name, "lr", lr, 0, math.inf, "a finite number, zero or more")
        checked(self.name, "weight_decay", group["weight_decay"], 0, math.inf, "a finite number, zero or more")
        if not isinstance(group["betas"], tuple | list) or len(group["betas"]) != 2:
            raise InputError(f"{self.name}(betas={group['betas']!r}): must be two numbers, usually (0.9, 0.999)")
        for beta in group["betas"]:
            checked(self.name, "betas", beta, 0, 1, "at least 0 and below 1")
        if "eps" in group:
            checked(self.name, "eps", group["eps"], SMALLEST_NORMAL, math.inf, "a positive number, usually 1e-8")
        for number, w in enumerate(group["params"]):
            self.check_parameter(name_of(group, number), w)

    def check_parameter(self, path, w):
        if not w.numel() or w.dtype not in DTYPES:
            raise InputError(
                f"{self.name}: {path} has shape {tuple(w.shape)} and dtype {w.dtype}; {self.name} takes parameters in "
                "float32, bfloat16 or float16 that are not empty: freeze this one"
            )
        if sharding.is_dtensor(w):
            raise InputError(f"{self.name}: {path} is sharded (a DTensor); {self.name} takes whole parameters: "
                             "give sharded tables to Ember")  # fmt: skip

    @torch.no_grad()
    def step(self, closure=None):
        """One step on every parameter that has a gradient; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._init_group()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                state = self.state[w]
                state["step"] += 1
                for name, new in self.step_parameter(w, state, group).items():
                    if new is not state[name]:
                        state[name].copy_(new)
        return loss

    def _init_group(self):
        """Check all, before anything is written; make the state of parameters that have their first gradient.

        The name is PyTorch's: ``torch.compile`` runs a method of this name as it stands, once.
        """
        for group in self.param_groups:
            self.check_group(group)
            for number, w in enumerate(group["params"]):
                self._check_gradient(name_of(group, number), w)
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None and not self.state[w]:
                    self.state[w]["step"] = torch.zeros((), dtype=torch.float32, device=w.device)
                    self.state[w].update(self.state_of(w))

    def weight_decay_of(self, w, group):
        """The weight decay of a parameter: zero for vectors (norms, biases), unless they are to decay."""
        return group["weight_decay"] if w.ndim > 1 or self.decay_vectors else 0.0

    def __getstate__(self):
        return super().__getstate__() | {"decay_vectors": self.decay_vectors}

    def _check_gradient(self, path, w):
        g = w.grad
        if g is None:
            return
        if g.layout != torch.strided or g.dtype not in DTYPES or g.shape != w.shape or g.device != w.device:
            raise InputError(
                f"{self.name}: the gradient of {path}, of shape {tuple(w.shape)} on {w.device}, is {g.layout}, of "
                f"shape {tuple(g.shape)} and dtype {g.dtype} on {g.device}: must be dense, in the shape and on the "
                "device of the parameter, in float32, bfloat16 or float16"
            )

    def load_state_dict(self, state_dict):
        """Load what ``state_dict`` gave, into any process; the state keeps its dtypes."""
        check_keys(self.name, state_dict)
        state_dict = state_dict | {"param_groups": list(state_dict["param_groups"])}
        saved = {}
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for i, w in zip(saved_group["params"], group["params"], strict=False):
                if state := state_dict["state"].get(i):
                    saved[w] = self._checked_state(name_of(group, i), w, state)
        super().load_state_dict(state_dict)
        for w, state in saved.items():  # PyTorch has cast the state to the dtype of its parameter
            self.state[w] = {name: value.to(w.device, copy=True) for name, value in state.items()}

    def _checked_state(self, path, w, state):
        needed = {"step": torch.zeros(())} | self.state_of(w)
        for name in needed.keys() | state.keys():
            found, zeros = state.get(name), needed.get(name)
            if found is None or zeros is None or found.shape != zeros.shape or found.dtype != zeros.dtype:
                has, needs = (
                    "none" if value is None else f"one of shape {tuple(value.shape)} and dtype {value.dtype}"
                    for value in (found, zeros)
                )
                raise InputError(
                    f"{self.name}.load_state_dict: of {name} the state has {has} for {path}, which needs {needs}: load "
                    "the state of this model, of a run with the same optimizer and the same options"
                )
        return dict(state)


def checked(optimizer, option, value, least, below, in_words):
    """Raise InputError for an option that is not a number from ``least`` to under ``below``."""
    if not isinstance(value, Real) or not least <= value < below:
        raise InputError(f"{optimizer}({option}={value!r}): must be {in_words}")


def running_mean(mean, value, beta):
    """``beta * mean + (1 - beta) * value``, as a step towards it: 0.999 has no exact float32, 0 has."""
    return mean + (1 - beta) * (value - mean)


def bias_correction(t, beta):
    """``1 - beta ** t``, which loses four digits in float32 at t = 1; expm1 loses none."""
    log_beta = math.log(beta) if beta > 0 else -math.inf
    return -torch.expm1(t.to(torch.float32) * log_beta)
