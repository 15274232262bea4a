"""Weights whose rows lie on several ranks: how they and their state lie there, and what the ranks must agree on.

Two ways are known. FSDP2 (``fully_shard``) makes each weight a DTensor, which says itself how it lies. In a
vocabulary-parallel model each rank has a plain tensor, its slice of a table's rows, and ``row_shard_group`` says who
has the others.

What an optimizer needs of rows on other ranks, means and sums, is reduced by the methods of ``RowShards``. State that
lies like the weight is a DTensor too, so that ``torch.distributed.checkpoint`` can move it; of the rest every rank has
a whole copy.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from cuda_ref.optimizers.companded import groups_of
from ember_mlx.shared.errors import InputError

__all__ = [
    "RowShards",
    "agree",
    "agree_on_step",
    "find_shards",
    "groups_on_all_ranks",
    "is_dtensor",
    "laid_out",
    "local_part",
    "parts_here",
    "shards_of_dtensor",
    "shards_of_slices",
    "whole",
    "zeros",
]

_communicators = {}


@dataclass(frozen=True)
class RowShards:
    """How the rows of one weight lie on the ranks.

    Attributes:
        communicator (ProcessGroup): The ranks that share the rows, on a communicator of Ember's own; None where this
            rank has all of them.
        rows, first_row, total_rows (int): The rows here, which may be none; the first of them; and those of all ranks.
        mesh, placements: How state lies as a DTensor; None where no DTensor lies like this, and it is a plain tensor of
            the rows here.
    """

    communicator: "dist.ProcessGroup | None"
    rows: int
    first_row: int
    total_rows: int
    mesh: "dist.DeviceMesh | None" = None
    placements: tuple = ()

    def mean_over_all_rows(self, column_mean: torch.Tensor) -> torch.Tensor:
        """The mean over the rows of all ranks, from those of each rank: one all-reduce of D float32 numbers."""
        share = column_mean * (self.rows / self.total_rows) if self.rows else torch.zeros_like(column_mean)
        dist.all_reduce(share, group=self.communicator)
        return share

    @property
    def ranks(self) -> int:
        """How many share the rows."""
        return 1 if self.communicator is None else self.communicator.size()

    def sum_over_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of what each rank gives, (...), which is overwritten."""
        dist.all_reduce(x, group=self.communicator)
        return x

    def all_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """A number of each row, (V,), from those of the rows here, (rows,)."""
        everyone = rows.new_zeros(self.total_rows)
        everyone[self.first_row : self.first_row + self.rows] = rows
        return self.sum_over_ranks(everyone)


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor, without the 0.8 s that importing them takes."""
    return hasattr(tensor, "device_mesh")


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a DTensor, the storage itself; a plain tensor is that already."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a DTensor, gathered from all ranks; a plain tensor is that already."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def shards_of_dtensor(w: torch.Tensor, optimizer: str, noun: str) -> RowShards:
    """The RowShards of a DTensor that is sharded by rows, over one dimension of its mesh, and otherwise replicated.

    ``optimizer`` and ``noun`` are the words of errors.
    """
    from torch.distributed.tensor import Replicate, Shard

    by_rows = [dim for dim, placement in enumerate(w.placements) if type(placement) is Shard and placement.dim == 0]
    rest = [placement for dim, placement in enumerate(w.placements) if dim not in by_rows]
    if len(by_rows) > 1 or not all(type(placement) is Replicate for placement in rest):
        raise InputError(
            f"{optimizer}: a {noun} of shape {tuple(w.shape)} has the placements {w.placements}; {optimizer} takes "
            f"{noun}s sharded by rows over one dimension of the mesh, (Shard(0),), and replicated over the others. Use "
            f"fully_shard without a shard_placement_fn, and no tensor parallelism of this {noun} besides"
        )
    mesh, placements, total_rows = w.device_mesh, tuple(w.placements), w.shape[0]
    if w.device.type != mesh.device_type:
        raise InputError(
            f"{optimizer}: a {noun} of shape {tuple(w.shape)} is on {w.device} and its ranks meet on "
            f"{mesh.device_type}; {optimizer} takes no offloaded {noun}s: shard this one without an offload_policy"
        )
    if not by_rows:
        return RowShards(None, total_rows, 0, total_rows, mesh, placements)
    group, rank = mesh.get_group(by_rows[0]), mesh.get_local_rank(by_rows[0])
    rows_of_ranks = _chunks(total_rows, group.size())
    first_row = sum(rows_of_ranks[:rank])
    return RowShards(_own_communicator(group), rows_of_ranks[rank], first_row, total_rows, mesh, placements)


def shards_of_slices(
    tables: Sequence[torch.Tensor], group: "dist.ProcessGroup", fault: InputError | None = None
) -> list[RowShards]:
    """The RowShards of plain tables, each of which has a slice of its rows on every rank of ``group``, by rank.

    All ranks call it together. ``fault`` is an InputError that this rank has found: then every rank raises one.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise InputError(
            f"Ember(row_shard_group={group!r}): must be a ProcessGroup that this rank is in; of a DeviceMesh give "
            "its get_group()"
        )
    communicator, rank = _own_communicator(group), group.rank()
    facts = {"the number of tables": len(tables)}
    if fault is None:
        facts |= {f"columns and dtype of table {number}": (w.shape[1], w.dtype) for number, w in enumerate(tables)}
    mine = [] if fault else [len(w) for w in tables]
    # By rank of the group: the communicator may have its ranks in another order.
    by_rank = sorted(agree(communicator, "Ember(row_shard_group=...)", facts, fault, (rank, mine)))
    found = []
    for number, w in enumerate(tables):
        rows_of_ranks = [rows[number] for _, rows in by_rank]
        total_rows = sum(rows_of_ranks)
        if not total_rows:
            raise InputError(f"Ember(row_shard_group=...): table {number} has no rows on any rank: it needs one")
        mesh = placements = None
        if communicator is not None and rows_of_ranks == _chunks(total_rows, len(rows_of_ranks)):
            from torch.distributed.tensor import DeviceMesh, Shard

            mesh, placements = DeviceMesh.from_group(group, w.device.type), (Shard(0),)
        first_row = sum(rows_of_ranks[:rank])
        found.append(RowShards(communicator, len(w), first_row, total_rows, mesh, placements))
    return found


