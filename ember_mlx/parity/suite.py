"""Implementations against the float64 oracle, step by step, over all streams and dtypes.

Parity means here: from the same weights and the same gradients, every single step of every implementation is within
its tolerance of the step that float64 arithmetic makes, and so are its statistics r and c, which it carries over all
the steps itself. The tolerances are those of float32 arithmetic and one rounding to the dtype of the table
(`tolerances`), so two implementations that pass are the same optimizer up to rounding.

Each step starts from the weights that the implementation itself reached, for the oracle too: a bound on a whole run
adds up the bounds of its steps, and is too wide to tell a small fault. The whole run is looked at besides, in float32;
in 16 bits two separately rounded runs part by a unit now and then, more and more, and nothing sharp can be said.

So the suite cannot show that two long runs end in the same bits: no two machines do that. Nor does it show anything of
forward and backward passes, whose gradients it takes as given, or of tables larger than its own.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from ember_mlx.parity import recorded, stochastic_rounding
from ember_mlx.parity.gradient_streams import SILENT_STEPS, STREAMS, gradient_stream, round_to_bfloat16
from ember_mlx.parity.implementations import Implementation
from ember_mlx.parity.oracle_float64 import EmberOracle
from ember_mlx.parity.recorded import Recording
from ember_mlx.parity.stepping import Stepped, Tables
from ember_mlx.parity.tolerances import bound, weight_bound
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.float_formats import SMALLEST_NORMAL, unit_in_the_last_place

__all__ = [
    "DTYPES",
    "LEARNING_RATE",
    "ORACLE",
    "SMALL",
    "WEIGHT_DECAY",
    "Case",
    "Comparison",
    "Expected",
    "cases",
    "cast_gradient",
    "failed",
    "follow",
    "initial_weights",
    "run",
    "select",
    "worst_of",
]

DTYPES = ("float32", "bfloat16", "float16")
SEED = 0
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1
ORACLE = "float64 oracle"

SMALL, ODD = (24, 8), (257, 33)  # few shapes: GPUs compile for each
STEPS = (1, 10, 1000)

STOCHASTIC = "stochastic rounding"
# Options of Ember by name. The schedule is made of operations that every framework rounds correctly, so that all, and
# the oracle, have the same float32 values; it goes from 0.5 to 0.999 at 1000 steps.
RULES = {
    "": {},
    "beta2 schedule": {"beta2": lambda steps_done: 1 - 1 / (2 + steps_done)},
    "row clip": {"row_clip": 1.0},
    "row floor": {"row_floor": 0.5},
    STOCHASTIC: {"rounding": "stochastic", "seed": 7, "eps": SMALLEST_NORMAL},
}


@dataclass(frozen=True)
class Case:
    """A stream of gradients (V, D), the numbers of steps at which to look, and which of the ``RULES`` is looked at."""

    stream: str
    shape: tuple[int, int]
    steps: tuple[int, ...]
    rule: str = ""

    @property
    def name(self) -> str:
        return f"{self.stream}, {self.rule}" if self.rule else self.stream

    def gradients(self) -> Iterable[np.ndarray]:
        real = recorded.real_streams()
        if self.stream in real:
            return real[self.stream][: self.steps[-1]]
        return gradient_stream(self.stream, self.shape, self.steps[-1], SEED)


@dataclass(frozen=True)
class Comparison:
    """One quantity over the steps ``first_step`` to ``steps`` of one stream, and the worst of its elements.

    ``ulps``, ``relative`` and ``allowed_ulps`` are of one element: the one with the largest error in ULPs, or, where
    something is not allowed, the one furthest beyond. ``of_allowed`` is the largest error of all as a part of what is
    allowed there: more than 1 is a fail. ULPs and relative error are those of the expected value; for w, of the larger
    of the weight before and after, and for the whole run of the largest that the weight had in it: a weight may end
    near zero. Values below 2^-126 count as 2^-126.
    """

    implementation: str
    against: str
    stream: str
    shape: tuple[int, int]
    dtype: str
    first_step: int
    steps: int
    quantity: str
    ulps: float
    relative: float
    allowed_ulps: float
    of_allowed: float
    error: str = ""  # what the implementation raised, where it did

    @property
    def passed(self) -> bool:
        return self.of_allowed <= 1


@cache
def cases() -> tuple[Case, ...]:
    """All of them: the named streams on a small table and for 10 steps on an odd one, and the recorded real ones."""
    small = [Case(name, SMALL, STEPS) for name in STREAMS]
    late = SILENT_STEPS + 10
    small = [replace(case, steps=(*STEPS, late)) if "silent" in case.stream else case for case in small]
    odd = [Case(name, ODD, STEPS[:-1]) for name in STREAMS]
    real = [Case(name, table.shape[1:], (1, 10, len(table))) for name, table in recorded.real_streams().items()]
    # Once more with the options. A compiled step is made anew for each, and for each shape: one shape each.
    scheduled = [Case("one rare row", SMALL, STEPS, "beta2 schedule")]
    scheduled += [Case("random", SMALL, STEPS[:-1], "beta2 schedule")]
    clipped = [Case("row silent then loud", SMALL, (*STEPS, late), "row clip")]
    clipped += [Case("random", SMALL, STEPS[:-1], "row clip")]
    floored = [Case("random", SMALL, STEPS, "row floor"), Case("one rare row", SMALL, STEPS[:-1], "row floor")]
    rounded = [Case(name, ODD, STEPS[:-1], STOCHASTIC) for name in ("random", "tiny")]
    return (*small, *odd, *real, *scheduled, *clipped, *floored, *rounded)


def select(streams: list[str] | None, steps: list[int] | None) -> list[Case]:
    """The cases of those streams, at those numbers of steps; all where None.

    Raises:
        InputError: for a stream or a number of steps that there is not.
    """
    known = list(dict.fromkeys(case.name for case in cases()))
    for name in streams or ():
        if name not in known:
            raise InputError(f"--stream {name!r}: unknown name; the names are {', '.join(map(repr, known))}")
    chosen = [case for case in cases() if not streams or case.name in streams]
    longest = max(case.steps[-1] for case in chosen)
    for count in steps or ():
        if not 1 <= count <= longest:
            raise InputError(f"--steps {count}: must be from 1 to {longest}")
    if steps:
        kept = {case: tuple(sorted({count for count in steps if count <= case.steps[-1]})) for case in chosen}
        chosen = [replace(case, steps=counts) for case, counts in kept.items() if counts]
    return chosen


def initial_weights(shape: tuple[int, int], dtype: str) -> np.ndarray:
    """Weights (V, D) like those of a trained table, which that dtype holds exactly, as float32."""
    return cast(np.random.RandomState(SEED + 3).uniform(-0.02, 0.02, size=shape).astype(np.float32), dtype)


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values rounded to those that ``dtype`` holds, still as float32."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    return round_to_bfloat16(values) if dtype == "bfloat16" else values


def cast_gradient(gradient: np.ndarray, dtype: str) -> tuple[np.ndarray, str]:
    """The gradient in that dtype, and the dtype: float32 where float16 would make it infinite, or all of it zero."""
    values = cast(gradient, dtype)
    if np.isfinite(values).all() and (values.any() or not gradient.any()):
        return values, dtype
    return gradient, "float32"


class Expected:
    """What the oracle makes of the gradients of one case in one dtype; T steps stand along the first axis."""

    def __init__(self, case: Case, dtype: str):
        rule = {} if case.rule == STOCHASTIC else RULES[case.rule]
        oracle = EmberOracle(case.shape, **rule)
        self.dtype = dtype
        self.gradients = [cast_gradient(gradient, dtype) for gradient in case.gradients()]
        self.mixed = any(gradient_dtype != dtype for _, gradient_dtype in self.gradients)
        change, r, c = [], [], []
        for gradient, _ in self.gradients:
            change.append(oracle.change(gradient, LEARNING_RATE))
            r.append(oracle.row_mean_square)
            c.append(oracle.column_mean_square)
        self.change, self.r, self.c = np.stack(change), np.stack(r), np.stack(c)

    def compare(
        self, first: int, after: Stepped, before: np.ndarray, other: Stepped | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Yield (quantity, numbers of a Comparison) for the steps from ``first`` on, taken from the weights ``before``.

        Against ``other``, the results of another implementation for the same one step, both sides may err.
        """
        now = slice(first - 1, first - 1 + len(before))
        t = np.arange(first, first + len(before))
        change, r, c = self.change[now], self.r[now], self.c[now]
        w = (1 - LEARNING_RATE * WEIGHT_DECAY) * before - change
        in_table, in_vector = t[:, None, None], t[:, None]
        allowed = Stepped(
            bound("r", "float32", r, in_vector),
            bound("c", "float32", c, in_vector),
            bound("step", self.dtype, change, in_table),
            weight_bound(self.dtype, before, w, change, in_table),
        )
        expected, sides = Stepped(r, c, change, w), 1
        if other is not None:
            expected, sides = Stepped(*(value[None] for value in other)), 2
        for quantity in Stepped._fields:
            value = getattr(expected, quantity)
            scale = np.maximum(np.abs(value), np.abs(before) if quantity == "w" else 0)
            unit = unit_in_the_last_place(scale, self.dtype if quantity in ("step", "w") else "float32")
            actual = getattr(after, quantity)
            yield quantity, worst_of(actual, value, sides * getattr(allowed, quantity), unit, scale)

    def compare_run(self, before: np.ndarray, after: np.ndarray) -> dict:
        """The numbers of a Comparison for the whole run to the weights ``after``, over steps from those in ``before``.

        The oracle goes its own way from the first weights. Errors add up, so what each step is allowed does too.
        """
        change = self.change[: len(before)]
        decay = 1 - LEARNING_RATE * WEIGHT_DECAY
        w, scale = before[0], np.abs(before[0])
        for changed in change:
            w = decay * w - changed
            scale = np.maximum(scale, np.abs(w))
        t = np.arange(1, len(before) + 1)[:, None, None]
        allowed = weight_bound(self.dtype, before, decay * before - change, change, t).sum(axis=0)
        return worst_of(after, w, allowed, unit_in_the_last_place(scale, self.dtype), scale)


