"""mlx-lm's own commands, with our ``load`` in the place of theirs: the one thing they cannot do is load tables."""

import sys
from importlib import import_module

from ember_mlx.finetune.adapters import load
from ember_mlx.shared.replacing import replaced

__all__ = ["run_mlx_lm"]


def run_mlx_lm(name: str, arguments: list[str]):
    """Run ``mlx_lm.NAME`` with these arguments."""
    module = import_module(f"mlx_lm.{name}")
    with replaced(module, "load", load), replaced(sys, "argv", [f"ember-mlx {name}", *arguments]):
        module.main()
