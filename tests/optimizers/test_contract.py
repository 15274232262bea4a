"""The contract that every optimizer here goes through."""

import platform
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from optimizers.contract import OPTIMIZERS

from ember_mlx.optimizers import AdamMini
from ember_mlx.parity.gradient_streams import gradient_stream
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.float_formats import unit_in_the_last_place

pytestmark = pytest.mark.filterwarnings("ignore:.*does nothing to.*float32")

DTYPES = ["float32", "bfloat16", "float16"]
SHAPES = {"model.embed_tokens.weight": (24, 8), "lm_head.weight": (5, 3)}

# Of a step: a number, and schedules of each kind.
LEARNING_RATES = {
    "a number": 1e-2,
    "an MLX schedule": mlx.optimizers.join_schedules(
        [mlx.optimizers.linear_schedule(0.0, 1e-2, steps=3), mlx.optimizers.cosine_decay(1e-2, 10)], [3]
    ),
    "a function that returns a float": lambda step: 1e-2,
}

# g++ for plain x86-64 has no fused multiply-add to contract a product and a sum into; other compilers do that, with one
# rounding where the eager operations have two.
COMPILED_KEEPS_EVERY_BIT = platform.machine() == "x86_64" and mx.default_device() == mx.Device(mx.cpu)


@pytest.fixture(params=OPTIMIZERS, ids=lambda contract: contract.name)
def contract(request):
    return request.param


def tree_of(arrays):
    return tree_unflatten([(path, next(arrays)) for path in SHAPES])


def parameters(dtype="float32"):
    random = np.random.RandomState(1)
    return tree_of(mx.array(random.uniform(-1, 1, size=shape)).astype(getattr(mx, dtype)) for shape in SHAPES.values())


def gradients(steps, dtype="float32"):
    """A list of trees of gradients, one a step."""
    streams = [gradient_stream("random", shape, steps, seed) for seed, shape in enumerate(SHAPES.values())]
    tables = (mx.array(next(stream)).astype(getattr(mx, dtype)) for _ in range(steps) for stream in streams)
    return [tree_of(tables) for _ in range(steps)]


def train(optimizer, weights, stream):
    for gradient in stream:
        weights = optimizer.apply_gradients(gradient, weights)
    return weights


def bits(tree):
    """Path -> the bytes of the array: 0 and -0 differ, and a NaN equals itself."""
    mx.eval(tree)
    return {path: bytes(memoryview(array.reshape(-1).view(mx.uint8))) for path, array in tree_flatten(tree)}


