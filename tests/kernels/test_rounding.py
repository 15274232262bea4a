"""The update with stochastic rounding: its Metal and its CUDA text emulated, and itself where there is a GPU."""

import mlx.core as mx
import numpy as np
import pytest
from kernels.emulator import EmulationError

from ember_mlx.kernels import choice, rounding
from ember_mlx.optimizers.ember import ember_step, update_table
from ember_mlx.optimizers.stochastic_rounding import bit_keys, random_bits, round_stochastically, table_seed

ON_GPU = mx.default_device().type == mx.DeviceType.gpu
ROWS = rounding.ROWS
# Fewer than 8 elements, which Metal gets in another address space; a whole threadgroup and one row more; columns that
# the threads take in two goes, with some left over.
SHAPES = [(1, 5), (ROWS + 1, 33), (3, 2101)]
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
    w, ones, numbers = mx.zeros(x.shape, dtype), [mx.ones(count) for count in x.shape], mx.array([1, 1, 2.0**-126])
    (new,) = kernel(inputs=[w, -x, *ones, *keys_of(x.shape), numbers], **rounding.launch(w, x))
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


@pytest.mark.parametrize(("plant", "message"), [
    (("i + k < rows ? columns - j : 0", "columns - j"), "heap-buffer-overflow"),
    (("columns - j, w_ij[k]", "VECTOR, w_ij[k]"), "heap-buffer-overflow"),
    (("j + v < columns ? b[j + v] : 1.0f", "b[j + v]"), "heap-buffer-overflow"),
])  # fmt: skip
def test_a_planted_fault_is_found(emulated, plant, message):
    with pytest.raises(EmulationError, match=message):
        run(emulated("metal", "memory", plant, module=rounding), values((ROWS + 1, 33)), mx.bfloat16)


def test_ember_with_the_kernel_steps_as_with_plain_operations(emulated, monkeypatch):
    random = np.random.RandomState(1)
    shape = (ROWS + 1, 33)
    g, w = (mx.array(random.uniform(-1, 1, size=shape)).astype(mx.bfloat16) for _ in range(2))
    state = mx.zeros(shape[0]), mx.zeros(shape[1])
    step = (w, g, *state, mx.array(1), 0.1, 0.999, 1e-8, 0.1, None, 0.5, table_seed(0, 0))
    expected = ember_step(*step)
    kernel, calls = emulated("metal", "memory", module=rounding), []
    monkeypatch.setattr(rounding, "kernel", lambda backend: calls.append(backend) or kernel)
    monkeypatch.setattr(rounding, "usable", lambda *dtypes: True)
    found = ember_step(*step)
    assert calls
    assert all(mx.array_equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_kernel_that_rounds_otherwise_is_warned_about_and_never_used(monkeypatch):
    def to_nearest(w, g, a, b, learning_rate, eps, weight_decay, keys):
        return update_table(w, g, a, b, learning_rate, eps, weight_decay)

    monkeypatch.setattr(choice, "usable", lambda dtype: True)
    for kernel, fine in ((update_table, True), (to_nearest, False)):
        monkeypatch.setattr(rounding, "update_table", kernel)
        rounding.fault.cache_clear()
        if fine:
            assert rounding.usable(mx.bfloat16, mx.float32)
            assert not rounding.usable(mx.float32, mx.float32)
        else:
            with pytest.warns(RuntimeWarning, match="values of a float32 gradient are rounded otherwise.*report"):
                assert not rounding.usable(mx.bfloat16, mx.float32)
    rounding.fault.cache_clear()


@pytest.mark.skipif(not ON_GPU, reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_rounds_as_plain_operations_do_on_this_gpu(dtype):
    kernel = rounding.kernel("metal" if mx.metal.is_available() else "cuda")
    for shape in [*SHAPES, (1000, 7168)]:
        x = values(shape)
        expected = round_stochastically(x, random_bits(*keys_of(shape)), dtype)
        for way in (x, mx.contiguous(x.T).T, mx.concatenate([x, x], axis=1)[:, : shape[1]]):
            assert mx.array_equal(run(kernel, way, dtype), expected, equal_nan=True)
