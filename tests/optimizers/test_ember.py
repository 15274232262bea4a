"""Ember against the float64 oracle, over all the streams, and what the rule promises besides."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import pytest
from mlx.utils import tree_map
from optimizers.tables import SHAPE, as_float64, random_table

from ember_mlx.optimizers import Ember
from ember_mlx.parity.gradient_streams import SILENT_STEPS, STREAMS, gradient_stream
from ember_mlx.parity.oracle_float64 import EmberOracle
from ember_mlx.parity.tolerances import bound, weight_bound, worst
from ember_mlx.shared.errors import InputError

DTYPES = ["float32", "bfloat16", "float16"]
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1


def in_dtype(gradient, dtype):
    """The NumPy gradient as an array of that dtype; float32 where float16 would make all of it infinite or zero."""
    array = mx.array(gradient)
    cast = array.astype(getattr(mx, dtype))
    kept = mx.all(mx.isfinite(cast)) & (mx.any(cast != 0) | mx.all(array == 0))
    return cast if kept.item() else array


def follow(stream, dtype, shape, steps):
    """Run Ember and the oracle along a stream; return the worst error of each quantity, as a part of its bound.

    Two tables get the same gradients. One is all zeros at every step, which shows the step itself to its last digit,
    where a weight would swallow most of it. The other is trained. Every step of it is compared with the oracle's step
    from the very same weights: rounding to the dtype is then half a unit and no more, however many steps came before,
    while two separately rounded bfloat16 runs would drift apart by a unit now and then and allow no sharp bound. The
    statistics are never copied over: they carry all the steps.
    """
    optimizer = Ember(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    zeros = mx.zeros(shape, getattr(mx, dtype))
    weights = random_table(shape, dtype)
    optimizer.init({"zeros": zeros, "weights": weights})
    oracle_of_steps, oracle_of_weights = EmberOracle(shape), EmberOracle(shape)
    errors = dict.fromkeys(["r", "c", "step", "weight"], 0.0)

    def note(quantity, *comparison):
        errors[quantity] = max(errors[quantity], worst(*comparison))

    for t, table in enumerate(gradient_stream(stream, shape, steps), start=1):
        gradient = in_dtype(table, dtype)
        new = optimizer.apply_gradients({"zeros": gradient, "weights": gradient}, {"zeros": zeros, "weights": weights})
        exact_gradient, before = as_float64(gradient), as_float64(weights)
        change = oracle_of_steps.change(exact_gradient, LEARNING_RATE)
        after = oracle_of_weights.step(before, exact_gradient, LEARNING_RATE, WEIGHT_DECAY)
        r, c = oracle_of_steps.row_mean_square, oracle_of_steps.column_mean_square

        for path in ("zeros", "weights"):
            note("r", as_float64(optimizer.state[path]["r"]), r, bound("r", "float32", r, t))
            note("c", as_float64(optimizer.state[path]["c"]), c, bound("c", "float32", c, t))
        note("step", -as_float64(new["zeros"]), change, bound("step", dtype, change, t))
        note("weight", as_float64(new["weights"]), after, weight_bound(dtype, before, after, change, t))
        weights = new["weights"]
    return errors


def assert_within_bounds(errors):
    assert all(error <= 1 for error in errors.values()), f"worst errors as parts of their bounds: {errors}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stream", STREAMS)
def test_ember_follows_the_oracle_for_10_steps(stream, dtype):
    assert_within_bounds(follow(stream, dtype, SHAPE, steps=10))


# Of each kind one: the others are these, larger, smaller or rounded, and have 10 steps above.
@pytest.mark.parametrize("stream", ["random", "constant", "one rare row", "row silent then loud"])
def test_ember_follows_the_oracle_for_1000_steps(stream):
    assert_within_bounds(follow(stream, "float32", SHAPE, steps=SILENT_STEPS + 10))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_ember_follows_the_oracle_for_1000_steps_in_16_bits(dtype):
    assert_within_bounds(follow("row silent then loud", dtype, SHAPE, steps=SILENT_STEPS + 10))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (257, 33)])
def test_ember_follows_the_oracle_in_odd_shapes(shape, dtype):
    assert_within_bounds(follow("random", dtype, shape, steps=10))


def test_column_statistics_stay_exact_over_a_vocabulary_of_rows():
    # One float32 sum straight down 151,936 rows is off by up to 9e-5.
    gradient = next(gradient_stream("random", (151_936, 4), steps=1))
    optimizer = Ember(LEARNING_RATE)
    optimizer.apply_gradients({"table": mx.array(gradient)}, {"table": mx.zeros(gradient.shape)})
    oracle = EmberOracle(gradient.shape)
    oracle.change(gradient, LEARNING_RATE)
    c = oracle.column_mean_square
    assert worst(as_float64(optimizer.state["table"]["c"]), c, bound("c of many rows", "float32", c, 1)) <= 1


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_beta2_and_eps_are_used_as_given(beta2, eps):
    # eps 0.5 beside roots of about 1 also tells whether it stands outside the root.
    optimizer, oracle = Ember(LEARNING_RATE, beta2=beta2, eps=eps), EmberOracle(SHAPE, beta2, eps)
    zeros = mx.zeros(SHAPE)
    for t, gradient in enumerate(gradient_stream("random", SHAPE, steps=10), start=1):
        stepped = optimizer.apply_gradients({"table": mx.array(gradient)}, {"table": zeros})["table"]
        change = oracle.change(gradient, LEARNING_RATE)
        assert worst(-as_float64(stepped), change, bound("step", "float32", change, t)) <= 1


def test_the_divisor_has_its_floor_of_1e_30():
    # Squares of 1e-34 are below the floor and normal in float32; an eps far below the root lets it show.
    optimizer, oracle = Ember(LEARNING_RATE, eps=1e-30), EmberOracle(SHAPE, eps=1e-30)
    gradient = 1e-17 * next(gradient_stream("ones", SHAPE, steps=1))
    stepped = optimizer.apply_gradients({"table": mx.array(gradient)}, {"table": mx.zeros(SHAPE)})["table"]
    change = oracle.change(gradient, LEARNING_RATE)
    assert worst(-as_float64(stepped), change, bound("step", "float32", change, 1)) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_gradient_leaves_every_weight_as_it_was(dtype):
    optimizer, weights = Ember(1.0), random_table(SHAPE, dtype)
    new = optimizer.apply_gradients({"table": mx.zeros_like(weights)}, {"table": weights})["table"]
    assert mx.array_equal(new, weights)


def test_a_row_without_gradient_keeps_its_weights_while_the_others_move():
    weights = random_table(SHAPE)
    gradient = random_table(SHAPE, seed=4)
    gradient[5] = 0
    new = Ember(1.0).apply_gradients({"table": gradient}, {"table": weights})["table"]
    moved = mx.any(new != weights, axis=1)
    assert moved.tolist() == [row != 5 for row in range(SHAPE[0])]


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_decay_alone_shrinks_the_weights_by_lr_times_wd(dtype):
    weights = random_table(SHAPE, dtype)
    optimizer = Ember(0.5, weight_decay=0.25)
    new = optimizer.apply_gradients({"table": mx.zeros_like(weights)}, {"table": weights})["table"]
    assert mx.array_equal(new, (0.875 * weights.astype(mx.float32)).astype(weights.dtype))


def test_each_step_of_a_gradient_of_one_size_has_the_size_of_the_learning_rate():
    # Without the bias correction the first would be 31.6 times too large.
    optimizer, zeros = Ember(0.01), mx.zeros(SHAPE)
    signs = mx.where(random_table(SHAPE) > 0, 1.0, -1.0)
    for t in range(1, 6):
        stepped = optimizer.apply_gradients({"table": 7.0 * signs}, {"table": zeros})["table"]
        expected = 0.01 * as_float64(signs)
        assert worst(-as_float64(stepped), expected, bound("step", "float32", expected, t)) <= 1


def test_numbers_of_numpy_are_as_good_as_python_s():
    numbers, gradient = {"beta2": 0.5, "eps": 2.0**-27, "row_clip": 2.0, "row_floor": 0.75}, random_table(SHAPE)
    for kind in (np.float32, np.float64):
        stepped = []
        for options in (numbers, {name: kind(value) for name, value in numbers.items()}):
            optimizer, weights = Ember(1e-3, **options), {"table": mx.zeros(SHAPE)}
            optimizer.init(weights)
            step = mx.compile(optimizer.apply_gradients, inputs=optimizer.state, outputs=optimizer.state)
            stepped.append(step({"table": gradient}, weights)["table"])
        assert mx.array_equal(*stepped)


SCHEDULES_OF_BETA2 = {
    "Adafactor's": lambda step: 1 - (step + 1) ** -0.8,
    "of floats": lambda step: 0.9 if step.item() < 3 else 0.99,
    "an MLX schedule": mlx.optimizers.linear_schedule(0.5, 0.999, steps=20),
    "a constant": lambda step: 0.999,
}


@pytest.mark.parametrize("name", SCHEDULES_OF_BETA2)
def test_a_schedule_of_beta2_corrects_its_bias_by_the_product_of_its_values(name):
    schedule = SCHEDULES_OF_BETA2[name]
    limits = {"row_clip": 0.8, "row_floor": 1.0}
    optimizer, zeros = Ember(LEARNING_RATE, beta2=schedule, **limits), mx.zeros(SHAPE)
    oracle = EmberOracle(SHAPE, beta2=lambda step: at(schedule, step), **limits)
    for t, gradient in enumerate(gradient_stream("random", SHAPE, steps=30), start=1):
        stepped = optimizer.apply_gradients({"table": mx.array(gradient)}, {"table": zeros})["table"]
        change = oracle.change(gradient, LEARNING_RATE)
        assert worst(-as_float64(stepped), change, bound("step", "float32", change, t)) <= 1
    assert optimizer.state["bias_correction"].item() == pytest.approx(1 - oracle.product_of_beta2, rel=1e-6)


def test_a_state_of_a_constant_beta2_does_not_fit_a_schedule_and_a_number_keeps_the_state_as_it_was():
    w = {"table": random_table(SHAPE)}
    constant, scheduled = Ember(1e-3), Ember(1e-3, beta2=SCHEDULES_OF_BETA2["Adafactor's"])
    constant.init(w)
    assert set(constant.state) == {"step", "learning_rate", "weight_decay", "table"}
    assert set(constant.state["table"]) == {"r", "c"}
    scheduled.state = constant.state
    with pytest.raises(InputError, match="no bias_correction"):
        scheduled.init(w)


def test_scaling_the_gradient_by_a_power_of_two_changes_no_bit_of_the_weights():
    # Every square, mean and root scales exactly, and eps is too small to matter.
    def trained(scale):
        optimizer, weights = Ember(LEARNING_RATE, eps=1e-30), random_table(SHAPE)
        for gradient in gradient_stream("random", SHAPE, steps=5):
            weights = optimizer.apply_gradients({"table": scale * mx.array(gradient)}, {"table": weights})["table"]
        return weights

    assert mx.array_equal(trained(1.0), trained(1024.0))


def warm_up(step):
    """Works on the step as an array."""
    return mx.minimum(step + 1, 20) * 1e-4


SCHEDULES = {
    "a number": 1e-3,
    "an integer": 1,
    "an MLX schedule": mlx.optimizers.linear_schedule(1e-3, 1e-4, steps=50),
    "an MLX cosine schedule": mlx.optimizers.cosine_decay(1e-3, 50),
    "a function that returns an array": warm_up,
    "a function that returns a float": lambda step: 1e-3 if step.item() < 30 else 2e-4,
    "a constant function": lambda step: 1e-3,
}


def at(schedule, steps_done):
    """The value for the next step, as a double. MLX hands a schedule the number of steps already done."""
    value = schedule(mx.array(steps_done)) if callable(schedule) else schedule
    return value.item() if isinstance(value, mx.array) else value


@pytest.mark.parametrize("scheduled", ["learning rate", "weight decay", "both"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rate_and_weight_decay_take_a_number_or_a_schedule(name, scheduled):
    """60 steps on float32 weights that the optimizer and the oracle each keep for themselves."""
    learning_rate = 1e-3 if scheduled == "weight decay" else SCHEDULES[name]
    weight_decay = 0.1 if scheduled == "learning rate" else SCHEDULES[name]
    optimizer, oracle = Ember(learning_rate, weight_decay=weight_decay), EmberOracle(SHAPE)
    weights = random_table(SHAPE)
    exact, allowed = as_float64(weights), 0.0
    for t, gradient in enumerate(gradient_stream("random", SHAPE, steps=60), start=1):
        weights = optimizer.apply_gradients({"table": mx.array(gradient)}, {"table": weights})["table"]
        before = exact
        rate, decay = at(learning_rate, t - 1), at(weight_decay, t - 1)
        exact = oracle.step(before, gradient, rate, decay)
        allowed = allowed + weight_bound("float32", before, exact, (1 - rate * decay) * before - exact, t)
    assert worst(as_float64(weights), exact, allowed) <= 1


def test_a_weight_decay_on_a_schedule_compiles_once_and_decays_as_it_says():
    # A zero gradient leaves the decay alone to act; 1 - lr * wd is exact, and so is its product with a power of two.
    optimizer, weights = Ember(0.5, weight_decay=lambda step: mx.where(step < 2, 0.5, 1.0)), mx.ones(SHAPE)
    optimizer.init({"table": weights})
    traces = []

    @partial(mx.compile, inputs=optimizer.state, outputs=optimizer.state)
    def step(weights):
        traces.append("traced")
        return optimizer.apply_gradients({"table": mx.zeros(SHAPE)}, {"table": weights})["table"]

    for expected in (0.75, 0.75**2, 0.75**2 * 0.5):
        weights = step(weights)
        assert mx.array_equal(weights, mx.full(SHAPE, expected))
    assert len(traces) == 1


def test_the_learning_rate_can_be_set_between_two_steps():
    optimizer, zeros, ones = Ember(0.5), mx.zeros(SHAPE), mx.ones(SHAPE)
    optimizer.apply_gradients({"table": ones}, {"table": zeros})
    optimizer.learning_rate = 0.25
    stepped = optimizer.apply_gradients({"table": ones}, {"table": zeros})["table"]
    np.testing.assert_allclose(as_float64(stepped), -0.25, rtol=1e-6)


@pytest.mark.parametrize("gradient_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_any_dtype_train_never_initialised_tables_of_any_dtype(dtype, gradient_dtype):
    # Squares of 300 and more are infinite in float16 and those of 1e-5 are zero: the arithmetic must be float32.
    weights = random_table(SHAPE, dtype, scale=1.0)
    gradient = random_table(SHAPE, gradient_dtype, scale=1000.0, seed=4)
    gradient[:12] *= 1e-8
    optimizer, oracle = Ember(0.01), EmberOracle(SHAPE)
    for t in (1, 2):
        before = as_float64(weights)
        weights = optimizer.apply_gradients({"table": gradient}, {"table": weights})["table"]
        change = oracle.change(as_float64(gradient), 0.01)
        expected = before - change
        assert weights.dtype == getattr(mx, dtype)
        assert worst(as_float64(weights), expected, weight_bound(dtype, before, expected, change, t)) <= 1
    assert {name: value.dtype for name, value in optimizer.state["table"].items()} == {"r": mx.float32, "c": mx.float32}


def test_two_tables_in_one_optimizer_train_as_each_would_alone():
    tables = {"embed_tokens": random_table((24, 8)), "lm_head": random_table((5, 3), "bfloat16")}
    gradients = {"embed_tokens": random_table((24, 8), seed=4), "lm_head": random_table((5, 3), "bfloat16", seed=5)}

    def trained(names):
        optimizer, new = Ember(LEARNING_RATE), {name: tables[name] for name in names}
        for _ in range(3):
            new = optimizer.apply_gradients({name: gradients[name] for name in names}, new)
        return new

    together = trained(["embed_tokens", "lm_head"])
    for name in tables:
        assert mx.array_equal(together[name], trained([name])[name])


def test_a_nested_tree_of_parameters_trains_and_keeps_its_structure():
    parameters = {
        "model": {"embed": {"weight": random_table(SHAPE)}, "more": [random_table((5, 3)), random_table((2, 2))]}
    }
    gradients = tree_map(mx.ones_like, parameters)
    optimizer = Ember(0.25)
    new = optimizer.apply_gradients(gradients, parameters)
    moves = tree_map(lambda before, after: before - after, parameters, new)
    for move in (moves["model"]["embed"]["weight"], *moves["model"]["more"]):
        np.testing.assert_allclose(as_float64(move), 0.25, rtol=1e-6)
    assert optimizer.state["model"]["more"][0]["r"].shape == (5,)


def test_parameters_without_a_gradient_are_left_out():
    # MLX's contract: the parameters may be a superset of the gradients.
    parameters = {"table": random_table(SHAPE), "frozen": random_table(SHAPE)}
    new = Ember(LEARNING_RATE).apply_gradients({"table": mx.ones(SHAPE)}, parameters)
    assert set(new) == {"table"}


def test_a_transposed_or_sliced_gradient_trains_as_its_copy_would():
    # The gradient of a tied table comes out of a transposed product.
    weights = random_table(SHAPE)
    plain = random_table(SHAPE, seed=4)
    wide = mx.concatenate([plain, mx.full(SHAPE, 9.0)], axis=1)
    expected = as_float64(weights) - EmberOracle(SHAPE).change(as_float64(plain), LEARNING_RATE)
    allowed = weight_bound("float32", as_float64(weights), expected, as_float64(weights) - expected, 1)
    for gradient in (mx.contiguous(plain.T).T, wide[:, : SHAPE[1]]):
        new = Ember(LEARNING_RATE).apply_gradients({"table": gradient}, {"table": weights})["table"]
        assert worst(as_float64(new), expected, allowed) <= 1


def test_update_trains_a_module():
    model = nn.Embedding(*SHAPE)
    before = mx.array(model.weight)
    Ember(0.25).update(model, {"weight": mx.ones(SHAPE)})
    np.testing.assert_allclose(as_float64(before - model.weight), 0.25, rtol=1e-6)
