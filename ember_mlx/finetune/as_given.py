"""How an option was given: errors and warnings begin with its flag, or with the file that gives it and its key there.

Whatever refuses an option names its flag. What comes out of a run's options passes through here.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ember_mlx.shared.errors import InputError

__all__ = ["as_given", "naming_as_given"]

OPTION = re.compile(r"(Warning: |)(?:--)?([a-z][a-z0-9_-]*)(?=[ :])")


def as_given(text: str, given: Mapping[str, str]) -> str:
    """The text of an error or a warning; the option that it begins with is named as it was given.

    Args:
        text: Begins with a flag, such as "--batch-size 0: ", or a key of a file.
        given: Where each option that was given is: "" on the command line, "--config FILE: " in a file.
    """
    found = OPTION.match(text)
    name = found[2].replace("-", "_") if found else ""
    if not given.get(name):
        return text
    return f"{found[1]}{given[name]}{name}{text[found.end() :]}"


@contextmanager
def naming_as_given(given: Mapping[str, str]) -> Iterator[None]:
    """Within ``with``, an InputError names an option of a file as :func:`as_given` does."""
    try:
        yield
    except InputError as error:
        text = as_given(str(error), given)
        if text == str(error):
            raise
        raise InputError(text) from error.__cause__