def agree(
    communicator: "dist.ProcessGroup | None", call: str, facts: dict, fault: InputError | None = None, own: Any = None
) -> list:
    """Compare ``facts``, names and values, over the ranks; return what each gives as ``own``, in their order.

    All ranks call it together. Raises InputError on every one of them if they differ, or if one has a ``fault``.
    """
    everyone = [(fault and str(fault), facts, own)]
    if communicator is not None:
        everyone *= communicator.size()
        dist.all_gather_object(everyone, (fault and str(fault), facts, own), group=communicator)
    if fault is not None:
        raise fault
    ranks = [0] if communicator is None else dist.get_process_group_ranks(communicator)
    for rank, (their_fault, _, _) in zip(ranks, everyone, strict=True):
        if their_fault is not None:
            raise InputError(f"{call}: rank {rank} stopped: {their_fault}")
    for name in dict.fromkeys(name for _, theirs, _ in everyone for name in theirs):
        mine = everyone[0][1].get(name)
        for rank, (_, theirs, _) in zip(ranks, everyone, strict=True):
            if repr(theirs.get(name)) != repr(mine):  # by repr, as a NaN must be equal to a NaN
                raise InputError(
                    f"{call}: the ranks disagree on {name}: rank {ranks[0]} has {mine!r}, rank {rank} has "
                    f"{theirs.get(name)!r}; give every rank the same, and load the same checkpoint on all"
                )
    return [theirs for _, _, theirs in everyone]


def find_shards(
    shards: dict[torch.Tensor, RowShards], optimizer: str, noun: str, weights: Iterable[torch.Tensor]
) -> None:
    """Add the RowShards of each DTensor among the weights to ``shards``, by weight, unless they are there."""
    for w in weights:
        if w not in shards and is_dtensor(w):
            shards[w] = shards_of_dtensor(w, optimizer, noun)


