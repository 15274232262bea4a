"""The optimizers of the body against their float64 oracles, step by step: one table of them, ``OPTIMIZERS``.

As for Ember in ``suite``, every step starts from the weights that the implementation itself reached, and the whole run
is looked at besides, in float32. What is allowed is 2e-6 of the largest change, and one rounding to the dtype. Where
state has 8 bits, a step starts from the implementation's own codes too. The codes after it may differ by one, where a
float32 rounding went the other way, and in 2 % of the places at most.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ember_mlx.parity.body_oracles import AdamMiniOracle, BodyOracle, SinkGDOracle
from ember_mlx.parity.implementations import Implementation
from ember_mlx.parity.oracle_flash_float64 import FlashLionOracle, FlashOracle
from ember_mlx.parity.oracle_sage_float64 import SageOracle
from ember_mlx.parity.suite import (
    DTYPES,
    LEARNING_RATE,
    ORACLE,
    SMALL,
    WEIGHT_DECAY,
    Case,
    Comparison,
    cast_gradient,
    failed,
    initial_weights,
    worst_of,
)
from ember_mlx.parity.tolerances import ROUNDING
from ember_mlx.shared.float_formats import SMALLEST_NORMAL, unit_in_the_last_place

__all__ = ["OPTIMIZERS", "STEPS", "STREAMS", "Entry", "run"]

STEPS = 20
AGREEMENT = 2e-6  # of the largest change
FLIPPED = 0.02  # of the codes
STREAMS = ("random", "one rare row", "constant", "bfloat16-rounded", "real embedding", "real head")


@dataclass(frozen=True)
class Entry:
    """An optimizer: its class of that name in ``ember_mlx.optimizers`` and ``cuda_ref.optimizers``, and its options.

    ``kernels`` names what it is made of: every process compiles anew what it uses, so those of one name go together.
    ``shapes`` are what the gradients (24, 8) of the small streams are made into, one after the other.
    """

    name: str
    class_name: str
    oracle: Callable[..., BodyOracle]
    kernels: str
    options: dict = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] = (SMALL, (3, 8, 8), (192,))


OPTIMIZERS = (
    Entry("AdamMini", "AdamMini", AdamMiniOracle, "statistics"),
    Entry("AdamMini int8", "AdamMini", AdamMiniOracle, "statistics", {"momentum": "int8"}),
    Entry("SinkGD", "SinkGD", SinkGDOracle, "sinkhorn"),
    Entry("SinkGD 2 passes", "SinkGD", SinkGDOracle, "sinkhorn", {"passes": 2}),
    Entry("SAGE", "SAGE", SageOracle, "statistics", {"still_rows": False}, shapes=(SMALL, (192,))),
    Entry("FlashAdamW", "FlashAdamW", FlashOracle, "flash"),
    Entry("FlashLion", "FlashLion", FlashLionOracle, "flash"),
)


def run(
    chosen: list[Implementation],
    streams: Iterable[str] = STREAMS,
    dtypes: Iterable[str] = DTYPES,
    optimizers: Iterable[Entry] = OPTIMIZERS,
    steps: int = STEPS,
    progress: Callable[[str], None] = lambda what: None,
) -> Iterator[Comparison]:
    """Yield every comparison of the optimizers in each of the ``chosen`` implementations that runs uncompiled.

    It looks after ``steps`` steps, and 20 at most. One that raises fails in that case, and the others go on.
    """
    for entry in optimizers:
        for implementation in (one for one in chosen if one.make_weights is not None):
            for dtype in (dtype for dtype in dtypes if dtype in implementation.dtypes):
                for stream, shape in _cases(entry, streams):
                    about = {"implementation": f"{implementation.name} {entry.name}", "stream": stream}
                    about |= {"shape": shape, "dtype": dtype}
                    progress(f"{stream}, {shape} {dtype}: {about['implementation']}")
                    try:
                        yield from _compare(entry, implementation, stream, shape, dtype, min(steps, STEPS), about)
                    except Exception as error:  # whatever a framework may raise, a compiler's errors included
                        yield failed(error, STEPS, about)


def _cases(entry, streams):
    """Pairs of a stream and a shape: all shapes for the first two streams, and the first shape for the others."""
    for stream in streams:
        if stream.startswith("real"):
            yield stream, None
        elif stream in STREAMS:
            yield from ((stream, shape) for shape in (entry.shapes if stream in STREAMS[:2] else entry.shapes[:1]))


def _compare(entry, implementation, stream, shape, dtype, count, about):
    made = Case(stream, SMALL, (count,)).gradients()
    gradients = [cast_gradient(gradient.reshape(shape or gradient.shape), dtype) for gradient in made]
    shape = gradients[0][0].shape
    about |= {"shape": shape}
    oracle = entry.oracle(shape, **entry.options)
    tested = implementation.make_weights(entry.class_name, shape, dtype, LEARNING_RATE, WEIGHT_DECAY, **entry.options)
    decay = 1 - LEARNING_RATE * (WEIGHT_DECAY if len(shape) > 1 else 0)
    start = initial_weights((1, int(np.prod(shape))), dtype).reshape(shape)
    weights = exact = start.astype(np.float64)
    steps, after, flips = [], [], []
    made = tested.steps(start, gradients)
    states = [dict(zip(made[2], arrays, strict=True)) for arrays in zip(*made[2].values(), strict=True)]
    for number, ((gradient, _), step, new) in enumerate(zip(gradients, *made[:2], strict=True)):
        if oracle.quantized and number:
            oracle.load(states[number - 1])
        change = oracle.change(gradient, LEARNING_RATE)
        exact = decay * exact - change
        steps.append(_numbers(step, change, AGREEMENT * np.abs(change).max(), np.abs(change), dtype))
        expected = decay * weights - change
        scale = np.maximum(np.abs(weights), np.abs(expected))
        after.append(_numbers(new, expected, AGREEMENT * np.abs(change).max() + 3 * ROUNDING * scale, scale, dtype))
        if oracle.quantized:
            state = states[number]
            flips += [state[name].astype(np.float64) - np.floor(codes) for name, codes in oracle.codes().items()]
        weights = new
    about |= {"against": ORACLE, "steps": len(gradients)}
    for quantity, found in (("step", steps), ("w", after)):
        yield Comparison(**about, first_step=1, quantity=quantity, **max(found, key=lambda one: one["of_allowed"]))
    if oracle.quantized:
        yield Comparison(**about, first_step=1, quantity="codes", **_flipped(np.concatenate(flips)))
    elif dtype == "float32":
        way = np.abs(exact - start).max()
        numbers = worst_of(weights, exact, AGREEMENT * way, unit_in_the_last_place(exact, dtype), way)
        yield Comparison(**about, first_step=len(gradients), quantity="w of the run", **numbers)


def _numbers(actual, expected, allowed, scale, dtype):
    unit = unit_in_the_last_place(np.maximum(scale, np.abs(expected)), dtype)
    return worst_of(actual, expected, allowed + 0.5 * unit + SMALLEST_NORMAL, unit, scale)


def _flipped(differences):
    """The numbers of a Comparison for codes: ULPs are codes, and the relative error is the part that differs."""
    share, furthest = float(np.mean(differences != 0)), float(np.abs(differences).max())
    worst = {"ulps": furthest, "relative": share, "allowed_ulps": 1.0}
    return worst | {"of_allowed": max(share / FLIPPED, furthest if furthest > 1 else 0.0)}
