"""A pair in a loop of one's own: 16-bit weights step as float32 ones do, whatever optimizer of MLX's has them."""

import gc

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from tiny_models import tiny_llama

from ember_mlx import Ember, PairedOptimizer
from ember_mlx.optimizers.in_float32 import in_float32, in_place
from ember_mlx.optimizers.rounded import StochasticRounding

RATE = 1e-3
STOCK = {
    "adam": lambda: optim.Adam(RATE),
    "corrected adam": lambda: optim.Adam(RATE, bias_correction=True),
    "adamw": lambda: optim.AdamW(RATE),
    "adamax": lambda: optim.Adamax(RATE),
    "adadelta": lambda: optim.AdaDelta(RATE),
    "adagrad": lambda: optim.Adagrad(RATE),
    "rmsprop": lambda: optim.RMSprop(RATE),
    "lion": lambda: optim.Lion(RATE),
    "sgd": lambda: optim.SGD(RATE, momentum=0.9),
    "muon": lambda: optim.Muon(RATE),
    "adafactor": lambda: optim.Adafactor(RATE, relative_step=False),
    "several": lambda: optim.MultiOptimizer(
        [optim.Adam(RATE), optim.AdamW(RATE)], [lambda path, _: path.endswith("q_proj.weight")]
    ),
}


def trained(make, dtype, numbers, steps):
    """Weights before and after each step of a caller's own, and the state; all numbers are such as ``numbers`` has."""
    model = tiny_llama(hidden=16)
    model.set_dtype(numbers)
    model.set_dtype(dtype)
    optimizer = PairedOptimizer(model, tables=Ember(RATE), rest=make())
    weights = [dict(tree_flatten(model.trainable_parameters()))]
    for step in range(steps):
        gradients = {}
        for path, w in weights[0].items():
            sizes = (10 ** mx.linspace(-6, 0, len(w))).reshape(-1, *[1] * (w.ndim - 1))  # float16 has no 1e-12
            drawn = sizes * mx.random.normal(w.shape, key=mx.random.key(len(path) + 100 * step))
            gradients[path] = drawn.astype(numbers).astype(dtype)
        optimizer.update(model, tree_unflatten(list(gradients.items())))
        weights.append(dict(tree_flatten(model.trainable_parameters())))
    return weights, dict(tree_flatten(optimizer.state))


@pytest.mark.parametrize(("dtype", "steps", "unit"), [(mx.float16, 3, 2.0**-11), (mx.bfloat16, 1, 2.0**-8)])
@pytest.mark.parametrize("name", STOCK)
def test_narrow_weights_step_as_float32_ones_do(name, dtype, steps, unit):
    exact, _ = trained(STOCK[name], mx.float32, dtype, steps)
    found, state = trained(STOCK[name], dtype, dtype, steps)
    for path, w in found[-1].items():
        assert w.dtype == dtype
        # Each step rounds the weight to nearest. bfloat16 state is rounded too: m and the square root of v.
        rounded = sum(unit * mx.abs(weights[path]) for weights in exact[1:])
        change = mx.abs(exact[-1][path] - exact[0][path])
        allowed = rounded + (2 * unit if dtype == mx.bfloat16 else 1e-4) * change + 2.0**-25 * steps
        assert mx.all(mx.abs(w.astype(mx.float32) - exact[-1][path]) <= allowed).item(), path
    if dtype == mx.float16:
        assert not [path for path, array in state.items() if array.dtype == mx.float16]


def test_an_optimizer_of_ones_own_is_left_as_it_is():
    class Own(optim.SGD):
        pass

    own = Own(RATE)
    PairedOptimizer(tiny_llama(), tables=Ember(RATE), rest=own)
    assert not {"init_single", "apply_single"} & vars(own).keys()


@pytest.mark.parametrize("name", ["adam", "corrected adam", "adamw", "rmsprop", "lion"])
def test_rounded_stochastically_float16_has_the_state_of_float32(name):
    """Gradients of 1e-5 have squares that float16 does not have; so without float32 state a step divides by 0."""
    w, g = mx.ones((4, 8), mx.float16), mx.full((4, 8), 1e-5, mx.float16)
    rounded, exact = StochasticRounding(STOCK[name]()), STOCK[name]()
    new = rounded.apply_gradients({"w": g}, {"w": w})["w"]
    wide = exact.apply_gradients({"w": g.astype(mx.float32)}, {"w": w.astype(mx.float32)})["w"]
    for key, array in exact.state["w"].items():
        assert rounded.state["w"][key].dtype == mx.float32
        assert mx.array_equal(rounded.state["w"][key], array)
    # Stochastically a number goes to one of its two neighbours: less than a unit in the last place away.
    assert new.dtype == mx.float16
    assert mx.all(mx.abs(new.astype(mx.float32) - wide) < 2.0**-10).item()


def test_a_narrow_table_under_adamw_is_stepped_without_scratch_of_its_size():
    table = mx.zeros((4096, 64), mx.bfloat16)
    optimizer = in_float32(in_place(optim.AdamW(RATE)))
    optimizer.init({"w": table})
    held = [optimizer.state]
    update = mx.compile(lambda g, w: optimizer.apply_gradients(g, w), inputs=held, outputs=held)
    for _ in range(2):  # compiled in the first
        gradient = mx.ones((4096, 64), mx.bfloat16)
        mx.eval(table, gradient, optimizer.state)
        gc.collect()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        new = update({"w": gradient}, {"w": table})
        del gradient, table
        mx.eval(new, optimizer.state)
        table = new.pop("w")
    assert mx.get_peak_memory() - before < table.nbytes / 4
