"""Bad input is refused by a clear error before anything is written."""

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch_tables import OTHER, SHAPE, everything, parameter, tables_of, train, two_tables

from cuda_ref import Ember, InputError

NAN, INFINITY = math.nan, math.inf
OUT_OF_RANGE = [
    *(("lr", value) for value in (-1e-3, NAN, INFINITY, "1e-3", torch.tensor(NAN), torch.ones(1), torch.tensor(1))),
    *(("beta2", value) for value in (1.0, -0.1, NAN, (0.9, 0.999))),
    *(("eps", value) for value in (0.0, NAN, INFINITY)),
    *(("weight_decay", value) for value in (-0.1, NAN, INFINITY, torch.tensor(0.1))),
]


def assert_refused(optimizer, call, match):
    before = everything(optimizer)
    with pytest.raises(InputError, match=match) as error:
        call()
    assert isinstance(error.value, ValueError)
    assert everything(optimizer) == before


def change(path, value):
    def changed(saved):
        place = saved
        for key in path[:-1]:
            place = place[key]
        if value is None:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        return saved

    return changed


def swapped(saved):
    saved["state"] = {0: saved["state"][1], 1: saved["state"][0]}
    return saved


@pytest.mark.parametrize(
    ("change", "match"),
    [
        pytest.param(
            change(["state", 1, "r"], torch.zeros(7)), r"r of shape \(7,\).*\(5, 3\)", id="another vocabulary"
        ),
        pytest.param(change(["state", 1, "c"], torch.zeros(4)), r"c of shape \(4,\).*\(5, 3\)", id="another width"),
        pytest.param(change(["state", 1, "c"], None), "no tensor c", id="no c"),
        pytest.param(change(["state", 1, "step"], 3), "no tensor step", id="a step that is no tensor"),
        pytest.param(change(["param_groups", 1], None), "groups of", id="a group less"),
        pytest.param(change(["param_groups", 1, "params"], [1, 2]), "groups of", id="a table more"),
        pytest.param(change(["param_groups", 1, "beta2"], None), "no beta2", id="of another optimizer"),
        pytest.param(change(["param_groups", 1, "lr"], NAN), "lr=nan", id="a bad value"),
        pytest.param(swapped, r"shape \(5,\)", id="swapped tables"),
    ],
)
def test_state_of_other_tables_is_refused(change, match):
    optimizer, source = train(two_tables(), 1), train(two_tables(), 2)
    saved = change(copy.deepcopy(source.state_dict()))
    assert_refused(optimizer, lambda: optimizer.load_state_dict(saved), match)
    assert optimizer.param_groups[1]["lr"] == 1e-2
    train(optimizer, 1)


@pytest.mark.parametrize(("option", "value"), OUT_OF_RANGE, ids=lambda value: str(value).replace("\n", ""))
def test_values_out_of_range_are_refused_wherever_they_come_in(option, value):
    with pytest.raises(InputError, match=option):
        Ember([parameter()], **{"lr": 1e-3, option: value})

    optimizer = train(two_tables(), 1)
    groups = len(optimizer.param_groups)
    assert_refused(optimizer, lambda: optimizer.add_param_group({"params": [parameter()], option: value}), option)
    assert len(optimizer.param_groups) == groups

    good = optimizer.param_groups[1][option]
    optimizer.param_groups[1][option] = value
    assert_refused(optimizer, optimizer.step, option)  # the first group has not moved either
    optimizer.param_groups[1][option] = good
    train(optimizer, 1)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("row_clip", value) for value in (0, -1.0, 1e-31, NAN, INFINITY, "3")),
        *(("row_floor", value) for value in (0, -1.0, 1e31, NAN, INFINITY, "3")),
        *(("rounding", value) for value in ("up", True)),
        *(("seed", value) for value in (-1, 2**32, 0.5)),
        ("beta2", lambda step: 1 - step * 0.01),  # falls below 0
        ("beta2", lambda step: step),
    ],
    ids=lambda value: "a schedule" if callable(value) else str(value),  # a name that is the same in every process
)
def test_options_of_the_whole_optimizer_out_of_range_are_refused(option, value):
    with pytest.raises(InputError, match=option):
        Ember([parameter()], lr=1e-3, **{option: value})


