"""Tables whose rows lie on several ranks: how they lie there, the one sum that all ranks need, and what must agree.

Two ways are known. FSDP2 (``fully_shard``) makes each table a DTensor, which says itself how it lies. In a
vocabulary-parallel model each rank has a plain tensor, its slice of the rows, and ``row_shard_group`` says who has the
others.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ember_mlx.shared.errors import InputError

__all__ = [
    "RowShards",
    "agree",
    "agree_on_step",
    "facts_of_table",
    "find_shards",
    "is_dtensor",
    "local_part",
    "parts_here",
    "shards_of_dtensor",
    "shards_of_slices",
    "state_here",
    "whole",
    "zeros_of_rows",
]

_communicators = {}


@dataclass(frozen=True)
class RowShards:
    """How the rows of one table lie on the ranks.

    Attributes:
        communicator (ProcessGroup): The ranks that share the rows, on a communicator of Ember's own; None where this
            rank has all of them.
        rows, first_row, total_rows (int): The rows here, which may be none; the first of them; and those of all ranks.
        mesh, placements: How ``r`` lies as a DTensor, so that ``torch.distributed.checkpoint`` can move it; None where
            no DTensor lies like this, and ``r`` is a plain tensor of the rows here.
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

    def lay_out(self, r: torch.Tensor) -> torch.Tensor:
        """``r`` of the rows here, (rows,), as the state keeps it: the rank's part of a DTensor of all rows, (V,)."""
        if self.mesh is None:
            return r
        from torch.distributed.tensor import DTensor

        shape = torch.Size((self.total_rows,))
        return DTensor.from_local(r, self.mesh, self.placements, run_check=False, shape=shape, stride=(1,))

    def rows_of(self, saved: torch.Tensor) -> torch.Tensor:
        """The rows here, (rows,), of a saved ``r``: a DTensor, a plain tensor of all rows, or of those here alone."""
        if is_dtensor(saved):
            if (saved.device_mesh, saved.placements) == (self.mesh, self.placements):
                return saved.to_local()
            saved = whole(saved)
        return saved[self.first_row : self.first_row + self.rows] if len(saved) == self.total_rows else saved


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor, without the 0.8 s that importing them takes."""
    return hasattr(tensor, "device_mesh")


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a DTensor, the storage itself; a plain tensor is that already."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a DTensor, gathered from all ranks; a plain tensor is that already."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def shards_of_dtensor(w: torch.Tensor, optimizer: str = "Ember", noun: str = "table") -> RowShards:
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


def find_shards(shards: dict[torch.Tensor, RowShards], tables: Iterable[torch.Tensor]) -> None:
    """Add the RowShards of each DTensor among the tables to ``shards``, by table, unless they are there."""
    for w in tables:
        if w not in shards and is_dtensor(w):
            shards[w] = shards_of_dtensor(w)


def agree_on_step(
    shards: dict[torch.Tensor, RowShards], facts: dict, tables: list[tuple], fault: InputError | None
) -> None:
    """Find that all ranks are about to take the same step on the tables that they share.

    All ranks call it together.

    Args:
        shards: table -> RowShards.
        facts: What must be the same for all tables, by name.
        tables: Of each table its name, itself, its state or None, and its options by name.
        fault: What this rank has found wrong; it is raised here, and an InputError on every rank.
    """
    for communicator in dict.fromkeys(found.communicator for found in shards.values()):
        of_tables = {}
        for name, w, state, options in tables if fault is None else ():
            if w in shards and shards[w].communicator is communicator:
                of_tables |= facts_of_table(name, w, state, options)
        agree(communicator, "Ember.step", facts | of_tables, fault)
    if fault is not None:
        raise fault


def zeros_of_rows(w: torch.Tensor, shards: RowShards | None) -> torch.Tensor:
    """A new ``r`` of a table: (V,) float32, laid out as its rows are."""
    rows = w.shape[0] if shards is None else shards.rows
    r = torch.zeros(rows, dtype=torch.float32, device=w.device)
    return r if shards is None else shards.lay_out(r)


def parts_here(tensors: tuple, shards: RowShards | None) -> tuple[tuple, RowShards | None]:
    """What this rank holds of tensors that lie like the rows, and their RowShards where others hold the rest."""
    if shards is None:
        return tensors, None
    return tuple(local_part(tensor) for tensor in tensors), None if shards.communicator is None else shards


def state_here(saved: dict, w: torch.Tensor, shards: RowShards | None) -> dict:
    """A copy of the saved state of a table as this rank keeps it: float32 whatever the dtype of the table."""
    state = {}
    for name in ("step", "r", "c", *({"q", "seed"} & saved.keys())):
        lies_like_rows = name == "r" and shards is not None
        value = shards.rows_of(saved[name]) if lies_like_rows else whole(saved[name])
        value = value.to(device=w.device, dtype=torch.int32 if name == "seed" else torch.float32, copy=True)
        state[name] = shards.lay_out(value) if lies_like_rows else value
    return state


def facts_of_table(name: str, w: torch.Tensor, state: dict | None, options: dict) -> dict:
    """What must be the same on all ranks before a step of a table, by name. Reads numbers back from the GPU."""
    facts = {
        "having a gradient": w.grad is not None,
        "the step": float(state["step"]) if state else 0.0,
        "the sum of c": float(state["c"].sum()) if state else 0.0,
    }
    facts |= {option: "a schedule" if callable(value) else float(value) for option, value in options.items()}
    return {f"{fact} of {name}": value for fact, value in facts.items()}


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
