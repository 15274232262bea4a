"""What ``test_contract.py`` needs to know of an optimizer. A new one goes into ``OPTIMIZERS``; no test changes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mlx.optimizers import Optimizer

from ember_mlx.optimizers import Ember

NAN, INFINITY = float("nan"), float("inf")


@dataclass(frozen=True)
class Contract:
    name: str
    make: Callable[..., Optimizer]  # called with learning_rate=, and any argument named below
    state_shapes: Callable[[int, int], dict[str, tuple[int, ...]]]  # of a table of V rows and D columns
    out_of_range: tuple[tuple[str, object], ...]  # an argument, and a value of it that must be refused


OPTIMIZERS = [
    Contract(
        name="Ember",
        make=Ember,
        state_shapes=lambda rows, columns: {"r": (rows,), "c": (columns,)},
        out_of_range=(
            *(("learning_rate", value) for value in (-1e-3, NAN, INFINITY)),
            *(("beta2", value) for value in (1.0, 1.5, -0.1, NAN)),
            *(("eps", value) for value in (0.0, -1e-8, NAN, INFINITY)),
            *(("weight_decay", value) for value in (-0.1, NAN, INFINITY)),
            *(("row_clip", value) for value in (0, 0.0, -1.0, 1e-31, NAN, INFINITY, "3")),
            *(("row_floor", value) for value in (0, -1.0, 1e31, NAN, INFINITY, "3")),
            *(("rounding", value) for value in ("up", True, None)),
            *(("seed", value) for value in (-1, 2**32, 0.5, None)),
        ),
    ),
    Contract(
        name="Ember with all options",
        make=partial(
            Ember, beta2=lambda step: 1 - (step + 1) ** -0.8, row_clip=1.0, row_floor=0.5, rounding="stochastic", seed=3
        ),
        state_shapes=lambda rows, columns: {"r": (rows,), "c": (columns,), "seed": ()},
        out_of_range=(),
    ),
]
