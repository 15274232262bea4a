"""The kernels of SinkGD's factors against float64: their texts emulated, and themselves where there is a GPU."""

from types import SimpleNamespace

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
# Of one element, one row and one column; one band, several, and an incomplete last one, of rows and of columns; rows
# that are read several elements at once, or not, and that fill a threadgroup twice.
SHAPES = [(1, 1), (1, 5), (5, 1), (7, 64), (16, 8), (33, 17), (40, 24), (5, 520)]
EPS, PASSES = 0.25, 2


@pytest.fixture
def with_kernels(emulated, monkeypatch):
    """with_kernels(language, checks, plant=None, **options): both kernels are emulated ones; returns the calls so far.

    A fault is planted where its text is. Matrices of a few rows have several bands, and threadgroups few threads.
    """
    small = {"SHARE_OF_SMALL": 8, "ROWS": 4, "MOST_THREADS": 64, "STEP_OF_THREADS": 64, "THREADGROUPS": 8}
    for name, value in small.items():
        monkeypatch.setattr(sinkhorn, name, value)

    def put(language, checks="memory", plant=None, **options):
        calls, made = [], {}

        def kernel(text):
            calls.append(text.name)
            if text not in made:
                here = plant if plant and plant[0] in text.source + text.functions else None
                made[text] = emulated(language, checks, here, SimpleNamespace(TEXT=text), **options)
            return made[text]

        monkeypatch.setattr(sinkhorn, "kernel", kernel)
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


@pytest.mark.parametrize(
    ("constant", "value"), [("MOST_REGISTERS", 0), ("MOST_AHEAD", 3), ("MOST_UNDER_WAY", 4)], ids=str
)
def test_rows_too_wide_for_registers_are_read_twice_and_others_in_any_cut(with_kernels, monkeypatch, constant, value):
    monkeypatch.setattr(sinkhorn, constant, value)
    with_kernels("cuda")
    for way in ("rows", "columns"):
        g = batch(way, mx.bfloat16, (24, 40))
        assert_right(g, sinkhorn.factors(g, PASSES, EPS))


def test_rows_and_columns_that_take_other_numbers_of_vectors_are_right_in_both_ways(with_kernels):
    with_kernels("metal")
    for way in ("rows", "columns"):
        g = batch(way, mx.float32, (264, 12))
        assert dict(sinkhorn.launch(g)["template"])["ALIKE"] == 0
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


@pytest.mark.parametrize("dtype", choice.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4096, 12288), (12288, 4096), (3072, 1024), (1024, 1024), (1024, 3072)])
def test_sums_of_bands_are_a_small_share_of_the_gradient(dtype, shape):
    g = SimpleNamespace(shape=(1, *shape), dtype=dtype, itemsize=dtype.size, size=shape[0] * shape[1])
    share = sinkhorn.SHARE_OF_SMALL if g.size * g.itemsize < sinkhorn.SMALL else sinkhorn.SHARE
    (sums,) = sinkhorn.launch(g)["output_shapes"][1]
    assert sums * 4 <= g.size * g.itemsize / share
    assert g.size * g.itemsize < 2**25 or sinkhorn.Layout.of(g).groups >= sinkhorn.THREADGROUPS / 2


def test_sinkgd_with_the_kernels_steps_as_with_plain_operations(with_kernels, monkeypatch):
    g, w = table((33, 33), mx.bfloat16), table((80, 20), mx.float32).reshape(2, 40, 20)
    gradients, weights = {"w": g, "experts": w}, {"w": mx.zeros(g.shape), "experts": w}
    expected = SinkGD(0.5, passes=3).apply_gradients(gradients, weights)
    calls = with_kernels("metal")
    monkeypatch.setattr("ember_mlx.kernels.usable", lambda kernel, *dtypes: kernel is sinkhorn)
    stepped = SinkGD(0.5, passes=3).apply_gradients(gradients, weights)
    assert len(calls) == 2 * (4 + 3)
    for name in weights:
        np.testing.assert_allclose(np.array(stepped[name]), np.array(expected[name]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "plant",
    [
        ("* weight[v]) * (x", ") * (x"),
        ("before * norm + eps", "norm + eps"),
        ("int k = 0; k < SIMDGROUPS; k++) sum +=", "int k = 1; k < SIMDGROUPS; k++) sum +="),
        ("turned ? !first_stage : !last_stage", "!last_stage"),
    ],
)
def test_differences_finds_a_fault(with_kernels, plant):
    with_kernels("cuda", plant=plant)
    assert "are off by" in sinkhorn.differences(mx.float16)


def test_sums_that_other_simdgroups_still_read_are_a_race(with_kernels):
    with_kernels("cuda", "races", plant=("side = 1 - side", "side = 0"))
    with pytest.raises(EmulationError, match="race"):
        sinkhorn.factors(batch("rows", mx.bfloat16, (33, 520)), PASSES, EPS)


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
