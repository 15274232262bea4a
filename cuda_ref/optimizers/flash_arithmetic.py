r"""One step of FlashAdamW and FlashLion: the ordinary rules in float32, between two steps 8-bit moments.

From FlashOptim (arXiv 2602.23349). Decode the weight and the moments, take the step, encode what it made:

.. math::

    m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
    w &\leftarrow (1 - \eta \lambda) w
        - \eta \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} \qquad \text{(AdamW)} \\
    w &\leftarrow (1 - \eta \lambda) w - \eta \, \text{sign}(\beta_1 m + (1 - \beta_1) g), \quad
        m \leftarrow \beta_2 m + (1 - \beta_2) g \qquad \text{(Lion)}

The step is taken by the moments before they are encoded. The codes are those of ``companded``, the weights those of
``split_weights``. The functions are those of ``ember_mlx/optimizers/flash_arithmetic.py``, line against line.
"""

from typing import NamedTuple

import torch

from cuda_ref.optimizers.companded import (
    decode_momentum,
    decode_second_moment,
    encode_momentum,
    encode_second_moment,
)
from cuda_ref.optimizers.ember import bias_correction
from cuda_ref.optimizers.ember import update_second_moment as running_mean
from cuda_ref.optimizers.split_weights import join, split

__all__ = ["Numbers", "Stored", "adamw", "flash_block", "flash_step", "lion", "numbers_of"]

# Plain operations make about six float32 copies of a block: of one in 32, a fifth of the weights as float32.
MOST_BLOCKS, FEWEST_GROUPS = 32, 2048


class Numbers(NamedTuple):
    """What a step needs beside its arrays: floats, or tensors of one float32."""

    learning_rate: torch.Tensor
    kept: torch.Tensor  # of a weight after decay, 1 - learning_rate * weight_decay
    beta1: float
    beta2: float
    correction1: torch.Tensor  # 1 - beta1^t
    correction2: torch.Tensor
    eps: float


class Stored(NamedTuple):
    """A parameter and its state between two steps, in groups of 32: None stands for what an optimizer has not."""

    w: torch.Tensor  # (groups, 32), float32, bfloat16 or float16
    rest: torch.Tensor | None  # (groups, 32) int8
    m: torch.Tensor  # (groups, 32) int8
    m_scales: torch.Tensor  # (groups,)
    v: torch.Tensor | None  # (groups, 32) uint8
    v_scales: torch.Tensor | None


def numbers_of(
    t: torch.Tensor, learning_rate: float | torch.Tensor, weight_decay: float, betas: tuple[float, float], eps: float
) -> Numbers:
    """Of step ``t``, a tensor, from 1."""
    corrections = (bias_correction(t, beta) for beta in betas)
    return Numbers(learning_rate, 1 - learning_rate * weight_decay, *betas, *corrections, eps)


def adamw(
    w: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, n: Numbers
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """AdamW in float32: the new ``w``, ``m`` and ``v``."""
    m = running_mean(m, g, n.beta1)
    v = running_mean(v, torch.square(g), n.beta2)
    return n.kept * w - n.learning_rate * ((m / n.correction1) / (torch.sqrt(v / n.correction2) + n.eps)), m, v


def lion(w: torch.Tensor, g: torch.Tensor, m: torch.Tensor, n: Numbers) -> tuple[torch.Tensor, torch.Tensor]:
    """Lion in float32: the new ``w`` and ``m``. The sign of a NaN is NaN, so that it is seen in the weight."""
    direction = running_mean(m, g, n.beta1)
    sign = torch.where(torch.isnan(direction), direction, torch.sign(direction))
    return n.kept * w - n.learning_rate * sign, running_mean(m, g, n.beta2)


def flash_step(stored: Stored, g: torch.Tensor, numbers: Numbers, published: bool = False) -> Stored:
    """One step in plain operations, block by block so that the float32 copies stay small.

    Args:
        stored (Stored): Before the step; with a ``v`` it is AdamW's, without one Lion's.
        g (Tensor): The gradient, (groups, 32), of any floating dtype.
        numbers (Numbers): Of this step.
        published (bool): Keep scales in float16, and let a small v have the code 0, as FlashOptim does.

    Returns:
        ``stored``, overwritten.
    """
    block = max(FEWEST_GROUPS, -(-len(g) // MOST_BLOCKS))
    for first in range(0, len(g), block):
        rows = slice(first, first + block)
        old = Stored(*(None if array is None else array[rows] for array in stored))
        for array, made in zip(stored, flash_block(old, g[rows], numbers, published), strict=True):
            if made is not None:
                array[rows] = made
    return stored


def flash_block(stored: Stored, g: torch.Tensor, numbers: Numbers, published: bool) -> Stored:
    """One step of some groups."""
    w = stored.w.to(torch.float32) if stored.rest is None else join(stored.w, stored.rest)
    g = g.to(torch.float32)
    m = decode_momentum(stored.m, stored.m_scales, g.shape)
    scale_dtype = torch.float16 if published else torch.float32
    v, v_codes = None, (None, None)
    if stored.v is None:
        w, m = lion(w, g, m, numbers)
    else:
        v = decode_second_moment(stored.v, stored.v_scales, g.shape)
        w, m, v = adamw(w, g, m, v, numbers)
        v_codes = encode_second_moment(v, scale_dtype, keep_positive=not published)
    weights = (w.to(stored.w.dtype), None) if stored.rest is None else split(w)
    return Stored(*weights, *encode_momentum(m, scale_dtype), *v_codes)
