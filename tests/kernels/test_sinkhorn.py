"""The kernel of SinkGD's factors against float64: its text emulated, and itself where there is a GPU."""

import mlx.core as mx
import numpy as np
import pytest
from kernels.emulator import EmulationError
from kernels.test_statistics import as_float64, same_bits, table
from kernels.views import VIEWS, laid

from ember_mlx import kernels
from ember_mlx.kernels import choice, sinkhorn
from ember_mlx.optimizers import SinkGD
from ember_mlx.parity.tolerances import ROUNDING

ON_GPU = mx.default_device().type == mx.DeviceType.gpu
# Of one element, one row and one column; one threadgroup, several, and an incomplete last one, of rows and of columns;
# lines that are read several elements at once, or not, and that a simdgroup reads in several turns.
SHAPES = [(1, 1), (1, 5), (5, 1), (7, 64), (16, 8), (33, 17), (40, 24), (5, 520)]
EPS, PASSES = 0.25, 2


@pytest.fixture
def with_kernels(emulated, monkeypatch):
    """with_kernels(language, checks, plant=None, **options): the kernel is an emulated one; returns the calls so far.

    Threadgroups have two simdgroups, so that small matrices take several.
    """
    monkeypatch.setattr(sinkhorn, "MOST_THREADS", 64)

    def put(language, checks="memory", plant=None, **options):
        calls, run = [], emulated(language, checks, plant, sinkhorn, **options)

        def call(**arguments):
            calls.append(arguments["output_shapes"])
            return run(**arguments)

        monkeypatch.setattr(sinkhorn, "kernel", lambda text: call)
        return calls

    return put


def exact(g, passes):
    """The factors in float64, of (E, m, n)."""
    g = as_float64(g)
    a, b = np.ones(g.shape[:2]), np.ones((g.shape[0], g.shape[2]))
    for _ in range(passes):
        a = a * np.sqrt(g.shape[2]) / (a * np.linalg.norm(g * b[:, None], axis=2) + EPS)
        b = b * np.sqrt(g.shape[1]) / (b * np.linalg.norm(g * a[..., None], axis=1) + EPS)
    return a, b


def assert_right(g, found, passes=PASSES):
    """Each norm adds its own error, a rounding for each addition on its longest way, to those of the factors in it.

    A new factor has the error of its norm, at most that of the factor before it, and its own: 1, 2, 4, 7, ... times.
    """
    times = [0, 0]
    for _ in range(2 * passes):
        times.append(times[-1] + times[-2] + 1)
    tolerance = times[-1] * (min(max(g.shape), 300) + 32) * ROUNDING
    for actual, expected in zip(found, exact(g, passes), strict=True):
        assert actual.shape == expected.shape
        assert (np.abs(as_float64(actual) - expected) <= tolerance * expected).all()


def batch(way, dtype, shape):
    return laid(way, table(shape, dtype))[None]


@pytest.mark.parametrize(
    ("dtype", "way"), [(mx.bfloat16, "rows"), (mx.float16, "columns"), (mx.float32, "columns")], ids=str
)
def test_the_metal_texts_are_right_touch_nothing_else_and_have_no_races(with_kernels, dtype, way):
    shapes = [*SHAPES[:-1], SHAPES[-1] if way == "rows" else SHAPES[-1][::-1]]
    matrices = [batch(way, dtype, shape) for shape in shapes]
    with_kernels("metal")
    found = [sinkhorn.factors(g, PASSES, EPS) for g in matrices]
    for g, outputs in zip(matrices, found, strict=True):
        assert_right(g, outputs)
    with_kernels("metal", "races", backward=True)
    for g, outputs in zip(matrices[-3:-1], found[-3:-1], strict=True):
        assert same_bits(outputs, sinkhorn.factors(g, PASSES, EPS))


@pytest.mark.parametrize("passes", [1, 3])
def test_a_gradient_may_lie_in_memory_in_any_way(with_kernels, passes):
    with_kernels("cuda")
    for way in VIEWS:
        g = batch(way, mx.bfloat16, (21, 40))
        assert_right(g, sinkhorn.factors(g, passes, EPS), passes)


