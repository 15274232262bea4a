r"""One step of FlashAdamW and FlashLion: the ordinary rules in float32, between two steps 8-bit moments.

From FlashOptim (arXiv 2602.23349). Decode the weight and the moments, take the step, encode what it made:

.. math::

    m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
    w &\leftarrow (1 - \eta \lambda) w
        - \eta \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} \qquad \text{(AdamW)} \\
    w &\leftarrow (1 - \eta \lambda) w - \eta \, \text{sign}(\beta_1 m + (1 - \beta_1) g), \quad
        m \leftarrow \beta_2 m + (1 - \beta_2) g \qquad \text{(Lion)}

The step is taken by the moments before they are encoded. The codes are those of ``companded``, the weights those of
``split_weights``.
"""

from typing import NamedTuple

import mlx.core as mx

from ember_mlx.optimizers.companded import (
    decode_momentum,
    decode_second_moment,
    encode_momentum,
    encode_second_moment,
)
from ember_mlx.optimizers.ember import bias_correction
from ember_mlx.optimizers.ember import update_second_moment as running_mean
from ember_mlx.optimizers.split_weights import join, split

__all__ = ["Numbers", "Stored", "adamw", "flash_block", "flash_step", "lion", "numbers_of"]

# MLX computes up to 20 blocks at once, each with a few float32 copies of itself.
MOST_BLOCKS, FEWEST_GROUPS = 512, 1024


class Numbers(NamedTuple):
    """What a step needs beside its arrays: floats, or arrays of one float32."""

    learning_rate: mx.array
    kept: mx.array  # of a weight after decay, 1 - learning_rate * weight_decay
    beta1: float
    beta2: float
    correction1: mx.array  # 1 - beta1^t
    correction2: mx.array
    eps: float


class Stored(NamedTuple):
    """A parameter and its state between two steps, in groups of 32: None stands for what an optimizer has not."""

    w: mx.array  # (groups, 32), float32, bfloat16 or float16
    rest: mx.array | None  # (groups, 32) int8
    m: mx.array  # (groups, 32) int8
    m_scales: mx.array  # (groups,)
    v: mx.array | None  # (groups, 32) uint8
    v_scales: mx.array | None


def numbers_of(
    t: mx.array, learning_rate: float | mx.array, weight_decay: float | mx.array, betas: tuple[float, float], eps: float
) -> Numbers:
    """Of step ``t``, an array, from 1."""
    corrections = (bias_correction(t, beta) for beta in betas)
    return Numbers(learning_rate, 1 - learning_rate * weight_decay, *betas, *corrections, eps)


def adamw(w: mx.array, g: mx.array, m: mx.array, v: mx.array, n: Numbers) -> tuple[mx.array, mx.array, mx.array]:
    """AdamW in float32: the new ``w``, ``m`` and ``v``."""
    m = running_mean(m, g, n.beta1)
    v = running_mean(v, mx.square(g), n.beta2)
    return n.kept * w - n.learning_rate * ((m / n.correction1) / (mx.sqrt(v / n.correction2) + n.eps)), m, v


def lion(w: mx.array, g: mx.array, m: mx.array, n: Numbers) -> tuple[mx.array, mx.array]:
    """Lion in float32: the new ``w`` and ``m``. The sign of a NaN is NaN, so that it is seen in the weight."""
    direction = running_mean(m, g, n.beta1)
    sign = mx.where(mx.isnan(direction), direction, mx.sign(direction))
    return n.kept * w - n.learning_rate * sign, running_mean(m, g, n.beta2)


def flash_step(stored: Stored, g: mx.array, numbers: Numbers, published: bool = False) -> Stored:
    """One step in plain operations, block by block so that the float32 copies stay small.

    Args:
        stored (Stored): Before the step; with a ``v`` it is AdamW's, without one Lion's.
        g (array): The gradient, (groups, 32), of any floating dtype.
        numbers (Numbers): Of this step.
        published (bool): Keep scales in float16, and let a small v have the code 0, as FlashOptim does.

    Returns:
        The new :class:`Stored`.
    """
    block = max(FEWEST_GROUPS, -(-len(g) // MOST_BLOCKS))
    if len(g) <= block:
        return flash_block(stored, g, numbers, published)
    names = [name for name, array in stored._asdict().items() if array is not None]
    made = {}
    for name in names:
        # One array of the result after another, each from the decoding on: of several, the blocks of one would wait
        # in memory until all blocks of another are in their places.
        arrays = mx.depends([g, *(getattr(stored, name) for name in names)], list(made.values()) or [g])
        made[name], part = mx.array(getattr(stored, name)), g
        for first in range(0, len(g), block):
            blocks = mx.depends([array[first : first + block] for array in arrays], [part])
            old = Stored(**dict.fromkeys(Stored._fields) | dict(zip(names, blocks[1:], strict=True)))
            part = getattr(flash_block(old, blocks[0], numbers, published), name)
            made[name][first : first + block] = part
    return Stored(**dict.fromkeys(Stored._fields) | made)


def flash_block(stored: Stored, g: mx.array, numbers: Numbers, published: bool) -> Stored:
    """One step of some groups."""
    w = stored.w.astype(mx.float32) if stored.rest is None else join(stored.w, stored.rest)
    g = g.astype(mx.float32)
    m = decode_momentum(stored.m, stored.m_scales, g.shape)
    scale_dtype = mx.float16 if published else mx.float32
    v, v_codes = None, (None, None)
    if stored.v is None:
        w, m = lion(w, g, m, numbers)
    else:
        v = decode_second_moment(stored.v, stored.v_scales, g.shape)
        w, m, v = adamw(w, g, m, v, numbers)
        v_codes = encode_second_moment(v, scale_dtype, keep_positive=not published)
    weights = (w.astype(stored.w.dtype), None) if stored.rest is None else split(w)
    return Stored(*weights, *encode_momentum(m, scale_dtype), *v_codes)
