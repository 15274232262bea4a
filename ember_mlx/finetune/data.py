"""The data of a run: checked before a model is loaded, and loaded with every row tried, before anything is written."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm.cli_ui import rprint
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.datasets import load_dataset

from ember_mlx.finetune.as_given import as_given
from ember_mlx.finetune.data_files import FORMATS, PlacedRow, read_file
from ember_mlx.finetune.options import Options
from ember_mlx.finetune.row_keys import Layout, layout_of, mlx_lm_row
from ember_mlx.finetune.rows import TriedRows, with_masked_prompts
from ember_mlx.shared.errors import InputError, did_you_mean_path, reason_of
from ember_mlx.shared.units import counted

__all__ = [
    "VALID_FRACTION",
    "DataSet",
    "Rows",
    "check_data_folder",
    "file_of",
    "is_local",
    "load_data",
    "load_sets",
    "may_validate",
    "split_off",
]

SETS = ("train", "valid", "test")
ON_HUB = {"train": ("train",), "valid": ("valid", "validation"), "test": ("test",)}
HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
VALID_FRACTION = 0.05
TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"  # transformers' name of a warning that it gives once
MOST_OF_FEW = 0.2  # of the rows, when --valid-fraction of them would not fill a batch


Rows = Mapping[str, Sequence[dict[str, Any]]]
"""Rows in memory, by "train" and "valid"; each is what a line of a file may hold."""


@dataclass(frozen=True)
class DataSet:
    """Rows as mlx-lm has them, and of the number of a row, from 0, its name for errors."""

    rows: Any = field(default_factory=list)
    where: Callable[[int], str] = str

    def __len__(self) -> int:
        return len(self.rows)


def is_local(args: Options) -> bool:
    """Whether ``--data`` is a folder or a file here, or can be meant as nothing else."""
    if getattr(args, "hf_dataset", None):
        return False
    path = Path(args.data)
    return path.exists() or path.suffix.lower() in FORMATS or not HUB_NAME.fullmatch(args.data)


def may_validate(args: Options) -> bool:
    """Whether a run may have validation rows, as far as that is known before any row is read."""
    return bool(_valid_fraction(args)) or not is_local(args) or file_of(args, "valid") is not None


def check_data_folder(args: Options, given: Rows | None = None) -> int | None:
    """Check local data, as far as that needs no tokenizer. A data set of the hub is checked when it is loaded.

    Args:
        args: The run's.
        given: Rows in memory, which take the place of ``--data``.

    Returns:
        How many rows train; None of the hub's.

    Raises:
        InputError: for data that is missing, and for a row that cannot be trained on; it names file and line.
    """
    if given is not None:
        if args.test:
            raise InputError("--test: rows in memory have no test set; give a folder with test.jsonl")
        return _that_train(args, {name: len(rows) for name, (rows, _) in _sets_of_given(args, given).items()})
    if not is_local(args):
        if find_spec("datasets") is None:
            named = getattr(args, "hf_dataset", None)
            what = "hf_dataset: " if named else f"--data {args.data}: is no file or folder here{_near(args.data)}, and "
            raise InputError(f"{what}a data set of the Hugging Face hub needs: pip install 'mlx-lm[train]'")
        return None
    path = Path(args.data)
    if not path.exists():
        is_file = path.suffix.lower() in FORMATS
        what = "file does not exist" if is_file else "folder does not exist"
        must = "" if is_file else "; it must hold train.jsonl"
        raise InputError(f"--data {args.data}: this {what}{_near(path)}{must}")
    for name, needed in (("train", args.train), ("test", args.test)):
        if needed and file_of(args, name) is None:
            if path.is_file():
                raise InputError(f"--test: {args.data} is one file; give a folder with {name}{path.suffix}")
            ends = ", ".join(list(FORMATS)[1:])
            raise InputError(
                f"--data {args.data}: it has no {name}.jsonl; put one row a line there, as JSON; "
                f"{ends} are read too, and a file by its own name"
            )
    sizes = {name: len(_read_set(args, name)[0]) for name in SETS if file_of(args, name)}
    for name, rows in sizes.items():
        _refuse_few(args, name, rows)
    return _that_train(args, sizes)


def _that_train(args, sizes):
    rows = sizes.get("train", 0)
    return rows if sizes.get("valid") else rows - split_off(args, rows)[0]


def _near(path):
    return did_you_mean_path(path, lambda other: other.is_dir() or other.suffix.lower() in FORMATS)


def file_of(args: Options, name: str) -> Path | None:
    """The local file of the set "train", "valid" or "test", or None. Of one name, .jsonl goes before the others."""
    path = Path(args.data)
    if path.is_file():
        return path if name == "train" else None
    files = (path / f"{name}{end}" for end in FORMATS)
    return next((file for file in files if file.is_file()), None)


def load_data(
    args: Options, tokenizer: TokenizerWrapper, given: Rows | None = None
) -> tuple[TriedRows, TriedRows, TriedRows]:
    """The train, valid and test sets; those that are not used are empty. Every row is tokenized once.

    Raises:
        InputError: for a set of fewer rows than a batch, and for a row that the tokenizer or its chat template
            refuses; it names file and line.
    """
    # Of rows above its own limit the tokenizer says that errors will follow; --max-seq-length cuts them, as told below.
    getattr(tokenizer, "deprecation_warnings", {})[TOO_LONG] = True
    tried = []
    for name, found in load_sets(args, tokenizer, given).items():
        used = _is_used(args, name)
        tried.append(TriedRows(found.rows if used else [], found.where))
    unshared = sum(rows.unshared for rows in tried)
    if unshared:
        line = (
            f"--mask-prompt: in {unshared} of {sum(map(len, tried))} rows the chat template begins an answer otherwise "
            "than after a prompt (an empty think block?); what row and prompt share is masked"
        )
        rprint(as_given(line, args.given))
    for rows in tried:
        if rows.empty_answers:
            rprint(
                f"Warning: {rows.where(rows.empty_answers[0])} has an empty answer, {len(rows.empty_answers)} of "
                f"{len(rows)} rows in all: the model learns to say nothing there. Fix or remove them"
            )
    _tell_of_cut_rows(args, dict(zip(SETS, tried, strict=True)))
    return tuple(tried)


def _tell_of_cut_rows(args, sets):
    """Once for all; mlx-lm warns of each batch."""
    limit = args.max_seq_length
    cut = {name: sum(length > limit for length in rows.lengths) for name, rows in sets.items()}
    if any(cut.values()):
        told = " and ".join(f"{cut[name]:,} of {len(sets[name]):,} {name} rows" for name in sets if cut[name])
        longest = max(max(rows.lengths, default=0) for rows in sets.values())
        line = (
            f"Warning: --max-seq-length {limit} cuts {told}; the longest has {longest:,} tokens, and what is cut is "
            "left out. Raise it, or split these rows"
        )
        rprint(as_given(line, args.given))


def load_sets(args: Options, tokenizer: TokenizerWrapper, given: Rows | None = None) -> dict[str, DataSet]:
    """The train, valid and test sets, no row of which has been tokenized yet.

    Raises:
        InputError: for data that cannot be loaded, and for a set that is used and has fewer rows than a batch.
    """
    described = given is None and getattr(args, "hf_dataset", None)
    sets = _described_sets(args, tokenizer) if described else _sets(args, tokenizer, given)
    for name, found in sets.items():
        _refuse_few(args, name, len(found))
        if _is_used(args, name) and name != "valid" and not len(found):
            raise InputError(f"--data {args.data}: has no {name} set; name data with one")
    return sets


def _is_used(args, name):
    return args.test if name == "test" else args.train


def _refuse_few(args, name, rows):
    if _is_used(args, name) and 0 < rows < args.batch_size:
        raise InputError(
            f"--data {args.data}: the {name} set has {counted(rows, 'row')}, fewer than --batch-size "
            f"{args.batch_size}: lower it to at most {rows}, or add rows"
        )


def _described_sets(args, tokenizer):
    """mlx-lm's own, of hf_dataset in the YAML file."""
    try:
        sets = [with_masked_prompts(rows, args) for rows in load_dataset(args, tokenizer)]
    # Whatever the hub's client raises: the user gave data that cannot be used.
    except Exception as error:
        raise InputError(f"hf_dataset: {reason_of(error)}") from error
    found = zip(SETS, sets, strict=True)
    return {name: DataSet(rows, partial("hf_dataset: {} row {}".format, name)) for name, rows in found}


