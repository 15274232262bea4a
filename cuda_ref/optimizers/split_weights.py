"""A bfloat16 weight with an int8 rest: 24 bits that take the small steps which 16 round away.

The format is FlashOptim's (arXiv 2602.23349). With ``low`` the weight to the nearest bfloat16 and ``h`` half a unit in
its last place, the rest is the integer nearest to ``127 (w - low) / h``, and back ``w = low + h rest / 127``. At a
learning rate of 1e-5 almost no bfloat16 weight of a usual size moves to nearest; with the rest the steps add up. Its
resolution is 1.5e-5 of a weight: at 1e-7 it fails too.
The functions are those of ``ember_mlx/optimizers/split_weights.py``, line against line.
"""

from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from cuda_ref.optimizers.base import WrappingOptimizer
from cuda_ref.sharding import is_dtensor
from ember_mlx.shared.ember_options import check_word
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.float_formats import SMALLEST_NORMAL

__all__ = ["WEIGHTS", "SplitWeights", "check_some_are_bfloat16", "half_unit", "join", "split"]

WEIGHTS = ("bf16+int8",)
STEPS = 127  # of the rest, to either side
# Of a bfloat16 number, 0.53 to 1.06 units in its last place: rounded up to nearest, that is its upper neighbour.
NEXT = 1 + 2.0**-8 + 2.0**-12


