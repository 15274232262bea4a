"""Stochastic rounding to 16 bits: up or down by chance, so that a float32 value is kept on average.

To nearest, a bfloat16 weight does not change at all by a step under about 1/500 of it. Here the value goes to the
upper neighbour with the probability of its distance from the lower one (Gupta et al. 2015, arXiv 1502.02551).

The random bits are a hash of (seed, step, row, column), so nothing is drawn and nothing is kept: a run repeats and
resumes bit for bit, each shard of a table rounds as the whole table would, and every backend and framework gives the
same 16 bits for the same float32 value.
"""

import mlx.core as mx

__all__ = ["DROPPED_BITS", "bit_keys", "mix", "random_bits", "round_stochastically", "table_seed"]

DROPPED_BITS = {mx.bfloat16: 16, mx.float16: 13}  # of the fraction of a float32; these dtypes can be rounded to
LARGEST = {mx.bfloat16: (2 - 2**-7) * 2.0**127, mx.float16: 65504.0}
SMALLEST_NORMAL_HALF = 2.0**-14  # float16 below it: all numbers are 2^-24 apart


def mix(x: mx.array) -> mx.array:
    """A 32-bit hash of each uint32, one to one: lowbias32 of Chris Wellons (nullprogram.com/blog/2018/07/31/)."""
    x = (x ^ (x >> 16)) * mx.array(0x7FEB352D, mx.uint32)
    x = (x ^ (x >> 15)) * mx.array(0x846CA68B, mx.uint32)
    return x ^ (x >> 16)


def table_seed(seed: int, number: int) -> mx.array:
    """The seed, a uint32 array, of an optimizer's table of that number, from 0: no two tables use the same bits."""
    return mix(mx.array(seed, mx.uint32) ^ mix(mx.array(number + 1, mx.uint32)))


def bit_keys(seed: mx.array, t: mx.array, rows: int, columns: int, first_row: int = 0) -> tuple[mx.array, mx.array]:
    """What :func:`random_bits` takes for step ``t``: uint32 of the rows, (V,), and of the columns, (D,).

    Of a part of a table, ``first_row`` is the number in the table of its first row.
    """
    step_key = mix(seed ^ mix(t.astype(mx.uint32)))
    numbers = mx.arange(first_row, first_row + rows, dtype=mx.uint32)
    return mix(step_key ^ numbers), mix(mx.arange(columns, dtype=mx.uint32))


def random_bits(row_keys: mx.array, column_keys: mx.array) -> mx.array:
    """A uint32 for each element, (V, D). Rows and columns are hashed apart: a table may have over 2^32 elements."""
    return mix(row_keys[:, None] ^ column_keys)


def round_stochastically(values: mx.array, random: mx.array, dtype: mx.Dtype) -> mx.array:
    """float32 ``values`` in bfloat16 or float16, each to one of its two neighbours there, by ``random`` of its shape.

    Infinity and NaN stay what they are. What is finite stays finite: beyond the largest number of ``dtype`` it is that.
    """
    dropped = DROPPED_BITS[dtype]
    bits = mx.clip(values, -LARGEST[dtype], LARGEST[dtype]).view(mx.uint32)
    bits = bits + (random >> (32 - dropped))  # carries into the bits that are kept, and the exponent
    rounded = ((bits >> dropped) << dropped).view(mx.float32)
    if dtype == mx.float16:
        scaled = values * 2.0**24
        lower = mx.floor(scaled)
        up = (scaled - lower) > (random >> 8).astype(mx.float32) * 2.0**-24
        small = (lower + up.astype(mx.float32)) * 2.0**-24
        rounded = mx.where(mx.abs(values) < SMALLEST_NORMAL_HALF, small, rounded)
    return mx.where(mx.isfinite(values), rounded, values).astype(dtype)
