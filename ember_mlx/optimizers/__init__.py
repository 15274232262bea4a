"""Optimizers for token tables and for the body of a model, one file each."""

from ember_mlx.optimizers.adam_mini import AdamMini
from ember_mlx.optimizers.ember import Ember
from ember_mlx.optimizers.sinkgd import SinkGD

__all__ = ["AdamMini", "Ember", "SinkGD"]
