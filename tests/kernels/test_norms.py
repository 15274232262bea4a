"""The kernel of several arrays' squares against float64: its Metal and its CUDA text emulated, and on a GPU itself."""

import mlx.core as mx
import numpy as np
import pytest
from kernels.test_statistics import as_float64, same_bits, table
from kernels.views import VIEWS, Laid, laid

from ember_mlx import kernels
from ember_mlx.kernels import choice, metal_and_cuda, norms
from ember_mlx.optimizers import guarded
from ember_mlx.parity.tolerances import ROUNDING

ON_GPU = mx.default_device().type == mx.DeviceType.gpu
# One element, fewer than 8 (which Metal gets in another address space), one row, one column, odd sizes, and the edges
# of chunks; eight in all, as many as a launch takes on Metal.
SHAPES = [
    (1, 1),
    (1, 5),
    (5, 1),
    (7, 64),
    (1, norms.CHUNK),
    (norms.CHUNK + 1, 1),
    (3, norms.CHUNK // 2 + 5),
    (33, 1001),
] * (norms.ARRAYS // 8)


def assert_right(arrays, sums):
    """A thread adds as many squares to each of its sums as its walk has steps, and then come at most 24 additions."""
    chunks = [np.add.reduceat(squares_in_memory(array), np.arange(0, array.shape[0] * array.shape[1], norms.CHUNK))
              for array in arrays]  # fmt: skip
    expected = np.concatenate(chunks)
    assert sums.dtype == mx.float32
    assert sums.shape == expected.shape
    assert (np.abs(as_float64(sums) - expected) <= (16 * 4 + 24) * ROUNDING * expected).all()


def squares_in_memory(array):
    """In the order in which a dense one lies in memory, and others in rows."""
    values = as_float64(array)
    strides = array.bits.strides if isinstance(array, Laid) else values.strides
    dense_columns = strides[0] == array.itemsize and strides[1] == array.itemsize * array.shape[0]
    return (values.T if dense_columns else values).reshape(-1) ** 2


def of_ways(shapes, dtype, ways):
    return [laid(way, table(shape, dtype)) for shape, way in zip(shapes, ways, strict=True)]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 2e18])