def worst_of(
    actual: np.ndarray, expected: np.ndarray, allowed: np.ndarray, unit: np.ndarray, scale: np.ndarray
) -> dict[str, float]:
    """The numbers of a Comparison."""
    error = np.abs(actual - expected)
    error = np.where(np.isfinite(error), error, np.inf)
    parts = error / allowed
    at = np.argmax(parts if parts.max() > 1 else error / unit)
    return {
        "ulps": float((error / unit).flat[at]),
        "relative": float((error / np.maximum(scale, SMALLEST_NORMAL)).flat[at]),
        "allowed_ulps": float((allowed / unit).flat[at]),
        "of_allowed": float(parts.max()),
    }


def run(
    chosen: list[Implementation],
    cases: list[Case],
    dtypes: Iterable[str] = DTYPES,
    recordings: Iterable[Recording] = (),
    progress: Callable[[str], None] = lambda what: None,
    expect: Callable[[Case, str], Expected] = Expected,
) -> Iterator[Comparison]:
    """Yield every comparison of the ``chosen`` implementations, and of each of them with each of the recordings.

    An implementation that raises fails in that case, and the others go on. ``expect`` may keep what it made before.
    """
    # By shape and dtype, so that an implementation that compiles does so once for each.
    for shape in dict.fromkeys(case.shape for case in cases):
        for dtype in dtypes:
            tables: dict[tuple[str, str], Tables] = {}
            for case in (case for case in cases if case.shape == shape):
                expected = expect(case, dtype)
                for implementation in chosen:
                    if dtype not in implementation.dtypes or (expected.mixed and not implementation.mixed):
                        continue
                    if case.rule == STOCHASTIC and (dtype == "float32" or not implementation.mixed):
                        continue
                    progress(f"{case.name}, {shape[0]} x {shape[1]} {dtype}: {implementation.name}")
                    about = {"implementation": implementation.name, "stream": case.name}
                    about |= {"shape": shape, "dtype": dtype}
                    try:
                        if case.rule == STOCHASTIC:
                            yield _compare_rounding(implementation, case, expected, about)
                            continue
                        key = implementation.name, case.rule
                        if key not in tables:
                            settings = shape, dtype, LEARNING_RATE, WEIGHT_DECAY
                            tables[key] = implementation.make(*settings, **RULES[case.rule])
                        yield from _compare_case(tables[key], case, expected, recordings, about)
                    except Exception as error:  # whatever a framework may raise, a compiler's errors included
                        yield failed(error, case.steps[-1], about)


