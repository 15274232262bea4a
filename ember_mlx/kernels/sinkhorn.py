"""The factors of Sinkhorn's normalization: passes over rows and columns, each in one reading of the gradient.

A pass makes factors of the norms of the rows, weighted by the factors of the columns, and then sums squares down the
columns, weighted by what it has made. As plain operations it needs the squares of the gradient as a float32 matrix.
Here a threadgroup takes a band of rows, and its threads lie side by side along whole rows. Each keeps the factors of
its columns, their sums and some rows in registers: rows wait there for their norms, and are read once.

Gradients come out of MLX's matrix product transposed, their columns side by side in memory. The kernels then work on
the matrix that lies there in rows. On that one the passes begin with columns and end with rows, so there is a reading
more: columns, rows and columns, ..., rows. Where a gradient lies is known to the kernels alone. So each launch is one
of these stages, and of other gradients the last stage reads nothing.

Rows that are too wide for registers, or that lie in memory in another way, are read twice. All sums are float32, in an
order that the text fixes, without atomics: the same input gives the same bits.
"""

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ember_mlx.kernels.metal_and_cuda import BYTES_AT_ONCE, MOST_THREADS, SIMDGROUP, kernel
from ember_mlx.kernels.sinkhorn_texts import COLUMNS, CUDA_THREADS, TEXT

__all__ = ["COLUMNS", "ROWS", "TEXT", "Layout", "differences", "factors", "launch", "launch_columns"]

# A band has so many rows that the sums of its columns are 1 / SHARE of its bytes at most. Kernels of small matrices, of
# fewer bytes than SMALL, run side by side: few threadgroups are enough for each.
SHARE, SHARE_OF_SMALL, SMALL = 32, 64, 2**25
THREADGROUPS = 128  # of a large matrix
STEP_OF_THREADS = 128  # what the number of threads is a multiple of
ROWS = 32  # of those that are read twice, at a time
# 512 threads have 128 registers each, and indices take over 40. Two rows are worth it that a few of those go to memory.
REGISTERS, MOST_REGISTERS = 84, 96
MOST_UNDER_WAY, MOST_AHEAD = 8, 4  # rows
BANDS_AT_ONCE = 4  # that a thread of the second kernel reads


def factors(g: mx.array, passes: int, eps: float) -> tuple[mx.array, mx.array]:
    """The factors after so many passes: ``a`` of the rows of ``g``, (E, m), and ``b`` of the columns, (E, n), float32.

    Args:
        g (array): (E, m, n), on the GPU that is MLX's default device, in float32, bfloat16 or float16. However it lies
            in memory, it is not copied; fastest are contiguous ones and their transposes.
        passes (int): 1 or more.
        eps (float): Added to the norms of the rows, and then of the columns, of ``a * g * b``.
    """
    layout, eps = Layout.of(g), mx.array([eps], mx.float32)
    rows = columns = mx.array([1.0] * 8)  # not read; Metal has arrays of fewer elements in another address space
    for stage in range(passes + 1):
        last = stage == passes
        sizes = layout.sizes(stage == 0, last)
        rows, sums = kernel(TEXT)(inputs=[g, rows, columns, sizes, eps], **launch(g, last))
        if not last:
            (columns,) = kernel(COLUMNS)(inputs=[sums, g, columns, sizes, eps], **launch_columns(g))
    return rows, sums


