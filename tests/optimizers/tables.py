"""Tables that the tests of optimizers share."""

import mlx.core as mx
import numpy as np

SHAPE = (24, 8)


def as_float64(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def random_table(shape, dtype="float32", scale=0.02, seed=3):
    return mx.array(np.random.RandomState(seed).uniform(-scale, scale, size=shape)).astype(getattr(mx, dtype))
