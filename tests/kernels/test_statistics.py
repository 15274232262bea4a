"""The statistics kernel against float64: its Metal and its CUDA text emulated, and itself where there is a GPU."""

import re

import mlx.core as mx
import numpy as np
import pytest
from kernels.views import SAME_NUMBERS, VIEWS, Laid, laid

from ember_mlx import Ember
from ember_mlx.kernels import choice, metal_and_cuda, statistics
from ember_mlx.parity.tolerances import ROUNDING

ON_GPU = mx.default_device().type == mx.DeviceType.gpu
ROWS = statistics.ROWS

# Edges: one element, one row, one column, fewer than 8 elements (which Metal gets in another address space), a whole
# threadgroup and one row more, every number of rows left over, and columns that the threads take in one, two or three
# goes, with and without some left over.
SHAPES = [(1, 1), (1, 5), (5, 1), (3, 2), (7, 64), (ROWS, 8), (ROWS + 1, 33), (2 * ROWS + 2, 20), (3, 1024), (6, 4101)]


def table(shape, dtype):
    """Random numbers whose rows, and whose columns, differ in scale."""
    random = np.random.RandomState(0)
    scale = np.exp2(random.randint(-3, 3, size=(shape[0], 1)) + random.randint(-3, 3, size=(1, shape[1])))
    return mx.array(random.uniform(-1, 1, size=shape) * scale).astype(dtype)


def as_float64(array):
    array = array.as_mlx() if isinstance(array, Laid) else array
    return np.array(array.astype(mx.float32)).astype(np.float64)


def assert_right(g, row_means, column_sums):
    """All numbers added are positive, so a sum is off by at most one rounding for each addition on the longest way."""
    squares = as_float64(g) ** 2
    expected = squares.mean(axis=1)
    simdgroups = statistics.launch(g)["threadgroup"][0] // 32
    additions = g.shape[1] // simdgroups + simdgroups + 16
    assert row_means.dtype == column_sums.dtype == mx.float32
    assert (np.abs(as_float64(row_means) - expected) <= min(additions, 300) * ROUNDING * expected).all()
    expected = np.add.reduceat(squares, np.arange(0, len(squares), ROWS), axis=0)
    assert column_sums.shape == expected.shape
    assert (np.abs(as_float64(column_sums) - expected) <= (ROWS + 1) * ROUNDING * expected).all()


