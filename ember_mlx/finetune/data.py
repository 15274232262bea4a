"""Checks of a data folder before mlx-lm reads it, so that a broken line is named and nothing has been written."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

from mlx_lm.tuner.datasets import load_dataset

from ember_mlx.shared.errors import InputError

# The kinds of rows that mlx-lm takes; the names can be changed in its YAML file, as these keys.
FEATURES = {"prompt_feature": "prompt", "completion_feature": "completion", "chat_feature": "messages"}
HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")


def check_data_folder(args):
    """Refuse a local data folder without train.jsonl or with a row that mlx-lm could not use, naming the line.

    Hub data sets (``hf_dataset`` in the YAML file, or an ``owner/name`` that is no folder) are left to mlx-lm.
    """
    folder = Path(args.data)
    described = getattr(args, "hf_dataset", None)
    if described or not folder.exists():
        if not described and not HUB_NAME.fullmatch(args.data):
            raise InputError(f"--data {args.data}: there is no such folder; it must hold train.jsonl")
        if find_spec("datasets") is None:
            what = "hf_dataset: " if described else f"--data {args.data}: is no folder here, and "
            raise InputError(f"{what}a data set of the Hugging Face hub needs: pip install 'mlx-lm[train]'")
        return
    for name, needed in (("train", args.train), ("test", args.test)):
        if needed and not (folder / f"{name}.jsonl").is_file():
            raise InputError(f"--data {args.data}: there is no {name}.jsonl in it; put one row a line there, as JSON")
    for name in ("train", "valid", "test"):
        if (folder / f"{name}.jsonl").is_file():
            _check_rows(folder / f"{name}.jsonl", args)


def load_data(args, tokenizer):
    """mlx-lm's train, valid and test sets; each that will be used has at least a batch of rows."""
    try:
        train, valid, test = load_dataset(args, tokenizer)
        for rows in (train, valid, test):
            if rows:
                rows.process(rows[0])  # a tokenizer without a chat template says so here, and not in the middle
    # Whatever the hub's client or the chat template raises: the user gave data that cannot be used.
    except Exception as error:
        raise InputError(f"--data {args.data}: {' '.join(str(error).split())}") from error
    used = [("train", train if args.train else []), ("valid", valid if args.train else [])]
    used.append(("test", test if args.test else []))
    for name, rows in used:
        if 0 < len(rows) < args.batch_size:
            raise InputError(
                f"--data {args.data}: the {name} set has {len(rows)} rows, fewer than --batch-size {args.batch_size}: "
                f"use --batch-size {len(rows)} or more rows"
            )
    return train, valid, test


def _check_rows(path, args):
    prompt, completion, messages = (getattr(args, key, None) or name for key, name in FEATURES.items())
    text = getattr(args, "text_feature", None) or "text"
    # mlx-lm takes a file's kind from its first row: the first kind here that the row has.
    kinds = [(prompt, completion), (messages,), (text,)]
    keys = None
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"--data {path.parent}: {path.name} line {number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise InputError(f"{where} is not JSON ({error}): mend or remove that line") from error
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
                    raise InputError(f"{where} has no {key}, which the first line has: mend or remove that line")
                kind = {messages: list, text: str}.get(key, object)
                if not isinstance(row[key], kind) or (kind is not object and not row[key]):
                    raise InputError(f"{where} has no {key} that can be trained on: mend or remove that line")
            if keys == (messages,):
                _check_turns(where, row[messages], args.mask_prompt)
    if keys is None:
        raise InputError(f"--data {path.parent}: {path.name} is empty: put one row a line there, as JSON")


def _check_turns(where, turns, mask_prompt):
    if not all(isinstance(turn, dict) and "role" in turn for turn in turns):
        raise InputError(f"{where} has a message without a role: mend or remove that line")
    if mask_prompt and len(turns) < 2:
        raise InputError(f"{where} has one message, of which --mask-prompt leaves nothing: mend or remove that line")
