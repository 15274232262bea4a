"""What ``test_contract.py`` needs to know of an optimizer. A new one goes into ``OPTIMIZERS``; no test changes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
from mlx.optimizers import Optimizer

from ember_mlx.optimizers import SAGE, AdamMini, Ember, FlashAdamW, FlashLion, SinkGD

NAN, INFINITY = float("nan"), float("inf")
NOT_FLOATING = (mx.zeros((2, 3), mx.int32), mx.zeros((2, 3), mx.complex64))
NO_TABLES = (mx.zeros((8,)), mx.zeros((2, 3, 4)), mx.array(1.0), *NOT_FLOATING)
NO_ELEMENTS = (mx.zeros((0,)), mx.zeros((2, 0, 4)))


@dataclass(frozen=True)
class Contract:
    name: str
    make: Callable[..., Optimizer]  # called with learning_rate=, and any argument named below
    state_shapes: Callable[[int, int], dict[str, tuple[int, ...]]]  # of a table of V rows and D columns
    out_of_range: tuple[tuple[str, object], ...]  # an argument, and a value of it that must be refused
    refused: tuple[mx.array, ...] = (*NO_ELEMENTS, *NOT_FLOATING)  # parameters
    not_float32: frozenset[str] = frozenset({"seed"})  # of the state


OF_BODY = (
    *(("learning_rate", value) for value in (-1e-3, NAN, INFINITY)),
    *(("betas", value) for value in ((0.9, 1.0), (-0.1, 0.9), (0.9, NAN), (0.9,), 0.9, None)),
    *(("eps", value) for value in (0.0, -1e-8, NAN, INFINITY)),
    *(("weight_decay", value) for value in (-0.1, NAN, INFINITY)),
)
OF_FLASH = (
    *(("weights", value) for value in ("int8", True, "float32")),
    *(("state_format", value) for value in ("float16", None)),
)


def groups(moment, size):
    count = -(-size // 32)
    return {moment: (count, 32), f"{moment}_scales": (count,)}


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
        refused=NO_TABLES,
    ),
    Contract(
        name="Ember with all options",
        make=partial(
            Ember, beta2=lambda step: 1 - (step + 1) ** -0.8, row_clip=1.0, row_floor=0.5, rounding="stochastic", seed=3
        ),
        state_shapes=lambda rows, columns: {"r": (rows,), "c": (columns,), "seed": ()},
        out_of_range=(),
        refused=NO_TABLES,
    ),
    Contract(
        name="AdamMini",
        make=AdamMini,
        state_shapes=lambda rows, columns: {"m": (rows, columns), "v": (rows, 1)},
        out_of_range=(*OF_BODY, *(("momentum", value) for value in ("int4", None, True))),
    ),
    Contract(
        name="AdamMini with 8-bit momentum",
        make=partial(AdamMini, momentum="int8", weight_decay=lambda step: 0.1),
        state_shapes=lambda rows, columns: {
            "m": (-(-rows * columns // 32), 32),
            "m_scales": (-(-rows * columns // 32),),
            "v": (rows, 1),
        },
        out_of_range=(),
        not_float32=frozenset({"m"}),
    ),
    Contract(
        name="SinkGD",
        make=SinkGD,
        state_shapes=lambda rows, columns: {},
        out_of_range=(*OF_BODY, *(("passes", value) for value in (0, -1, 2.5, 101, True, None))),
    ),
    Contract(
        name="SAGE",
        make=SAGE,
        state_shapes=lambda rows, columns: {"m": (rows, columns), "s": (columns,)},
        out_of_range=(*OF_BODY, *(("still_rows", value) for value in (None, 1, "yes"))),
        refused=(mx.zeros((2, 3, 4)), mx.array(1.0), *NO_ELEMENTS, *NOT_FLOATING),
    ),
    Contract(
        name="FlashAdamW",
        make=FlashAdamW,
        state_shapes=lambda rows, columns: groups("m", rows * columns) | groups("v", rows * columns),
        out_of_range=(*OF_BODY, *OF_FLASH),
        not_float32=frozenset({"m", "v"}),
    ),
    Contract(
        name="FlashLion",
        make=FlashLion,
        state_shapes=lambda rows, columns: groups("m", rows * columns),
        out_of_range=(*(case for case in OF_BODY if case[0] != "eps"), *OF_FLASH),
        not_float32=frozenset({"m"}),
    ),
]
