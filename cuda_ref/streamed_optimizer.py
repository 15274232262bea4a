"""Which optimizer steps which weight of a streamed step, and that optimizer with one weight alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import LBFGS, Optimizer, SparseAdam

from cuda_ref.optimizers.base import CheckedOptimizer
from cuda_ref.pairing import PairedOptimizer
from cuda_ref.sharding import is_dtensor
from ember_mlx.shared.errors import InputError

__all__ = ["Side", "alone", "check_parameter", "sides_of"]

Side = tuple[Optimizer, dict[str, Any]]
"""An optimizer and one of its groups."""


def sides_of(optimizer: Optimizer) -> dict[torch.nn.Parameter, Side]:
    """Parameter -> (its optimizer, its group). InputError for one that is not known to look at one array at a time."""
    if not isinstance(optimizer, Optimizer):
        raise InputError(
            f"StreamedBackward(optimizer={type(optimizer).__name__}): must be a torch.optim.Optimizer; a GradScaler or "
            "accelerate's wrapper needs all gradients at once"
        )
    paired = isinstance(optimizer, PairedOptimizer)
    sides = [side for side in (optimizer.rest, optimizer.tables) if side] if paired else [optimizer]
    for side in sides:
        if not _looks_at_one_array(side):
            raise InputError(
                f"StreamedBackward: {type(side).__name__} is not known to look at one array at a time, and all "
                "gradients never exist at once; take one of torch.optim but LBFGS and SparseAdam. If it does, set its "
                "class attribute one_array_at_a_time = True"
            )
    return {p: (side, group) for side in sides for group in side.param_groups for p in group["params"]}


def _looks_at_one_array(optimizer):
    of_torch = f"{type(optimizer).__module__}.".startswith("torch.optim.")
    of_torch = of_torch and not isinstance(optimizer, LBFGS | SparseAdam)
    return of_torch or isinstance(optimizer, CheckedOptimizer) or getattr(optimizer, "one_array_at_a_time", False)


def check_parameter(name: str, p: torch.nn.Parameter, side_of: dict[torch.nn.Parameter, Side]) -> None:
    """Raise InputError for a trainable parameter that no side has, and for a DTensor."""
    if p not in side_of:
        raise InputError(
            f"StreamedBackward: {name} is trainable and not in the optimizer: freeze it, or make the optimizer anew"
        )
    if is_dtensor(p):
        raise InputError(
            f"StreamedBackward: {name} is a DTensor; sharded models (FSDP2) keep their ordinary step, backward() and "
            "optimizer.step()"
        )


@contextmanager
def alone(optimizer: Optimizer, group: dict[str, Any], p: torch.nn.Parameter) -> Iterator[None]:
    """The optimizer with one parameter, so that a step looks at no other; its group and its state are the same."""
    groups, whole = optimizer.param_groups, dict(group)
    number = next(i for i, other in enumerate(group["params"]) if other is p)
    one = {name: [group[name][number]] for name in ("params", "param_names") if name in group}
    group.update(one)
    optimizer.param_groups = [group]
    try:
        yield
    finally:
        group.update({name: whole[name] for name in one})
        optimizer.param_groups = groups
