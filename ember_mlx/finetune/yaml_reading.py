"""Reading a YAML file of options: what comes back is what JSON can hold, of a size that adapters can record."""

from pathlib import Path
from typing import Any

from ember_mlx.finetune.mlx_lm_internals import YamlError, load_yaml, yaml_nodes
from ember_mlx.shared.errors import InputError, did_you_mean_path, reason_of

__all__ = ["MOST_VALUES", "check_values", "read_yaml"]

MOST_VALUES = 10_000  # aliases written out: a file of a few lines can stand for billions
MOST_BYTES = 10**6
DEEPEST = 50


def read_yaml(path: Path, where: str) -> dict[str, Any]:
    """The names and values in a YAML file.

    Args:
        path: The file.
        where: What messages begin with.

    Raises:
        InputError: for a file that cannot be read, is no YAML or holds no names and values; for a name that is there
            twice; and for values that JSON cannot hold: names that are no text, dates, sets, bytes, half of a surrogate
            pair, circles of aliases, and more than ``MOST_VALUES`` values.
    """
    if not path.is_file():
        raise InputError(f"{where}: no such file{did_you_mean_path(path)}; give an existing one")
    if path.stat().st_size > MOST_BYTES:
        raise InputError(f"{where}: has more than {MOST_BYTES:,} bytes; options take a few hundred")
    try:
        text = path.read_text(encoding="utf-8")
        nodes, config = yaml_nodes(text), load_yaml(text)
    except OSError as error:
        raise InputError(f"{where}: cannot be read ({error.strerror or error})") from error
    # ValueError: a date that no calendar has, a number of thousands of digits, bytes that are not UTF-8.
    except (YamlError, RecursionError, TypeError, ValueError) as error:
        raise InputError(f"{where} is not YAML: {reason_of(error)}") from error
    _refuse_repeated(nodes, where)
    if not isinstance(config, dict):
        raise InputError(f"{where}: must hold `option: value` lines, as mlx_lm.lora takes them")
    check_values(config, where)
    return config


def _refuse_repeated(node, where):
    """Of a name that is there twice PyYAML takes the last, in silence. Aliases make circles: each node is seen once."""
    left, seen = [node], set()
    while left:
        node = left.pop()
        if id(node) in seen or not isinstance(getattr(node, "value", None), list):
            continue
        seen.add(id(node))
        if node.id == "sequence":
            left += node.value
            continue
        lines = {}
        for key, value in node.value:
            left += [key, value]
            if key.id != "scalar" or key.tag.endswith(":merge"):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                both = f"line {line}" if lines[key.value] == line else f"lines {lines[key.value]} and {line}"
                raise InputError(f"{where}: {key.value} is given twice, in {both}; keep one")
            lines[key.value] = line


def check_values(config: Any, where: str) -> None:
    """Raises InputError for values that JSON cannot hold. They are walked without recursion, aliases written out."""
    left = [(where, config, 0)]
    count = 0
    while left:
        name, value, depth = left.pop()
        count += 1
        if count > MOST_VALUES or depth > DEEPEST:
            limit = f"{MOST_VALUES:,} values, aliases written out, or {DEEPEST} levels"
            raise InputError(f"{where}: holds more than {limit}; leave aliases out")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise InputError(f'{name}: the name {key!r} must be text; write it in quotes, as "{key}"')
                _check_text(name, key)
            left += [(f"{name}: {key}", inner, depth + 1) for key, inner in value.items()]
        elif isinstance(value, list):
            left += [(name, inner, depth + 1) for inner in value]
        elif isinstance(value, str):
            _check_text(name, value)
        elif not isinstance(value, bool | int | float | type(None)):
            kind = type(value).__name__
            raise InputError(f"{name}: {value} is read as a {kind}; write text in quotes, or give a number or a list")


def _check_text(name, text):
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: {text!r} holds half of a surrogate pair, which is no character") from error
