"""A streamed step of several ranks, each with its own part of a batch: gradients are summed unit by unit.

A layer is a unit. Its gradients go over the wire together, as soon as all of them are there, and its weights are
stepped before the next layer's gradients exist. Of tables under Ember blocks of rows go over the wire, and of an
embedding the rows that any rank has looked up. The twin of ``ember_mlx/streaming/machines.py``.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cuda_ref.sharding import agree
from cuda_ref.streamed_model import layers_of
from ember_mlx.shared.errors import InputError

__all__ = ["Ranks", "Units"]


class Ranks:
    """The ranks that take a step together; without a group of several this one alone, and nothing is sent."""

    def __init__(self, group: "dist.ProcessGroup | None"):
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise InputError(f"StreamedBackward(group={group!r}): must be a ProcessGroup, such as dist.group.WORLD")
        self._group = None if group is None or group.size() == 1 else group

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return self._group is not None

    def sum(self, x: Tensor) -> Tensor:
        """The sum of what each gives, the same bits on all; ``x`` may be overwritten."""
        if self.several:
            x = x.contiguous()
            dist.all_reduce(x, group=self._group)
        return x

    def share_model(self, model: nn.Module) -> None:
        """The weights of rank 0, on all, as DistributedDataParallel does it; InputError where they do not fit."""
        if self.several:
            tensors = dict(model.named_parameters()) | dict(model.named_buffers())
            facts = {f"{name}": (tuple(x.shape), x.dtype, x.requires_grad) for name, x in tensors.items()}
            agree(self._group, "StreamedBackward(group=...)", facts)
            for x in tensors.values():
                dist.broadcast(x.detach(), group=self._group, group_src=0)

    def count(self, own: int, fault: InputError | None, device: torch.device) -> int:
        """The sum of all counts, where no rank has a fault. Every rank raises an InputError where one has."""
        if not self.several:
            if fault:
                raise fault
            return own
        total, faults = self.sum(torch.tensor([own, fault is not None], dtype=torch.int64, device=device)).tolist()
        if faults:
            raise fault or InputError(f"StreamedBackward: {faults} of the other ranks refused their batch")
        return total

    def all_rows(self, ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The ids of all ranks, each once, and the sums of their rows (U, D), from each rank's distinct ids."""
        if not self.several:
            return ids, rows
        most = torch.tensor(len(ids), device=ids.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self._group)
        padded = torch.full((int(most),), -1, dtype=torch.int64, device=ids.device)
        padded[: len(ids)] = ids
        everyone = [torch.empty_like(padded) for _ in range(self._group.size())]
        dist.all_gather(everyone, padded, group=self._group)
        union = torch.unique(torch.cat(everyone))
        union = union[union >= 0]
        whole = rows.new_zeros(len(union), rows.shape[1])
        whole[torch.searchsorted(union, ids)] = rows
        return union, self.sum(whole)


class Units:
    """Gradients of the body, summed over the ranks and handed on unit by unit, from the last layer to the first.

    Of one rank alone each is handed on at once. What is in no layer goes after the layers.

    Every rank sends every unit once a step and in one order, whatever its own backward pass reaches: what has no
    gradient on a rank counts as zeros there, and what has none on any rank is not handed on.

    Args:
        ranks: Of the run.
        model: Whose layers are units; a parameter outside of them is a unit of its own.
        parameters: Those that train and have whole gradients, in the order of the model.
    """

    def __init__(self, ranks: Ranks, model: nn.Module, parameters: Iterable[nn.Parameter]):
        self._ranks = ranks
        layer_of = {p: number for number, layer in enumerate(layers_of(model)) for p in layer.parameters()}
        layers, rest = {}, []
        for p in parameters if ranks.several else ():
            if p in layer_of:
                layers.setdefault(layer_of[p], []).append(p)
            else:
                rest.append([p])
        self._units = [*(layers[number] for number in sorted(layers, reverse=True)), *reversed(rest)]

    def begin(self, step: Callable[[nn.Parameter], None]) -> None:
        """Before a backward pass. ``step`` gets each parameter with the sum as its ``.grad``."""
        self._step, self._sent, self._there = step, 0, set()

    def arrived(self, p: nn.Parameter) -> None:
        """A parameter has its gradient of this rank."""
        if not self._ranks.several:
            self._step(p)
            return
        self._there.add(p)
        while self._sent < len(self._units) and self._there.issuperset(self._units[self._sent]):
            self._send()

    def finish(self) -> None:
        """After the backward pass: what is left goes, too."""
        while self._sent < len(self._units):
            self._send()

    def _send(self):
        unit = self._units[self._sent]
        self._sent += 1
        for dtype in dict.fromkeys(p.dtype for p in unit):
            alike = [p for p in unit if p.dtype == dtype]
            has = torch.tensor([p.grad is not None for p in alike], dtype=dtype, device=alike[0].device)
            parts = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in alike]
            bucket = torch.cat([*parts, has])
            del parts
            for p in alike:
                p.grad = None
            *parts, has = self._ranks.sum(bucket).split([*(p.numel() for p in alike), len(alike)])
            for p, part, any_has in zip(alike, parts, has.tolist(), strict=True):
                if any_has:
                    p.grad = part.view_as(p)
                    self._step(p)
