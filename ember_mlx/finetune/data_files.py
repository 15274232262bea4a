"""Files of rows: .jsonl, .json, .csv and .parquet, read to dictionaries, each with its place in the file.

The standard library reads text, since errors then name the line. pyarrow, which `datasets` brings, reads .parquet.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ember_mlx.finetune.rows import REMEDY
from ember_mlx.shared.errors import InputError

__all__ = ["FORMATS", "PlacedRow", "read_file"]

DELIMITERS = ",;\t"
LONGEST_CELL = 2**31 - 1  # csv refuses more than 131,072 characters unless told


class PlacedRow(NamedTuple):
    """A row, and how errors name its place: "line 3" or "row 3", from 1."""

    place: str
    row: Any


def read_file(path: Path, where: str) -> list[PlacedRow]:
    """The rows of a file of one of :data:`FORMATS`; a byte order mark, CR and blank last lines are no part of them.

    Args:
        path: The file.
        where: What names it in errors.

    Raises:
        InputError: for a file of another kind, one that cannot be read, and one without rows.
    """
    read = FORMATS.get(path.suffix.lower())
    if read is None:
        raise InputError(f"{where} is no file of rows; use {', '.join(FORMATS)}, or a folder with train.jsonl")
    rows = list(read(path, where))
    if not rows:
        raise InputError(f"{where} is empty: put at least one row there")
    return rows


def _read_bytes(path, where):
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{where} is text in UTF-16: save it as UTF-8")
    return data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _read_json_lines(path, where):
    yield from _json_lines(_read_bytes(path, where), where)


def _json_lines(data, where):
    for number, line in enumerate(data.rstrip().split(b"\n") if data.strip() else [], start=1):
        try:
            row = json.loads(line.decode("utf-8"))
        except (RecursionError, ValueError) as error:
            raise InputError(f"{where} line {number} is not JSON ({error}): {REMEDY}") from error
        yield PlacedRow(f"line {number}", row)


def _read_json(path, where):
    data = _read_bytes(path, where)
    try:
        rows = json.loads(data.decode("utf-8"))
    except (RecursionError, ValueError) as error:
        if data.lstrip().startswith(b"{"):  # files of JSON lines often have this name
            yield from _json_lines(data, where)
            return
        raise InputError(f"{where} is not JSON ({error}): fix it there") from error
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        # {"data": [...]} holds rows; {"messages": [...]}, whose list holds turns, is one.
        rows = lists[0] if len(rows) == 1 and lists and not {"role", "from"} & lists[0][0].keys() else [rows]
    if not isinstance(rows, list):
        raise InputError(f"{where} holds a {type(rows).__name__}; it must hold a list of rows, each an object")
    yield from (PlacedRow(f"row {number}", row) for number, row in enumerate(rows, start=1))


def _read_csv(path, where):
    try:
        text = _read_bytes(path, where).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 ({error}): save it as UTF-8") from error
    header = text.partition("\n")[0]
    csv.field_size_limit(LONGEST_CELL)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=max(DELIMITERS, key=header.count), strict=True)
    first = 1
    try:
        keys = [key.strip() for key in next(lines, [])]
        if len(set(keys)) < len(keys):
            raise InputError(f"{where} line 1 names a column twice ({', '.join(keys)}): give each its own name")
        first = lines.line_num + 1
        for cells in lines:
            if cells and len(cells) != len(keys):
                raise InputError(f"{where} line {first} has {len(cells)} cells, line 1 has {len(keys)}: {REMEDY}")
            if cells:
                yield PlacedRow(f"line {first}", dict(zip(keys, cells, strict=True)))
            first = lines.line_num + 1
    except csv.Error as error:
        raise InputError(f"{where} line {first} is not CSV ({error}): {REMEDY}") from error


def _read_parquet(path, where):
    if find_spec("pyarrow") is None:
        raise InputError(f"{where} a .parquet file needs pyarrow: pip install 'mlx-lm[train]' brings it")
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{where} is no .parquet file ({error}): write it again, or use .jsonl") from error
    yield from (PlacedRow(f"row {number}", row) for number, row in enumerate(rows, start=1))


FORMATS: dict[str, Callable[[Path, str], Iterator[PlacedRow]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""What reads a file, by the end of its name."""
