"""Command lines: help in groups, with every default, and errors in one line."""

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ember_mlx.shared.errors import InputError, did_you_mean
from ember_mlx.shared.units import parse_size

__all__ = [
    "Help",
    "actions_of",
    "describe",
    "flag",
    "in_any_case",
    "is_of_another",
    "size_or_zero",
    "with_one_line_errors",
]

# {group: {dest: (metavar, text)}}; the metavar is None for switches and choices.
Help = Mapping[str, Mapping[str, tuple[str | None, str]]]


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Texts start in one column that leaves them room, and indented lines, which are examples, stay as they are."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28)

    def _fill_text(self, text, width, indent):
        fold = super(argparse.RawDescriptionHelpFormatter, self)._fill_text
        lines = text.splitlines()
        return "\n".join(line if line.startswith(" ") else fold(line, width, indent) for line in lines)


def flag(name: str) -> str:
    """The flag of an option: "--batch-size" of "batch_size"."""
    return "--" + name.replace("_", "-")


def size_or_zero(text: str) -> int:
    """Bytes, as argparse's ``type`` of an option that takes a size."""
    try:
        return parse_size(text, or_zero=True)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options of a parser. argparse keeps this list to itself, and has no other."""
    return parser._actions


def in_any_case(choices: Iterable[Any]) -> Callable[[str], Any]:
    """What reads a name: the choice that it is, whatever its case, or else the same word, for the error to name."""
    known = {str(choice).lower(): choice for choice in choices}
    return lambda word: known.get(word.lower(), word)


def is_of_another(word: str, actions: Iterable[argparse.Action]) -> str:
    """ "; X is for --flag" where a word that is no choice of one option is a choice of others; or ""."""
    flags = " and ".join(
        action.option_strings[0]
        for action in actions
        if action.option_strings and action.choices and word.lower() in map(str, action.choices)
    )
    return f"; {word.lower()} is for {flags}" if flags else ""


def describe(
    parser: argparse.ArgumentParser, texts: Help, defaults: Mapping[str, Any] | None = None
) -> argparse.ArgumentParser:
    """The same parser, whose help shows its options in groups with these texts and their defaults.

    Args:
        parser: Has all options that ``texts`` names; its errors become InputErrors.
        texts: "Default: X." is added to each that says neither this nor "Required".
        defaults: By name, where they are not the parser's own.
    """
    actions = {action.dest: action for action in actions_of(parser)}
    for title, options in texts.items():
        group = parser.add_argument_group(title)
        for name, (metavar, text) in options.items():
            action = actions[name]
            action.metavar = metavar
            default = action.default if defaults is None else defaults[name]
            action.help = _with_default(text, default).replace("%", "%%")
            for other in parser._action_groups:  # argparse has no call that moves an option
                if action in other._group_actions:
                    other._group_actions.remove(action)
            group._group_actions.append(action)
    parser.formatter_class = HelpFormatter
    return with_one_line_errors(parser)


def with_one_line_errors(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The same parser, which raises InputError where argparse would print its usage and exit.

    It takes no abbreviations: one that is unique today would mean another flag, or none, tomorrow. No flag begins with
    a digit, so that "-1GB" and "-1e-4" are values, as "-1" is to argparse. Names of a fixed list are taken in any case.
    """
    for action in actions_of(parser):
        if action.choices and action.type in (None, str):
            action.type = in_any_case(action.choices)

    def error(message):
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            flags = [flag for action in actions_of(parser) for flag in action.option_strings]
            # Of "--lerning-rate 1e-4" argparse names both words.
            words = [word.partition("=")[0] for word in unknown.split() if word.startswith("--")]
            message += next(filter(None, (did_you_mean(word, flags) for word in words)), "")
            if not unknown.startswith("-"):
                likely = ["--config"] if unknown.endswith((".yaml", ".yml")) else []
                likely += ["--prompt", "--data", "--adapter-path"]
                message += next((f"; a value needs its flag, such as {flag}" for flag in likely if flag in flags), "")
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message:
            for action in actions_of(parser):
                if action.choices and "/".join(action.option_strings) in missing.split(", "):
                    message += f": one of {', '.join(map(str, action.choices))}"
        wrong = re.search(r"^argument (\S+): invalid choice: '(.*)' \(choose from", message)
        if wrong:
            flags, word = wrong.groups()
            choices = [
                str(choice)
                for action in actions_of(parser)
                if action.choices and "/".join(action.option_strings) == flags
                for choice in action.choices
            ]
            message += did_you_mean(word, choices) + is_of_another(word, actions_of(parser))
        raise InputError(f"{message}; {parser.prog} --help lists the options")

    parser.error, parser.allow_abbrev = error, False
    parser._negative_number_matcher = re.compile(r"-\.?\d")
    return parser


def _with_default(text, value):
    if "Default:" in text or "Required" in text:
        return text
    if isinstance(value, bool):
        return f"{text} Default: {'on' if value else 'off'}."
    return f"{text} Default: {f'{value:g}' if isinstance(value, float) else value}."
