"""Optimizers for token tables and for the body of a model, one file each."""

from ember_mlx.optimizers.adam_mini import AdamMini
from ember_mlx.optimizers.ember import Ember
from ember_mlx.optimizers.flash import FlashAdamW, FlashLion
from ember_mlx.optimizers.sage import SAGE
from ember_mlx.optimizers.sinkgd import SinkGD
from ember_mlx.optimizers.split_weights import SplitWeights

__all__ = ["SAGE", "AdamMini", "Ember", "FlashAdamW", "FlashLion", "SinkGD", "SplitWeights"]
