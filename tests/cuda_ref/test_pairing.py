"""PairedOptimizer: two optimizers that look like one to a loop, to schedulers and to GradScaler."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch_pair import TABLES, Model, V, backward, differing, paired, rates, same_state, train, trained

from cuda_ref import Ember, InputError


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
