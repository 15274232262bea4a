"""Optimizers, one file each."""

from cuda_ref.optimizers.ember import Ember

__all__ = ["Ember"]