@pytest.mark.parametrize(
    ("value", "says"),
    [("0.9", "'0.9'"), (None, "None"), ([0.9], r"\[0.9\]"), (torch.zeros(2), r"an array of shape \(2,\)")],
    ids=["text", "nothing", "a list", "two numbers"],
)
def test_a_schedule_that_gives_anything_but_one_number_is_refused_at_once_and_in_a_step(value, says):
    says = f"beta2=.*gives {says}.*: must be one number"
    with pytest.raises(InputError, match=says.replace(".*:", " after 128 steps:")):
        Ember([parameter()], lr=1e-3, beta2=lambda step: 0.9 if step < 100 else value)
    optimizer = train(two_tables(beta2=lambda step: value if step == 3 else torch.full((1, 1), 0.9)), 3)
    assert_refused(optimizer, optimizer.step, says)


@pytest.mark.parametrize("value", [np.where(True, 0.5, 0.9), Fraction(1, 2)], ids=["of NumPy", "a fraction"])
def test_one_number_of_another_library_is_as_good_as_a_float(value):
    of_that, of_a_float = (train(two_tables(beta2=lambda _, number=number: number), 2) for number in (value, 0.5))
    assert everything(of_that) == everything(of_a_float)


def test_a_state_without_a_schedule_does_not_fit_one_and_the_other_way_round():
    constant, scheduled = train(two_tables(), 1), train(two_tables(beta2=lambda step: 1 - 1 / (2 + step)), 1)
    assert_refused(constant, lambda: constant.load_state_dict(scheduled.state_dict()), "was a schedule.*is a number")
    saved = constant.state_dict()
    assert_refused(scheduled, lambda: scheduled.load_state_dict(saved), "was a number.*is a schedule")
    for group in saved["param_groups"]:
        group["beta2"] = "a schedule"
    assert_refused(scheduled, lambda: scheduled.load_state_dict(saved), "no tensor q")


def test_a_learning_rate_on_another_device_is_refused():
    with pytest.raises(InputError, match="meta.*cpu"):
        Ember([parameter()], lr=torch.tensor(1e-3, device="meta"))


@pytest.mark.parametrize(
    "refused",
    [
        torch.zeros(8),
        torch.zeros(2, 3, 4),
        torch.tensor(1.0),
        torch.zeros(0, 8),
        torch.zeros(8, 0),
        torch.zeros(2, 3, dtype=torch.float64),
        torch.zeros(2, 3, dtype=torch.complex64),
        torch.zeros(2, 3, dtype=torch.int32),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)} {tensor.dtype}",
)
def test_anything_but_a_2_d_table_of_floats_is_refused(refused):
    optimizer = two_tables()
    table = torch.nn.Parameter(refused, requires_grad=False)
    with pytest.raises(InputError, match="parameter 1 .*PairedOptimizer") as error:
        optimizer.add_param_group({"params": [parameter(), table]})
    assert str(refused.dtype) in str(error.value)
    assert len(optimizer.param_groups) == 2


def test_a_table_in_two_groups_is_pytorchs_own_error():
    optimizer = two_tables()
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": tables_of(optimizer)[:1]})
    assert len(optimizer.param_groups) == 2


def sparse(table):
    embedding = torch.nn.Embedding.from_pretrained(table, freeze=False, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    return embedding.weight.grad


class Elsewhere(torch.Tensor):
    """A gradient that says it is on another device; PyTorch lets no real one be given."""

    device = torch.device("cuda:7")


@pytest.mark.parametrize(
    ("gradient", "match"),
    [
        pytest.param(sparse, "sparse=False", id="sparse"),
        pytest.param(lambda table: torch.ones(6, 3), r"\(5, 3\).*\(6, 3\)", id="of another shape"),
        pytest.param(lambda table: torch.ones(OTHER).as_subclass(Elsewhere), "cpu.*cuda:7", id="on another device"),
        pytest.param(lambda table: torch.ones(OTHER, dtype=torch.int32), "int32", id="of integers"),
    ],
)
@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_bad_gradient_of_the_last_table_leaves_all_as_it_was(gradient, match, steps_before, monkeypatch):
    optimizer = train(two_tables(), steps_before)
    first, last = tables_of(optimizer)
    first.grad = torch.ones_like(first)
    bad = gradient(last.detach().float())
    with monkeypatch.context() as patched:  # PyTorch refuses most of these itself, but not behind a view or .data
        patched.setattr(type(last), "grad", property(lambda table: bad if table is last else torch.ones(SHAPE)))
        assert_refused(optimizer, optimizer.step, match)
    train(optimizer, 1)


def test_unknown_and_impossible_implementations_are_refused():
    with pytest.raises(InputError, match="'cuda'.*'auto', 'eager' or 'triton'"):
        Ember([parameter()], lr=1e-3, implementation="cuda")


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr("cuda_ref.triton_kernels.available", lambda device=None: device is None)
    with pytest.raises(InputError, match="cpu.*CUDA device"):
        Ember([parameter()], lr=1e-3, implementation="triton")