@pytest.mark.parametrize(("constant", "value"), [("AT_ONCE", 1), ("ACROSS", 4), ("AHEAD", 3)], ids=str)
def test_lines_are_right_in_any_cut(with_kernels, monkeypatch, constant, value):
    monkeypatch.setattr(sinkhorn, constant, value)
    with_kernels("cuda")
    for way in ("rows", "columns"):
        g = batch(way, mx.bfloat16, (24, 40))
        assert_right(g, sinkhorn.factors(g, PASSES, EPS))


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_are_matrices_each(with_kernels, transposed):
    experts = mx.stack([table((19, 24), mx.float32) * scale for scale in (1, 0.1, 10)])
    if transposed:
        experts = mx.contiguous(experts.swapaxes(1, 2)).swapaxes(1, 2)
    with_kernels("cuda")
    assert_right(experts, sinkhorn.factors(experts, PASSES, EPS))


@pytest.mark.parametrize("way", ["rows", "columns"])
def test_the_cuda_texts_give_the_bits_of_the_metal_texts(with_kernels, way):
    g, outputs = batch(way, mx.bfloat16, (33, 24)), []
    for how in (("metal", "memory"), ("cuda", "memory"), ("cuda", "races")):
        with_kernels(*how)
        outputs.append(sinkhorn.factors(g, PASSES, EPS))
    assert same_bits(outputs[0], outputs[1])
    assert same_bits(outputs[0], outputs[2])


@pytest.mark.parametrize("way", ["rows", "columns"])
def test_a_silent_row_and_a_silent_column_have_the_factor_0(with_kernels, way):
    g = table((37, 40), mx.float32)
    g[3], g[:, 30] = 0, 0
    with_kernels("metal")
    a, b = sinkhorn.factors(laid(way, g)[None], PASSES, EPS)
    assert np.flatnonzero(as_float64(a[0]) == 0).tolist() == [3]
    assert np.flatnonzero(as_float64(b[0]) == 0).tolist() == [30]


def test_sinkgd_with_the_kernels_steps_as_with_plain_operations(with_kernels, monkeypatch):
    g, w = table((33, 33), mx.bfloat16), table((80, 20), mx.float32).reshape(2, 40, 20)
    gradients, weights = {"w": g, "experts": w}, {"w": mx.zeros(g.shape), "experts": w}
    expected = SinkGD(0.5, passes=3).apply_gradients(gradients, weights)
    calls = with_kernels("metal")
    monkeypatch.setattr("ember_mlx.kernels.usable", lambda kernel, *dtypes: kernel is sinkhorn)
    stepped = SinkGD(0.5, passes=3).apply_gradients(gradients, weights)
    assert calls == [*([[(1, 33)], [(1, 33)]] * 3), *([[(2, 40)], [(2, 20)]] * 3)]
    for name in weights:
        np.testing.assert_allclose(np.array(stepped[name]), np.array(expected[name]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "plant",
    [
        ("* weight[v]) * (x", ") * (x"),
        ("before * norm + eps", "norm + eps"),
        ("int k = 0; k < SIMDGROUPS; k++) sum +=", "int k = 1; k < SIMDGROUPS; k++) sum +="),
        ("has_before = options[1] != 0", "has_before = false"),
        ("j >= length ? 0.0f", "j >= length ? 1.0f"),
        ("add_squares<VECTOR>(wide, weight[l], sums)", "add_squares<VECTOR>(wide, 1.0f, sums)"),
    ],
)
def test_differences_finds_a_fault(with_kernels, plant):
    with_kernels("cuda", plant=plant)
    assert "are off by" in sinkhorn.differences(mx.float16)


def test_sums_that_are_read_before_the_others_have_written_theirs_are_a_race(with_kernels):
    with_kernels("cuda", "races", plant=("    threadgroup_barrier(mem_flags::mem_threadgroup);\n", ""))
    with pytest.raises(EmulationError, match="race"):
        sinkhorn.factors(batch("rows", mx.bfloat16, (40, 24)), PASSES, EPS)


def test_differences_finds_nothing_where_nothing_is_wrong(with_kernels):
    with_kernels("cuda")
    assert sinkhorn.differences(mx.bfloat16) is None


@pytest.mark.skipif(not ON_GPU, reason="no GPU")
@pytest.mark.parametrize("dtype", choice.DTYPES, ids=str)
def test_the_kernels_are_right_on_this_gpu(dtype):
    assert kernels.usable(sinkhorn, dtype)
    for shape in [*SHAPES, (1000, 7168)]:
        for view in VIEWS.values():
            g = view(mx, table(shape, dtype))[None]
            assert_right(g, sinkhorn.factors(g, PASSES, EPS))
