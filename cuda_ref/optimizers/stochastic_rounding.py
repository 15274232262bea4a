"""Stochastic rounding to 16 bits: up or down by chance, so that a float32 value is kept on average.

To nearest, a bfloat16 weight does not change at all by a step under about 1/500 of it. Here the value goes to the
upper neighbour with the probability of its distance from the lower one (Gupta et al. 2015, arXiv 1502.02551).

The random bits are a hash of (seed, step, row, column), so nothing is drawn and nothing is kept: a run repeats and
resumes bit for bit, each shard of a table rounds as the whole table would, and every backend and framework gives the
same 16 bits for the same float32 value.

The functions are those of ``ember_mlx/kernels/stochastic_rounding.py``, line against line. PyTorch computes little
in uint32: here it is an int32, whose sums and products are the same bits.
"""

import torch

__all__ = ["DROPPED_BITS", "bit_keys", "mix", "random_bits", "round_stochastically", "table_seed"]

DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of the fraction of a float32; these can be rounded to
LARGEST = {torch.bfloat16: (2 - 2**-7) * 2.0**127, torch.float16: 65504.0}
SMALLEST_NORMAL_HALF = 2.0**-14  # float16 below it: all numbers are 2^-24 apart


def mix(x: torch.Tensor) -> torch.Tensor:
    """A 32-bit hash of each int32, one to one: lowbias32 of Chris Wellons (nullprogram.com/blog/2018/07/31/)."""
    x = (x ^ shift_right(x, 16)) * 0x7FEB352D
    x = (x ^ shift_right(x, 15)) * (0x846CA68B - 2**32)
    return x ^ shift_right(x, 16)


def shift_right(x: torch.Tensor, places: int) -> torch.Tensor:
    """As of a uint32: zeros come in from the left."""
    return (x >> places) & ((1 << (32 - places)) - 1)


def table_seed(seed: int, number: int) -> torch.Tensor:
    """The seed, an int32 tensor, of an optimizer's table of that number, from 0: no two tables use the same bits."""
    seed = torch.tensor(seed, dtype=torch.int64).to(torch.int32)
    return mix(seed ^ mix(torch.tensor(number + 1, dtype=torch.int32)))


def bit_keys(
    seed: torch.Tensor, t: torch.Tensor, rows: int, columns: int, first_row: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`random_bits` takes for step ``t``: int32 of the rows, (V,), and of the columns, (D,)."""
    step_key = mix(seed ^ mix(t.to(torch.int32)))
    i, j = (torch.arange(count, dtype=torch.int32, device=t.device) for count in (rows, columns))
    return mix(step_key ^ (i + first_row)), mix(j)


def random_bits(row_keys: torch.Tensor, column_keys: torch.Tensor) -> torch.Tensor:
    """An int32 for each element, (V, D). Rows and columns are hashed apart: a table may have over 2^32 elements."""
    return mix(row_keys[:, None] ^ column_keys)


def round_stochastically(values: torch.Tensor, random: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 ``values`` in bfloat16 or float16, each to one of its two neighbours there, by ``random`` of its shape.

    Infinity and NaN stay what they are. What is finite stays finite: beyond the largest number of ``dtype`` it is that.
    """
    dropped = DROPPED_BITS[dtype]
    bits = torch.clamp(values, -LARGEST[dtype], LARGEST[dtype]).view(torch.int32)
    bits = bits + shift_right(random, 32 - dropped)  # carries into the bits that are kept, and the exponent
    rounded = ((bits >> dropped) << dropped).view(torch.float32)
    if dtype == torch.float16:
        scaled = values * 2.0**24
        lower = torch.floor(scaled)
        up = (scaled - lower) > shift_right(random, 8).to(torch.float32) * 2.0**-24
        small = (lower + up.to(torch.float32)) * 2.0**-24
        rounded = torch.where(torch.abs(values) < SMALLEST_NORMAL_HALF, small, rounded)
    return torch.where(torch.isfinite(values), rounded, values).to(dtype)