def follow(
    tables: Tables, case: Case, expected: Expected, steps_beside: dict[int, list] | None = None
) -> Iterator[tuple[int, np.ndarray, Stepped, list[Stepped]]]:
    """Take ``tables`` along a case; yield each number of steps at which to look, with all that was done since the last:
    the weights before each step, (T, V, D), and what the steps made.

    ``steps_beside`` maps such a number to other weights from which to take that step too: what each made is yielded
    last, and leaves no trace.
    """
    weights, done = initial_weights(case.shape, expected.dtype), 0
    tables.start()
    for t in case.steps:
        *until, last = expected.gradients[done:t]
        made = [tables.steps(weights, until)] if until else []
        after = made[0].w[-1].astype(np.float32) if until else weights
        beside = []
        if others := (steps_beside or {}).get(t):
            state = tables.state()
            for other in others:
                beside.append(tables.steps(other.astype(np.float32), [last]))
                tables.restore(state)
        made.append(tables.steps(after, [last]))
        stepped = Stepped(*map(np.concatenate, zip(*made, strict=True)))
        yield t, np.concatenate([weights[None], stepped.w[:-1]]), stepped, beside
        weights, done = stepped.w[-1].astype(np.float32), t


def _compare_case(tables, case, expected, recordings, about):
    """All comparisons of one implementation in one case."""
    found = {
        t: [(other, other.at(case.name, case.shape, expected.dtype, t)) for other in recordings] for t in case.steps
    }
    found = {t: [(other, result) for other, result in pairs if result] for t, pairs in found.items()}
    steps_beside = {t: [result["before"] for _, result in pairs] for t, pairs in found.items()}
    run = []
    for t, before, stepped, beside in follow(tables, case, expected, steps_beside):
        first = t + 1 - len(before)
        run.append(before)
        for quantity, numbers in expected.compare(first, stepped, before):
            yield Comparison(**about, against=ORACLE, first_step=first, steps=t, quantity=quantity, **numbers)
        if expected.dtype == "float32":
            numbers = expected.compare_run(np.concatenate(run), stepped.w[-1])
            yield Comparison(**about, against=ORACLE, first_step=t, steps=t, quantity="w of the run", **numbers)
        for (other, result), stepped_beside in zip(found[t], beside, strict=True):
            theirs = Stepped(*(result[quantity] for quantity in Stepped._fields))
            for quantity, numbers in expected.compare(t, stepped_beside, result["before"][None], theirs):
                yield Comparison(**about, against=other.name, first_step=t, steps=t, quantity=quantity, **numbers)


