"""What the tests ask of every Python process that they start, by its environment; this folder is on PYTHONPATH.

EMBER_TESTS_WITHOUT_TORCH: no PyTorch is found. transformers, which mlx-lm imports, would import it, for two seconds.
EMBER_TESTS_PRODUCTS: a library of quick_products.py, whose products of matrices MLX takes if it is there first.
"""

import ctypes
import os
import sys

if "EMBER_TESTS_WITHOUT_TORCH" in os.environ:
    sys.modules["torch"] = None
if "EMBER_TESTS_PRODUCTS" in os.environ:
    ctypes.CDLL(os.environ["EMBER_TESTS_PRODUCTS"], ctypes.RTLD_GLOBAL)
