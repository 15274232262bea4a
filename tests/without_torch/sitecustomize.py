"""With this folder on PYTHONPATH, a process and all that it starts find no PyTorch.

transformers, which mlx-lm imports, would import it, for two seconds of each process.
"""

import sys

sys.modules["torch"] = None