def split(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights ``w``, float32, as bfloat16 and its rest, int8: each in the shape of ``w``.

    The rest is 0 where a weight is not finite, is beyond the largest bfloat16, or is too small for half a unit to be a
    normal float32 (under 2^-118).
    """
    low = w.to(torch.bfloat16)
    rest = STEPS * torch.clamp((w - low.to(torch.float32)) / half_unit(low), -1, 1)
    rest = torch.sign(rest) * torch.floor(torch.abs(rest) + 0.5)  # half away from zero
    return low, torch.where(torch.isfinite(rest), rest, 0).to(torch.int8)


def join(low: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """The float32 weights of ``low``, bfloat16, and ``rest``, int8."""
    value = low.to(torch.float32)
    return torch.where(rest == 0, value, value + half_unit(low) * rest.to(torch.float32) / STEPS)


def half_unit(low: torch.Tensor) -> torch.Tensor:
    """Half the distance from each bfloat16 to its neighbour away from zero, float32."""
    magnitude = torch.abs(low.to(torch.float32))
    half = ((magnitude * NEXT).to(torch.bfloat16).to(torch.float32) - magnitude) / 2
    return torch.clamp(half, min=SMALLEST_NORMAL)


class SplitWeights(WrappingOptimizer):
    """Any optimizer, with bfloat16 weights that keep an int8 rest: 1 byte a weight more, in its state.

    A step gives the optimizer inside one parameter at a time, as the float32 weights that ``join`` makes, so that no
    more than one is float32 at once. The rest stands in ``state_dict`` as ``rest``, beside what the optimizer keeps of
    that weight. It starts as 0, also where a loaded state has none. Parameters of other dtypes pass as they are.

    Args:
        optimizer (Optimizer): Any that takes each parameter by itself, Ember and PyTorch's own included. A closure, a
            CUDA graph and ``torch.compile`` are for the optimizers alone, not for this.
        weights (str): The format, ``"bf16+int8"``; there is no other.

    Raises:
        InputError: (a ``ValueError``) for another format; for an optimizer that splits weights itself; where no
            parameter is bfloat16, so that the option means nothing; for DTensors (FSDP2); for a loaded ``rest`` that is
            not of its weight.

    Example:
        >>> optimizer = SplitWeights(Ember(tables, lr=1e-5))
        >>> optimizer.step()
    """

    def __init__(self, optimizer: Optimizer, weights: str = "bf16+int8"):
        name = type(optimizer).__name__
        check_word("SplitWeights", "weights", weights, WEIGHTS)
        if not isinstance(optimizer, Optimizer):
            raise InputError(f"SplitWeights({optimizer!r}): must be a torch.optim.Optimizer, made")
        if hasattr(optimizer, "weights"):  # as of FlashAdamW, whose state has a rest of its own
            raise InputError(f"SplitWeights({name}): {name} splits weights itself: take it with weights='bf16+int8'")
        for w in (w for group in optimizer.param_groups for w in group["params"]):
            if is_dtensor(w):
                raise InputError(
                    f"SplitWeights({name}): a weight of shape {tuple(w.shape)} is a DTensor, which cannot be float32 "
                    "for one step: under FSDP2 take FlashAdamW or FlashLion with weights='bf16+int8'"
                )
        check_some_are_bfloat16("SplitWeights", optimizer.param_groups)
        # Optimizer.__init__ would make groups beside those of the optimizer; this sets up all else that it does.
        state = {"optimizer": optimizer, "weights": weights, "state": defaultdict(dict)}
        self.__setstate__({"defaults": dict(optimizer.defaults)} | state)

    def __getstate__(self):
        return {name: getattr(self, name) for name in ("defaults", "optimizer", "weights", "state")}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer inside."""
        return self.optimizer.param_groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient."""
        if closure is not None:
            raise InputError("SplitWeights.step(closure): takes none: compute the gradients before the step")
        self._check_rests()
        groups = [
            (group, {name: list(group[name]) for name in ("params", "param_names") if name in group})
            for group in self.param_groups
        ]
        try:
            for group, whole in groups:
                group.update({name: [] for name in whole})
            for group, whole in groups:
                for number, w in enumerate(whole["params"]):
                    if w.grad is not None:
                        group.update({name: [values[number]] for name, values in whole.items()})
                        self._step_parameter(w)
                group.update({name: [] for name in whole})
        finally:
            for group, whole in groups:
                group.update(whole)

    def _check_rests(self):
        for i, w in self._numbered():
            rest = self.state[w].get("rest") if w.grad is not None else None
            if rest is not None and rest.shape != w.shape:
                raise InputError(
                    f"SplitWeights.step: parameter {i} has shape {tuple(w.shape)}, and its rest shape "
                    f"{tuple(rest.shape)}; resize the model before the first step, or make the optimizer anew"
                )

    def _step_parameter(self, w):
        if w.dtype != torch.bfloat16:
            self.optimizer.step()
            return
        rest, low, g = self.state[w].get("rest"), w.data, w.grad
        rest = torch.zeros_like(low, dtype=torch.int8) if rest is None else rest
        w.grad_dtype = None  # any
        try:
            w.data = join(low, rest)
            w.grad = g.to(torch.float32)
            self.optimizer.step()
            new, self.state[w]["rest"] = split(w.data)
            low.copy_(new)
        finally:
            w.data = low
            w.grad = g

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def _joined_state(self):
        """As the optimizer's own, with a ``rest`` for each weight that has taken a step."""
        saved = self.optimizer.state_dict()
        for i, w in self._numbered():
            if "rest" in self.state[w]:
                saved["state"][i] = saved["state"].get(i, {}) | {"rest": self.state[w]["rest"]}
        return saved

    def _load_parts(self, state_dict):
        """What the optimizer alone gave is taken, too: then every rest is 0."""
        rests = {}
        saved = (i for group in state_dict["param_groups"] for i in group["params"])  # a pair's tables start above 0
        for i, (_, w) in zip(saved, self._numbered(), strict=False):  # the optimizer inside refuses other groups
            rest = state_dict["state"].get(i, {}).get("rest")
            if rest is not None and (w.dtype != torch.bfloat16 or rest.shape != w.shape or rest.dtype != torch.int8):
                raise InputError(
                    f"SplitWeights.load_state_dict: the state has a rest of shape {tuple(rest.shape)} and dtype "
                    f"{rest.dtype} for parameter {i}, of shape {tuple(w.shape)} and dtype {w.dtype}; it must be int8, "
                    "in the shape of a bfloat16 parameter. Load the state of this model"
                )
            if rest is not None:
                rests[w] = {"rest": rest.to(w.device, copy=True)}
        others = {i: {name: value for name, value in state.items() if name != "rest"}
                  for i, state in state_dict["state"].items()}  # fmt: skip
        with self._seen_as_float32():
            self.optimizer.load_state_dict(state_dict | {"state": {i: state for i, state in others.items() if state}})
        self.state = defaultdict(dict, rests)

    @contextmanager
    def _seen_as_float32(self):
        """PyTorch casts loaded state to the dtype of its parameter, which in each step is float32. Takes no memory."""
        lows = {w: w.data for _, w in self._numbered() if w.dtype == torch.bfloat16}
        try:
            for w, low in lows.items():
                w.grad_dtype = None  # any
                w.data = torch.empty((), dtype=torch.float32, device=low.device).expand(low.shape)
            yield
        finally:
            for w, low in lows.items():
                w.data = low

    def _numbered(self):
        return enumerate(w for group in self.param_groups for w in group["params"])


def check_some_are_bfloat16(optimizer: str, groups: list[dict[str, Any]]) -> None:
    """Raise InputError where no parameter of the groups is bfloat16."""
    dtypes = {w.dtype for group in groups for w in group["params"]}
    if torch.bfloat16 not in dtypes:
        raise InputError(
            f"{optimizer}(weights='bf16+int8'): no parameter is bfloat16, but {', '.join(sorted(map(str, dtypes)))}, "
            "so there is nothing to split. Leave the option out, as with LoRA, or load the model in bfloat16"
        )
