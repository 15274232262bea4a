"""Rounding by chance, schedules of beta2 and clipped rows in PyTorch: the bits of MLX, and what a state keeps."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch_tables import SHAPE, everything, parameter, random_table, tables_of, train, two_tables

from cuda_ref import Ember, SplitWeights
from cuda_ref.optimizers.stochastic_rounding import bit_keys, random_bits, round_stochastically, table_seed
from ember_mlx.parity import stochastic_rounding as reference
from ember_mlx.parity.oracle_float64 import EmberOracle
from ember_mlx.parity.tolerances import bound, worst

pytestmark = pytest.mark.filterwarnings("ignore:.*does nothing to.*float32")

DTYPES = ["bfloat16", "float16"]
ALL_OPTIONS = {"beta2": lambda step: 1 - (step + 1) ** -0.8, "row_clip": 1.0, "row_floor": 0.5}
ALL_OPTIONS |= {"rounding": "stochastic", "seed": 3}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seed", "number", "step", "first_row"), [(0, 0, 1, 0), (2**32 - 1, 3, 70_000, 123_456)])
def test_it_is_the_reference_to_the_bit(dtype, seed, number, step, first_row):
    random = np.random.RandomState(0)
    values = (random.standard_normal((90, 41)) * np.exp2(random.randint(-40, 18, (90, 41)))).astype(np.float32)
    edges = [np.nan, np.inf, -np.inf, 0.0, -1e-40, 65504, 65520, -65535, -3.4e38, 2**-14, -(2**-14), 2**-24, -(2**-26)]
    values.flat[: len(edges)] = edges
    drawn = random_bits(*bit_keys(table_seed(seed, number), torch.tensor(float(step)), 90, 41, first_row))
    wanted_bits = reference.random_bits(seed, number, step, first_row + np.arange(90), np.arange(41))
    np.testing.assert_array_equal(drawn.numpy().view(np.uint32), wanted_bits)
    rounded = round_stochastically(torch.tensor(values), drawn, getattr(torch, dtype))
    np.testing.assert_array_equal(rounded.double().numpy(), reference.round_stochastically(values, wanted_bits, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_is_rounded_by_the_bits_of_its_table_step_and_seed(implementation, dtype):
    name, device = implementation
    options = {"lr": 1e-3, "implementation": name, "eps": 2.0**-126}  # eps: added or fused, it makes no difference
    exact = Ember([parameter(device=device), parameter(device=device)], **options)
    rounded = Ember([parameter(dtype=dtype, device=device) for _ in range(2)], rounding="stochastic", seed=9, **options)
    for step in (1, 2, 3):
        gradient = random_table(seed=step, dtype=dtype, scale=1.0, device=device)
        for table in (*tables_of(exact), *tables_of(rounded)):
            table.grad = gradient.to(table.dtype)
            table.data.zero_()
        exact.step()
        rounded.step()
        for number, (values, found) in enumerate(zip(tables_of(exact), tables_of(rounded), strict=True)):
            bits = reference.random_bits(9, number, step, *map(np.arange, SHAPE))
            expected = reference.round_stochastically(values.detach().cpu().numpy(), bits, dtype)
            np.testing.assert_array_equal(found.detach().double().cpu().numpy(), expected)


@pytest.mark.parametrize("name", ["Adafactor's", "of numbers"])
def test_a_schedule_of_beta2_corrects_its_bias_by_the_product_of_its_values(implementation, name):
    schedule = {"Adafactor's": ALL_OPTIONS["beta2"], "of numbers": lambda step: 0.9 if step < 3 else 0.99}[name]
    (kind, device), table = implementation, parameter(device=implementation[1])
    limits = {"row_clip": 0.8, "row_floor": 1.0}
    optimizer = Ember([table], lr=1e-3, beta2=schedule, **limits, implementation=kind)
    oracle = EmberOracle(SHAPE, beta2=lambda step: float(schedule(torch.tensor(float(step)))), **limits)
    for t in range(1, 11):
        table.data.zero_()
        table.grad = random_table(seed=t, scale=1.0, device=device)
        optimizer.step()
        change = oracle.change(table.grad.double().cpu().numpy(), 1e-3)
        assert worst(-table.detach().double().cpu().numpy(), change, bound("step", "float32", change, t)) <= 1
    assert optimizer.state[table]["q"].item() == pytest.approx(1 - oracle.product_of_beta2, rel=1e-6)


def test_all_options_continue_bit_for_bit_from_a_file_and_in_a_copy(implementation, tmp_path):
    straight, first, second = (two_tables(implementation, **ALL_OPTIONS) for _ in range(3))
    train(straight, 5)
    train(first, 2)
    torch.save(first.state_dict(), tmp_path / "state.pt")  # the schedule is a function, which no file can hold
    for table, trained in zip(tables_of(second), tables_of(first), strict=True):
        table.data.copy_(trained.data)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert everything(second) == everything(first)
    assert {value.dtype for value in second.state[tables_of(second)[1]].values()} == {torch.float32, torch.int32}
    twin = copy.deepcopy(first)
    assert everything(train(second, 3, first=2)) == everything(straight)
    assert everything(train(twin, 3, first=2)) == everything(straight)


def test_every_table_has_the_seed_of_its_place_where_they_are_stepped_one_by_one():
    def tables():
        dtypes = ("float16", "bfloat16", "float16", "float16")
        return [(f"t{number}", parameter(dtype=dtype)) for number, dtype in enumerate(dtypes)]

    def stepped(make_one):
        named = tables()
        optimizer = make_one(Ember([{"params": named[:2]}, {"params": named[2:]}], lr=1e-3, rounding="stochastic"))
        optimizer = copy.deepcopy(optimizer)
        copies = [w for group in optimizer.param_groups for w in group["params"]]
        for w in copies:
            w.grad = random_table(dtype="float16", seed=1, scale=1.0).to(w.dtype)
        optimizer.step()
        assert [name for group in optimizer.param_groups for name in group["param_names"]] == ["t0", "t1", "t2", "t3"]
        return [w for w in copies if w.dtype == torch.float16]

    split, alone = stepped(SplitWeights), stepped(lambda ember: ember)
    for one, other in zip(split, alone, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(split[0], split[1])
    assert not torch.equal(split[1], split[2])


def test_a_state_from_before_gets_its_seeds():
    before, after, fresh = two_tables(), *(two_tables(rounding="stochastic") for _ in range(2))
    after.load_state_dict(train(before, 1).state_dict())
    train(after, 1)
    train(fresh, 1)
    for table, other in zip(tables_of(after), tables_of(fresh), strict=True):
        assert torch.equal(after.state[table]["seed"], fresh.state[other]["seed"])


def test_a_compiled_step_rounds_as_an_eager_one_does():
    tables = [parameter(dtype="bfloat16") for _ in range(2)]
    eager, compiled = (Ember([table], lr=1e-3, **ALL_OPTIONS) for table in tables)
    step = torch.compile(compiled.step, fullgraph=True)
    for t in range(3):
        for table in tables:
            table.grad = random_table(dtype="bfloat16", seed=t, scale=1.0)
        eager.step()
        step()
    differ = (tables[0] != tables[1]).float().mean()  # a product and a sum may be rounded once
    assert differ < 0.02
    assert torch.allclose(*tables, rtol=2**-7, atol=1e-6)


def test_warnings_are_those_of_mlx_and_come_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Ember([("embed.weight", parameter(dtype="bfloat16")), ("head.weight", parameter(dtype="bfloat16"))], lr=1e-6)
        Ember([parameter()], lr=1e-6)
        Ember([parameter(dtype="bfloat16")], lr=1e-6, rounding="stochastic")
        Ember([parameter(dtype="bfloat16", device="meta")], lr=1e-6)
        Ember([("head.weight", parameter())], lr=1e-6, rounding="stochastic")
    lost, nothing = (str(one.message) for one in caught)
    assert 'Ember(rounding="nearest"): a step of the learning rate 1e-06 is rounded away in' in lost
    assert "embed.weight" in lost
    assert "does nothing to head.weight" in nothing
