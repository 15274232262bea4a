"""How long the batches are that mlx-lm makes of a data folder: known from its rows, before a model is loaded."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.datasets import CacheDataset

from ember_mlx.finetune.data import DataSet, load_sets
from ember_mlx.finetune.mlx_lm_internals import PAD_TO
from ember_mlx.finetune.options import Options
from ember_mlx.finetune.packing import packs_of
from ember_mlx.finetune.rows import tokenized as tokens_of
from ember_mlx.shared.errors import InputError

__all__ = ["LongestBatch", "longest_batch", "longest_batches"]

CHARACTERS = 5_000_000  # of a set that are tokenized: a few seconds


@dataclass(frozen=True)
class LongestBatch:
    """The longest batch of a data set.

    Args:
        width (int): Tokens of each of its rows, with the padding; the last token is only predicted.
        longest (int): Tokens of its longest row.
        is_cut (bool): Whether that is longer than ``--max-seq-length``; how much longer other rows are was not asked.
        tokenized, rows (int): How many rows were tokenized, those of the most characters, of how many in batches. Where
            these differ and nothing is cut, a row of fewer characters could be one of more tokens.
        all_rows (int): Those of a last, smaller batch too, which is left out.
        packs (int): With ``--packing``, how many packs the rows make; where not all were tokenized, about as many.
    """

    width: int
    longest: int
    is_cut: bool
    tokenized: int
    rows: int
    all_rows: int
    packs: int = 0


def longest_batches(args: Options, tokenizer: TokenizerWrapper) -> dict[str, LongestBatch]:
    """The longest batches of the local folder ``--data`` in training: of "train", and of "valid" and "test" if used.

    Raises:
        InputError: for sets that ``train`` would refuse, once :func:`ember_mlx.finetune.data.check_data_folder` has
            taken the folder, and for a row of which the tokenizer makes nothing.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # what mlx-lm says of the sets, training says
        sets = load_sets(args, tokenizer)
    return {
        name: _packed_batch(found, args)
        if name == "train" and args.packing
        else longest_batch(found.rows, args.batch_size, args.max_seq_length, found.where)
        for name, found in sets.items()
        if len(found) and (name != "test" or args.test)
    }


def longest_batch(rows: Any, batch_size: int, max_seq_length: int, where: Callable[[int], str]) -> LongestBatch:
    """The longest of the batches that mlx-lm makes of ``rows``, one of its data sets.

    ``where``, called with the number of a row from 0, names it for errors.

    Raises:
        InputError: for a row that the tokenizer refuses, and where it makes nothing of any.
    """
    order = sorted(range(len(rows)), key=CacheDataset(rows).itemlen)
    of_batches = order[: len(rows) // batch_size * batch_size]  # a last, smaller batch is left out
    sizes = {i: len(str(rows[i])) for i in of_batches}
    tokenized = longest = characters = 0
    for i in sorted(sizes, key=sizes.get, reverse=True):
        if longest > max_seq_length or (tokenized and characters + sizes[i] > CHARACTERS):
            break
        longest = max(longest, len(tokens_of(rows, i, where(i))[0]))
        tokenized += 1
        characters += sizes[i]
    if not longest:
        raise InputError(f"{where(0)}: the chat template makes nothing of it: see chat_template of the tokenizer")
    width = _padded(longest, max_seq_length)
    return LongestBatch(width, longest, longest > max_seq_length, tokenized, len(of_batches), len(rows))


def _packed_batch(found: DataSet, args: Options) -> LongestBatch:
    """Of packs. Where there are too many rows to tokenize, the first stand for all, and packs are taken for full."""
    lengths, characters, sizes = [], 0, [len(str(found.rows[i])) for i in range(len(found))]
    for i, size in enumerate(sizes):
        if lengths and characters + size > CHARACTERS:
            break
        lengths.append(max(len(tokens_of(found.rows, i, found.where(i))[0]), 1))
        characters += size
    capacity = args.max_seq_length
    cut = [min(length, capacity) for length in lengths]
    if len(lengths) == len(sizes):
        packs = packs_of(cut, capacity, args.batch_size, args.seed)
        fullest, number = max(sum(cut[i] for i in pack) for pack in packs), len(packs)
    else:
        fullest, number = capacity, -(-sum(cut) * sum(sizes) // (characters * capacity))
    width = _padded(fullest, capacity)
    cuts, rows = max(lengths) > capacity, len(sizes)
    return LongestBatch(width, max(lengths), cuts, len(lengths), rows, rows, number)


def _padded(tokens, max_seq_length):
    return min(1 + PAD_TO * -(-tokens // PAD_TO), max_seq_length)
