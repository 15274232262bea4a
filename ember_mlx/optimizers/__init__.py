"""Optimizers, one file each."""

from ember_mlx.optimizers.ember import Ember
from ember_mlx.optimizers.flash import FlashAdamW, FlashLion
from ember_mlx.optimizers.sage import SAGE
from ember_mlx.optimizers.split_weights import SplitWeights

__all__ = ["SAGE", "Ember", "FlashAdamW", "FlashLion", "SplitWeights"]
