"""``--packing``: whole rows side by side up to ``--max-seq-length``, so that little of a batch is padding."""

from collections.abc import Sequence

import numpy as np

from ember_mlx.finetune.options import Options
from ember_mlx.finetune.rows import TriedRows, spans_of
from ember_mlx.streaming.marks import marks_of_pack

__all__ = ["PackedRows", "first_fit", "packed", "packs_of"]


def packs_of(lengths: Sequence[int], capacity: int, batch_size: int, seed: int) -> list[tuple[int, ...]]:
    """The numbers of the rows in each pack, by first fit. Those of most rows are split until all fill batches.

    mlx-lm's batches leave out what fills none, the same in every epoch; of packs that could be most of the rows.

    Args:
        lengths: Tokens of each row, at most ``capacity``.
        capacity: Tokens of a pack.
        batch_size: Packs of a batch.
        seed: Of the order in which rows are packed.
    """
    packs = first_fit(lengths, capacity, seed)
    while len(packs) % batch_size and len(packs) < len(lengths):
        most = max(range(len(packs)), key=lambda i: len(packs[i]))
        pack = packs.pop(most)
        packs += [pack[::2], pack[1::2]]
    return packs


def first_fit(lengths: Sequence[int], capacity: int, seed: int) -> list[tuple[int, ...]]:
    """The numbers of the rows in each pack: rows in random order, each in the first pack that has room for it."""
    packs, room, full = [], np.full(len(lengths), capacity), 0
    least = min(lengths)
    for i in np.random.RandomState(seed).permutation(len(lengths)).tolist():
        place = full + int(np.argmax(room[full : len(packs) + 1] >= lengths[i]))
        if place == len(packs):
            packs.append([])
        packs[place].append(i)
        room[place] -= lengths[i]
        while full < len(packs) and room[full] < least:
            full += 1
    return [tuple(pack) for pack in packs]


class PackedRows:
    """The packs of a training set, of mlx-lm's kind: ``process`` makes the tokens and the marks of one.

    Rows longer than ``--max-seq-length`` are cut. ``fullness`` is the part of so long packs that rows fill.
    """

    def __init__(self, rows: TriedRows, args: Options):
        self.rows = rows
        self.max_seq_length = args.max_seq_length
        self.checksum, self.token_checksum = rows.checksum, rows.token_checksum
        lengths = [min(length, args.max_seq_length) for length in rows.lengths]
        self.packs = packs_of(lengths, args.max_seq_length, args.batch_size, args.seed)
        self.fullness = sum(lengths) / (len(self.packs) * args.max_seq_length)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> tuple[int, ...]:
        return self.packs[index]

    def process(self, pack: tuple[int, ...]) -> tuple[list[int], np.ndarray]:
        """The tokens of a pack, and their marks: see :mod:`ember_mlx.streaming.marks`."""
        tokens, rows = [], []
        for i in pack:
            of_row, learned = self.rows.process(self.rows[i])
            of_row = of_row[: self.max_seq_length]
            tokens += of_row
            rows.append((len(of_row), spans_of(of_row, learned, self.max_seq_length)))
        return tokens, marks_of_pack(rows)


def packed(args: Options, rows: TriedRows) -> TriedRows | PackedRows:
    """The training set, packed if ``--packing`` says so."""
    return PackedRows(rows, args) if args.packing and args.train else rows