def _sets(args, tokenizer, given):
    if given is not None:
        placed = _sets_of_given(args, given)
    elif is_local(args):
        placed = {name: _read_set(args, name) if file_of(args, name) else ([], None) for name in SETS}
    else:
        placed = _sets_of_hub(args)
    if args.train and placed["valid"][0] and args.valid_fraction is not None:
        line = f"Warning: --valid-fraction {args.valid_fraction:g}: no effect: the data has validation rows"
        rprint(as_given(line, args.given))
    if args.train and not placed["valid"][0]:
        rows, layout = placed["train"]
        size, told = split_off(args, len(rows))
        rprint(told)
        if size:
            chosen = set(np.random.RandomState(args.seed).permutation(len(rows))[:size].tolist())
            placed["train"] = [row for i, row in enumerate(rows) if i not in chosen], layout
            placed["valid"] = [row for i, row in enumerate(rows) if i in chosen], layout
    return {name: _data_set(args, rows, layout, tokenizer) for name, (rows, layout) in placed.items()}


def _data_set(args: Options, placed: list[PlacedRow], layout: Layout | None, tokenizer) -> DataSet:
    if not placed:
        return DataSet()
    rows = layout.data_set([row for _, row in placed], tokenizer)
    return DataSet(with_masked_prompts(rows, args), lambda i: placed[i].place)


