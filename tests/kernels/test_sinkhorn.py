"""The kernel of one pass against float64: its Metal and its CUDA text emulated, and itself where there is a GPU."""

from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from kernels.test_statistics import as_float64, same_bits, table
from kernels.views import VIEWS, laid

from ember_mlx import kernels
from ember_mlx.kernels import choice, metal_and_cuda, sinkhorn
from ember_mlx.optimizers import SinkGD
from ember_mlx.parity.tolerances import ROUNDING

ON_GPU = mx.default_device().type == mx.DeviceType.gpu
ROWS = sinkhorn.MOST_ROWS
SHAPES = [(1, 1), (1, 5), (5, 1), (7, 64), (ROWS, 8), (ROWS + 1, 33), (2 * ROWS + 2, 20), (3, 1024), (6, 4104)]
EPS = 0.25


def inputs_for(matrices):
    """Of (E, m, n): themselves, factors of rows and columns, and eps."""
    count, rows, columns = matrices.shape
    random = np.random.RandomState(1)
    a, b = (mx.array(random.uniform(0.5, 2, size=(count, n)).astype(np.float32)) for n in (rows, columns))
    return [matrices, a, b, mx.array([EPS], mx.float32)]


def assert_right(inputs, new_a, column_sums):
    """All numbers added are positive: a sum is off by at most one rounding an addition on the longest way, and more."""
    g, a, b, _ = map(as_float64, inputs)
    count, _, columns = g.shape
    norms = np.linalg.norm(g * b[:, None], axis=2)
    expected = a * np.sqrt(columns) / (a * norms + EPS)
    tolerance = (min(columns, 300) + ROWS + 20) * ROUNDING
    assert (np.abs(as_float64(new_a) - expected) <= tolerance * expected).all()
    sums = ((g * expected[..., None]) ** 2).sum(axis=1)
    column_sums = as_float64(column_sums).reshape(count, -1, columns).sum(axis=1)
    assert (np.abs(column_sums - sums) <= 3 * tolerance * sums).all()


@pytest.fixture
def pass_of(emulated):
    """As ``emulated``, of this kernel; called with its inputs."""

    def make(*language_and_checks, **options):
        return partial(one_pass, emulated(*language_and_checks, module=sinkhorn, **options))

    return make


@pytest.fixture
def kernels_of(emulated, monkeypatch):
    """Both kernels of a pass are emulated ones, with a fault planted where its text is; returns the calls so far."""

    def put(language, plant=None):
        calls = []

        def kernel(text):
            calls.append(text.name)
            here = plant if plant and plant[0] in text.source + text.functions else None
            return emulated(language, "memory", here, SimpleNamespace(TEXT=text))

        monkeypatch.setattr(sinkhorn, "kernel", kernel)
        return calls

    return put


def one_pass(kernel, inputs):
    """The new row factors, and the sums of columns by bands of rows."""
    g, a, b, eps = inputs
    return kernel(inputs=[g, b, a, eps], **sinkhorn.launch(g))


@pytest.mark.parametrize("way", ["rows", "columns"])
@pytest.mark.parametrize("dtype", choice.DTYPES, ids=str)
def test_the_metal_text_is_right_touches_nothing_else_and_has_no_races(pass_of, dtype, way):
    first, second = pass_of("metal", "memory"), pass_of("metal", "races", backward=True)
    for shape in SHAPES:
        inputs = inputs_for(laid(way, table(shape, dtype))[None])
        outputs = first(inputs)
        assert_right(inputs, *outputs)
        assert same_bits(outputs, second(inputs))


@pytest.mark.parametrize("way", VIEWS)
def test_a_gradient_may_lie_in_memory_in_any_way(pass_of, way):
    inputs = inputs_for(laid(way, table((ROWS + 1, 40), mx.bfloat16))[None])
    assert_right(inputs, *pass_of("cuda", "memory")(inputs))


