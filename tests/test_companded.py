"""Moments in 8 bits, in both frameworks, against float64."""

import mlx.core as mx
import numpy as np
import pytest
import torch

from cuda_ref.optimizers import companded as of_torch
from ember_mlx.optimizers import companded as of_mlx

# A group, a part of one, several and a part; scales from what float16 cannot hold to large.
SHAPES = [(32,), (5,), (7, 33), (2, 3, 64)]
SCALES = [1e-12, 1e-6, 1.0, 1e4]
FRAMEWORKS = {"mlx": (of_mlx, mx.array, mx.float16), "torch": (of_torch, torch.tensor, torch.float16)}


@pytest.fixture(params=FRAMEWORKS)
def framework(request):
    return FRAMEWORKS[request.param]


def as_numpy(array):
    """In float64, from either framework."""
    return (array.numpy() if isinstance(array, torch.Tensor) else np.array(array)).astype(np.float64)


def momentum(shape, scale):
    """float32 values over four decades, some of them zero."""
    random = np.random.RandomState(0)
    values = random.uniform(-1, 1, size=shape) * 10.0 ** random.uniform(-4, 0, size=shape) * scale
    values[random.uniform(size=shape) < 0.1] = 0
    return values.astype(np.float32)


def largest_of_group(values):
    flat = np.abs(values).ravel()
    padded = np.pad(flat, (0, -len(flat) % 32)).reshape(-1, 32)
    return np.repeat(padded.max(axis=1), 32)[: len(flat)].reshape(values.shape).astype(np.float64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_momentum_comes_back_within_half_a_code(framework, shape, scale):
    codec, array, _ = framework
    m = momentum(shape, scale)
    codes, scales = codec.encode_momentum(array(m))
    back = as_numpy(codec.decode_momentum(codes, scales, shape))
    assert tuple(codes.shape) == (codec.groups_of(m.size), 32)
    assert tuple(scales.shape) == (codec.groups_of(m.size),)
    largest = largest_of_group(m)

    def curve(values):
        z = np.abs(values) / largest
        return np.sign(values) * 254 * z / (1 + z)

    assert (np.abs(curve(back) - curve(m.astype(np.float64))) <= 0.5 + 1e-4).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_a_second_moment_comes_back_within_half_a_code_and_never_vanishes(framework, shape, scale):
    codec, array, _ = framework
    v = momentum(shape, scale) ** 2
    codes, scales = codec.encode_second_moment(array(v))
    back = as_numpy(codec.decode_second_moment(codes, scales, shape))
    assert ((back > 0) == (v > 0)).all()
    root = np.sqrt(v.astype(np.float64))
    error = 255 * np.abs(np.sqrt(back) - root) / largest_of_group(root)
    assert (error <= np.where(root * 255 < 0.5 * largest_of_group(root), 1.0, 0.5) + 1e-4).all()


def test_both_frameworks_have_the_same_codes_and_scales():
    m = momentum((40, 33), 1e-3)
    for name, values in (("encode_momentum", m), ("encode_second_moment", m**2)):
        ours = getattr(of_mlx, name)(mx.array(values))
        theirs = getattr(of_torch, name)(torch.tensor(values))
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(as_numpy(mine), as_numpy(other))


def test_the_published_format_has_float16_scales_and_lets_small_second_moments_vanish(framework):
    codec, array, float16 = framework
    v = np.full(32, 1e-6, np.float32)
    v[0] = 1.0
    codes, scales = codec.encode_second_moment(array(v), scale_dtype=float16, keep_positive=False)
    assert as_numpy(codes)[0].tolist() == [255] + [0] * 31
    assert scales.dtype == float16
    assert as_numpy(codec.encode_second_moment(array(v))[0])[0].tolist() == [255] + [1] * 31


def test_zeros_stay_zeros_and_a_nan_stays_in_its_group(framework):
    codec, array, _ = framework
    m = np.zeros(96, np.float32)
    m[40], m[70] = np.nan, 1.0
    back = as_numpy(codec.decode_momentum(*codec.encode_momentum(array(m)), (96,)))
    assert (back[:32] == 0).all()
    assert np.isnan(back[32:64]).all()
    np.testing.assert_array_equal(back[64:], m[64:])
