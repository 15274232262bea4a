"""The options of ``train`` as a call in Python gives them: by name, with values of Python's own."""

import copy
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mlx_lm.cli_ui import rprint

from ember_mlx.finetune.options import Options, build_parser, complete, defaults, typed
from ember_mlx.finetune.yaml_reading import check_values
from ember_mlx.shared.command_line import actions_of
from ember_mlx.shared.errors import InputError, did_you_mean

__all__ = ["NAMES", "naming_keywords", "options_of"]

NAMES = frozenset(defaults()) | {"hf_dataset"}
"""Every name that an option may have."""

FLAG = re.compile(r"(?<![\w-])--(no-)?([a-z][a-z0-9-]*)")


def options_of(given: Mapping[str, Any]) -> tuple[Options, frozenset[str]]:
    """The options that a command line with the same values gives, and the names of those given; None is not given.

    Options without effect are warned of by keyword.

    Args:
        given: By name, in the types that a YAML file has; a path may be a ``Path``, a list a tuple. They are copied.

    Raises:
        InputError: for a name that is no option, and for a value that the command line refuses.
    """
    parser = build_parser()
    actions = {action.dest: action for action in actions_of(parser)}
    values = vars(parser.parse_args([]))
    for name, value in given.items():
        if name not in NAMES:
            hint = did_you_mean(name, NAMES) or "; `ember-mlx train --help` lists them, with - for _"
            raise InputError(f"{name}: is no option of train{hint}")
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        value = _with_lists(value)
        if value is not None and name in actions:
            value = typed(f"{name}: {value!r}", value, actions[name])
        else:
            check_values(value, name)
        values[name] = value
    return complete(parser, values, data_required=True, warn=lambda line: rprint(_in_keywords(line)))


def _with_lists(value):
    """A copy, with lists in the places of tuples."""
    if isinstance(value, Mapping):
        return {name: _with_lists(one) for name, one in value.items()}
    return [_with_lists(one) for one in value] if isinstance(value, list | tuple) else copy.deepcopy(value)


@contextmanager
def naming_keywords() -> Iterator[None]:
    """Within ``with``, an InputError names keywords where the command line's names flags."""
    try:
        yield
    except InputError as error:
        raise InputError(_in_keywords(str(error))) from error.__cause__


def _in_keywords(text):
    switches = {action.dest: action.nargs == 0 for action in actions_of(build_parser()) if action.dest in NAMES}

    def as_keyword(found):
        name = found[2].replace("-", "_")
        if name not in switches:
            return found[0]
        return f"{name}={not found[1]}" if switches[name] else name

    return FLAG.sub(as_keyword, text.replace("--resume to", "resume=True to"))
