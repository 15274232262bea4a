"""Optimizers, one file each."""

from cuda_ref.optimizers.adam_mini import AdamMini
from cuda_ref.optimizers.ember import Ember
from cuda_ref.optimizers.flash import FlashAdamW, FlashLion
from cuda_ref.optimizers.sage import SAGE
from cuda_ref.optimizers.sinkgd import SinkGD
from cuda_ref.optimizers.split_weights import SplitWeights

__all__ = ["SAGE", "AdamMini", "Ember", "FlashAdamW", "FlashLion", "SinkGD", "SplitWeights"]
