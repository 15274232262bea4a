"""What the optimizers ask of options, weights, gradients and loaded state: else InputError, and nothing is written."""

from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch

from cuda_ref import sharding, triton_kernels
from ember_mlx.shared.ember_options import (
    SAMPLE,
    check_beta2_schedule,
    check_word,
    not_one_number,
    rounding_warning,
)
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.float_formats import ROUNDS_TO_INFINITY, SMALLEST_NORMAL

__all__ = [
    "DTYPES",
    "SCHEDULE",
    "as_number",
    "by_triton",
    "check_device",
    "check_gradient",
    "check_implementation",
    "check_keys",
    "check_number",
    "check_options",
    "check_schedule",
    "fact_of",
    "fault_of",
    "loss_of",
    "name_of",
    "warning_of",
    "with_schedule",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights and of gradients, in any mix
SCHEDULE = "a schedule"  # what a state_dict says of one: a function is nothing to save
FINITE = (0, ROUNDS_TO_INFINITY, "zero or more and finite in float32")


def check_implementation(optimizer: str, implementation: str) -> None:
    """Refuse what is no implementation, or cannot be found; ``optimizer`` is the name for the error."""
    check_word(optimizer, "implementation", implementation, ("auto", "eager", "triton"))
    if implementation == "triton" and not triton_kernels.available():
        raise InputError(f"{optimizer}(implementation='triton'): Triton is not installed; 'auto' does without it")


def by_triton(implementation: str, w: torch.Tensor) -> bool:
    """Whether the kernels take this weight."""
    if implementation == "auto":
        return w.is_cuda and triton_kernels.available(w.device)
    return implementation == "triton"


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What the closure of a step returns, run with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def check_device(optimizer: str, implementation: str, name: str, w: torch.Tensor) -> None:
    """Refuse a weight that lies where the kernels do not run, if nothing else is to step it."""
    if implementation == "triton" and not triton_kernels.available(w.device):
        raise InputError(
            f"{optimizer}(implementation='triton'): {name} is on {w.device}, and Triton needs a CUDA device: move the "
            "model there before, or take 'auto'"
        )


def check_options(optimizer: str, group: Mapping[str, Any]) -> None:
    """Refuse ``lr``, ``weight_decay`` and ``eps`` of a parameter group that are out of range."""
    _check_learning_rate(optimizer, group)
    check_number(optimizer, "weight_decay", group["weight_decay"], *FINITE)
    check_number(optimizer, "eps", group["eps"], SMALLEST_NORMAL, ROUNDS_TO_INFINITY, "a positive number, usually 1e-8")


def check_number(optimizer: str, name: str, value: Any, least: float, below: float, in_words: str) -> None:
    """Refuse a value that is not from ``least`` to below ``below``; ``in_words`` says what must be given."""
    if not isinstance(value, Real) or not least <= value < below:
        raise InputError(f"{optimizer}({name}={value!r}): must be {in_words}")


def check_schedule(group: Mapping[str, Any]) -> None:
    """Refuse a schedule of ``beta2`` by its values, which a step does not look at."""
    schedule = group["beta2"]
    if callable(schedule):
        check_beta2_schedule(lambda step: as_number("beta2", schedule(torch.tensor(float(step))), "cpu", step).item())


def as_number(option: str, value: Any, device: torch.device | str, step: int | None = None) -> torch.Tensor:
    """What the schedule of an option gave, as one float32 number, (), on ``device`` whatever its type."""
    if isinstance(value, Real):
        return torch.full((), float(value), dtype=torch.float32, device=device)
    if isinstance(value, np.ndarray):  # also of no dimensions, as np.where makes them
        value = torch.from_numpy(value)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise not_one_number(option, value, step)
    return value.to(device, torch.float32).reshape(())


def with_schedule(saved_group: dict[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """A group of a loaded state, with the schedule of ``group`` where the state says that it had one."""
    was, scheduled = saved_group.get("beta2") == SCHEDULE, callable(group["beta2"])
    if was != scheduled and "beta2" in saved_group:
        kinds = {True: "a schedule", False: "a number"}
        raise InputError(
            f"Ember.load_state_dict: beta2 was {kinds[was]} in the run of the state, and is {kinds[scheduled]} in this "
            "optimizer: make it with that of the run"
        )
    return saved_group | {"beta2": group["beta2"]} if scheduled else saved_group


def warning_of(group: Mapping[str, Any], rounding: str) -> str | None:
    """Of the first table of a group whose rounding does nothing or leaves nothing of a step, or None.

    It reads some rows of 16-bit tables to nearest, once, where the learning rate can be read without waiting.
    """
    lr = group["lr"]
    if isinstance(lr, torch.Tensor) and lr.device.type != "cpu":
        return None
    for number, w in enumerate(group["params"]):
        w = sharding.local_part(w.detach())
        if w.numel() and w.device.type != "meta":
            dtype, sample = str(w.dtype).removeprefix("torch."), partial(_sample, w)
            if found := rounding_warning(rounding, name_of(group, number), dtype, sample, lambda: float(lr)):
                return found
    return None


def _sample(w):
    """Some rows, evenly spaced, as float32 in NumPy."""
    return w[:: -(-w.numel() // SAMPLE)].float().cpu().numpy()


def fault_of(check: Callable[..., Any], *arguments: Any) -> InputError | None:
    """The InputError that ``check`` raises, or None."""
    try:
        check(*arguments)
    except InputError as fault:
        return fault
    return None


def name_of(group: Mapping[str, Any], number: int) -> str:
    """What messages call a parameter of a group: its name where PyTorch was told one."""
    return group["param_names"][number] if "param_names" in group else f"parameter {number}"


def fact_of(option: Any) -> Any:
    """An option as ranks compare it: a number whatever its type, and of a schedule that it is one."""
    if callable(option):
        return SCHEDULE
    return float(option) if isinstance(option, Real | torch.Tensor) else option


def _check_learning_rate(optimizer, group):
    lr = group["lr"]
    if isinstance(lr, torch.Tensor):
        devices = {str(w.device) for w in group["params"]} or {str(lr.device)}  # SplitWeights empties the other groups
        if lr.ndim or lr.dtype not in (torch.float32, torch.float64) or {str(lr.device)} - devices - {"cpu"}:
            raise InputError(
                f"{optimizer}(lr=...): a tensor of shape {tuple(lr.shape)} and dtype {lr.dtype} on {lr.device}; must "
                "be one float32 number, torch.tensor(1e-3), on the CPU or where the parameters are "
                f"({', '.join(devices)})"
            )
        if lr.device.type != "cpu":  # to look at its value would wait for the GPU
            return
        lr = lr.item()
    check_number(optimizer, "lr", lr, *FINITE)


def check_gradient(optimizer: str, noun: str, name: str, w: torch.Tensor) -> None:
    """Refuse a gradient that is sparse, or does not lie as its weight does; ``noun`` is what errors call that."""
    g = w.grad
    if g.layout != torch.strided:
        raise InputError(
            f"{optimizer}: the gradient of {name} is sparse ({g.layout}); {optimizer} takes dense ones: make the "
            "embedding with sparse=False"
        )
    if g.dtype not in DTYPES:
        raise InputError(
            f"{optimizer}: the gradient of {name} has dtype {g.dtype}; {optimizer} takes float32, bfloat16 and float16"
        )
    if g.shape != w.shape or g.device != w.device:
        raise InputError(
            f"{optimizer}: {name} of shape {tuple(w.shape)} on {w.device} has a gradient of shape {tuple(g.shape)} on "
            f"{g.device}: both must be the same"
        )
    if sharding.is_dtensor(w) and (w.device_mesh, w.placements) != (g.device_mesh, g.placements):
        raise InputError(
            f"{optimizer}: {name} with the placements {w.placements} has a gradient with {g.placements}: both must be "
            f"the same, as fully_shard leaves them. Under torch's tensor parallelism give this {noun} to another "
            "optimizer"
        )


def check_keys(optimizer: str, state_dict: Mapping[str, Any]) -> None:
    """Refuse what is no optimizer's state_dict; ``optimizer`` is the name for the error."""
    missing = [key for key in ("state", "param_groups") if key not in state_dict]
    if missing:
        raise InputError(f"{optimizer}.load_state_dict: it has no {missing[0]!r}: load what state_dict() gave")
