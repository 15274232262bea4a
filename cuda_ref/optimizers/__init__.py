"""Optimizers, one file each."""

from cuda_ref.optimizers.ember import Ember
from cuda_ref.optimizers.flash import FlashAdamW, FlashLion
from cuda_ref.optimizers.sage import SAGE
from cuda_ref.optimizers.split_weights import SplitWeights

__all__ = ["SAGE", "Ember", "FlashAdamW", "FlashLion", "SplitWeights"]
