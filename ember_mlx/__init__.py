"""Ember for MLX: train the token tables of language models, at the price of V + D numbers of state."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ember_mlx.finetune.adapters import load
    from ember_mlx.in_python import Result, train
    from ember_mlx.optimizers import SAGE, AdamMini, Ember, FlashAdamW, FlashLion, SinkGD, SplitWeights
    from ember_mlx.optimizers.paired import PairedOptimizer
    from ember_mlx.shared.errors import InputError
    from ember_mlx.token_tables import TokenTable, find_token_tables

__all__ = [
    "SAGE",
    "AdamMini",
    "Ember",
    "FlashAdamW",
    "FlashLion",
    "InputError",
    "PairedOptimizer",
    "Result",
    "SinkGD",
    "SplitWeights",
    "TokenTable",
    "find_token_tables",
    "load",
    "train",
]

# Imported when asked for: mlx-lm takes seconds, which an optimizer alone need not wait for, and the command line must
# be able to say so where MLX has no backend.
_MODULES = {
    "SAGE": "optimizers",
    "AdamMini": "optimizers",
    "Ember": "optimizers",
    "FlashAdamW": "optimizers",
    "FlashLion": "optimizers",
    "SinkGD": "optimizers",
    "SplitWeights": "optimizers",
    "InputError": "shared.errors",
    "PairedOptimizer": "optimizers.paired",
    "Result": "in_python",
    "TokenTable": "token_tables",
    "find_token_tables": "token_tables",
    "load": "finetune.adapters",
    "train": "in_python",
}


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__():
    return [*globals(), *__all__]
