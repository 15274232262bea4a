"""The one exception that stands for bad input."""

import argparse


class InputError(ValueError):
    """Something the caller gave cannot be used: the message says what, what is allowed, and what to do.

    The command line prints it as one line and exits with code 2.
    """


def with_one_line_errors(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The same parser, which raises InputError where argparse would print its usage and exit."""

    def error(message):
        raise InputError(f"{message}; {parser.prog} --help lists the options")

    parser.error = error
    return parser
