"""Ember for PyTorch: the twin of ember_mlx, for reference runs on GPUs and for sharded training."""

from cuda_ref.optimizers import Ember
from ember_mlx.errors import InputError

__all__ = ["Ember", "InputError"]
