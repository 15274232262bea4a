"""Optimizers, one file each."""

from cuda_ref.optimizers.adam_mini import AdamMini
from cuda_ref.optimizers.ember import Ember
from cuda_ref.optimizers.sinkgd import SinkGD

__all__ = ["AdamMini", "Ember", "SinkGD"]
