"""Stochastic rounding makes infinity of nothing that is finite, whoever does it; the kernels' texts: tests/kernels."""

import mlx.core as mx
import numpy as np
import pytest
import torch

import cuda_ref
import ember_mlx
from cuda_ref import triton_kernels
from cuda_ref.optimizers import stochastic_rounding as in_torch
from ember_mlx.kernels import stochastic_rounding as in_mlx
from ember_mlx.parity import stochastic_rounding as in_numpy

LARGEST = {"bfloat16": float.fromhex("0x1.fep127"), "float16": 65504.0}
MOST = float(np.finfo(np.float32).max)
RANDOM = np.array([0, 1, 2**31, 2**32 - 1], np.uint32)
needs_triton = pytest.mark.skipif(not triton_kernels.available(torch.device("cpu")), reason="Triton is not interpreted")


def near(dtype):
    """float32 numbers around the largest of ``dtype``, and up to the largest of all."""
    largest = np.float32(LARGEST[dtype])
    below, above = np.nextafter(largest, np.float32(0)), np.nextafter(largest, np.float32(np.inf))
    parts = [largest * np.float32(1 + part * 2.0**-8) for part in (0.1, 0.25, 0.49)] if dtype == "float16" else []
    values = np.array([below, largest, above, *parts, largest / 2 + MOST / 2, MOST], np.float32)
    return np.concatenate([values, -values])


@pytest.mark.parametrize("dtype", LARGEST)
def test_what_is_finite_stays_finite_and_below_the_largest_nothing_has_changed(dtype):
    values, random = (array.ravel() for array in np.meshgrid(near(dtype), RANDOM))
    found = {
        "NumPy": in_numpy.round_stochastically(values, random, dtype),
        "MLX": in_mlx.round_stochastically(mx.array(values), mx.array(random), getattr(mx, dtype)),
        "PyTorch": in_torch.round_stochastically(
            torch.tensor(values), torch.tensor(random.view(np.int32)), getattr(torch, dtype)
        ),
    }
    found["MLX"] = np.array(found["MLX"].astype(mx.float32))
    found["PyTorch"] = found["PyTorch"].float().numpy()
    for name, rounded in found.items():
        assert np.isfinite(rounded).all(), name
        assert (np.abs(rounded) <= LARGEST[dtype]).all(), name
        np.testing.assert_array_equal(rounded, found["NumPy"], err_msg=name)
    beyond = np.abs(values) >= LARGEST[dtype]
    np.testing.assert_array_equal(found["NumPy"][beyond], np.copysign(LARGEST[dtype], values[beyond]))


@pytest.mark.parametrize("dtype", LARGEST)
def test_infinity_and_nan_stay_what_they_are(dtype):
    values, random = np.array([np.inf, -np.inf, np.nan], np.float32), np.full(3, 2**32 - 1, np.uint32)
    expected = values.astype(np.float64)
    np.testing.assert_array_equal(in_numpy.round_stochastically(values, random, dtype), expected)
    rounded = in_mlx.round_stochastically(mx.array(values), mx.array(random), getattr(mx, dtype))
    np.testing.assert_array_equal(np.array(rounded.astype(mx.float32)), expected)
    rounded = in_torch.round_stochastically(
        torch.tensor(values), torch.tensor(random.view(np.int32)), getattr(torch, dtype)
    )
    np.testing.assert_array_equal(rounded.double().numpy(), expected)


@pytest.mark.parametrize("implementation", ["eager", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("dtype", LARGEST)
def test_a_step_beyond_the_largest_number_ends_at_it(dtype, implementation):
    w = torch.nn.Parameter(torch.zeros(40, 8, dtype=getattr(torch, dtype)))
    w.grad = torch.ones_like(w)
    lr = LARGEST[dtype] * (1 + 2.0**-13)
    cuda_ref.Ember([w], lr=lr, rounding="stochastic", implementation=implementation).step()
    assert (w == -LARGEST[dtype]).all()


@pytest.mark.parametrize("dtype", LARGEST)
def test_a_step_beyond_the_largest_number_ends_at_it_in_mlx(dtype):
    w = mx.zeros((40, 8), getattr(mx, dtype))
    optimizer = ember_mlx.Ember(LARGEST[dtype] * (1 + 2.0**-13), rounding="stochastic")
    new = optimizer.apply_gradients({"w": mx.ones_like(w)}, {"w": w})["w"]
    assert mx.all(new == -LARGEST[dtype]).item()
