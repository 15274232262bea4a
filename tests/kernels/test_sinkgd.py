"""SinkGD on weights rounded stochastically: the texts of its kernel emulated, and itself where there is a GPU."""

import mlx.core as mx
import pytest

from ember_mlx import kernels
from ember_mlx.optimizers import SinkGD, sinkgd_kernel
from ember_mlx.optimizers.rounded import StochasticRounding

ON_GPU = mx.default_device().type == mx.DeviceType.gpu
# Inside a block, blocks that end inside, whole ones, more than a threadgroup's of both, and several matrices.
SHAPES = [(3, 5), (9, 21), (8, 16), (36, 264), (2, 3, 9, 8)]


def drawn(dtype, number, transposed=False):
    """Arrays by shape, and a vector, whose state is AdamW's; transposed ones lie in memory as the others do not."""
    arrays = {}
    for shape in [*SHAPES, (7,)]:
        array = mx.random.normal(shape, key=mx.random.key(number + sum(shape))).astype(dtype)
        turned = transposed and len(shape) > 1
        arrays[str(shape)] = mx.contiguous(array.swapaxes(-1, -2)).swapaxes(-1, -2) if turned else array
    return arrays


def steps_of(dtype, transposed):
    optimizer, w = StochasticRounding(SinkGD(1e-2, passes=2, weight_decay=0.1)), drawn(dtype, 0)
    for number in (1, 2):
        w = optimizer.apply_gradients(drawn(dtype, number, transposed), w)
    return w


@pytest.mark.parametrize(
    ("dtype", "language", "transposed"), [(mx.bfloat16, "metal", True), (mx.float16, "cuda", False)], ids=str
)
def test_the_texts_step_as_plain_operations_do(make_emulated, monkeypatch, dtype, language, transposed):
    with mx.stream(mx.cpu):
        plain = steps_of(dtype, transposed)
        kernel, calls = make_emulated(language, "memory", module=sinkgd_kernel), []
        monkeypatch.setattr(sinkgd_kernel, "kernel", lambda text: calls.append(text) or kernel)
        monkeypatch.setattr(kernels, "usable", lambda module, *dtypes: module is sinkgd_kernel)
        for name, found in steps_of(dtype, transposed).items():
            assert found.dtype == dtype
            assert mx.array_equal(found, plain[name]), name
        assert len(calls) == 2 * len(SHAPES)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("k < VECTOR && k < rows", "k < VECTOR", "heap-buffer-overflow"),
        ("x[v][k] = column[v]", "x[k][v] = column[v]", "by transposed"),
        ("if (steps) y[v] =", "y[v] =", "that are not finite"),
        ("steps ? stepped", "true ? stepped", "that are not finite"),
    ],
)
def test_a_planted_fault_is_found_by_the_check_of_a_machine(found_with, old, new, says):
    assert says in found_with(sinkgd_kernel, old, new)


def test_the_check_of_a_machine_finds_nothing_where_nothing_is_wrong(emulated, monkeypatch):
    kernel = emulated("cuda", "memory", module=sinkgd_kernel)
    monkeypatch.setattr(sinkgd_kernel, "kernel", lambda text: kernel)
    assert sinkgd_kernel.differences(mx.bfloat16, mx.float32) is None


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_on_a_gpu_it_steps_as_plain_operations_do(dtype):
    assert sinkgd_kernel.differences(dtype, dtype) is None
