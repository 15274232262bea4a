"""Rounding of whole weights: its Metal and its CUDA text emulated, and itself where there is a GPU."""

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from kernels.test_rounding import values

from ember_mlx import kernels
from ember_mlx.kernels import weight_rounding
from ember_mlx.kernels.stochastic_rounding import bit_keys, random_bits, round_stochastically, table_seed
from ember_mlx.optimizers.rounded import StochasticRounding

ON_GPU = mx.default_device().type == mx.DeviceType.gpu
SEED, STEP = table_seed(3, 1), mx.array(9, mx.uint32)
# Of fewer elements than a thread takes; rows that end within a thread's, or with them; more than a threadgroup's.
SHAPES = [(1, 3), (9, 5), (4, 8), (3, 701)]


def expected(x, dtype):
    return round_stochastically(x, random_bits(*bit_keys(SEED, STEP, *x.shape)), dtype)


@pytest.fixture
def with_kernel(monkeypatch):
    """with_kernel(kernel): all weights are rounded by it."""

    def use(kernel):
        monkeypatch.setattr(weight_rounding, "kernel", lambda text: kernel)
        monkeypatch.setattr(kernels, "usable", lambda module, *dtypes: module is weight_rounding)

    return use


@pytest.mark.parametrize(
    ("dtype", "language"),
    [(mx.bfloat16, "metal"), (mx.float16, "cuda")],
    ids=str,
)
def test_the_texts_round_as_plain_operations_do(emulated, with_kernel, dtype, language):
    with_kernel(emulated(language, "memory", module=weight_rounding))
    for shape in SHAPES:
        x = values(shape)
        found = weight_rounding.round_weights(x, SEED, STEP, dtype)
        assert mx.array_equal(found, expected(x, dtype), equal_nan=True), shape


def test_a_planted_fault_is_found_by_the_check_of_a_machine(found_with):
    row = "static_cast<uint32_t>(++row)", "static_cast<uint32_t>(row)"
    assert "are rounded otherwise" in found_with(weight_rounding, *row, (mx.bfloat16,))


@pytest.mark.parametrize("rest", [optim.AdamW, optim.Lion])  # of Adam's moments and of others' there are two ways
def test_an_optimizer_with_the_kernel_steps_as_with_plain_operations(emulated, with_kernel, rest):
    w, g = {"a": values((9, 5)), "b": values((1, 7))[0]}, {"a": values((9, 5)) / 3, "b": values((1, 7))[0]}
    w, g = ({name: x.astype(mx.bfloat16) for name, x in tree.items()} for tree in (w, g))

    def stepped():
        optimizer = StochasticRounding(rest(1e-2))
        return optimizer.apply_gradients(g, optimizer.apply_gradients(g, w)), optimizer.state

    plain, state = stepped()
    with_kernel(emulated("metal", "memory", module=weight_rounding))
    found, state_found = stepped()
    for name in w:
        assert mx.array_equal(found[name], plain[name], equal_nan=True)
        assert mx.array_equal(state_found[name]["m"], state[name]["m"], equal_nan=True)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_on_a_gpu_it_rounds_as_plain_operations_do(dtype):
    assert weight_rounding.differences(dtype) is None
