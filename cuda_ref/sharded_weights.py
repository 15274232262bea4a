"""Weights whose rows lie on several ranks, as FSDP2 (``fully_shard``) lays them: their state, and agreement.

A weight of any shape is a DTensor sharded along its first dimension. What its optimizer needs of rows on other ranks,
means and sums, is reduced by the methods of ``RowShards``. State that lies like the weight is a DTensor too, so that
``torch.distributed.checkpoint`` can move it; of the rest every rank has a whole copy.
"""

from collections.abc import Iterable
from typing import Any

import torch

from cuda_ref import sharding
from cuda_ref.optimizers.companded import groups_of
from cuda_ref.sharding import RowShards
from ember_mlx.shared.errors import InputError

__all__ = ["agree_on_step", "find_shards", "groups_on_all_ranks", "laid_out", "zeros"]


def find_shards(shards: dict[torch.Tensor, RowShards], optimizer: str, weights: Iterable[torch.Tensor]) -> None:
    """Add the RowShards of each DTensor among the weights to ``shards``; ``optimizer`` is the name for errors."""
    for w in weights:
        if w not in shards and sharding.is_dtensor(w):
            shards[w] = sharding.shards_of_dtensor(w, optimizer, "weight")


def agree_on_step(
    shards: dict[torch.Tensor, RowShards],
    optimizer: str,
    facts: dict[str, Any],
    weights: list[tuple[str, torch.Tensor, dict[str, torch.Tensor] | None]],
    fault: InputError | None,
) -> None:
    """Find that all ranks are about to take the same step on the weights that they share.

    All ranks call it together.

    Args:
        shards: weight -> RowShards.
        optimizer: The name for errors.
        facts: What must be the same for all weights, by name.
        weights: Of each its name, itself, and its state or None.
        fault: What this rank has found wrong; it is raised here, and an InputError on every rank.
    """
    for communicator in dict.fromkeys(found.communicator for found in shards.values()):
        of_weights = {}
        for name, w, state in weights if fault is None else ():
            if w in shards and shards[w].communicator is communicator:
                of_weights[f"having a gradient of {name}"] = w.grad is not None
                of_weights[f"the step of {name}"] = float(state["step"]) if state else 0.0
        sharding.agree(communicator, f"{optimizer}.step", facts | of_weights, fault)
    if fault is not None:
        raise fault


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, shards: RowShards | None) -> torch.Tensor:
    """Zeros of that shape; with ``shards`` each rank makes its rows of them only, as its part of a DTensor."""
    if shards is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    from torch.distributed import tensor

    return tensor.zeros(shape, dtype=dtype, device_mesh=shards.mesh, placements=shards.placements)


def laid_out(saved: torch.Tensor, dtype: torch.dtype, device: torch.device, shards: RowShards | None) -> torch.Tensor:
    """A copy of saved state, a DTensor or a plain tensor of all rows, laid out as ``zeros`` does."""
    if shards is None:
        return sharding.whole(saved).to(device, dtype, copy=True)
    if sharding.is_dtensor(saved) and (saved.device_mesh, saved.placements) == (shards.mesh, shards.placements):
        return saved.to(dtype, copy=True)
    from torch.distributed.tensor import distribute_tensor

    saved = sharding.whole(saved).to(device, dtype, copy=True)
    return distribute_tensor(saved, shards.mesh, shards.placements, src_data_rank=None)


def groups_on_all_ranks(w: torch.Tensor, shards: RowShards | None) -> int:
    """How many groups of codes a weight has: no group crosses from rank to rank, and each rank has equally many.

    The last groups of a rank are padded. Where the rows of each rank are whole groups, this is the number, and these
    are the groups, of the weight on one rank.
    """
    if shards is None:
        return groups_of(w.numel())
    most_rows = -(-shards.total_rows // shards.ranks)
    return shards.ranks * groups_of(most_rows * (w.numel() // shards.total_rows))
