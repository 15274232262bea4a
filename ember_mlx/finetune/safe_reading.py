"""Reading files that may be damaged or made to do harm: every way of being wrong ends in one InputError."""

import hashlib
import json
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from ember_mlx.optimizers.guarded import all_finite
from ember_mlx.shared.errors import InputError, reason_of

__all__ = [
    "JSON_LIMIT",
    "check_arrays",
    "check_finite",
    "check_types",
    "no_constant",
    "plain_file",
    "read_arrays",
    "read_json",
    "read_metadata",
    "sha256",
]

JSON_LIMIT = 10**7  # bytes
AT_ONCE = 2**16  # elements
UNREADABLE = (SafetensorError, OSError, RuntimeError, ValueError, TypeError, OverflowError)


def plain_file(path: Path, where: str) -> Path:
    """The path, if it is an ordinary file that lies in its folder itself: no pipe, and no link that leads elsewhere."""
    try:
        inside = path.resolve().is_relative_to(path.parent.resolve())
        ordinary = stat.S_ISREG(path.stat().st_mode)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
        raise InputError(f"{where}: file {path.name} cannot be read ({reason_of(error)})") from error
    if not inside:
        raise InputError(
            f"{where}: {path.name} is a link to a file elsewhere, which is not followed; copy the folder with the "
            "files themselves, as cp -RL does"
        )
    if not ordinary:
        raise InputError(f"{where}: {path.name} is not an ordinary file; remove it")
    return path


def read_json(path: Path, where: str) -> dict:
    """The object that a JSON file holds."""
    try:
        if plain_file(path, where).stat().st_size > JSON_LIMIT:
            raise ValueError(f"larger than {JSON_LIMIT} bytes")
        value = json.loads(path.read_bytes(), parse_constant=no_constant)
    except InputError:
        raise
    except (OSError, RecursionError, ValueError) as error:
        raise InputError(f"{where}: {path.name} is not JSON that can be read ({reason_of(error)})") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: {path.name} holds a {type(value).__name__} where an object belongs")
    return value


def read_arrays(path: Path, where: str) -> dict[str, mx.array]:
    """The arrays of a safetensors file by name. Their data is read when they are first used, as with ``mx.load``."""
    read_metadata(path, where)  # which checks every length, offset and shape in the header
    with _reading(path, where):
        return mx.load(str(path), format="safetensors")


def read_metadata(path: Path, where: str) -> dict[str, str]:
    """What a safetensors file says beside its arrays."""
    plain_file(path, where)
    with _reading(path, where), safe_open(path, framework="numpy") as file:
        return file.metadata() or {}


def sha256(path: Path, where: str) -> str:
    """The checksum of a file, in hexadecimal."""
    plain_file(path, where)
    with _reading(path, where), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _reading(path, where):
    try:
        yield
    except UNREADABLE as error:
        raise InputError(f"{where}: {path.name} cannot be read ({reason_of(error)})") from error


def check_types(value: Any, expected: Any, where: str) -> None:
    """Refuse a value from JSON that is not built as ``expected`` says.

    ``expected`` is a type, a tuple of types, a list with the type of every item, or a dict with a type for each key,
    all of which must be there and no others.
    """
    if isinstance(expected, dict):
        if not isinstance(value, dict) or value.keys() != expected.keys():
            raise InputError(f"{where} must hold {', '.join(expected)}, and nothing else")
        for key, kind in expected.items():
            check_types(value[key], kind, f"{where}: {key}")
    elif isinstance(expected, list):
        check_types(value, list, where)
        for item in value:
            check_types(item, expected[0], where)
    else:
        kinds = expected if isinstance(expected, tuple) else (expected,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            words = " or ".join({"NoneType": "null"}.get(kind.__name__, kind.__name__) for kind in kinds)
            raise InputError(f"{where} is of type {type(value).__name__}, not {words}")


def check_arrays(arrays: dict[str, mx.array], expected: dict[str, mx.array], where: str, remedy: str) -> None:
    """Refuse arrays that are not those of ``expected``, name by name, in shape and dtype."""
    for name in sorted(arrays.keys() | expected.keys()):
        if name not in arrays or name not in expected:
            raise InputError(f"{where}: {name} is {'missing' if name in expected else 'not of this run'}; {remedy}")
        found, own = arrays[name], expected[name]
        if found.shape != own.shape or found.dtype != own.dtype:
            raise InputError(
                f"{where}: {name} has shape {found.shape} and dtype {found.dtype}, but {own.shape} and {own.dtype} in "
                f"this run; {remedy}"
            )


def check_finite(arrays: dict[str, mx.array], where: str, remedy: str) -> None:
    """Refuse, by name, an array with a number that is not finite.

    Small ones, of which adapters have hundreds, are looked at all at once, and large ones one at a time, for memory.
    """
    floating = {name: array for name, array in arrays.items() if mx.issubdtype(array.dtype, mx.floating)}
    small = {name for name, array in floating.items() if array.size < AT_ONCE}
    if small and all_finite([floating[name] for name in small]).item():
        floating = {name: array for name, array in floating.items() if name not in small}
    for name, array in floating.items():
        if not all_finite([array]).item():
            count = array.size - mx.isfinite(array).sum().item()
            raise InputError(f"{where}: {name} has {count} of {array.size} numbers that are not finite; {remedy}")


def no_constant(name: str) -> NoReturn:
    """For ``json.loads``: raises ValueError for NaN and the infinities, which JSON does not have."""
    raise ValueError(f"{name} is no number")
