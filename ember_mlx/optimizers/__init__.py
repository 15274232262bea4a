"""Optimizers for token tables, one file each."""

from ember_mlx.optimizers.ember import Ember

__all__ = ["Ember"]
