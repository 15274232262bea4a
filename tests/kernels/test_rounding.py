"""The update with stochastic rounding: its Metal and its CUDA text emulated, and itself where there is a GPU."""

import mlx.core as mx
import numpy as np
import pytest
from kernels.emulator import EmulationError

from ember_mlx.kernels import metal_and_cuda, rounding
from ember_mlx.optimizers.ember import ember_step, update_table
from ember_mlx.optimizers.stochastic_rounding import bit_keys, random_bits, round_stochastically, table_seed

ON_GPU = mx.default_device().type == mx.DeviceType.gpu
TILE = rounding.TILE_BYTES // 4, rounding.COLUMNS  # rows and columns, of a float32 gradient
# Fewer than 8 elements, which Metal gets in another address space; a part of a tile, a whole one, and one row and some
# columns more.
SHAPES = [(1, 5), (7, 33), TILE, (TILE[0] + 1, TILE[1] + 3)]
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


def run(kernel, x, dtype):
    """The kernel's rounding of x alone: from weights of zero, by factors of one and a learning rate of one."""
    w, ones, numbers = mx.zeros(x.shape, dtype), [mx.ones(count) for count in x.shape], [1.0, 1.0, 2.0**-126]
    numbers = [mx.array([number]) for number in numbers]
    (new,) = kernel(inputs=[w, -x, *ones, *keys_of(x.shape), *numbers], **rounding.launch(w, x))
    return new


@pytest.mark.parametrize(
    ("dtype", "language", "checks", "options"),
    [
        (mx.bfloat16, "metal", "memory", {}),
        (mx.bfloat16, "metal", "races", {"layout": "columns", "backward": True}),
        (mx.bfloat16, "cuda", "memory", {}),
        (mx.float16, "metal", "memory", {"layout": "every second element"}),
        (mx.float16, "cuda", "races", {}),
    ],
    ids=str,
)
def test_the_texts_round_as_plain_operations_do_touch_nothing_else_and_have_no_races(
    emulated, dtype, language, checks, options
):
    kernel = emulated(language, checks, module=rounding, **options)
    for shape in SHAPES:
        x = values(shape)
        expected = round_stochastically(x, random_bits(*keys_of(shape)), dtype)
        assert mx.array_equal(run(kernel, x, dtype), expected, equal_nan=True)


@pytest.mark.parametrize(("layout", "checks", "plant", "message"), [
    ("rows", "memory", ("i < rows; i += DOWN", "i < ROWS; i += DOWN"), "heap-buffer-overflow"),
    ("rows", "memory", ("v < VECTOR && v < left", "v < VECTOR"), "heap-buffer-overflow"),
    ("columns", "memory", ("? rows - i : 0", "? VECTOR : 0"), "heap-buffer-overflow"),
    ("columns", "races", ("threadgroup_barrier(mem_flags::mem_threadgroup);", ""), "data race|never written"),
])  # fmt: skip
def test_a_planted_fault_is_found(emulated, layout, checks, plant, message):
    with pytest.raises(EmulationError, match=message):
        run(emulated("metal", checks, plant, module=rounding, layout=layout), values(SHAPES[-1]), mx.bfloat16)


def test_ember_with_the_kernel_steps_as_with_plain_operations(emulated, monkeypatch):
    random = np.random.RandomState(1)
    shape = SHAPES[-1]
    g, w = (mx.array(random.uniform(-1, 1, size=shape)).astype(mx.bfloat16) for _ in range(2))
    state = mx.zeros(shape[0]), mx.zeros(shape[1])
    step = (w, g, *state, mx.array(1), 0.1, 0.999, 1e-8, 0.1, None, 0.5, table_seed(0, 0))
    expected = ember_step(*step)
    kernel, calls = emulated("metal", "memory", module=rounding), []
    monkeypatch.setattr(rounding, "kernel", lambda text: calls.append(text) or kernel)
    monkeypatch.setattr("ember_mlx.kernels.usable", lambda kernel, *dtypes: kernel is rounding)
    found = ember_step(*step)
    assert calls
    assert all(mx.array_equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_kernel_that_rounds_otherwise_is_told_from_one_that_does_not(monkeypatch, dtype):
    def to_nearest(w, g, a, b, learning_rate, eps, weight_decay, keys):
        return update_table(w, g, a, b, learning_rate, eps, weight_decay)

    monkeypatch.setattr(rounding, "update_table", update_table)
    assert rounding.differences(dtype, mx.float32) is None
    monkeypatch.setattr(rounding, "update_table", to_nearest)
    assert "values of a mlx.core.float32 gradient are rounded otherwise" in rounding.differences(dtype, mx.float32)


@pytest.mark.skipif(not ON_GPU, reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_rounds_as_plain_operations_do_on_this_gpu(dtype):
    kernel = metal_and_cuda.kernel(rounding.TEXT)
    for shape in [*SHAPES, (1000, 7168)]:
        x = values(shape)
        expected = round_stochastically(x, random_bits(*keys_of(shape)), dtype)
        for way in (x, mx.contiguous(x.T).T, mx.concatenate([x, x], axis=1)[:, : shape[1]]):
            assert mx.array_equal(run(kernel, way, dtype), expected, equal_nan=True)
