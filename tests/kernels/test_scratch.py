"""What a compiled table step takes of memory beyond the table, its gradient and the state: plain operations on the CPU.

In tables of float32. The kernel is measured where there is a GPU, by examples/benchmarks.
"""

from functools import partial

import mlx.core as mx
import pytest

from ember_mlx import Ember
from ember_mlx.optimizers.ember import ember_step, mean_squares, update_table

SHAPE = (50_257, 128)

pytestmark = pytest.mark.skipif(mx.default_device().type != mx.DeviceType.cpu, reason="of plain operations")


def scratch(step):
    """The most memory that a second run of ``step`` takes on top of what is there before, in tables."""
    mx.eval(step())
    mx.clear_cache()
    mx.clear_cache()  # a cached buffer may serve a smaller array, and counts whole
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(step())
    return (mx.get_peak_memory() - before) / (4 * SHAPE[0] * SHAPE[1])


def made(*shape):
    array = mx.random.normal(shape, key=mx.random.key(0))
    mx.eval(array)
    return array


def test_a_table_step_takes_two_tables_at_most_the_new_one_included():
    optimizer, w, g = Ember(1e-3), made(*SHAPE), made(*SHAPE)
    optimizer.init({"w": w})

    @partial(mx.compile, inputs=optimizer.state, outputs=optimizer.state)
    def step(g, w):
        return optimizer.apply_gradients({"w": g}, {"w": w})["w"]

    assert scratch(lambda: step(g, w)) <= 2.1


def test_stochastic_rounding_takes_the_new_table_and_blocks_of_rows():
    w, g = made(*SHAPE).astype(mx.bfloat16), made(*SHAPE).astype(mx.bfloat16)
    r, c, t, seed = mx.ones(SHAPE[0]), mx.ones(SHAPE[1]), mx.array(1), mx.array(3, mx.uint32)
    mx.eval(w, g, r, c, t, seed)

    @mx.compile
    def step(w, g, t):
        new, *_ = ember_step(w, g, r, c, t, learning_rate=1e-3, beta2=0.999, eps=1e-8, weight_decay=0.0, seed=seed)
        return new

    @mx.compile
    def statistics(g):
        return mean_squares(g)

    in_bfloat16 = 2  # scratch is in tables of float32
    assert in_bfloat16 * (scratch(lambda: step(w, g, t)) - scratch(lambda: statistics(g))) <= 1.5


def test_the_compiled_update_writes_the_new_table_into_the_buffer_of_the_gradient():
    # As MLX does with a buffer that nothing else refers to any more. A reading of it counts until it is done, so in a
    # whole step, where the statistics have just been asked for, the buffer may or may not be free in time.
    x, y, w, a, b = made(SHAPE[0], 4), made(4, SHAPE[1]), made(*SHAPE), mx.ones(SHAPE[0]), mx.ones(SHAPE[1])

    @mx.compile
    def step(x, y, w):
        return update_table(w, x @ y, a, b, 1e-3, 1e-8, 0.0)

    assert scratch(lambda: step(x, y, w)) <= 1.1
