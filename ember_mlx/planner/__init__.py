"""How much memory a run will take, from the shapes in a config.json: pure arithmetic, without MLX.

A step of training is written down as its arrays and what each is computed from (:mod:`step`), put into the order in
which MLX computes them, and gone through with a count of what is alive (:mod:`evaluation`).
"""

from ember_mlx.planner.architecture import Architecture, read_architecture
from ember_mlx.planner.graph import Run
from ember_mlx.planner.plan import Plan, advice, alternatives, plan, run_of

__all__ = ["Architecture", "Plan", "Run", "advice", "alternatives", "plan", "read_architecture", "run_of"]
