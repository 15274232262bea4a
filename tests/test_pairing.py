"""PairedOptimizer: two optimizers that look like one to a loop, to mx.compile and to a state file."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from tiny_models import loss, tiny_llama

from ember_mlx import Ember, InputError, PairedOptimizer

TABLES = ["model.embed_tokens.weight", "lm_head.weight"]


def adamw(learning_rate=1e-3):
    return optim.AdamW(learning_rate, bias_correction=True)


def paired(model, table_learning_rate=1e-2, learning_rate=1e-3):
    return PairedOptimizer(model, tables=Ember(table_learning_rate), rest=adamw(learning_rate))


def tokens(seed=1):
    return mx.random.randint(0, 260, (2, 9), key=mx.random.key(seed))


def gradients_of(model):
    return nn.value_and_grad(model, loss)(model, tokens())[1]


def weights(model):
    return dict(tree_flatten(model.parameters()))


def differing(a, b):
    return [name for name in a if not mx.array_equal(a[name], b[name])]


def train(model, optimizer, steps, compiled=False):
    traced = []

    def step(batch):
        traced.append(batch)
        value, gradients = nn.value_and_grad(model, loss)(model, batch)
        optimizer.update(model, gradients)
        return value

    if compiled:
        state = [model.state, optimizer.state, mx.random.state]
        step = partial(mx.compile, inputs=state, outputs=state)(step)
    for i in range(steps):
        value = step(tokens(i))
        mx.eval(value, model.state, optimizer.state)
    return len(traced)


def test_each_side_does_what_its_optimizer_does_alone():
    model = tiny_llama()
    gradients = dict(tree_flatten(gradients_of(model)))
    before = weights(model)
    paired(model).update(model, tree_unflatten(list(gradients.items())))
    after = weights(model)
    for optimizer, paths in ((Ember(1e-2), TABLES), (adamw(), [path for path in before if path not in TABLES])):
        alone = optimizer.apply_gradients({p: gradients[p] for p in paths}, {p: before[p] for p in paths})
        assert not differing(alone, after)


def test_the_two_learning_rates_never_overwrite_each_other():
    optimizer = paired(tiny_llama(), 0.5, 0.25)
    assert (optimizer.table_learning_rate.item(), optimizer.learning_rate.item()) == (0.5, 0.25)
    optimizer.learning_rate = 0.125
    assert (optimizer.table_learning_rate.item(), optimizer.learning_rate.item()) == (0.5, 0.125)
    optimizer.table_learning_rate = 2
    assert (optimizer.table_learning_rate.item(), optimizer.learning_rate.item()) == (2, 0.125)


@pytest.mark.parametrize("compiled", [False, True])
def test_each_side_follows_its_own_schedule(compiled):
    model = tiny_llama()
    optimizer = paired(model, optim.linear_schedule(1.0, 0.0, 4), lambda step: 1e-3 * 2.0 ** -step.astype(mx.float32))
    train(model, optimizer, 3, compiled)
    assert optimizer.table_learning_rate.item() == pytest.approx(0.5)
    assert optimizer.learning_rate.item() == pytest.approx(0.25e-3)
    assert optimizer.step.item() == 3


def test_compiled_is_traced_once_and_gives_what_eager_gives():
    eager, compiled = tiny_llama(), tiny_llama()
    train(eager, paired(eager), 4)
    assert train(compiled, paired(compiled), 4, compiled=True) == 1
    for name, array in weights(eager).items():
        # The compiler fuses the model's own arithmetic too, so the last bits of the gradients differ.
        assert mx.allclose(array, weights(compiled)[name], rtol=1e-4, atol=1e-5), name


def test_the_state_is_one_container_for_life():
    model = tiny_llama()
    optimizer = paired(model)
    container, sides = optimizer.state, [id(side) for side in optimizer.state.values()]
    train(model, optimizer, 2)
    optimizer.state = dict(tree_flatten(optimizer.state))
    assert optimizer.state is container
    assert [id(side) for side in container.values()] == sides
    assert optimizer.tables.state is container["tables"]


@pytest.mark.parametrize("compiled", [False, True])
def test_state_from_a_file_continues_bit_for_bit(tmp_path, compiled):
    straight, stopped = tiny_llama(), tiny_llama()
    schedule = optim.cosine_decay(1e-2, 10)
    train(straight, paired(straight, schedule), 5, compiled)
    first = paired(stopped, schedule)
    train(stopped, first, 2, compiled)
    mx.save_safetensors(str(tmp_path / "state.safetensors"), dict(tree_flatten(first.state)))
    second = paired(stopped, schedule)
    second.state = mx.load(str(tmp_path / "state.safetensors"))
    assert second.step.item() == 2
    # The same batches as the straight run sees from here on.
    for i in range(2, 5):
        value, gradients = nn.value_and_grad(stopped, loss)(stopped, tokens(i))
        second.update(stopped, gradients)
        mx.eval(value, stopped.state, second.state)
    if not compiled:
        assert not differing(weights(straight), weights(stopped))
    else:
        for name, array in weights(straight).items():
            assert mx.allclose(array, weights(stopped)[name], rtol=1e-4, atol=1e-5), name


def test_state_is_restored_by_name_and_not_by_position():
    model = tiny_llama()
    optimizer = paired(model)
    train(model, optimizer, 2)
    saved = dict(tree_flatten(optimizer.state))
    shuffled = dict(sorted(saved.items(), reverse=True))
    for form in (shuffled, tree_unflatten(list(shuffled.items()))):
        other = paired(tiny_llama())
        other.state = form
        assert not differing(saved, dict(tree_flatten(other.state)))
    assert "tables.lm_head.weight.r" in saved
    assert "rest.model.layers.1.mlp.up_proj.weight.m" in saved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("tables.lm_head.weight.r"), "tables.lm_head.weight.r is missing"),
        (lambda s: s.update(extra=mx.zeros(1)), "extra is not of this optimizer"),
        (lambda s: s.update({"tables.lm_head.weight.c": mx.zeros(7)}), r"lm_head.weight.c has shape \(7,\)"),
        (lambda s: s.update({"tables.lm_head.weight.c": mx.zeros(32, mx.bfloat16)}), "must be .*float32"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    optimizer = paired(tiny_llama())
    before = dict(tree_flatten(optimizer.state))
    wrong = {name: array + 1 for name, array in before.items()}
    change(wrong)
    with pytest.raises(InputError, match=message):
        optimizer.state = wrong
    assert not differing(before, dict(tree_flatten(optimizer.state)))


def test_every_trainable_parameter_is_on_exactly_one_side():
    model = tiny_llama()
    optimizer = paired(model)
    sides = {path: optimizer.side_of(path) for path, _ in tree_flatten(model.trainable_parameters())}
    assert [path for path, side in sides.items() if side is optimizer.tables] == TABLES
    kept = {path for side in optimizer.state.values() for path in side if path.endswith("weight")}
    assert kept == set(sides)


def test_a_parameter_unfrozen_later_is_refused_by_name():
    model = tiny_llama()
    model.model.norm.freeze()
    optimizer = paired(model)
    model.model.norm.unfreeze()
    with pytest.raises(InputError, match="model.norm.weight was not trainable"):
        optimizer.update(model, gradients_of(model))


def test_frozen_tables_are_nobodys():
    model = tiny_llama()
    model.lm_head.freeze()
    optimizer = paired(model)
    head = model.lm_head.weight
    optimizer.update(model, gradients_of(model))
    assert mx.array_equal(head, model.lm_head.weight)
    assert list(optimizer.tables.state.keys() & set(TABLES)) == TABLES[:1]


def test_tables_alone_can_train():
    model = tiny_llama()
    model.freeze()
    model.model.embed_tokens.unfreeze()
    before = weights(model)
    train(model, paired(model), 2)
    assert differing(before, weights(model)) == TABLES[:1]


def test_no_trainable_table_says_what_was_looked_for():
    model = tiny_llama()
    model.model.embed_tokens.freeze()
    model.lm_head.freeze()
    with pytest.raises(InputError, match="found model.embed_tokens.weight, lm_head.weight, frozen or quantized"):
        paired(model)
    with pytest.raises(InputError, match="no token table in Linear; looked for an embedding"):
        paired(nn.Linear(3, 3))


def test_one_optimizer_cannot_be_both_sides():
    optimizer = adamw()
    with pytest.raises(InputError, match="one and the same"):
        PairedOptimizer(tiny_llama(), tables=optimizer, rest=optimizer)


def test_bytes_of_state_are_counted_by_parameter():
    optimizer = paired(tiny_llama())
    assert optimizer.state_bytes("lm_head.weight") == 4 * (260 + 32)
    assert optimizer.state_bytes("model.norm.weight") == 2 * 4 * 32
