"""What ``Ember`` asks of options, tables, gradients and loaded state: else InputError, before anything is written."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch

from cuda_ref import sharding, triton_kernels
from ember_mlx.shared.ember_options import (
    BETA2_RANGE,
    SAMPLE,
    check_beta2_schedule,
    not_one_number,
    rounding_warning,
)
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.float_formats import ROUNDS_TO_INFINITY, SMALLEST_NORMAL

__all__ = [
    "DTYPES",
    "OPTIONS",
    "SCHEDULE",
    "as_number",
    "by_triton",
    "check_gradient",
    "check_group",
    "check_implementation",
    "check_keys",
    "check_schedule",
    "check_state",
    "check_state_dict",
    "fault_of",
    "loss_of",
    "name_of",
    "warning_of",
    "with_schedule",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of tables and of gradients, in any mix
OPTIONS = ("lr", "beta2", "eps", "weight_decay")
SCHEDULE = "a schedule"  # what a state_dict says of one: a function is nothing to save
FINITE = (0, ROUNDS_TO_INFINITY, "zero or more and finite in float32")


def check_implementation(optimizer: str, implementation: str) -> None:
    """Refuse what is no implementation, or cannot be found; ``optimizer`` is the name for the error."""
    if implementation not in ("auto", "eager", "triton"):
        raise InputError(f"{optimizer}(implementation={implementation!r}): must be 'auto', 'eager' or 'triton'")
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


def check_group(group: Mapping[str, Any], implementation: str, row_shard_group: Any) -> None:
    """Refuse options out of range, and parameters that are no tables, of one parameter group."""
    _check_learning_rate(group)
    _check("weight_decay", group["weight_decay"], *FINITE)
    if not callable(group["beta2"]):
        _check("beta2", group["beta2"], *BETA2_RANGE)
    _check("eps", group["eps"], SMALLEST_NORMAL, ROUNDS_TO_INFINITY, "a positive number, usually 1e-8")
    for number, w in enumerate(group["params"]):
        # A slice of a table may have no rows.
        is_table = w.ndim == 2 and bool(w.numel() if row_shard_group is None else w.shape[1])
        if not is_table or w.dtype not in DTYPES:
            raise InputError(
                f"Ember: {name_of(group, number)} has shape {tuple(w.shape)} and dtype {w.dtype}; Ember takes 2-D "
                "token tables in float32, bfloat16 or float16 only: give this parameter to another optimizer, for "
                "example with cuda_ref.PairedOptimizer"
            )
        if implementation == "triton" and not triton_kernels.available(w.device):
            raise InputError(
                f"Ember(implementation='triton'): {name_of(group, number)} is on {w.device}, and Triton needs a CUDA "
                "device: move the model there before, or take 'auto'"
            )
        if row_shard_group is not None and sharding.is_dtensor(w):
            raise InputError(
                f"Ember(row_shard_group=...): {name_of(group, number)} is a DTensor, which says itself how its rows "
                "lie: give it to an Ember without row_shard_group; a slice of rows that is sharded again is not "
                "supported"
            )


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


def _check_learning_rate(group):
    lr = group["lr"]
    if isinstance(lr, torch.Tensor):
        devices = {str(w.device) for w in group["params"]}
        if lr.ndim or lr.dtype not in (torch.float32, torch.float64) or {str(lr.device)} - devices - {"cpu"}:
            raise InputError(
                f"Ember(lr=...): a tensor of shape {tuple(lr.shape)} and dtype {lr.dtype} on {lr.device}; must be "
                f"one float32 number, torch.tensor(1e-3), on the CPU or where the tables are ({', '.join(devices)})"
            )
        if lr.device.type != "cpu":  # to look at its value would wait for the GPU
            return
        lr = lr.item()
    _check("lr", lr, *FINITE)


def check_gradient(w: torch.Tensor) -> None:
    """Refuse a gradient that is sparse, or does not lie as its table (V, D) does."""
    g = w.grad
    if g is None:
        return
    if g.layout != torch.strided:
        raise InputError(f"Ember: the gradient of a table {tuple(w.shape)} is sparse ({g.layout}); "
                         "Ember takes dense ones: make the embedding with sparse=False")  # fmt: skip
    if g.dtype not in DTYPES:
        raise InputError(f"Ember: the gradient of a table {tuple(w.shape)} has dtype {g.dtype}; "
                         "Ember takes float32, bfloat16 and float16")  # fmt: skip
    if g.shape != w.shape or g.device != w.device:
        raise InputError(
            f"Ember: a table of shape {tuple(w.shape)} on {w.device} has a gradient of shape {tuple(g.shape)} on "
            f"{g.device}: both must be the same"
        )
    if sharding.is_dtensor(w) and (w.device_mesh, w.placements) != (g.device_mesh, g.placements):
        raise InputError(
            f"Ember: a table with the placements {w.placements} has a gradient with {g.placements}: both must be the "
            "same, as fully_shard leaves them. Under torch's tensor parallelism give this table to another optimizer"
        )


def check_state(name: str, w: torch.Tensor, state: Mapping[str, torch.Tensor] | None) -> None:
    """Refuse state of a table, where it has any, that is of another shape or on another device."""
    if not state:
        return
    w, r, c = (sharding.local_part(tensor) for tensor in (w, state["r"], state["c"]))
    if w.shape != (len(r), len(c)) or w.device != r.device:
        raise InputError(
            f"Ember.step: {name} has shape {tuple(w.shape)} on {w.device}, and its state is of shape "
            f"{(len(r), len(c))} on {r.device}; resize or move the model before the first step, or make the optimizer "
            "anew"
        )


def check_keys(optimizer: str, state_dict: Mapping[str, Any]) -> None:
    """Refuse what is no optimizer's state_dict; ``optimizer`` is the name for the error."""
    missing = [key for key in ("state", "param_groups") if key not in state_dict]
    if missing:
        raise InputError(f"{optimizer}.load_state_dict: it has no {missing[0]!r}: load what state_dict() gave")


