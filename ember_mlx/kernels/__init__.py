"""GPU kernels, where plain MLX operations would need scratch memory of the size of a table.

``statistics``, ``norms``, ``rounding``, ``weight_rounding`` and ``sinkhorn`` have one each, written once for Metal and
CUDA in the language of ``metal_and_cuda``; ``choice`` says whether to use them.
"""

from ember_mlx.kernels import norms, rounding, sinkhorn, statistics, weight_rounding
from ember_mlx.kernels.choice import try_all, usable

__all__ = ["norms", "rounding", "sinkhorn", "statistics", "try_all", "usable", "weight_rounding"]
