"""mlx-lm's own commands, with our ``load`` in the place of theirs, which cannot load token tables."""

import sys
from importlib import import_module

from ember_mlx.finetune.adapters import load
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.replacing import replaced

__all__ = ["run_mlx_lm"]


def run_mlx_lm(name: str, arguments: list[str]) -> None:
    """Run ``mlx_lm.NAME`` with these arguments.

    Raises:
        InputError: for whatever mlx-lm raises.
    """
    module = import_module(f"mlx_lm.{name}")
    try:
        with replaced(module, "load", load), replaced(sys, "argv", [f"ember-mlx {name}", *arguments]):
            module.main()
    except (InputError, OSError):
        raise
    # Such as a prompt cache that is not there, or options for the chat template that are not JSON.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"mlx_lm.{name} cannot do that: {type(error).__name__}: {reason}") from error
