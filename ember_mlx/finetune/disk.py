"""What a run takes on the disk, from its sizes and options alone, so that ``plan`` and ``train`` tell the same."""

from dataclasses import dataclass
from typing import Any

from ember_mlx.shared.units import format_bytes

__all__ = ["DiskUse", "Kept", "disk_use", "what_is_kept"]

CHECKPOINTS = 3
CHECKPOINTS_WITH_TABLES = 1  # a table is most of a LoRA checkpoint, and a checkpoint is checked before the older goes


@dataclass(frozen=True)
class Kept:
    """What of its saves a run keeps: so many checkpoints and numbered saves, None for all; and whether ``best/``."""

    checkpoints: int
    numbered: int | None
    best: bool


def what_is_kept(args: Any, tables: bool, best: bool) -> Kept:
    """By ``--keep-checkpoints``. Where tables train, numbered saves are only written if it asks for them.

    Without them the default leaves all the files that mlx-lm leaves.
    """
    if args.keep_checkpoints is not None:
        return Kept(args.keep_checkpoints, args.keep_checkpoints, best)
    if tables:
        return Kept(CHECKPOINTS_WITH_TABLES, 0, best)
    return Kept(CHECKPOINTS, None, best)


@dataclass(frozen=True)
class DiskUse:
    """Bytes that a run leaves, by kind, and the most that it takes at any moment. Where ``best/`` is counted, it is a
    copy of its own: when the last step is the best, it is the adapter's files, and takes nothing."""

    adapter: int
    numbered: int
    best: int
    checkpoints: int
    peak: int

    @property
    def final(self) -> int:
        """All that is left."""
        return self.adapter + self.numbered + self.best + self.checkpoints

    def __str__(self):
        kinds = ("adapter", "numbered", "best", "checkpoints")
        words = {"numbered": "numbered saves", "best": "best/"}
        parts = [
            f"{words.get(kind, kind)} {format_bytes(getattr(self, kind))}" for kind in kinds if getattr(self, kind)
        ]
        return f"{format_bytes(self.final)} ({', '.join(parts)}), {format_bytes(self.peak)} at the peak"


def disk_use(args: Any, weights: int, state: int, kept: Kept) -> DiskUse:
    """What a run from its first step to its last takes.

    A numbered save and the adapter of the same step are one file, and so are ``best/`` and the last adapter.

    Args:
        args: Its options: ``iters``, ``save_every`` and ``steps_per_eval``.
        weights, state: Bytes of all that trains, and of the optimizer's state.
        kept: What it keeps.
    """
    checkpoint = weights + state
    earlier = (args.iters - 1) // args.save_every  # saves before the last
    numbers = args.iters // args.save_every
    validations = (args.iters - 1) // args.steps_per_eval + (args.iters > 1)  # that may be the best, before the end
    numbered = numbers if kept.numbered is None else min(numbers, kept.numbered)
    numbered_before = min(numbered, earlier)

    before = max(numbered_before, min(earlier, 1)) * weights  # the adapter and the numbered saves before the last save
    old = min(kept.checkpoints, earlier) * checkpoint
    best = weights if kept.best and validations else 0
    saved_best = weights * min(validations, 2) if kept.best else 0
    new_checkpoint = checkpoint if kept.checkpoints else 0
    checkpoints = min(kept.checkpoints, earlier + 1) * checkpoint
    linked = numbered > 0 and args.iters % args.save_every == 0
    return DiskUse(
        adapter=weights,
        numbered=(numbered - linked) * weights,
        best=best,
        checkpoints=checkpoints,
        peak=max(
            before + old + saved_best,  # while the last best/ but one is still there
            before + old + best + new_checkpoint,
            before + checkpoints + best + weights,  # while the adapter before is still there
        ),
    )