def structure(tree):
    return {path: (array.shape, array.dtype) for path, array in tree_flatten(tree)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_keep_their_dtype_and_shape(contract, dtype):
    before = parameters(dtype)
    after = train(contract.make(learning_rate=1e-2), before, gradients(2, dtype))
    assert structure(after) == structure(before)


@pytest.mark.parametrize("gradient_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("initialised", [True, False])
def test_state_is_float32_in_its_stated_shapes_and_nothing_more(contract, dtype, gradient_dtype, initialised):
    optimizer = contract.make(learning_rate=1e-2)
    if initialised:
        optimizer.init(parameters(dtype))
    train(optimizer, parameters(dtype), gradients(1, gradient_dtype))
    state = tree_flatten(optimizer.state)
    for path, shape in SHAPES.items():
        found = {name[len(path) + 1 :]: array for name, array in state if name.startswith(path)}
        assert {name: array.shape for name, array in found.items()} == contract.state_shapes(*shape)
        assert {array.dtype for name, array in found.items() if name not in contract.not_float32} <= {mx.float32}
    # Step number, learning rate and the like: a few numbers for all tables together.
    assert all(array.size == 1 for name, array in state if not name.startswith(tuple(SHAPES)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("learning_rate", LEARNING_RATES)
def test_state_keeps_its_structure_from_init_on(contract, learning_rate, dtype):
    optimizer = contract.make(learning_rate=LEARNING_RATES[learning_rate])
    weights = parameters(dtype)
    optimizer.init(weights)
    at_init = structure(optimizer.state)
    for gradient in gradients(2, dtype):
        weights = optimizer.apply_gradients(gradient, weights)
        assert structure(optimizer.state) == at_init


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_input_gives_the_same_bits_twice(contract, dtype):
    first, second = contract.make(learning_rate=1e-2), contract.make(learning_rate=1e-2)
    weights = train(first, parameters(dtype), gradients(5, dtype))
    again = train(second, parameters(dtype), gradients(5, dtype))
    assert bits(weights) == bits(again)
    assert bits(first.state) == bits(second.state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_init_never_called_gives_the_same_bits_as_init_with_the_parameters(contract, dtype):
    never, called = contract.make(learning_rate=1e-2), contract.make(learning_rate=1e-2)
    called.init(parameters(dtype))
    # float32 gradients are what a lazy init must not be misled by.
    assert bits(train(never, parameters(dtype), gradients(3))) == bits(train(called, parameters(dtype), gradients(3)))
    assert bits(never.state) == bits(called.state)


def compiled(optimizer):
    """A compiled step, and the list that grows by one whenever it is traced, which is when it is compiled."""
    traces = []

    @partial(mx.compile, inputs=optimizer.state, outputs=optimizer.state)
    def step(gradient, weights):
        traces.append("traced")
        return optimizer.apply_gradients(gradient, weights)

    return step, traces


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("learning_rate", LEARNING_RATES)
def test_compiled_steps_give_what_eager_ones_do_and_are_compiled_once(contract, learning_rate, dtype):
    steps = 5
    eager, in_one = (contract.make(learning_rate=LEARNING_RATES[learning_rate]) for _ in range(2))
    expected = train(eager, parameters(dtype), gradients(steps, dtype))
    weights = parameters(dtype)
    in_one.init(weights)
    step, traces = compiled(in_one)
    for gradient in gradients(steps, dtype):
        weights = step(gradient, weights)
        assert len(traces) == 1
    if COMPILED_KEEPS_EVERY_BIT:
        assert bits(weights) == bits(expected)
        assert bits(in_one.state) == bits(eager.state)
        return
    # A fused multiply-add saves a rounding in each of a few operations of a step.
    pairs = zip(tree_flatten((weights, in_one.state)), tree_flatten((expected, eager.state)), strict=True)
    for (path, actual), (_, wanted) in pairs:
        actual, wanted = (np.array(array.astype(mx.float32)).astype(np.float64) for array in (actual, wanted))
        kind = dtype if path.startswith("0.") else "float32"
        # Weights start at up to 1 and may come close to 0: what counts is the unit at 1.
        unit = unit_in_the_last_place(np.maximum(np.abs(wanted), 1.0 if path.startswith("0.") else 0.0), kind)
        assert (np.abs(actual - wanted) <= 2 * steps * unit).all(), path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("learning_rate", LEARNING_RATES)
def test_state_saved_and_loaded_continues_bit_for_bit(contract, learning_rate, dtype, tmp_path):
    stream = gradients(8, dtype)
    straight, before, after = (contract.make(learning_rate=LEARNING_RATES[learning_rate]) for _ in range(3))
    expected = train(straight, parameters(dtype), stream)

    half_way = train(before, parameters(dtype), stream[:4])
    path = str(tmp_path / "state.safetensors")
    mx.save_safetensors(path, dict(tree_flatten(before.state)))
    after.state = tree_unflatten(list(mx.load(path).items()))
    assert bits(after.state) == bits(before.state)
    assert bits(train(after, half_way, stream[4:])) == bits(expected)
    assert bits(after.state) == bits(straight.state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_learns_which_token_follows_which(contract, dtype):
    """A table of 16 tokens, each of which has one successor, read by a fixed random head."""
    tokens = mx.arange(16)
    successors = mx.array(np.random.RandomState(0).permutation(16))
    head = mx.array(np.random.RandomState(1).uniform(-1, 1, size=(8, 16)).astype(np.float32))

    def loss(table):
        return nn.losses.cross_entropy(table["weight"].astype(mx.float32)[tokens] @ head, successors, reduction="mean")

    optimizer, table = contract.make(learning_rate=0.1), {"weight": mx.zeros((16, 8), getattr(mx, dtype))}
    start = loss(table).item()
    for _ in range(100):
        table = optimizer.apply_gradients(mx.grad(loss)(table), table)
    assert loss(table).item() < 0.05 * start


@pytest.mark.parametrize("when", ["at init", "at the first gradients", "when a module is updated"])
@pytest.mark.parametrize(
    ("contract", "refused"),
    [(contract, array) for contract in OPTIMIZERS for array in contract.refused],
    ids=lambda value: getattr(value, "name", None) or f"{value.shape} {value.dtype}",
    indirect=["contract"],
)
def test_a_parameter_that_it_does_not_take_is_refused_by_its_path(contract, refused, when):
    optimizer = contract.make(learning_rate=1e-2)
    tree = {"model": {"embed_tokens": {"weight": mx.zeros((4, 2))}, "norm": {"weight": refused}}}
    model = nn.Module()
    model.model = tree["model"]
    call = {
        "at init": lambda: optimizer.init(tree),
        "at the first gradients": lambda: optimizer.apply_gradients(tree, tree),
        "when a module is updated": lambda: optimizer.update(model, tree),
    }[when]
    with pytest.raises(InputError, match=r"model\.norm\.weight") as error:
        call()
    assert isinstance(error.value, ValueError)
    assert "embed_tokens" not in str(error.value)
    assert str(refused.dtype).removeprefix("mlx.core.") in str(error.value)


def test_a_list_of_parameters_is_refused_by_its_position(contract):
    with pytest.raises(InputError, match=r"layers\.1\b"):
        contract.make(learning_rate=1e-2).init({"layers": [mx.zeros((4, 2)), contract.refused[0]]})


@pytest.mark.parametrize(
    ("contract", "argument", "value"),
    [(contract, *case) for contract in OPTIMIZERS for case in contract.out_of_range],
    ids=lambda value: getattr(value, "name", None) or str(value),
    indirect=["contract"],
)
def test_values_out_of_range_are_refused_by_argument_and_value(contract, argument, value):
    with pytest.raises(InputError, match=argument) as error:
        contract.make(**{"learning_rate": 1e-2, argument: value})
    assert str(value) in str(error.value)
    assert isinstance(error.value, ValueError)


def test_gradients_are_left_as_they_were(contract):
    stream = gradients(1)
    before = bits(tree_map(mx.array, stream[0]))
    weights = parameters()
    weights_before = bits(tree_map(mx.array, weights))
    train(contract.make(learning_rate=1e-2), weights, stream)
    assert bits(stream[0]) == before
    assert bits(weights) == weights_before


def test_a_model_given_as_betas_is_not_written_out_whole():
    with pytest.raises(InputError, match="betas=.*two numbers") as refused:
        AdamMini(1e-3, nn.Sequential(*(nn.Linear(2, 2) for _ in range(50))))
    assert len(str(refused.value)) < 200
