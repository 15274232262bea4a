"""Ember for MLX: train the token tables of language models, at the price of V + D numbers of state."""

from ember_mlx.errors import InputError
from ember_mlx.finetune.adapters import load
from ember_mlx.optimizers import Ember
from ember_mlx.pairing import PairedOptimizer
from ember_mlx.token_tables import TokenTable, find_token_tables

__all__ = ["Ember", "InputError", "PairedOptimizer", "TokenTable", "find_token_tables", "load"]
