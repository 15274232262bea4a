"""How long the batches are that mlx-lm makes of a data folder: known from its rows, before a model is loaded."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

from mlx_lm.tuner.datasets import CacheDataset

from ember_mlx.errors import InputError
from ember_mlx.finetune.data import check_data_folder, load_data

PAD_TO = 32  # of mlx_lm.tuner.trainer.iterate_batches
CHARACTERS = 5_000_000  # of a set that are tokenized: a few seconds


@dataclass(frozen=True)
class LongestBatch:
    """The longest batch of a data set.

    Args:
        width (int): Tokens of each of its rows, with the padding; the last token is only predicted.
        longest (int): Tokens of the longest row.
        is_cut (bool): Whether that is longer than ``--max-seq-length``; how much longer other rows are was not asked.
        tokenized, rows (int): How many rows were tokenized, those of the most characters, of how many. Where these
            differ and nothing is cut, a row of fewer characters could be one of more tokens.
    """

    width: int
    longest: int
    is_cut: bool
    tokenized: int
    rows: int


def longest_batches(args, tokenizer) -> dict[str, LongestBatch]:
    """The longest batches of the local folder ``--data`` in training: of "train", and of "valid" and "test" if used.

    Raises:
        InputError: for what ``train`` would refuse in the folder.
    """
    check_data_folder(args)
    with contextlib.redirect_stdout(io.StringIO()):  # what mlx-lm says of the sets, training says
        train, valid, test = load_data(args, tokenizer)
    sets = {"train": train, "valid": valid, "test": test if args.test else []}
    try:
        return {name: longest_batch(rows, args.batch_size, args.max_seq_length) for name, rows in sets.items() if rows}
    # Whatever a chat template has against a row.
    except Exception as error:
        raise InputError(f"--data {args.data}: a row cannot be tokenized: {' '.join(str(error).split())}") from error


def is_local(args) -> bool:
    """Whether ``--data`` is a folder here that holds rows to train on."""
    return not getattr(args, "hf_dataset", None) and (Path(args.data) / "train.jsonl").is_file()


def longest_batch(rows, batch_size: int, max_seq_length: int) -> LongestBatch:
    """The longest of the batches that mlx-lm makes of ``rows``, one of its data sets."""
    order = sorted(range(len(rows)), key=CacheDataset(rows).itemlen)
    of_batches = order[: len(rows) // batch_size * batch_size]  # a last, smaller batch is left out
    sizes = {i: len(str(rows[i])) for i in of_batches}
    tokenized = longest = characters = 0
    for i in sorted(sizes, key=sizes.get, reverse=True):
        if longest > max_seq_length or (tokenized and characters + sizes[i] > CHARACTERS):
            break
        longest = max(longest, len(rows.process(rows[i])[0]))
        tokenized += 1
        characters += sizes[i]
    width = min(1 + PAD_TO * -(-longest // PAD_TO), max_seq_length)
    return LongestBatch(width, longest, longest > max_seq_length, tokenized, len(of_batches))