def _compare_rounding(implementation, case, expected, about):
    """Stochastic rounding, to the bit: a float32 table of zeros takes the step that the 16-bit one rounds.

    Its kernel may be another one, so eps is too small for it to matter whether its sum is rounded once or twice.
    """
    options, zeros, steps = RULES[case.rule], np.zeros(case.shape, np.float32), []
    for dtype, these in (("float32", {"eps": options["eps"]}), (expected.dtype, options)):
        tables = implementation.make(case.shape, dtype, LEARNING_RATE, WEIGHT_DECAY, **these)
        tables.start()
        steps.append(-tables.steps(zeros, expected.gradients).step)
    exact, rounded = steps
    rows, columns = (np.arange(count) for count in case.shape)
    random = [stochastic_rounding.random_bits(options["seed"], 0, t, rows, columns) for t in range(1, len(exact) + 1)]
    right = stochastic_rounding.round_stochastically(exact, np.stack(random), expected.dtype)
    ulps = np.abs(rounded - right) / unit_in_the_last_place(right, expected.dtype)
    wrong = np.max(np.where(np.isfinite(ulps), ulps, np.inf))  # max() leaves out a NaN
    return Comparison(
        **about, against="bits by NumPy", first_step=1, steps=case.steps[-1], quantity="rounding", ulps=float(wrong),
        relative=float(wrong), allowed_ulps=0.0, of_allowed=np.inf if wrong else 0.0,
    )  # fmt: skip


def failed(error: Exception, steps: int, about: dict) -> Comparison:
    """What an implementation that raised ``error`` within so many steps is told to have failed in."""
    infinite = dict.fromkeys(("ulps", "relative", "of_allowed"), np.inf)
    return Comparison(
        **about, against=ORACLE, first_step=1, steps=steps, quantity="all", allowed_ulps=0, **infinite,
        error=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
    )  # fmt: skip
