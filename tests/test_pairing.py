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


def test_swapped_sides_are_refused_with_the_right_ones():
    with pytest.raises(InputError, match="with PairedOptimizer it is tables=, and another optimizer is rest="):
        PairedOptimizer(tiny_llama(), tables=adamw(), rest=Ember(1e-3))


@pytest.mark.parametrize("wrong", [None, Ember, "ember"])
def test_what_is_no_optimizer_is_refused_by_name(wrong):
    with pytest.raises(InputError, match="PairedOptimizer.tables="):
        PairedOptimizer(tiny_llama(), tables=wrong, rest=adamw())
    with pytest.raises(InputError, match="an mlx.nn.Module is needed"):
        PairedOptimizer(wrong, tables=Ember(1e-3), rest=adamw())


RESTS = {
    "adamw": lambda: optim.AdamW(1e-3),
    "lion": lambda: optim.Lion(1e-4),
    "adafactor": lambda: optim.Adafactor(1e-3, relative_step=False),
    "sgd": lambda: optim.SGD(1e-3, momentum=0.9),
    "muon": lambda: optim.Muon(1e-3),
    "muon and adamw": lambda: optim.MultiOptimizer(
        [optim.Muon(1e-3), optim.AdamW(1e-3)], [lambda path, _: "mlp" in path]
    ),
}


@pytest.mark.parametrize("rest", RESTS)
def test_any_optimizer_of_mlx_can_train_the_rest(rest):
    def make(model):
        return PairedOptimizer(model, tables=Ember(1e-2), rest=RESTS[rest]())

    model = tiny_llama()
    optimizer = make(model)
    before = weights(model)
    assert train(model, optimizer, 3, compiled=True) == 1
    assert differing(before, weights(model)) == list(before)
    saved = dict(tree_flatten(optimizer.state))
    other = make(model)
    other.state = saved
    assert not differing(saved, dict(tree_flatten(other.state)))
    # And both go on alike.
    gradients = gradients_of(model)
    first, second = (o.apply_gradients(gradients, model.parameters()) for o in (optimizer, other))
    assert not differing(dict(tree_flatten(first)), dict(tree_flatten(second)))


class Toy(nn.Module):
    """A language model whose modules stand in dicts, under names that look like places in a list."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.parts = {"0": nn.Linear(8, 8), "5": nn.Linear(8, 8), "a.b": nn.Linear(8, 8)}
        self.head = nn.Linear(8, 50)

    def __call__(self, x):
        x = self.embed(x)
        for part in self.parts.values():
            x = part(x)
        return self.head(x)


def test_modules_may_stand_in_dicts_under_any_name():
    model = Toy()
    optimizer = PairedOptimizer(model, tables=Ember(1e-2), rest=optim.SGD(1e-1))
    before = weights(model)
    _, gradients = nn.value_and_grad(model, loss)(model, tokens() % 50)
    optimizer.update(model, gradients)
    assert len(differing(before, weights(model))) == len(before)


def test_a_table_that_stands_in_two_places_is_refused():
    model = Toy()
    model.decoder_embed = model.embed
    with pytest.raises(InputError, match="embed and decoder_embed are one and the same module|decoder_embed and embed"):
        PairedOptimizer(model, tables=Ember(1e-2), rest=optim.SGD(1e-1))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tables", [lambda: Ember(1e-2), adamw])
@pytest.mark.parametrize("where", ["embed.weight", "head.weight", "parts.5.weight", "head.bias"])
def test_a_nan_anywhere_changes_nothing_on_either_side(where, tables, compiled):
    model = Toy()
    optimizer = PairedOptimizer(model, tables=tables(), rest=adamw(), skip_nonfinite=True)
    gradients = dict(tree_flatten(nn.value_and_grad(model, loss)(model, tokens() % 50)[1]))
    bad = gradients | {where: gradients[where] * 1}
    bad[where][1:2] = float("nan")

    def step(gradients):
        model.load_weights(list(optimizer.apply_gradients(gradients, weights(model)).items()))

    if compiled:
        held = [model.state, optimizer.state]
        step = partial(mx.compile, inputs=held, outputs=held)(step)

    def everything():
        mx.eval(model.state, optimizer.state)
        return weights(model) | dict(tree_flatten(optimizer.state))

    for _ in range(2):  # the first step, and a later one
        before = everything()
        step(bad)
        after = everything()
        assert differing(before, after) == ["nonfinite_steps"]
        step(gradients)
        assert {"tables.step", "rest.step", where} < set(differing(after, everything()))
    assert optimizer.nonfinite_steps.item() == 2


def test_with_ember_gradients_whose_squares_overflow_change_nothing_either():
    model = tiny_llama()
    optimizer = PairedOptimizer(model, tables=Ember(1e-2), rest=adamw(), skip_nonfinite=True)
    gradients = dict(tree_flatten(gradients_of(model)))
    before = weights(model)
    optimizer.update(model, tree_unflatten(list((gradients | {TABLES[0]: mx.full((260, 32), 1e20)}).items())))
    assert not differing(before, weights(model))
    optimizer.update(model, tree_unflatten(list((gradients | {TABLES[0]: mx.full((260, 32), 1e15)}).items())))
    assert len(differing(before, weights(model))) == len(before)
    assert optimizer.nonfinite_steps.item() == 1


def test_clipping_is_by_the_norm_of_both_sides_together():
    model, by_hand = Toy(), Toy()
    by_hand.update(model.parameters())
    gradients = nn.value_and_grad(model, loss)(model, tokens() % 50)[1]
    norm = sum(mx.square(g).sum() for _, g in tree_flatten(gradients)).sqrt()
    sides = {"tables": optim.SGD(1.0), "rest": optim.SGD(1.0)}
    PairedOptimizer(model, **sides, clip_grad_norm=0.25 * norm.item()).update(model, gradients)
    optim.SGD(0.25).update(by_hand, gradients)
    for name, array in weights(model).items():
        assert mx.allclose(array, weights(by_hand)[name], rtol=1e-5, atol=1e-7), name


def test_a_state_from_before_the_guard_is_taken():
    model = tiny_llama()
    old = paired(model)
    train(model, old, 2)
    new = PairedOptimizer(model, tables=Ember(1e-2), rest=adamw(), skip_nonfinite=True)
    new.state = dict(tree_flatten(old.state))
    assert new.nonfinite_steps.item() == 0
    assert new.step.item() == 2
