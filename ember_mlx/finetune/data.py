"""Checks of a data folder before mlx-lm reads it, so that a broken line is named and nothing has been written."""

import json
import re
from pathlib import Path

from mlx_lm.tuner.datasets import load_dataset

from ember_mlx.errors import InputError

# The kinds of rows that mlx-lm takes; the names can be changed in its YAML file, as these keys.
FEATURES = {"prompt_feature": "prompt", "completion_feature": "completion", "chat_feature": "messages"}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_data_folder(args):
    """Refuse a local data folder without train.jsonl or with a row that mlx-lm could not use, naming the line.

    Hub data sets (``hf_dataset`` in the YAML file, or an ``owner/name`` that is no folder) are left to mlx-lm.
    """
    if getattr(args, "hf_dataset", None):
        return
    folder = Path(args.data)
    if not folder.exists():
        if not HUB_NAME.fullmatch(str(args.data)):
            raise InputError(f"--data {args.data}: there is no such folder; it must hold train.jsonl")
        return
    wanted = [("train", args.train), ("test", args.test)]
    for name, needed in wanted:
        if needed and not (folder / f"{name}.jsonl").is_file():
            raise InputError(f"--data {args.data}: there is no {name}.jsonl in it; put one row a line there, as JSON")
    for name in ("train", "valid", "test"):
        if (folder / f"{name}.jsonl").is_file():
            _check_rows(folder / f"{name}.jsonl", args)


def load_data(args, tokenizer):
    """mlx-lm's train, valid and test sets; each that will be used has at least a batch of rows."""
    try:
        train, valid, test = load_dataset(args, tokenizer)
    except ImportError as error:
        raise InputError(
            f"--data {args.data}: {error}; data sets of the hub need: pip install 'mlx-lm[train]'"
        ) from error
    except (ValueError, OSError) as error:
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
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{where} is not JSON ({error}): mend or remove that line") from error
            if keys is None:
                keys = next((kind for kind in kinds if isinstance(row, dict) and set(kind) <= row.keys()), None)
                if keys is None:
                    raise InputError(
                        f"{where} is of no kind that mlx-lm trains on: it needs the keys {prompt} and {completion}, or "
                        f"{messages}, or {text}"
                    )
            for key in keys:
                if not isinstance(row, dict) or not isinstance(row.get(key), str | list):
                    raise InputError(f"{where} has no {key}, which the first line has: mend or remove that line")
                if not row[key] and key in (messages, text):
                    raise InputError(f"{where} has an empty {key}: mend or remove that line")
    if keys is None:
        raise InputError(f"--data {path.parent}: {path.name} is empty: put one row a line there, as JSON")
