"""The update with stochastic rounding: its Metal and its CUDA text emulated, and itself where there is a GPU."""

import mlx.core as mx
import numpy as np
import pytest
from kernels.emulator import EmulatedKernel, EmulationError
from kernels.views import SAME_NUMBERS, VIEWS, laid

from ember_mlx.kernels import choice, metal_and_cuda, rounding
from ember_mlx.kernels.stochastic_rounding import bit_keys, random_bits, round_stochastically, table_seed
from ember_mlx.optimizers.ember import ember_step, update_table

ON_GPU = mx.default_device().type == mx.DeviceType.gpu
TILE = rounding.TILE_BYTES // 4, rounding.COLUMNS  # rows and columns, of a float32 gradient
VECTORS, SINGLES = rounding.COLUMNS + 8, rounding.COLUMNS + 5  # columns that allow reading several at once, or do not
# Fewer than 8 elements, which Metal gets in another address space; a part of a tile, two whole ones, and one row and
# some columns more than one.
SHAPES = [(1, 5), (7, 33), (2 * TILE[0], TILE[1]), (TILE[0] + 1, TILE[1] + 3)]
DTYPES = [mx.bfloat16, mx.float16]


def values(shape):
    """Of all sizes, with those that no rounding may change."""
    random = np.random.RandomState(0)
    table = random.uniform(-1, 1, size=shape) * np.exp2(random.randint(-40, 18, size=shape))
    special = [np.nan, np.inf, -np.inf, 0, 65535, -3.4e38, 2**-14][: table.size - 1]
    table.flat[table.size - len(special) :] = special
    return mx.array(table.astype(np.float32))


def keys_of(shape):
    return bit_keys(table_seed(3, 1), mx.array(9), *shape)


def run(kernel, x, dtype, way):
    """The kernel's rounding of x alone: from weights of zero, by factors of one and a learning rate of one."""
    w, ones = mx.zeros(x.shape, dtype), [mx.ones(length) for length in x.shape]
    g = laid(way, -x) if isinstance(kernel, EmulatedKernel) else VIEWS[way](mx, -x)
    return updated(kernel, w, g, *ones, 1.0, 2.0**-126, 0.0, keys_of(x.shape))


