"""What a run takes on the disk, from its sizes and options alone, so that ``plan`` and ``train`` tell the same."""

import math
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
    """Bytes of arrays that a run leaves, by kind, and the most that it takes at any moment.

    At most: when the last step is the best, ``best/`` is the adapter's files, and takes nothing.
    """

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
        return f"{format_bytes(self.final)} in the end ({', '.join(parts)}), {format_bytes(self.peak)} at the peak"


def disk_use(args: Any, weights: int, state: int, kept: Kept) -> DiskUse:
    """What a run takes from its first step to its last. Peaks are in one of its last two saves, or before the last.

    Args:
        args: Its options: ``iters``, ``save_every`` and ``steps_per_eval``.
        weights, state: Bytes of all that trains, and of the optimizer's state.
        kept: What it keeps.
    """
    checkpoint = weights + state
    saves = math.ceil(args.iters / args.save_every)
    validations = (args.iters - 1) // args.steps_per_eval + (args.iters > 1)  # whose loss may be the lowest so far
    bests = min(validations, 2) if kept.best else 0  # the one of before, and the new one

    def numbered(save):
        written = min(save, args.iters // args.save_every)
        return written if kept.numbered is None else min(written, kept.numbered)

    def left_by(save):  # checkpoints apart
        return (min(save, 1) + numbered(save) + min(bests, 1)) * weights

    def in_save(save):
        old, now = (min(kept.checkpoints, each) * checkpoint for each in (save - 1, save))
        new_checkpoint = checkpoint if kept.checkpoints else 0
        is_numbered = kept.numbered != 0 and save * args.save_every <= args.iters
        return left_by(save - 1) + max(old + new_checkpoint, now + (1 + is_numbered) * weights)

    before_last = left_by(saves - 1) + min(kept.checkpoints, saves - 1) * checkpoint
    return DiskUse(
        adapter=weights,
        numbered=numbered(saves) * weights,
        best=min(bests, 1) * weights,
        checkpoints=min(kept.checkpoints, saves) * checkpoint,
        peak=max(in_save(saves), in_save(max(saves - 1, 1)), before_last + max(bests - 1, 0) * weights),
    )