def agree_on_step(
    shards: dict[torch.Tensor, RowShards],
    optimizer: str,
    facts: dict[str, Any],
    facts_of: Callable[[torch.Tensor, Any], dict[str, Any]],
    weights: Iterable[tuple[str, torch.Tensor, Any]],
    fault: InputError | None,
) -> None:
    """Find that all ranks are about to take the same step on the weights that they share.

    All ranks call it together.

    Args:
        shards: weight -> RowShards.
        optimizer: The name for errors.
        facts: What must be the same for all weights, by name.
        facts_of: From a weight and its group to what must be the same of it; called for those that are shared.
        weights: Of each its name, itself and its group.
        fault: What this rank has found wrong; it is raised here, and an InputError on every rank.
    """
    weights = list(weights)
    for communicator in dict.fromkeys(found.communicator for found in shards.values()):
        of_weights = {}
        for name, w, group in weights if fault is None else ():
            if w in shards and shards[w].communicator is communicator:
                of_weights |= {f"{fact} of {name}": value for fact, value in facts_of(w, group).items()}
        agree(communicator, f"{optimizer}.step", facts | of_weights, fault)
    if fault is not None:
        raise fault


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, shards: RowShards | None) -> torch.Tensor:
    """Zeros of that shape; with ``shards`` each rank makes its rows of them only, where it can as part of a DTensor."""
    if shards is None or shards.mesh is None:
        rows = () if shards is None else (shards.rows,)
        return torch.zeros((*rows, *shape[len(rows) :]), dtype=dtype, device=device)
    from torch.distributed import tensor

    return tensor.zeros(shape, dtype=dtype, device_mesh=shards.mesh, placements=shards.placements)


def laid_out(saved: torch.Tensor, dtype: torch.dtype, device: torch.device, shards: RowShards | None) -> torch.Tensor:
    """A copy of saved state, a DTensor or a plain tensor of all rows or of those here, laid out as ``zeros`` does."""
    row_by_row = {"copy": True, "memory_format": torch.contiguous_format}  # the steps write by place in memory
    if shards is None:
        return whole(saved).to(device, dtype, **row_by_row)
    if is_dtensor(saved) and (saved.device_mesh, saved.placements) == (shards.mesh, shards.placements):
        return saved.to(dtype, copy=True)
    saved = whole(saved)
    if shards.mesh is None:
        mine = (
            slice(shards.first_row, shards.first_row + shards.rows) if len(saved) == shards.total_rows else slice(None)
        )
        return saved[mine].to(device, dtype, **row_by_row)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(saved.to(device, dtype, **row_by_row), shards.mesh, shards.placements, src_data_rank=None)


def groups_on_all_ranks(w: torch.Tensor, shards: RowShards | None) -> int:
    """How many groups of codes a weight has: no group crosses from rank to rank, and each rank has equally many.

    The last groups of a rank are padded. Where the rows of each rank are whole groups, this is the number, and these
    are the groups, of the weight on one rank.
    """
    if shards is None:
        return groups_of(w.numel())
    most_rows = -(-shards.total_rows // shards.ranks)
    return shards.ranks * groups_of(most_rows * (w.numel() // shards.total_rows))


def parts_here(tensors: tuple, shards: RowShards | None) -> tuple[tuple, RowShards | None]:
    """What this rank holds of tensors that lie like the rows, and their RowShards where others hold the rest."""
    if shards is None:
        return tensors, None
    return tuple(local_part(tensor) for tensor in tensors), None if shards.communicator is None else shards


def _own_communicator(group):
    """The ranks of ``group`` on a communicator of Ember's own, made once; None for a single rank.

    On a shared one, Ember's sums could be issued in another order on another rank than those that FSDP has under way.
    """
    ranks, backend = dist.get_process_group_ranks(group), str(dist.get_backend_config(group))
    if len(ranks) == 1:
        return None
    world, communicator = _communicators.get((*ranks, backend), (None, None))
    if world is not dist.group.WORLD:  # none yet, or of a world that was destroyed since
        communicator = dist.new_group(ranks, backend=backend, use_local_synchronization=True, group_desc="ember")
        _communicators[*ranks, backend] = dist.group.WORLD, communicator
    return communicator


def _chunks(rows, ranks):
    """How many of the rows each rank has where they lie as DTensor lays them, which is as ``torch.chunk`` does."""
    each = -(-rows // ranks)
    return [min(each, max(0, rows - rank * each)) for rank in range(ranks)]
