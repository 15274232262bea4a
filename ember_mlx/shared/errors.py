"""The one exception that stands for bad input."""

import argparse
import difflib
from collections.abc import Iterable

__all__ = ["InputError", "did_you_mean", "with_one_line_errors"]


class InputError(ValueError):
    """Something the caller gave cannot be used: the message says what, what is allowed, and what to do.

    The command line prints it as one line and exits with code 2.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " (did you mean 'X'?)" for the word of ``known`` that is spelt most like this one, or "" if none is."""
    # Without the dashes, which all flags share.
    names = {name.lstrip("-"): name for name in known}
    near = difflib.get_close_matches(word.lstrip("-"), names, n=1, cutoff=0.6)
    return f" (did you mean {names[near[0]]!r}?)" if near else ""


def with_one_line_errors(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The same parser, which raises InputError where argparse would print its usage and exit."""

    def error(message):
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            flags = [flag for action in parser._actions for flag in action.option_strings]
            # Of "--lerning-rate 1e-4" argparse names both words.
            words = [word.partition("=")[0] for word in unknown.split() if word.startswith("--")]
            message += next(filter(None, (did_you_mean(word, flags) for word in words)), "")
        raise InputError(f"{message}; {parser.prog} --help lists the options")

    parser.error = error
    return parser
