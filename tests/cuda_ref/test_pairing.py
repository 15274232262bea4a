"""PairedOptimizer: two optimizers that look like one to a loop, to schedulers, to GradScaler and to a checkpoint."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, Adafactor, AdamW, Muon
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

from cuda_ref import Ember, InputError, PairedOptimizer

V, D = 23, 4
TABLES = ["embed.weight", "head.weight"]


class Model(nn.Module):
    def __init__(self, rows=V):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(rows, D)
        self.mid = nn.Linear(D, D)
        self.head = nn.Linear(D, rows)

    def forward(self, ids):
        return self.head(torch.tanh(self.mid(self.embed(ids))))


def paired(model, **sides):
    return PairedOptimizer(model, **{"tables": partial(Ember, lr=1e-2), "rest": partial(AdamW, lr=1e-3)} | sides)


def backward(model, seed=0):
    ids = torch.randint(0, V, (9,), generator=torch.Generator().manual_seed(seed))
    loss = nn.functional.cross_entropy(model(ids[:-1]), ids[1:])
    loss.backward()
    return loss


def train(model, optimizer, steps, first=0):
    for seed in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()


def trained(steps, dtype=torch.float32, **sides):
    model = Model().to(dtype)
    optimizer = paired(model, **sides)
    train(model, optimizer, steps)
    return model, optimizer


def differing(a, b):
    return [name for name, w in a.state_dict().items() if not torch.equal(w, b.state_dict()[name])]


def same_state(a, b):
    a, b = a.state_dict()["state"], b.state_dict()["state"]
    return a.keys() == b.keys() and all(torch.equal(x, b[i][name]) for i in a for name, x in a[i].items())


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def test_each_side_does_what_its_optimizer_does_alone():
    together, _ = trained(3)
    alone = Model()
    tables = [alone.get_parameter(name) for name in TABLES]
    rest = [p for name, p in alone.named_parameters() if name not in TABLES]
    optimizers = Ember(tables, lr=1e-2), AdamW(rest, lr=1e-3)
    for seed in range(3):
        alone.zero_grad()
        backward(alone, seed)
        for optimizer in optimizers:
            optimizer.step()
    assert not differing(together, alone)
    assert differing(together, Model()) == list(alone.state_dict())


def test_groups_and_state_are_those_of_the_sides():
    model, optimizer = trained(1)
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["mid.weight", "mid.bias", "head.bias"],
        TABLES,
    ]
    optimizer.param_groups[1]["lr"] = 0.5
    assert (
        rates(optimizer)
        == [1e-3, 0.5]
        == [optimizer.rest.param_groups[0]["lr"], optimizer.tables.param_groups[0]["lr"]]
    )
    assert set(optimizer.state) == set(model.parameters())
    assert optimizer.state[model.embed.weight] is optimizer.tables.state[model.embed.weight]
    optimizer.state[model.embed.weight] = {}
    del optimizer.state[model.mid.weight]
    assert not optimizer.tables.state[model.embed.weight]
    assert model.mid.weight not in optimizer.state
    assert len(optimizer.state) == 4
    assert optimizer.state[model.mid.weight] == {}
    with pytest.raises(KeyError):
        optimizer.state[nn.Parameter(torch.zeros(1))]


def test_only_what_is_trainable_and_tables_alone():
    model = Model()
    model.requires_grad_(False)
    model.embed.weight.requires_grad_()
    optimizer = paired(model, rest=pytest.fail)
    assert optimizer.rest is None
    train(model, optimizer, 2)
    assert differing(model, Model()) == TABLES[:1]
    other = paired(model, rest=pytest.fail)
    other.load_state_dict(optimizer.state_dict())
    assert same_state(optimizer, other)


def test_a_closure_is_called_once_with_gradients():
    model = Model()
    optimizer, losses = paired(model), []

    def closure():
        losses.append(backward(model))
        return losses[-1]

    with torch.no_grad():
        assert optimizer.step(closure) is losses[0]
    assert len(losses) == 1
    assert len(differing(model, Model())) == 5


def test_zero_grad():
    model = Model()
    optimizer = paired(model)
    backward(model)
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_hooks_of_the_pair_run_once():
    model, seen = Model(), []
    optimizer = paired(model)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: seen.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    train(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "load", "loaded"]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda o: LambdaLR(o, [lambda step: 2.0**-step, lambda step: 1.0 + step]), [0.25e-3, 3e-2]),
        (lambda o: CosineAnnealingLR(o, 2), [0, 0]),
        (lambda o: OneCycleLR(o, [1.0, 3.0], total_steps=5, pct_start=0.5, cycle_momentum=False), None),
        (lambda o: ReduceLROnPlateau(o, patience=0), [1e-4, 1e-3]),
    ],
    ids=["LambdaLR", "CosineAnnealingLR", "OneCycleLR", "ReduceLROnPlateau"],
)
def test_schedulers_scale_each_side_from_its_own_rate(make, expected):
    model = Model()
    optimizer = paired(model)
    scheduler = make(optimizer)
    for _ in range(2):
        train(model, optimizer, 1)
        scheduler.step(*[1.0] if isinstance(scheduler, ReduceLROnPlateau) else [])
    if expected is None:  # the two peaks are 1 to 3
        assert rates(optimizer)[1] == pytest.approx(3 * rates(optimizer)[0])
    else:
        assert rates(optimizer) == pytest.approx(expected)


def test_grad_scaler_skips_both_sides_or_neither():
    model = Model()
    optimizer, scaler = paired(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for poisoned in (True, False):
        optimizer.zero_grad()
        ids = torch.arange(V)
        scaler.scale(nn.functional.cross_entropy(model(ids), ids)).backward()
        if poisoned:
            model.mid.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert len(differing(model, Model())) == (0 if poisoned else 5)
        assert len(optimizer.state) == (0 if poisoned else 5)


RESTS = {
    "sgd": partial(SGD, lr=1e-1),
    "sgd with momentum": partial(SGD, lr=1e-1, momentum=0.9),
    "adafactor": partial(Adafactor, lr=1e-2),
    "fused adamw": partial(AdamW, lr=1e-3, fused=True),
    "two groups": lambda named: AdamW(
        [{"params": named[:1]}, {"params": named[1:], "weight_decay": 0.0}], lr=1e-3, weight_decay=0.1
    ),
}


@pytest.mark.parametrize("rest", RESTS)
def test_state_from_a_file_continues_bit_for_bit(tmp_path, rest):
    straight, first = trained(2, rest=RESTS[rest])
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    resumed = Model()
    resumed.load_state_dict(straight.state_dict())
    second = paired(resumed, rest=RESTS[rest])
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert same_state(first, second)
    for model, optimizer in ((straight, first), (resumed, second)):
        train(model, optimizer, 2, first=2)
    assert not differing(straight, resumed)


def test_state_keeps_float32_for_16_bit_tables():
    _, optimizer = trained(2, torch.bfloat16)
    other = paired(Model().to(torch.bfloat16))
    other.load_state_dict(optimizer.state_dict())
    assert same_state(optimizer, other)
    assert {state["r"].dtype for state in other.tables.state.values()} == {torch.float32}


@pytest.mark.parametrize("flat", [False, True])
def test_state_goes_through_distributed_checkpoint(flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = trained(2)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    assert ("state.embed.weight.r" in saved) if flat else ("embed.weight" in saved["state"])
    other_model = Model()
    other = paired(other_model)
    set_optimizer_state_dict(other_model, other, saved, options=options)
    assert same_state(optimizer, other)
    assert rates(other) == [1e-3, 1e-2]


def schedule(step):
    return 1 - (step + 1) ** -0.8


OPTIONS = {
    "beta2": {"beta2": 0.9},
    "beta2 schedule": {"beta2": schedule},
    "eps": {"eps": 1e-3},
    "weight_decay": {"weight_decay": 0.1},
    "row_clip": {"row_clip": 0.5},
    "row_floor": {"row_floor": 0.5},
    "rounding": {"rounding": "stochastic", "seed": 5},
    "implementation": {"implementation": "eager"},
    "lr tensor": {"lr": torch.tensor(1e-2)},
}
OPTIONS["all"] = {name: value for options in list(OPTIONS.values()) for name, value in options.items()}


def through_state_dict(model, optimizer, other_model, other, folder):
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # PyTorch's own optimizers would share the tensors


def through_a_file(model, optimizer, other_model, other, folder):
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    other.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))


def through_dcp(flat, model, optimizer, other_model, other, folder):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    dcp.save(get_optimizer_state_dict(model, optimizer, options=options), checkpoint_id=folder, no_dist=True)
    saved = get_optimizer_state_dict(other_model, other, options=options)
    dcp.load(saved, checkpoint_id=folder, no_dist=True)
    set_optimizer_state_dict(other_model, other, saved, options=options)


WAYS = {
    "state_dict": through_state_dict,
    "file": through_a_file,
    "dcp": partial(through_dcp, False),
    "flat dcp": partial(through_dcp, True),
}


@pytest.mark.filterwarnings("ignore:.*Saving|.*process group|.*rounded away")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_ember_goes_through_the_pair_and_its_state_continues_bit_for_bit(name, way, tmp_path):
    tables = partial(Ember, **{"lr": 1e-2} | OPTIONS[name])
    model, optimizer = trained(2, torch.bfloat16, tables=tables)
    for option, value in OPTIONS[name].items():
        of_group = optimizer.param_groups[-1].get(option)
        found = getattr(optimizer.tables, option) if of_group is None else of_group
        assert found is value
    resumed = Model().to(torch.bfloat16)
    resumed.load_state_dict(model.state_dict())
    other = paired(resumed, tables=tables)
    WAYS[way](model, optimizer, resumed, other, tmp_path)
    assert same_state(optimizer, other)
    assert other.param_groups[-1]["beta2"] == tables.keywords.get("beta2", 0.999)
    train(model, optimizer, 2, first=2)
    train(resumed, other, 2, first=2)
    assert not differing(model, resumed)
    assert same_state(optimizer, other)


def test_the_state_dict_of_the_pair_is_what_one_optimizer_of_all_parameters_would_give():
    _, optimizer = trained(1, tables=partial(SGD, lr=1.0, momentum=0.9), rest=RESTS["two groups"])
    state_dict = torch.optim.Optimizer.state_dict
    ours, plain = optimizer.state_dict(), state_dict(optimizer)
    assert ours["param_groups"] == plain["param_groups"]
    assert ours["state"].keys() == plain["state"].keys()
    assert all(ours["state"][i][name] is x for i, state in plain["state"].items() for name, x in state.items())


def test_hooks_of_a_state_dict_run_once_and_may_change_it():
    _, optimizer = trained(1)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("before"))
    optimizer.register_state_dict_post_hook(lambda _, saved: seen.append("after") or saved | {"extra": 1})
    optimizer.tables.register_state_dict_post_hook(lambda _, saved: seen.append("tables"))
    assert optimizer.state_dict()["extra"] == 1
    assert seen == ["before", "tables", "after"]


@pytest.mark.parametrize(
    ("saved_by", "message"),
    [
        (
            lambda: paired(Model(), rest=RESTS["two groups"]),
            r"saved groups hold \[1, 2, 2\] parameters, those of this optimizer \[3, 2\]",
        ),
        (lambda: paired(Model(V + 1)), "needs shape"),
        (lambda: paired(Model(), tables=partial(SGD, lr=1.0, momentum=0.9)), "Ember.load_state_dict"),
    ],
    ids=["groups", "shape", "another optimizer"],
)
def test_a_state_that_does_not_fit_changes_neither_side(saved_by, message):
    _, optimizer = trained(1)
    before = copy.deepcopy(optimizer.state_dict())
    other = saved_by()
    for group in other.param_groups:
        group["lr"] = 7.0
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    other.step()
    with pytest.raises(InputError, match=message):
        optimizer.load_state_dict(other.state_dict())
    after = paired(Model())
    after.load_state_dict(before)
    assert same_state(optimizer, after)
    assert rates(optimizer) == [1e-3, 1e-2]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_keep_both_sides_and_their_parameters(copied):
    pair = trained(2)
    model, optimizer = copied(pair)
    assert set(optimizer.state) == set(model.parameters())
    for each in (pair, (model, optimizer)):
        train(*each, 2, first=2)
    assert not differing(pair[0], model)


def test_a_group_is_added_to_a_side():
    model = Model()
    model.mid.bias.requires_grad_(False)
    optimizer = paired(model)
    group = {"params": [("mid.bias", model.mid.bias)]}
    with pytest.raises(InputError, match=r"call .rest.add_param_group"):
        optimizer.add_param_group(group)
    model.mid.bias.requires_grad_()
    optimizer.rest.add_param_group(group)
    train(model, optimizer, 1)
    assert "mid.bias" in differing(model, Model())
    assert [len(group["params"]) for group in optimizer.state_dict()["param_groups"]] == [2, 1, 2]


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
        r"embed.weight has shape \(30, 4\) on cpu, and its state is of shape \(23, 4\)",
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
