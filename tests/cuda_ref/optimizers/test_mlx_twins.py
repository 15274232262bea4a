"""SAGE, FlashAdamW, FlashLion and split weights of PyTorch beside those of MLX, where that is installed."""

import numpy as np
import pytest
import torch
from torch_family import AGREEMENT, KINDS, as_float64, gradient, make, start, train

from cuda_ref.optimizers.split_weights import join, split

mx = pytest.importorskip("mlx.core")
mlx_optimizers = pytest.importorskip("ember_mlx.optimizers")
of_mlx = pytest.importorskip("ember_mlx.optimizers.split_weights")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "FlashAdamW, published"])
def test_they_go_as_their_mlx_twins(kind, implementation):
    name, device = implementation
    dtype = "bfloat16" if "split" in kind else "float32"
    w = start((6, 33), dtype, device)
    twin = getattr(mlx_optimizers, kind.split(",")[0])(1e-3, **KINDS[kind])
    of_twin = {"w": mx.array(as_float64(w)).astype(getattr(mx, dtype))}
    before = as_float64(w)
    optimizer = make(kind, [w], name)
    for t in range(20):
        train(optimizer, 1, t)
        of_twin = twin.apply_gradients({"w": mx.array(gradient((6, 33), t)).astype(getattr(mx, dtype))}, of_twin)
    found, expected = as_float64(w), np.array(of_twin["w"].astype(mx.float32)).astype(np.float64)
    # A float32 weight rounds 20 times, and a flipped code moves a step by 1/127 of itself at most.
    unit = np.maximum(np.abs(before), 0.02) * (2.0**-7 if dtype == "bfloat16" else 2.0**-23)
    flip = 0 if kind == "SAGE" else 1 / 127
    assert (np.abs(found - expected) <= (AGREEMENT + flip) * np.abs(found - before).max() + 10 * unit).all()


def test_weights_are_split_and_joined_as_in_mlx():
    random = np.random.RandomState(0)
    w = (random.uniform(-1, 1, size=4096) * 10.0 ** random.randint(-20, 20, size=4096)).astype(np.float32)
    w[:3] = 0, np.inf, np.nan
    (low, rest), (low_mlx, rest_mlx) = split(torch.tensor(w)), of_mlx.split(mx.array(w))
    assert np.array_equal(low.float().numpy(), np.array(low_mlx.astype(mx.float32)), equal_nan=True)
    assert np.array_equal(rest.numpy(), np.array(rest_mlx))
    assert np.array_equal(join(low, rest).numpy(), np.array(of_mlx.join(low_mlx, rest_mlx)), equal_nan=True)