def updated(kernel, *arguments):
    """``rounding.update_table`` with that kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "kernel", lambda text: kernel)
        return rounding.update_table(*arguments)


def step(columns, g_dtype=mx.bfloat16):
    """The arguments of an update of two tiles of rows by two of columns, all numbers general."""
    random = np.random.RandomState(1)
    shape = rounding.TILE_BYTES // g_dtype.size + 3, columns
    w, g = (mx.array(random.uniform(-1, 1, size=shape)).astype(dtype) for dtype in (mx.bfloat16, g_dtype))
    a, b = (mx.array(random.uniform(0.5, 2, size=length).astype(np.float32)) for length in shape)
    return w, g, a, b, 0.1, 1e-8, 0.1, keys_of(shape)


@pytest.mark.parametrize(
    ("dtype", "language", "checks", "way"),
    [
        (mx.bfloat16, "metal", "memory", "rows"),
        (mx.bfloat16, "metal", "races", "columns"),
        (mx.bfloat16, "cuda", "memory", "rows"),
        (mx.float16, "metal", "memory", "every second element"),
        (mx.float16, "cuda", "races", "rows"),
    ],
    ids=str,
)
def test_the_texts_round_as_plain_operations_do_touch_nothing_else_and_have_no_races(
    emulated, dtype, language, checks, way
):
    kernel = emulated(language, checks, module=rounding, backward=way == "columns")
    for shape in SHAPES:
        x = values(shape)
        expected = round_stochastically(x, random_bits(*keys_of(shape)), dtype)
        assert mx.array_equal(run(kernel, x, dtype, way), expected, equal_nan=True)


@pytest.mark.parametrize("g_dtype", [mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("columns", [VECTORS, SINGLES])
def test_both_tables_may_lie_in_memory_in_any_way(emulated, columns, g_dtype):
    kernel = emulated("cuda", "memory", module=rounding)
    w, g, *others = step(columns, g_dtype)
    expected = update_table(w, g, *others)
    for way in SAME_NUMBERS:
        for tables in ((laid(way, w), g), (w, laid(way, g)), (laid(way, w), laid(way, g))):
            assert mx.array_equal(updated(kernel, *tables, *others), expected), way


def test_a_gradient_may_be_one_row_for_all_or_one_number(emulated):
    kernel = emulated("cuda", "memory", module=rounding)
    w, g, *others = step(VECTORS)
    for way in ("one row for all", "one number for all"):
        same = laid(way, g)
        assert mx.array_equal(updated(kernel, w, same, *others), update_table(w, same.as_mlx(), *others))


WIDER, SECOND, ODD = "rows of a wider table", "every second element", "from an odd place"
BEGIN_OF_W, BEGIN_OF_G = "aligned<VECTOR>(w + first_row * w_row + j)", "aligned<VECTOR>(g + first_row * g_row + j)"
WRONG, MISALIGNED, OVERFLOW = "", "misaligned address", "heap-buffer-overflow"
# The text that is replaced, what stands there instead, how w and g lie, how many columns they have, and what is found.
FAULTS = {
    "threads beyond the last column": ("left >= VECTOR && ", "", "rows", "rows", VECTORS, OVERFLOW),
    "new rows begin anywhere": ("columns % VECTOR == 0", "true", WIDER, WIDER, SINGLES, MISALIGNED),
    "columns of w apart": ("w_column == 1", "true", SECOND, "rows", VECTORS, WRONG),
    "rows of w begin anywhere": ("w_row % VECTOR == 0", "true", WIDER, "rows", VECTORS, MISALIGNED),
    "w begins anywhere": (BEGIN_OF_W, "true", ODD, "rows", VECTORS, MISALIGNED),
    "columns of g apart": ("g_column == 1 &&", "true &&", "rows", SECOND, VECTORS, WRONG),
    "rows of g begin anywhere": ("g_row % VECTOR == 0", "true", "rows", WIDER, VECTORS, MISALIGNED),
    "g begins anywhere": (BEGIN_OF_G, "true", "rows", ODD, VECTORS, MISALIGNED),
    "rows past the last": ("i < rows; i += DOWN", "i < ROWS; i += DOWN", "rows", "rows", SINGLES, OVERFLOW),
    "columns past the last": ("v < VECTOR && v < left", "v < VECTOR", "rows", "rows", SINGLES, OVERFLOW),
    "rows past the last, turned": ("? rows - i : 0", "? VECTOR : 0", "rows", "columns", SINGLES, OVERFLOW),
    "columns past the last, turned": ("+ column < columns", "+ 0 < columns", "rows", "columns", SINGLES, OVERFLOW),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(emulated, fault):
    old, new, w_way, g_way, columns, says = FAULTS[fault]
    w, g, *others = step(columns)
    kernel = emulated("cuda", "memory", (old, new), module=rounding)
    tables = laid(w_way, w), laid(g_way, g)
    if says:
        with pytest.raises(EmulationError, match=says):
            updated(kernel, *tables, *others)
    else:
        assert not mx.array_equal(updated(kernel, *tables, *others), update_table(w, g, *others))


def test_a_missing_barrier_is_found(emulated):
    plant = "threadgroup_barrier(mem_flags::mem_threadgroup);", ""
    w, g, *others = step(SINGLES)
    with pytest.raises(EmulationError, match="data race|never written"):
        updated(emulated("metal", "races", plant, module=rounding), w, laid("columns", g), *others)


def test_ember_with_the_kernel_steps_as_with_plain_operations(emulated, monkeypatch):
    random = np.random.RandomState(1)
    shape = SHAPES[-1]
    g, w = (mx.array(random.uniform(-1, 1, size=shape)).astype(mx.bfloat16) for _ in range(2))
    state = mx.zeros(shape[0]), mx.zeros(shape[1])
    arguments = (w, g, *state, mx.array(1))
    options = {"learning_rate": 0.1, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    options |= {"row_clip": 0.5, "row_floor": 1.0, "seed": table_seed(0, 0)}
    expected = ember_step(*arguments, **options)
    kernel, calls = emulated("metal", "memory", module=rounding), []
    monkeypatch.setattr(rounding, "kernel", lambda text: calls.append(text) or kernel)
    monkeypatch.setattr("ember_mlx.kernels.usable", lambda kernel, *dtypes: kernel is rounding)
    found = ember_step(*arguments, **options)
    assert calls
    assert all(mx.array_equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_kernel_that_rounds_otherwise_is_told_from_one_that_does_not(monkeypatch, dtype):
    def to_nearest(w, g, a, b, learning_rate, eps, weight_decay, keys):
        return update_table(w, g, a, b, learning_rate, eps, weight_decay)

    monkeypatch.setattr("ember_mlx.kernels.usable", lambda kernel, *dtypes: False)
    monkeypatch.setattr(rounding, "update_table", update_table)
    assert rounding.differences(dtype, mx.float32) is None
    monkeypatch.setattr(rounding, "update_table", to_nearest)
    assert "rounded otherwise to mlx.core" in rounding.differences(dtype, mx.float32)


# Where the text reads a table, a factor or a key: several at once, from a turned tile, and one by one.
READINGS = [
    ("read_together<VECTOR>(w + row * w_row + j, y)", "read_together<VECTOR>(w + first_row * w_row + j, y)"),
    ("read_together<VECTOR>(g + row * g_row + j, x)", "read_together<VECTOR>(g + first_row * g_row + j, x)"),
    ("x[v] = static_cast<float>(turned[across + v][i])", "x[v] = static_cast<float>(turned[across][i])"),
    ("a_i, b_j[v], key_i ^ key_j[v]", "a_i, b_j[0], key_i ^ key_j[v]"),
    ("a_i, b_j[v], key_i ^ key_j[v]", "a_i, b_j[v], key_i ^ key_j[0]"),
    ("static_cast<G>(turned[across + v][i])", "static_cast<G>(turned[across][i])"),
    ("static_cast<float>(w[row * w_row + (j + v) * w_column])", "static_cast<float>(w[row * w_row + j * w_column])"),
    ("g[row * g_row + (j + v) * g_column]", "g[row * g_row + j * g_column]"),
    ("a_i, b[j + v], key_i ^ column_keys[j + v]", "a_i, b[j], key_i ^ column_keys[j + v]"),
    ("a_i, b[j + v], key_i ^ column_keys[j + v]", "a_i, b[j + v], key_i ^ column_keys[j]"),
    ("a_i = a[row]", "a_i = a[first_row]"),
    ("key_i = row_keys[row]", "key_i = row_keys[first_row]"),
]


@pytest.mark.parametrize("plant", [None, *READINGS], ids=str)
def test_the_check_of_a_machine_sees_what_each_path_reads(emulated, monkeypatch, plant):
    kernel = emulated("metal", "races", plant, module=rounding)
    monkeypatch.setattr(rounding, "kernel", lambda text: kernel)
    assert (rounding.differences(mx.bfloat16, mx.bfloat16) is None) == (plant is None)


@pytest.mark.skipif(not ON_GPU, reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_rounds_as_plain_operations_do_on_this_gpu(dtype):
    kernel = metal_and_cuda.kernel(rounding.TEXT)
    for shape in [*SHAPES, (1000, 7168)]:
        x = values(shape)
        for g_dtype in (mx.float32, dtype):
            g = x.astype(g_dtype)
            expected = round_stochastically(g.astype(mx.float32), random_bits(*keys_of(shape)), dtype)
            for way in SAME_NUMBERS:
                assert mx.array_equal(run(kernel, g, dtype, way), expected, equal_nan=True), way


@pytest.mark.skipif(not ON_GPU, reason="no GPU")
@pytest.mark.parametrize("g_dtype", choice.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_check_of_a_machine_finds_nothing_on_this_gpu(dtype, g_dtype):
    assert rounding.differences(dtype, g_dtype) is None
