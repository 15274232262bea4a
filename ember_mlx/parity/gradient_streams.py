"""Named streams of gradients, the same on every machine and for every framework: NumPy float32 in, nothing else.

``gradient_stream(name, shape, steps, seed)`` yields ``steps`` arrays of shape (V, D). The random ones are made from
``numpy.random.RandomState``, whose numbers NumPy promises never to change (``default_rng`` has no such promise), and
only from its uniform draws and powers of two: no logarithm or cosine, whose last bit depends on the machine.
"""

from collections.abc import Callable, Iterator

import numpy as np

__all__ = [
    "RARE_EVERY",
    "SILENT_STEPS",
    "STREAMS",
    "bfloat16_rounded",
    "constant",
    "gradient_stream",
    "huge",
    "one_rare_row",
    "ones",
    "random",
    "round_to_bfloat16",
    "row_silent_then_loud",
    "tiny",
    "zero",
]

SILENT_STEPS = 1000  # of the first row, in "row silent then loud"
RARE_EVERY = 37  # steps from one gradient of the rare row to the next


def _random_table(random: np.random.RandomState, shape: tuple[int, int]) -> Callable[[], np.ndarray]:
    """A maker of random tables whose rows, and whose columns, differ in scale by up to 32 times.

    Were the scales alike, a mean over the wrong axis would hardly show.
    """
    rows, columns = shape
    row_scale = np.exp2(random.randint(-3, 3, size=(rows, 1)))
    column_scale = np.exp2(random.randint(-3, 3, size=(1, columns)))
    return lambda: (random.uniform(-1, 1, size=shape) * row_scale * column_scale).astype(np.float32)


def zero(random: np.random.RandomState, shape: tuple[int, int], steps: int) -> Iterator[np.ndarray]:
    for _ in range(steps):
        yield np.zeros(shape, dtype=np.float32)


def ones(random: np.random.RandomState, shape: tuple[int, int], steps: int) -> Iterator[np.ndarray]:
    for _ in range(steps):
        yield np.ones(shape, dtype=np.float32)


def constant(random: np.random.RandomState, shape: tuple[int, int], steps: int) -> Iterator[np.ndarray]:
    """One random table, every step again: with an exact bias correction every step has the same size."""
    table = _random_table(random, shape)()
    for _ in range(steps):
        yield table.copy()


def random(random: np.random.RandomState, shape: tuple[int, int], steps: int) -> Iterator[np.ndarray]:
    draw = _random_table(random, shape)
    for _ in range(steps):
        yield draw()


def one_rare_row(random: np.random.RandomState, shape: tuple[int, int], steps: int) -> Iterator[np.ndarray]:
    """The first row has a gradient at the first step and then at every 37th: its mean square decays in between."""
    draw = _random_table(random, shape)
    for step in range(steps):
        table = draw()
        if step % RARE_EVERY:
            table[0] = 0
        yield table


def row_silent_then_loud(random: np.random.RandomState, shape: tuple[int, int], steps: int) -> Iterator[np.ndarray]:
    """The first row has no gradient for 1000 steps, and then one 100 times as large as its neighbours'."""
    draw = _random_table(random, shape)
    for step in range(steps):
        table = draw()
        table[0] *= 0 if step < SILENT_STEPS else 100
        yield table


def tiny(random: np.random.RandomState, shape: tuple[int, int], steps: int) -> Iterator[np.ndarray]:
    """About 1e-20: squares are subnormal in float32, or zero where the machine flushes them."""
    draw = _random_table(random, shape)
    for _ in range(steps):
        yield draw() * np.float32(1e-20)


def huge(random: np.random.RandomState, shape: tuple[int, int], steps: int) -> Iterator[np.ndarray]:
    """About 1e15: squares are near 1e30, and a product of two of them has no place in float32."""
    draw = _random_table(random, shape)
    for _ in range(steps):
        yield draw() * np.float32(1e15)


def bfloat16_rounded(random: np.random.RandomState, shape: tuple[int, int], steps: int) -> Iterator[np.ndarray]:
    """Values that bfloat16 holds exactly, as the gradients of a bfloat16 model are."""
    draw = _random_table(random, shape)
    for _ in range(steps):
        yield round_to_bfloat16(draw())


STREAMS = {
    "zero": zero,
    "ones": ones,
    "constant": constant,
    "random": random,
    "one rare row": one_rare_row,
    "row silent then loud": row_silent_then_loud,
    "tiny": tiny,
    "huge": huge,
    "bfloat16-rounded": bfloat16_rounded,
}


def gradient_stream(name: str, shape: tuple[int, int], steps: int, seed: int = 0) -> Iterator[np.ndarray]:
    """The stream of that name: ``steps`` float32 arrays of that shape."""
    return STREAMS[name](np.random.RandomState(seed), shape, steps)


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to the nearest that bfloat16 holds, ties to even, still as float32. NaN stays NaN.

    bfloat16 is the upper half of a float32, so adding just under half a unit of the upper half, and one more where that
    half is odd, carries into it exactly when the value rounds up.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    with np.errstate(over="ignore"):  # a NaN may carry past the top; it is put back below
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(values), values, rounded.view(np.float32))