def test_of_several_gradients_each_is_judged_by_its_own_numbers(emulated, monkeypatch, wrong):
    kernel, launches = emulated("metal", "memory", module=norms), []
    monkeypatch.setattr(norms, "kernel", lambda text: launches.append(text) or kernel)
    monkeypatch.setattr(kernels, "usable", lambda module, dtype: module is norms and dtype == mx.bfloat16)
    shapes = [(3,), (2, norms.CHUNK), (5,), (7, 64), (1,), (2, 3, 4)] * 2
    for place in (0, 1, 3, 11):
        gradients = [mx.ones(shape, mx.bfloat16) for shape in shapes] + [mx.ones((9,)), mx.full((9,), np.nan)]
        flat = gradients[place].reshape(-1)
        flat[-1] = wrong
        gradients[place] = flat.reshape(shapes[place])
        expected = [number not in (place, 13) for number in range(14)]
        assert [flag.item() for flag in guarded.safe_norms(gradients)] == expected
    assert len(launches) == 4 * -(-12 // norms.ARRAYS)


def test_gradients_without_axes_or_elements_are_judged_beside_others(emulated, monkeypatch):
    kernel = emulated("metal", "memory", module=norms)
    monkeypatch.setattr(norms, "kernel", lambda text: kernel)
    monkeypatch.setattr(kernels, "usable", lambda module, dtype: module is norms)
    gradients = [mx.array(1.0), mx.ones((5,)), mx.array(mx.nan), mx.zeros((0, 3)), mx.zeros((0,)), mx.array([mx.nan])]
    assert [flag.item() for flag in guarded.safe_norms(gradients)] == [True, True, False, True, True, False]


@pytest.mark.parametrize("traced", [False, True])
def test_each_flag_lies_where_metal_reads_a_constant(monkeypatch, traced):
    """Metal gets a view by its offset, which in the constant address space must be a multiple of 4 bytes."""
    squares = lambda arrays: mx.stack([mx.square(array).sum() for array in arrays])  # noqa: E731
    monkeypatch.setattr(norms, "sums_of_squares", squares)
    monkeypatch.setattr(kernels, "usable", lambda module, dtype: module is norms)
    with mx.stream(mx.cpu):
        safe_norms = mx.compile(guarded.safe_norms) if traced else guarded.safe_norms
        flags = safe_norms([mx.ones((3,)), mx.full((2, 3), mx.nan), mx.ones((4,))])
        assert [flag.item() for flag in flags] == [True, False, True]
        given = [np.array(metal_and_cuda.flag(flag), copy=False) for flag in flags]
    assert [flag.__array_interface__["data"][0] % 4 for flag in given] == [0, 0, 0]


@pytest.mark.parametrize("dtype", choice.DTYPES, ids=str)
def test_the_metal_text_is_right_touches_nothing_else_and_has_no_races(emulated, dtype):
    first = emulated("metal", "memory", module=norms)
    second = emulated("metal", "races", module=norms, backward=True)
    for way in ("rows", "columns"):
        arrays = of_ways(SHAPES, dtype, [way] * len(SHAPES))
        (sums,) = first(inputs=arrays, **norms.launch(arrays))
        assert_right(arrays, sums)
        assert same_bits([sums], second(inputs=arrays, **norms.launch(arrays)))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_arrays_may_lie_in_memory_in_any_way_and_the_cuda_text_gives_the_bits_of_the_metal_text(emulated, dtype):
    ways = ([*VIEWS] * norms.ARRAYS)[: norms.ARRAYS]
    arrays = of_ways([(41, 811)] * norms.ARRAYS, dtype, ways)
    outputs = [
        emulated(language, "memory", module=norms)(inputs=arrays, **norms.launch(arrays))
        for language in ("cuda", "metal")
    ]
    assert_right(arrays, outputs[0][0])
    assert same_bits(*outputs)


def test_fewer_arrays_are_filled_up(emulated, monkeypatch):
    kernel = emulated("cuda", "memory", module=norms)
    monkeypatch.setattr(norms, "kernel", lambda text: kernel)
    g = table((300, 400), mx.float32)
    for count in (1, 3):
        total = norms.sums_of_squares([g] * count).sum().item()
        assert total == pytest.approx(count * (as_float64(g) ** 2).sum(), rel=1e-6)


@pytest.mark.parametrize("special", [np.inf, np.nan])
def test_an_infinity_or_a_nan_anywhere_reaches_its_sum(emulated, special):
    arrays = [table((6, 50), mx.float32) for _ in range(norms.ARRAYS)]
    arrays[5][5, 49] = special
    (sums,) = emulated("cuda", "memory", module=norms)(inputs=arrays, **norms.launch(arrays))
    assert np.flatnonzero(~np.isfinite(as_float64(sums))).tolist() == [5]


def test_the_norm_of_all_gradients_is_the_same_with_the_kernel(emulated, monkeypatch):
    gradients = {
        "layers": [{"w": table((300, 300), dtype), "norm": table((1, 300), dtype)[0]} for dtype in choice.DTYPES],
        "experts": table((512, 300), mx.bfloat16).reshape(2, 256, 300),
    }
    expected = guarded.global_norm(gradients).item()
    kernel, calls = emulated("metal", "memory", module=norms), []
    monkeypatch.setattr(norms, "kernel", lambda text: calls.append(text) or kernel)
    monkeypatch.setattr("ember_mlx.kernels.usable", lambda kernel, *dtypes: kernel is kernels.norms)
    assert guarded.global_norm(gradients).item() == pytest.approx(expected, rel=1e-6)
    assert len(calls) == len(choice.DTYPES)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("squares_of_thread<CHUNK, VECTOR>(", "0 * squares_of_thread<CHUNK, VECTOR>("),
        ("row * row_step + column * column_step", "i + v"),
        ("(column_step == rows || columns == 1)", "true"),
        ("for (int k = 0; k < SIMDGROUPS; k++)", "for (int k = 1; k < SIMDGROUPS; k++)"),
    ],
)
def test_a_fault_is_found_on_first_use(found_with, old, new):
    assert found_with(norms, old, new, dtypes=[mx.bfloat16])


@pytest.mark.skipif(not ON_GPU, reason="no GPU")
@pytest.mark.parametrize("dtype", choice.DTYPES, ids=str)
def test_the_kernel_is_right_on_this_gpu(dtype):
    kernel = metal_and_cuda.kernel(norms.TEXT)
    arrays = [table(shape, dtype) for shape in SHAPES]
    outputs = kernel(inputs=arrays, **norms.launch(arrays))
    assert_right(arrays, outputs[0])
    assert same_bits(outputs, kernel(inputs=arrays, **norms.launch(arrays)))
    total = sum((as_float64(array) ** 2).sum() for array in arrays)
    for way in VIEWS:
        if "for all" not in way:
            views = [VIEWS[way](mx, array) for array in arrays]
            (sums,) = kernel(inputs=views, **norms.launch(views))
            assert as_float64(sums).sum() == pytest.approx(total, rel=1e-5)
