"""A data folder: checked before mlx-lm reads it, and loaded with every row tried, before anything is written."""

import json
import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from mlx_lm.cli_ui import rprint
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.datasets import load_dataset

from ember_mlx.finetune.options import Options
from ember_mlx.finetune.rows import REMEDY, TriedRows, fault_of, with_compared_prompts
from ember_mlx.shared.errors import InputError

__all__ = ["FEATURES", "HUB_NAME", "check_data_folder", "load_data", "load_sets", "row_name"]

# The kinds of rows that mlx-lm takes; the names can be changed in its YAML file, as these keys.
FEATURES = {"prompt_feature": "prompt", "completion_feature": "completion", "chat_feature": "messages"}
SETS = ("train", "valid", "test")
HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")


def check_data_folder(args: Options) -> None:
    """Check a local data folder, as far as that needs no tokenizer.

    Hub data sets (``hf_dataset`` in the YAML file, or an ``owner/name`` that is no folder) are left to mlx-lm.

    Raises:
        InputError: for a folder without train.jsonl, and for a row that cannot be trained on; it names file and line.
    """
    folder = Path(args.data)
    described = getattr(args, "hf_dataset", None)
    if described or not folder.exists():
        if not described and not HUB_NAME.fullmatch(args.data):
            raise InputError(f"--data {args.data}: this folder does not exist; it must hold train.jsonl")
        if find_spec("datasets") is None:
            what = "hf_dataset: " if described else f"--data {args.data}: is no folder here, and "
            raise InputError(f"{what}a data set of the Hugging Face hub needs: pip install 'mlx-lm[train]'")
        return
    for name, needed in (("train", args.train), ("test", args.test)):
        if needed and not (folder / f"{name}.jsonl").is_file():
            raise InputError(f"--data {args.data}: it has no {name}.jsonl; put one row a line there, as JSON")
    for name in SETS:
        if (folder / f"{name}.jsonl").is_file():
            _check_rows(folder / f"{name}.jsonl", args)


def load_data(args: Options, tokenizer: TokenizerWrapper) -> tuple[TriedRows, TriedRows, TriedRows]:
    """The train, valid and test sets; those that are not used are empty. Every row is tokenized once.

    Raises:
        InputError: for a set of fewer rows than a batch, and for a row that the tokenizer or its chat template
            refuses; it names file and line.
    """
    tried = []
    for name, rows in zip(SETS, load_sets(args, tokenizer), strict=True):
        used = args.test if name == "test" else args.train
        tried.append(TriedRows(rows if used else [], partial(row_name, args, name)))
    unshared = sum(rows.unshared for rows in tried)
    if unshared:
        rprint(
            f"--mask-prompt: in {unshared} of {sum(map(len, tried))} rows the chat template begins an answer otherwise "
            "than after a prompt (an empty think block?); what row and prompt share is masked"
        )
    return tuple(tried)


def load_sets(args: Options, tokenizer: TokenizerWrapper) -> tuple:
    """mlx-lm's train, valid and test sets, no row of which has been tokenized yet.

    Raises:
        InputError: for data that mlx-lm does not load, and for a set that is used and has fewer rows than a batch.
    """
    try:
        sets = [with_compared_prompts(rows) for rows in load_dataset(args, tokenizer)]
    # Whatever the hub's client raises: the user gave data that cannot be used.
    except Exception as error:
        raise InputError(f"--data {args.data}: {' '.join(str(error).split())}") from error
    for name, rows in zip(SETS, sets, strict=True):
        used = args.test if name == "test" else args.train
        if used and 0 < len(rows) < args.batch_size:
            raise InputError(
                f"--data {args.data}: the {name} set has {len(rows)} rows, fewer than --batch-size {args.batch_size}: "
                f"use --batch-size {len(rows)} or more rows"
            )
    return tuple(sets)


def row_name(args: Options, name: str, index: int) -> str:
    """How errors name a row of the set ``name``: by its line, or, in a data set of the hub, by its number from 1."""
    if getattr(args, "hf_dataset", None) or not Path(args.data).exists():
        return f"--data {args.data}: {name} row {index + 1}"
    return f"--data {args.data}: {name}.jsonl line {index + 1}"


def _check_rows(path, args):
    prompt, completion, messages = (getattr(args, key, None) or name for key, name in FEATURES.items())
    text = getattr(args, "text_feature", None) or "text"
    # mlx-lm takes a file's kind from its first row: the first kind here that the row has.
    kinds = [(prompt, completion), (messages,), (text,)]
    keys = None
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = row_name(args, path.stem, number - 1)
            try:
                row = json.loads(line.decode("utf-8"))
            except (RecursionError, ValueError) as error:
                raise InputError(f"{where} is not JSON ({error}): {REMEDY}") from error
            if keys is None:
                keys = next((kind for kind in kinds if isinstance(row, dict) and set(kind) <= row.keys()), None)
                if keys is None:
                    raise InputError(
                        f"{where} is of no kind that mlx-lm trains on: it needs the keys {prompt} and {completion}, or "
                        f"{messages}, or {text}"
                    )
                if args.mask_prompt and keys == (text,):
                    raise InputError(
                        f"--mask-prompt: {where} has {text} and so no prompt; leave --mask-prompt out, or use rows of "
                        f"{prompt} and {completion}"
                    )
            for key in keys:
                if not isinstance(row, dict) or key not in row:
                    raise InputError(f"{where} has no {key}, which the first line has: {REMEDY}")
            if fault := fault_of(row, keys, messages, mask_prompt=args.mask_prompt):
                raise InputError(f"{where} {fault}: {REMEDY}")
    if keys is None:
        raise InputError(f"--data {path.parent}: {path.name} is empty: put one row a line there, as JSON")