@pytest.mark.parametrize(("constant", "value"), [("REGISTERS", 0), ("MOST_AHEAD", 2)], ids=str)
def test_rows_too_wide_for_registers_are_read_twice_and_others_in_any_cut(pass_of, monkeypatch, constant, value):
    monkeypatch.setattr(sinkhorn, constant, value)
    inputs = inputs_for(table((ROWS + 5, 40), mx.bfloat16)[None])
    assert_right(inputs, *pass_of("cuda", "memory")(inputs))


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_are_matrices_each(pass_of, transposed):
    experts = mx.stack([table((ROWS + 3, 33), mx.float32) * scale for scale in (1, 0.1, 10)])
    if transposed:
        experts = mx.contiguous(experts.swapaxes(1, 2)).swapaxes(1, 2)
    inputs = inputs_for(experts)
    assert_right(inputs, *pass_of("cuda", "memory")(inputs))


@pytest.mark.parametrize("way", ["rows", "columns"])
def test_the_cuda_text_gives_the_bits_of_the_metal_text(pass_of, way):
    inputs = inputs_for(laid(way, table((ROWS + 1, 33), mx.bfloat16))[None])
    outputs = [pass_of(*how)(inputs) for how in (("metal", "memory"), ("cuda", "memory"), ("cuda", "races"))]
    assert same_bits(outputs[0], outputs[1])
    assert same_bits(outputs[0], outputs[2])


@pytest.mark.parametrize("way", ["rows", "columns"])
def test_a_silent_row_has_the_factor_0_and_a_nan_stays_in_its_row(pass_of, way):
    g = table((ROWS + 5, 40), mx.float32)
    g[3], g[7, 2] = 0, mx.nan
    new_a, column_sums = pass_of("metal", "memory")(inputs_for(laid(way, g)[None]))
    assert np.flatnonzero(as_float64(new_a[0]) == 0).tolist() == [3]
    assert np.flatnonzero(np.isnan(as_float64(new_a[0]))).tolist() == [7]
    assert np.isfinite(as_float64(column_sums[0, 1:])).all()


def test_sinkgd_with_the_kernel_steps_as_with_plain_operations(kernels_of, monkeypatch):
    g, w = table((ROWS + 1, 33), mx.bfloat16), table((80, 20), mx.float32).reshape(2, 40, 20)
    gradients, weights = {"w": g, "experts": w}, {"w": mx.zeros(g.shape), "experts": w}
    expected = SinkGD(0.5, passes=3).apply_gradients(gradients, weights)
    calls = kernels_of("metal")
    monkeypatch.setattr("ember_mlx.kernels.usable", lambda kernel, *dtypes: kernel is sinkhorn)
    stepped = SinkGD(0.5, passes=3).apply_gradients(gradients, weights)
    assert len(calls) == 12
    for name in weights:
        np.testing.assert_allclose(np.array(stepped[name]), np.array(expected[name]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "plant",
    [
        ("* weight[v]) * (x", ") * (x"),
        ("before * norm + eps", "norm + eps"),
        ("int k = 1; k < SIMDGROUPS", "int k = 2; k < SIMDGROUPS"),
        ("k * apart < columns) read", "k * apart < columns - 1) read"),
        ("i + of_lane < rows", "i + of_lane < rows - 1"),
    ],
)
def test_differences_finds_a_fault(kernels_of, plant):
    kernels_of("cuda", plant)
    assert "are off by" in sinkhorn.differences(mx.float16)


def test_differences_finds_nothing_where_nothing_is_wrong(kernels_of):
    kernels_of("cuda")
    assert sinkhorn.differences(mx.bfloat16) is None


@pytest.mark.skipif(not ON_GPU, reason="no GPU")
@pytest.mark.parametrize("dtype", choice.DTYPES, ids=str)
def test_the_kernel_is_right_on_this_gpu(dtype):
    assert kernels.usable(sinkhorn, dtype)
    kernel = metal_and_cuda.kernel(sinkhorn.TEXT)
    for shape in [*SHAPES, (1000, 7168)]:
        for view in VIEWS.values():
            inputs = inputs_for(view(mx, table(shape, dtype))[None])
            assert_right(inputs, *one_pass(kernel, inputs))