def same_bits(first, second):
    return all(mx.array_equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("way", ["rows", "columns"])
@pytest.mark.parametrize("dtype", choice.DTYPES, ids=str)
def test_the_metal_text_is_right_touches_nothing_else_and_has_no_races(emulated, dtype, way):
    first, second = emulated("metal", "memory"), emulated("metal", "races", backward=True)
    for shape in SHAPES:
        g = laid(way, table(shape, dtype))
        outputs = first(inputs=[g], **statistics.launch(g))
        assert_right(g, *outputs)
        assert same_bits(outputs, second(inputs=[g], **statistics.launch(g)))


@pytest.mark.parametrize("way", SAME_NUMBERS)
def test_a_gradient_may_lie_in_memory_in_any_way(emulated, way):
    g = laid(way, table((ROWS + 1, 40), mx.bfloat16))
    assert_right(g, *emulated("cuda", "memory")(inputs=[g], **statistics.launch(g)))


def test_a_gradient_may_be_one_row_for_all(emulated):
    g = laid("one row for all", table((ROWS + 1, 33), mx.bfloat16))
    assert_right(g, *emulated("cuda", "memory")(inputs=[g], **statistics.launch(g)))


@pytest.mark.parametrize("way", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_the_cuda_text_gives_the_bits_of_the_metal_text(emulated, dtype, way):
    for shape in [(1, 1), (3, 1024), (ROWS + 1, 33)]:
        g = laid(way, table(shape, dtype))
        outputs = [
            emulated(language, checks)(inputs=[g], **statistics.launch(g))
            for language, checks in [("metal", "memory"), ("cuda", "memory"), ("cuda", "races")]
        ]
        assert same_bits(outputs[0], outputs[1])
        assert same_bits(outputs[0], outputs[2])


def test_the_signature_is_the_one_the_text_counts_on(emulated):
    def signature(shape):
        g = mx.zeros(shape, mx.bfloat16)
        text = emulated("metal", "memory").text(g, **statistics.launch(g))
        return re.search(r"\[\[kernel\]\] void \w+\(\n(.*?)\) \{", text, re.DOTALL)[1].splitlines()

    assert [line.strip() for line in signature((4, 2))] == [
        "const device bfloat16_t* g [[buffer(0)]],",
        "const constant int* g_shape [[buffer(1)]],",
        "const constant int64_t* g_strides [[buffer(2)]],",
        "device float* row_means [[buffer(3)]],",
        "device float* column_sums [[buffer(4)]],",
        "uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],",
        "uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],",
        "uint3 thread_position_in_threadgroup [[thread_position_in_threadgroup]],",
        "uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]],",
        "uint3 threads_per_threadgroup [[threads_per_threadgroup]]",
    ]
    assert signature((7, 1))[0].strip() == "const constant bfloat16_t* g [[buffer(0)]],"


@pytest.mark.parametrize("special", [np.inf, np.nan])
def test_an_infinity_or_a_nan_reaches_its_own_row_and_column_alone(emulated, special):
    g = table((6, 50), mx.float32)
    g[4, 3] = special
    row_means, column_sums = emulated("metal", "memory")(inputs=[g], **statistics.launch(g))
    assert np.flatnonzero(~np.isfinite(as_float64(row_means))).tolist() == [4]
    assert np.flatnonzero(~np.isfinite(as_float64(column_sums[0]))).tolist() == [3]


def test_ember_with_the_kernel_steps_as_with_plain_operations(emulated, monkeypatch):
    g, w = table((ROWS + 1, 33), mx.bfloat16), table((ROWS + 1, 33), mx.float32)
    plain, with_kernel = Ember(0.5), Ember(0.5)
    expected = plain.apply_gradients({"w": g}, {"w": w})["w"]
    kernel, calls = emulated("metal", "memory"), []
    monkeypatch.setattr(statistics, "kernel", lambda text: calls.append(text) or kernel)
    monkeypatch.setattr("ember_mlx.kernels.usable", lambda kernel, *dtypes: kernel is statistics)
    stepped = with_kernel.apply_gradients({"w": g}, {"w": w})["w"]
    assert len(calls) == 1
    np.testing.assert_allclose(np.array(stepped), np.array(expected), rtol=0, atol=1e-4)


@pytest.mark.skipif(not ON_GPU, reason="no GPU")
@pytest.mark.parametrize("dtype", choice.DTYPES, ids=str)
def test_the_kernel_is_right_on_this_gpu(dtype):
    kernel = metal_and_cuda.kernel(statistics.TEXT)
    for shape in [*SHAPES, (5000, 576), (1000, 7168)]:
        g = table(shape, dtype)
        outputs = kernel(inputs=[g], **statistics.launch(g))
        assert_right(g, *outputs)
        assert same_bits(outputs, kernel(inputs=[g], **statistics.launch(g)))
        for way in SAME_NUMBERS:  # whose bits differ: the compiler contracts other products where it reads otherwise
            assert_right(g, *kernel(inputs=[VIEWS[way](mx, g)], **statistics.launch(g)))


@pytest.mark.skipif(not ON_GPU, reason="no GPU")
def test_the_gradient_of_an_untied_head_is_not_copied_on_this_gpu():
    rows, columns = 20_000, 512
    g = mx.contiguous(mx.random.normal((columns, rows))).T
    mx.eval(g, statistics.mean_squares(g))
    mx.clear_cache()  # a cached buffer may serve a smaller array, and counts whole
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(statistics.mean_squares(g))
    assert mx.get_peak_memory() - before < 0.1 * g.nbytes


@pytest.mark.parametrize("language", ["metal", "cuda"])
def test_the_check_of_a_machine_finds_nothing_in_the_means_of_squares_and_of_magnitudes(
    emulated, monkeypatch, language
):
    kernel = emulated(language, "memory")
    monkeypatch.setattr(statistics, "kernel", lambda text: kernel)
    assert statistics.differences(mx.bfloat16) is None


def test_the_check_of_a_machine_sees_squares_for_magnitudes(emulated, monkeypatch):
    kernel = emulated("cuda", "memory", ("MAGNITUDES ? fabs(x[v]) : ", ""))
    monkeypatch.setattr(statistics, "kernel", lambda text: kernel)
    assert "means of magnitudes" in statistics.differences(mx.bfloat16)
