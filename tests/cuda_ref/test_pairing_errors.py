"""What PairedOptimizer refuses or warns of; nothing has moved then."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Muon
from torch_pair import RESTS, TABLES, D, Model, V, backward, differing, paired, train, trained

from cuda_ref import InputError


def test_no_trainable_table_says_what_was_looked_for():
    model = Model()
    for name in TABLES:
        model.get_parameter(name).requires_grad_(False)
    with pytest.raises(InputError, match="no token table of Model is trainable; found embed.weight, head.weight"):
        paired(model)
    with pytest.raises(InputError, match="no token table in Linear; looked for an embedding"):
        paired(nn.Linear(3, 3))


@pytest.mark.parametrize("side", ["tables", "rest"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (None, "is of type NoneType; must be a callable"),
        (SGD([nn.Parameter(torch.ones(1))]), "is of type SGD; must be a callable"),
        (lambda named: named, "returned an object of type list"),
        (lambda named: SGD(named[1:]), "left out (embed|mid).weight"),
        (lambda named: SGD([*named, ("new", nn.Parameter(torch.ones(1)))]), "added 1 parameters"),
    ],
)
def test_a_side_that_is_not_what_it_must_be_is_refused(side, make, message):
    with pytest.raises(InputError, match=f"PairedOptimizer: {side} {message}"):
        paired(Model(), **{side: make})


def test_an_error_of_ember_leaves_both_sides_as_they_were():
    model = Model()
    optimizer = paired(model)
    backward(model)
    model.head.weight.grad = model.head.weight.grad.to_sparse()
    with pytest.raises(InputError, match="sparse"):
        optimizer.step()
    assert not differing(model, Model())
    with pytest.raises(ValueError, match="Muon only supports 2D"):  # as it stands, not wrapped
        paired(model, rest=Muon)


def test_what_is_no_module_is_refused_with_what_trainer_needs():
    with pytest.raises(InputError, match="lambda: PairedOptimizer"):
        paired(list(Model().parameters()))


def test_frozen_tables_of_a_peft_model_are_to_be_named_in_its_config():
    model = Model().requires_grad_(False)
    model.peft_config = {}
    with pytest.raises(InputError, match=r"modules_to_save=\['embed', 'head'\]"):
        paired(model)


def test_a_step_without_any_gradient_of_a_table_is_warned_of():
    optimizer = paired(Model())
    with pytest.warns(UserWarning, match="no token table has a gradient"):
        optimizer.step()


def resize(model, *names):
    """As ``resize_token_embeddings`` does: new modules with new parameters."""
    for name in names:
        old = getattr(model, name)
        new = nn.Embedding(V + 7, D) if name == "embed" else nn.Linear(D, V + 7)
        new.weight.data[:V] = old.weight.data
        setattr(model, name, new)


@pytest.mark.parametrize("names", [("embed",), ("head",), ("embed", "head")])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_each_table_that_the_model_has_replaced_is_warned_of(names, set_to_none):
    model = Model()
    optimizer = paired(model)
    train(model, optimizer, 1)
    resize(model, *names)
    optimizer.zero_grad(set_to_none)
    backward(model)
    replaced = ", ".join(f"{name}.weight" for name in names)
    says = replaced if len(names) == 1 or not set_to_none else "no token table has a gradient"
    with pytest.warns(UserWarning, match=says):
        optimizer.step()


def test_a_table_without_a_gradient_that_the_model_still_has_is_no_reason_to_warn(recwarn):
    model = Model()
    optimizer = paired(model)
    model.embed(torch.arange(3)).sum().backward()
    optimizer.step()
    wrapped = nn.ModuleDict({"inside": model})  # whose parameters have other names now
    train(wrapped["inside"], optimizer, 1)
    assert not recwarn.list


CHANGES = {
    "to another dtype": (lambda model: model.to(torch.bfloat16), "mid.weight was .* in float32 .* in bfloat16"),
    "another shape of the rest": (
        lambda model: setattr(model.mid.weight, "data", torch.ones(D + 1, D)) or setattr(model, "mid", Wider(model)),
        "mid.weight was",
    ),
    "another shape of a table": (
        lambda model: setattr(model.embed.weight, "data", torch.ones(V + 7, D)),
        r"embed.weight .* has shape \(30, 4\) on cpu, and its r shape \(23,\)",
    ),
}


class Wider(nn.Module):
    """The middle with one more output, which it leaves out again."""

    def __init__(self, model):
        super().__init__()
        self.weight, self.bias = model.mid.weight, model.mid.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight)[..., :D] + self.bias


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_of_another_shape_or_dtype_is_refused_and_nothing_moves(change):
    make, message = CHANGES[change]
    model, optimizer = trained(1)
    make(model)
    optimizer.zero_grad()
    before = copy.deepcopy(model)
    backward(model)
    with pytest.raises(InputError, match=message):
        optimizer.step()
    assert not differing(model, before)


def test_a_state_that_fits_the_new_dtype_is_used():
    model, optimizer = trained(1, rest=RESTS["sgd"])  # Ember's state is float32 always, and this SGD has none
    model.to(torch.bfloat16)
    train(model, optimizer, 1)
    optimizer = trained(1)[1]
    loaded = copy.deepcopy(optimizer.state_dict())
    model = Model().to(torch.bfloat16)
    optimizer = paired(model)
    optimizer.load_state_dict(loaded)
    train(model, optimizer, 1)


def test_what_is_no_state_of_an_optimizer_is_refused_by_both():
    optimizer = paired(Model())
    for side in (optimizer, optimizer.tables):
        with pytest.raises(InputError, match=f"{type(side).__name__}.load_state_dict: it has no 'param_groups'"):
            side.load_state_dict({"state": {}})
