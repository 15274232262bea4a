"""GPU kernels, where plain MLX operations would need scratch memory of the size of a table.

``statistics`` has the one there is, written once for Metal and CUDA; ``choice`` says whether to use it.
"""

from ember_mlx.kernels.choice import usable
from ember_mlx.kernels.statistics import mean_squares

__all__ = ["mean_squares", "usable"]