def split_off(args: Options, rows: int) -> tuple[int, str]:
    """How many of the training rows become validation rows, where there are none, and what is said of it."""
    fraction = _valid_fraction(args)
    size = round(rows * fraction)
    if fraction and size < args.batch_size <= rows * MOST_OF_FEW:
        size = args.batch_size
    if not args.batch_size <= size <= rows - args.batch_size:
        why, most = "", int(rows * MOST_OF_FEW)
        if fraction:
            lower = f"; --batch-size {most} does" if 0 < most < args.batch_size and size <= rows - most else ""
            both = f"--valid-fraction {fraction:g} of {counted(rows, 'row')} does not leave both sets"
            why = f" ({both} a batch of {args.batch_size}{lower})"
        return 0, f"Warning: no validation rows exist, and none are split off{why}: training without validation."
    why = f"--valid-fraction {fraction:g}" + (", at least a batch" if size > round(rows * fraction) else "")
    split = f"{size} of {rows} rows are split off for validation, by --seed {args.seed} ({why})"
    return size, f"The data has no validation rows: {split}"


def _valid_fraction(args):
    if args.valid_fraction is None:
        return 0 if args.train_tables == "none" else VALID_FRACTION
    return args.valid_fraction


def _read_set(args, name):
    """The rows of a local file, each with its whole name, as mlx-lm takes them; and their layout."""
    path = file_of(args, name)
    where = f"--data {args.data}:" + ("" if path == Path(args.data) else f" {path.name}")
    return _converted(args, [(f"{where} {place}", row) for place, row in read_file(path, where)])


def _sets_of_given(args, given):
    named = {name: [(f"data: {name}[{i}]", row) for i, row in enumerate(given.get(name, ()))] for name in SETS}
    return {name: _converted(args, rows) for name, rows in named.items()}


def _sets_of_hub(args):
    from datasets import load_dataset as load_from_hub

    rprint(f"Loading Hugging Face dataset {args.data}.")
    try:
        splits = load_from_hub(args.data)
        found = {name: next((list(splits[n]) for n in ON_HUB[name] if n in splits), []) for name in SETS}
    # Whatever the hub's client raises: the user gave data that cannot be used.
    except Exception as error:
        raise InputError(f"--data {args.data}: {reason_of(error)}") from error
    return {
        name: _converted(args, [(f"--data {args.data}: {name} row {i}", row) for i, row in enumerate(rows, start=1)])
        for name, rows in found.items()
    }


def _converted(args, named):
    if not named:
        return [], None
    layout = layout_of(args, named[0][1], named[0][0])
    return [PlacedRow(where, mlx_lm_row(row, layout, where)) for where, row in named], layout
