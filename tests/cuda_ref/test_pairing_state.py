"""The state of PairedOptimizer: through state dicts, files and checkpoints, with every option of Ember."""

import copy
from functools import partial

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD
from torch_pair import RESTS, Model, V, differing, paired, rates, same_state, train, trained

from cuda_ref import Ember, InputError
from cuda_ref.optimizers import SplitWeights


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


def test_rests_of_split_tables_come_back_whatever_their_number_in_the_pair():
    sides = {side: lambda named: SplitWeights(SGD(named, lr=1e-3)) for side in ("tables", "rest")}
    _, optimizer = trained(2, torch.bfloat16, **sides)
    other = paired(Model().to(torch.bfloat16), **sides)
    other.load_state_dict(optimizer.state_dict())
    for side in ("tables", "rest"):
        rests, found = ([s["rest"] for s in getattr(o, side).state.values()] for o in (optimizer, other))
        assert any(rest.any() for rest in rests)
        assert len(rests) == len(found)
        assert all(map(torch.equal, rests, found))


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
