"""beta2 over the whole range that is allowed, 0 to just below 1, against float64: MLX, PyTorch and Triton."""

import mlx.core as mx
import numpy as np
import pytest
import torch

import cuda_ref
import ember_mlx
from cuda_ref import triton_kernels
from ember_mlx.parity.oracle_float64 import EmberOracle
from ember_mlx.parity.tolerances import bound, worst

SHAPE, STEPS, LEARNING_RATE = (24, 8), 6, 1e-3
BETA2 = [0.0, 5e-324, 1e-30, 1e-9, 1e-4, 0.1, 0.4999999, 0.5, 0.9, 0.999, 0.9999999, 1 - 2.0**-24]
# Gradients that get 1000 times smaller or larger a step: what came before is all of a moment, or nothing.
SIZES = {"falling": [1, 1e-3, 1e-6, 1e-6, 1e-3, 1], "rising": [1e-4, 1e-1, 1e2, 1e5, 1e5, 1e2]}
needs_triton = pytest.mark.skipif(not triton_kernels.available(torch.device("cpu")), reason="Triton is not interpreted")


def mlx_steps(gradients, beta2):
    optimizer, zeros = ember_mlx.Ember(LEARNING_RATE, beta2=beta2), mx.zeros(SHAPE)
    for g in gradients:
        new = optimizer.apply_gradients({"w": mx.array(g)}, {"w": zeros})["w"]
        state = optimizer.state["w"]
        yield [np.array(x).astype(np.float64) for x in (state["r"], state["c"], -new)]


def torch_steps(gradients, beta2, implementation="eager"):
    w = torch.nn.Parameter(torch.zeros(SHAPE))
    optimizer = cuda_ref.Ember([w], lr=LEARNING_RATE, beta2=beta2, implementation=implementation)
    for g in gradients:
        w.data.zero_()
        w.grad = torch.tensor(g)
        optimizer.step()
        state = optimizer.state[w]
        yield [x.detach().double().numpy() for x in (state["r"], state["c"], -w)]


def triton_steps(gradients, beta2):
    return torch_steps(gradients, beta2, "triton")


IMPLEMENTATIONS = [mlx_steps, torch_steps, pytest.param(triton_steps, marks=needs_triton)]


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("steps", IMPLEMENTATIONS)
def test_each_beta2_from_0_to_1_is_right(steps, sizes, scheduled):
    random = np.random.RandomState(0)
    gradients = [(size * random.uniform(-1, 1, size=SHAPE)).astype(np.float32) for size in SIZES[sizes]]
    for beta2 in BETA2[:: 2 if steps is triton_steps else 1]:  # the interpreter is slow
        given = (lambda step, beta2=beta2: beta2) if scheduled else beta2
        oracle = EmberOracle(SHAPE, beta2=given)
        for t, (g, found) in enumerate(zip(gradients, steps(gradients, given), strict=True), start=1):
            change = oracle.change(g, LEARNING_RATE)
            exact = oracle.row_mean_square, oracle.column_mean_square, change
            for name, value, expected in zip(("r", "c", "step"), found, exact, strict=True):
                part = worst(value, expected, bound(name, "float32", expected, t))
                assert part <= 1, (beta2, t, name, part)


@pytest.mark.parametrize("beta2", [1 - 2.0**-26, 1 - 2.0**-53])
def test_a_beta2_that_float32_takes_for_1_is_refused(beta2):
    for refused in (lambda: ember_mlx.Ember(1e-3, beta2=beta2), lambda: next(torch_steps([], beta2))):
        with pytest.raises(ember_mlx.InputError, match="must be at least 0 and, in float32, below 1"):
            refused()


@pytest.mark.parametrize("beta2", [0.5, 0.9, 0.999])
def test_from_a_half_on_a_moment_takes_a_step_towards_the_mean_square(beta2):
    # The form that keeps the bits of 0.999, which float32 does not have.
    random = np.random.RandomState(0)
    moment, mean = (random.uniform(0, 1, size=1000).astype(np.float32) for _ in range(2))
    expected = moment + np.float32(1 - beta2) * (mean - moment)
    in_mlx = ember_mlx.optimizers.ember.update_second_moment(mx.array(moment), mx.array(mean), beta2)
    in_torch = cuda_ref.optimizers.ember.update_second_moment(torch.tensor(moment), torch.tensor(mean), beta2)
    np.testing.assert_array_equal(np.array(in_mlx), expected)
    np.testing.assert_array_equal(in_torch.numpy(), expected)
