"""Commands of mlx-lm that run as they are, with our ``load`` in the place of theirs, which cannot load token tables."""

import argparse
import sys
from importlib import import_module
from types import SimpleNamespace

from ember_mlx.finetune.adapters import load
from ember_mlx.shared.command_line import Help, actions_of, describe
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.replacing import replaced

__all__ = ["run_command"]


def run_command(name: str, arguments: list[str], description: str, texts: Help, epilog: str) -> None:
    """Run ``mlx_lm.{name}`` with ``arguments``: its code and its options, our ``load`` and our help.

    Raises:
        InputError: for whatever mlx-lm raises, but an EOFError or an OSError, which pass.
    """
    module = import_module(f"mlx_lm.{name}")

    def our_parser(**_):
        parser = argparse.ArgumentParser(description=description, epilog=epilog)

        def describe_and_parse():  # which mlx-lm calls once, when the parser has all its options
            del parser.parse_args
            nothing = {action.dest: None for action in actions_of(parser) if action.default == ""}
            parser.set_defaults(**nothing)
            return describe(parser, texts).parse_args()

        parser.parse_args = describe_and_parse
        return parser

    try:
        with (
            replaced(module, "load", load),
            replaced(module, "argparse", SimpleNamespace(**vars(argparse) | {"ArgumentParser": our_parser})),
            replaced(sys, "argv", [f"ember-mlx {name}", *arguments]),
        ):
            module.main()
    except (EOFError, InputError, OSError):
        raise
    # Such as a prompt cache that does not exist, or a chat template that the tokenizer lacks.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"mlx_lm.{name} cannot do that: {type(error).__name__}: {reason}") from error
