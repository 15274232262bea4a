"""``--packing``: whole rows side by side up to ``--max-seq-length``, so that little of a batch is padding."""

from collections.abc import Sequence

import numpy as np

from ember_mlx.finetune.options import Options
from ember_mlx.finetune.rows import TriedRows, spans_of
from ember_mlx.shared.errors import InputError
from ember_mlx.streaming.marks import marks_of_pack

__all__ = ["PackedRows", "first_fit", "packed", "refuse_too_few"]


def first_fit(lengths: Sequence[int], capacity: int, seed: int) -> list[tuple[int, ...]]:
    """The numbers of the rows in each pack: rows in random order, each in the first pack that has room for it.

    Args:
        lengths: Tokens of each row, at most ``capacity``.
        capacity: Tokens of a pack.
        seed: Of the order.
    """
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

    Rows longer than ``max_seq_length`` are cut. ``fullness`` is the part of all packs that rows fill.
    """

    def __init__(self, rows: TriedRows, max_seq_length: int, seed: int):
        self.rows = rows
        self.max_seq_length = max_seq_length
        self.checksum, self.token_checksum = rows.checksum, rows.token_checksum
        lengths = [min(length, max_seq_length) for length in rows.lengths]
        self.packs = first_fit(lengths, max_seq_length, seed)
        self.fullness = sum(lengths) / (len(self.packs) * max_seq_length)

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
    """The training set, packed if ``--packing`` says so.

    Raises:
        InputError: where that leaves fewer packs than a batch has.
    """
    if not (args.packing and args.train):
        return rows
    found = PackedRows(rows, args.max_seq_length, args.seed)
    refuse_too_few(args, len(rows), len(found))
    return found


def refuse_too_few(args: Options, rows: int, packs: int) -> None:
    """Raises InputError where there are fewer packs than a batch has."""
    if packs < args.batch_size:
        raise InputError(
            f"--packing: {rows} rows make {packs} packs of --max-seq-length {args.max_seq_length}, fewer than "
            f"--batch-size {args.batch_size}: use --batch-size {packs}, or a shorter --max-seq-length"
        )