def check_state_dict(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    shards: Mapping[torch.Tensor, sharding.RowShards],
    check_group: Callable[[Mapping[str, Any]], None],
) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
    """Refuse what ``load_state_dict`` got unless it fits ``groups``; return the saved state of each table with any."""
    check_keys("Ember", state_dict)
    saved_groups, sizes = state_dict["param_groups"], [len(group["params"]) for group in groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if saved_sizes != sizes:
        raise InputError(
            f"Ember.load_state_dict: the state is of groups of {saved_sizes} tables, this optimizer has groups of "
            f"{sizes}: make it with the groups that were saved"
        )
    found = {}
    for group, saved_group in zip(groups, saved_groups, strict=True):
        missing = [option for option in OPTIONS if option not in saved_group]
        if missing:
            raise InputError(
                f"Ember.load_state_dict: a group of the state has no {missing[0]}: load the state of an Ember"
            )
        saved_group = with_schedule(saved_group, group)
        check_group(saved_group | {"params": group["params"]})
        for i, w in zip(saved_group["params"], group["params"], strict=True):
            state = state_dict["state"].get(i)
            if state:
                _check_state(w, state, shards.get(w), callable(saved_group["beta2"]))
                found[w] = state
    return found


def _check_state(w, state, shards, scheduled):
    rows, columns = (w.shape[0] if shards is None else shards.total_rows), w.shape[1]
    needed = {"step": (), "r": (rows,), "c": (columns,)} | ({"q": ()} if scheduled else {})
    for name, shape in (needed | dict.fromkeys({"seed"} & state.keys(), ())).items():
        found = tuple(state[name].shape) if isinstance(state.get(name), torch.Tensor) else None
        plain_part = name == "r" and shards is not None and shards.mesh is None and found == (shards.rows,)
        if found != shape and not plain_part:
            has = f"no tensor {name}" if found is None else f"{name} of shape {found}"
            raise InputError(
                f"Ember.load_state_dict: the state has {has} for a table of shape {tuple(w.shape)}, which needs "
                f"shape {shape}: load the state of this model"
            )


def _check(name, value, least, below, in_words):
    if not isinstance(value, Real) or not least <= value < below:
        raise InputError(f"Ember({name}={value!r}): must be {in_words}")
