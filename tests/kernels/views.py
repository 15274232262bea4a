"""The ways in which a table may lie in memory: the same numbers, each time as another view.

On a GPU machine MLX may lay a view out anew before NumPy sees it. So the emulator gets its tables from NumPy, as
:class:`Laid`, and lays nothing on MLX's memory; MLX's own views are for kernels that run on a GPU.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np


def from_an_odd_place(xp, x):
    return xp.concatenate([x[:1, :1].reshape(-1), x.reshape(-1)])[1:].reshape(x.shape)


def contiguous(xp, x):
    return mx.contiguous(x) if xp is mx else np.ascontiguousarray(x)


VIEWS = {
    "rows": contiguous,
    "columns": lambda xp, x: contiguous(xp, x.T).T,
    "from an odd place": from_an_odd_place,
    "rows of a wider table": lambda xp, x: xp.pad(x, ((0, 0), (0, 3)))[:, :-3],
    "every second element": lambda xp, x: xp.repeat(x, 2, axis=1)[:, ::2],
    "last row first": lambda xp, x: contiguous(xp, x[::-1])[::-1],
    "last column first": lambda xp, x: contiguous(xp, x[:, ::-1])[:, ::-1],
    "one row for all": lambda xp, x: xp.broadcast_to(x[:1], x.shape),
    "one number for all": lambda xp, x: xp.broadcast_to(x[:1, :1], x.shape),
}
SAME_NUMBERS = [way for way in VIEWS if "for all" not in way]


@dataclass(frozen=True)
class Laid:
    """A table (V, D) as it lies in memory, with what a kernel's launch asks of an array."""

    bits: np.ndarray  # a view of unsigned integers
    dtype: mx.Dtype

    @property
    def shape(self):
        return self.bits.shape

    @property
    def itemsize(self):
        return self.bits.itemsize

    @property
    def size(self):
        return self.bits.size

    def __getitem__(self, key):
        return Laid(self.bits[key], self.dtype)

    def as_mlx(self):
        """The same numbers as an array of MLX, wherever that puts them."""
        in_rows = np.ascontiguousarray(self.bits).reshape(self.shape)  # NumPy gives one without axes an axis
        return mx.array(in_rows).view(self.dtype)


def laid(way, x):
    """The array ``x`` for the emulator, lying in that way."""
    return Laid(VIEWS[way](np, np.ascontiguousarray(as_mlx_laid_it(x).bits)), x.dtype)


def as_mlx_laid_it(x):
    """As an array of MLX lies: in rows or in columns, whatever the machine. Of other views ask :func:`laid`."""
    return Laid(np.asarray(x.view({1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[x.itemsize])), x.dtype)
