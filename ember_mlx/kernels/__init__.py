"""GPU kernels, where plain MLX operations would need scratch memory of the size of a table.

``statistics`` and ``rounding`` have one each, written once for Metal and CUDA in the language of ``metal_and_cuda``;
``choice`` says whether to use them.
"""

from ember_mlx.kernels import rounding, statistics
from ember_mlx.kernels.choice import usable

__all__ = ["rounding", "statistics", "usable"]