@dataclass(frozen=True)
class Layout:
    """How a gradient is shared out, of two numbers the first if it lies in rows, and the second if transposed.

    The kernels get it as an array: of constants in their texts MLX would compile one for each shape.
    """

    rows: tuple[int, int]  # of a band
    sums: tuple[int, int]  # of columns, of all bands of a matrix
    groups: int  # threadgroups of a matrix
    line: int  # from the factors of one matrix to those of the next

    @classmethod
    def of(cls, g: mx.array) -> "Layout":
        matrices, *lengths = g.shape
        least = 4 * (SHARE_OF_SMALL if g.size * g.itemsize < SMALL else SHARE) // g.itemsize
        rows = tuple(max(least, -(-matrices * length // THREADGROUPS)) for length in lengths)
        bands = [-(-length // of_band) for length, of_band in zip(lengths, rows, strict=True)]
        sums = tuple(count * length for count, length in zip(bands, reversed(lengths), strict=True))
        # So that all lines begin at addresses from which several elements are read at once.
        return cls(rows, sums, max(bands), -(-max(lengths) // BYTES_AT_ONCE) * BYTES_AT_ONCE)

    def sizes(self, first: bool, last: bool) -> mx.array:
        """What the kernels take as ``sizes``, in the first or last stage or another one."""
        return mx.array([*self.rows, self.groups, self.line, int(first), int(last)], mx.uint32)


def launch(g: mx.array, last: bool = False) -> dict[str, Any]:
    """What the kernel is called with for ``g``: its constants, the size of its grid, and its outputs."""
    (matrices, height, columns), layout, vector = g.shape, Layout.of(g), BYTES_AT_ONCE // g.itemsize
    most = CUDA_THREADS if mx.cuda.is_available() else MOST_THREADS
    neighbours = -(-max(height, columns) // vector)
    threads = -(-neighbours // -(-neighbours // most) // STEP_OF_THREADS) * STEP_OF_THREADS
    in_rows, turned = (in_registers(-(-length // (vector * threads)), vector) for length in (columns, height))
    constants = {
        "T": g.dtype,  # also for MLX's CUDA backend, which keeps compiled kernels by their name and these alone
        "VECTOR": vector,
        **dict(zip(("VECTORS", "ROWS_AHEAD", "ROWS_AT_ONCE"), in_rows, strict=True)),
        **dict(zip(("TURNED_VECTORS", "TURNED_ROWS_AHEAD", "TURNED_ROWS_AT_ONCE"), turned, strict=True)),
        "MOST_AT_ONCE": max(in_rows[2], turned[2]),
        "ALIKE": int(in_rows == turned),
        "ROWS": ROWS,
        "SIMDGROUPS": threads // SIMDGROUP,
        "SIMDGROUP": SIMDGROUP,
    }
    between = [(matrices, layout.line), (matrices * max(layout.sums),)]
    return {
        "template": list(constants.items()),
        "grid": (matrices * layout.groups * threads, 1, 1),
        "threadgroup": (threads, 1, 1),
        "output_shapes": [(matrices, height), (matrices, columns)] if last else between,
        "output_dtypes": [mx.float32, mx.float32],
    }


def in_registers(vectors: int, vector: int) -> tuple[int, int, int]:
    """Vectors of a row that a thread has in registers, rows ahead and rows at once; 0 for rows that are too wide."""
    of_columns, of_row = 2 * vectors * vector, vectors * BYTES_AT_ONCE // 4  # their factors and sums are float32
    if of_columns + 2 * of_row > MOST_REGISTERS:
        return 0, 1, 1
    under_way = max(2, min(MOST_UNDER_WAY, (REGISTERS - of_columns) // of_row))
    ahead = min(MOST_AHEAD, under_way)
    return vectors, ahead, 2 ** int(math.log2(under_way // ahead))


def launch_columns(g: mx.array) -> dict[str, Any]:
    """What the kernel of column factors is called with for ``g``."""
    matrices, line = g.shape[0], Layout.of(g).line
    return {
        "template": [
            ("BANDS_AT_ONCE", BANDS_AT_ONCE),
            ("SIMDGROUPS", MOST_THREADS // SIMDGROUP),
            ("SIMDGROUP", SIMDGROUP),
        ],
        "grid": (matrices * -(-line // SIMDGROUP) * MOST_THREADS, 1, 1),
        "threadgroup": (MOST_THREADS, 1, 1),
        "output_shapes": [(matrices, line)],
        "output_dtypes": [mx.float32],
    }


def differences(dtype: mx.Dtype) -> str | None:
    """Where the kernels differ from plain operations on pairs of awkward matrices of that dtype, in words, or None.

    They have several bands of rows and of columns, of incomplete last ones, and odd sizes; or else can be read several
    elements at once, along rows or columns. They lie in memory as most do, and then transposed.
    """
    odd = MOST_THREADS * BYTES_AT_ONCE // dtype.size + 37
    for shape in ((2, 5, odd), (2, *[4 * SHARE_OF_SMALL // dtype.size + 8] * 2)):
        g = mx.random.normal(shape, key=mx.random.key(0)) * mx.linspace(0.1, 2, shape[1])[:, None]
        g = (g * mx.linspace(1, 3, shape[2])).astype(dtype)
        expected, squares = [mx.ones((2, length)) for length in shape[1:]], mx.square(g.astype(mx.float32))
        for _ in range(2):
            for axis in (0, 1):
                norms = mx.sqrt((squares * mx.square(mx.expand_dims(expected[1 - axis], 1 + axis))).sum(axis=2 - axis))
                factor, length = expected[axis], shape[2 - axis]
                expected[axis] = factor * math.sqrt(length) / (factor * norms + 0.5)
        for way, matrices in {"": g, "transposed ": mx.contiguous(g.swapaxes(1, 2)).swapaxes(1, 2)}.items():
            for name, found, exact in zip(("row", "column"), factors(matrices, 2, 0.5), expected, strict=True):
                error = (mx.abs(found - exact) / exact).max().item()
                if not error < 1e-5:  # a NaN is not
                    return f"The {name} factors of {way}{dtype} matrices of {shape} are off by {error:.1e}"
    return None
