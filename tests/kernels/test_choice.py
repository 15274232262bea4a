"""When the kernel is used, and what happens on a machine where it does not work."""

import warnings
from functools import partial

import mlx.core as mx
import pytest

from ember_mlx import Ember, InputError, kernels
from ember_mlx.kernels import choice, statistics


@pytest.fixture
def on_a_gpu(monkeypatch):
    """on_a_gpu(mean_squares): a machine with a GPU whose statistics kernel is that function, not tried yet."""

    def pretend(mean_squares):
        monkeypatch.delenv(choice.VARIABLE, raising=False)
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        monkeypatch.setattr(statistics, "mean_squares", mean_squares)
        monkeypatch.setattr(statistics, "mean_magnitudes", right_magnitudes)
        choice.fault.cache_clear()

    yield pretend
    choice.fault.cache_clear()


def right(g, calls=None):
    if calls is not None:
        calls.append(g.dtype)
    squares = mx.square(g.astype(mx.float32))
    return squares.mean(axis=1), squares.mean(axis=0)


def right_magnitudes(g):
    magnitudes = mx.abs(g.astype(mx.float32))
    return magnitudes.mean(axis=1), magnitudes.mean(axis=0)


def last_column_forgotten(g):
    rows, columns = right(g)
    return rows, columns * (mx.arange(len(columns)) < len(columns) - 1)


def last_row_a_nan(g):
    rows, columns = right(g)
    return mx.where(mx.arange(len(rows)) < len(rows) - 1, rows, float("nan")), columns


def does_not_compile(g):
    raise RuntimeError("[metal::Device] Unable to build metal library from source")


def test_a_kernel_that_works_is_tried_once_when_an_optimizer_first_sees_its_tables_and_then_used(on_a_gpu):
    calls = []
    on_a_gpu(partial(right, calls=calls))
    table = {"w": mx.ones((4, 2), mx.float16)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = Ember(1e-3)
        optimizer.init(table)
        tried = list(calls)
        assert set(tried) == {mx.float16}
        Ember(1e-3).init(table)
        optimizer.apply_gradients(table, table)
    assert calls == [*tried, mx.float16]


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (last_column_forgotten, "The column means of a mlx.core.float32 table"),
        (last_row_a_nan, "The row means of a mlx.core.float32 table"),
        (does_not_compile, "Unable to build metal library"),
    ],
)
def test_a_kernel_that_does_not_work_is_warned_about_once_and_never_used(on_a_gpu, broken, says):
    on_a_gpu(broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizers = [Ember(0.5), Ember(0.5)]
        stepped = optimizers[1].apply_gradients({"w": mx.ones((4, 2))}, {"w": mx.ones((4, 2))})["w"]
    assert [warning.category for warning in caught] == [RuntimeWarning]
    for needed in (says, mx.device_info()["device_name"], f"MLX {mx.__version__}", "report", "plain operations"):
        assert needed in str(caught[0].message)
    assert mx.allclose(stepped, mx.full((4, 2), 0.5))


def test_the_check_leaves_the_random_numbers_of_the_user_alone(on_a_gpu):
    on_a_gpu(right)
    mx.random.seed(7)
    expected = mx.random.normal((3,))
    mx.random.seed(7)
    Ember(1e-3).init({"w": mx.ones((4, 2))})
    assert mx.array_equal(mx.random.normal((3,)), expected)


def test_the_check_can_be_made_while_mlx_traces(on_a_gpu):
    # An optimizer that was made for the CPU, and then used in a compiled step on the GPU.
    calls = []
    on_a_gpu(partial(right, calls=calls))
    row_means, _ = mx.compile(lambda g: kernels.usable(statistics, g.dtype) and statistics.mean_squares(g))(
        mx.full((4, 2), 3.0)
    )
    assert row_means.tolist() == [9.0] * 4
    assert set(calls) == {mx.float32}


def test_the_environment_turns_the_kernel_off_before_it_is_tried(on_a_gpu, monkeypatch):
    on_a_gpu(does_not_compile)
    monkeypatch.setenv(choice.VARIABLE, "off")
    assert not kernels.usable(statistics, mx.float32)


def test_another_value_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "metal")
    with pytest.raises(InputError, match="EMBER_MLX_KERNELS='metal': must be 'on' or 'off'"):
        Ember(1e-3).init({"w": mx.ones((4, 2))})


def test_plain_operations_take_what_the_kernel_does_not(on_a_gpu, monkeypatch):
    on_a_gpu(right)
    assert kernels.usable(statistics, mx.bfloat16)
    assert not kernels.usable(statistics, mx.float64)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert not kernels.usable(statistics, mx.bfloat16)
