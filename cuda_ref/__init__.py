"""Ember for PyTorch: the twin of ember_mlx, for reference runs on GPUs and for sharded training."""

from cuda_ref.optimizers import SAGE, AdamMini, Ember, FlashAdamW, FlashLion, SinkGD, SplitWeights
from cuda_ref.pairing import PairedOptimizer
from cuda_ref.streaming import StreamedBackward
from cuda_ref.token_tables import TokenTable, find_token_tables
from ember_mlx.shared.errors import InputError

__all__ = [
    "SAGE",
    "AdamMini",
    "Ember",
    "FlashAdamW",
    "FlashLion",
    "InputError",
    "PairedOptimizer",
    "SinkGD",
    "SplitWeights",
    "StreamedBackward",
    "TokenTable",
    "find_token_tables",
]
