"""Betas over their whole range in every kernel of the body optimizers: a step is that of plain operations."""

import mlx.core as mx
import numpy as np
import pytest
import torch

import cuda_ref
from cuda_ref import triton_kernels
from ember_mlx.optimizers import AdamMini, FlashAdamW, FlashLion, adam_mini_kernel, flash_kernel

BETAS = [0.0, 1e-3, 0.3, 0.5, 0.9]
SHAPE, RATE = (4, 64), 1e-2
ROUNDING = 2.0**-23
# A moment far larger than what comes after it: a step towards that, r + (1 - beta) * (x - r), cancels for small betas.
SIZES = [1, 1e-6]
needs_triton = pytest.mark.skipif(not triton_kernels.available(torch.device("cpu")), reason="Triton is not interpreted")
MAKE = {
    "AdamMini": {"momentum": "float32"},
    "AdamMini int8": {"momentum": "int8"},
    "SAGE": {},
    "FlashAdamW": {},
    "FlashLion": {},
}


def gradients():
    random = np.random.RandomState(0)
    return [(size * random.uniform(0.5, 1, size=SHAPE) * random.choice([-1, 1], SHAPE)).astype(np.float32)
            for size in SIZES]  # fmt: skip


def torch_changes(name, beta, implementation):
    """What each step subtracts from weights of 0."""
    w = torch.nn.Parameter(torch.zeros(SHAPE))
    kind = getattr(cuda_ref, name.split()[0])
    options = MAKE[name] | {"betas": (beta, beta), "weight_decay": 0.0, "implementation": implementation}
    optimizer = kind([w], lr=RATE, **options)
    for g in gradients():
        w.data.zero_()
        w.grad = torch.tensor(g)
        optimizer.step()
        yield w.detach().double().numpy()


@needs_triton
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", MAKE)
def test_triton_steps_as_plain_operations_do(name, beta):
    pairs = zip(torch_changes(name, beta, "triton"), torch_changes(name, beta, "eager"), strict=True)
    for found, expected in pairs:
        # Both forms are off by 4 roundings; the moment, the root, two divisions and the rate add a few more.
        np.testing.assert_allclose(found, expected, rtol=16 * ROUNDING, atol=0)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    ("module", "make"),
    [(flash_kernel, FlashAdamW), (flash_kernel, FlashLion), (adam_mini_kernel, AdamMini)],
    ids=["FlashAdamW", "FlashLion", "AdamMini"],
)
def test_a_metal_or_cuda_kernel_is_asked_from_a_half_on_alone(module, make, beta, monkeypatch):
    class Asked(Exception):
        pass

    def asked(*_):
        raise Asked

    monkeypatch.setattr("ember_mlx.kernels.usable", lambda kernel, *dtypes: kernel is module)
    monkeypatch.setattr(module, "kernel", asked)
    g = mx.array(gradients()[0])
    step = lambda: make(RATE, betas=(beta, beta)).apply_gradients({"w": g}, {"w": mx.zeros(SHAPE)})  # noqa: E731
    if beta >= 0.5:
        with pytest.raises(Asked):
            step()
    else:
        assert mx.isfinite(step()["w"]).all().item()
