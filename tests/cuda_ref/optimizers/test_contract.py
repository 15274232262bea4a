"""What PyTorch's training loops and tools expect of an optimizer."""

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch.optim import lr_scheduler
from torch_tables import (
    OTHER,
    SHAPE,
    Check,
    bits,
    everything,
    give,
    parameter,
    random_table,
    tables_of,
    train,
    two_tables,
)

from cuda_ref import Ember, InputError
from ember_mlx.parity.gradient_streams import gradient_stream
from ember_mlx.parity.oracle_float64 import EmberOracle


def test_each_group_trains_with_its_own_options(implementation):
    name, device = implementation
    options = [{"lr": 0.5, "beta2": 0.0, "weight_decay": 0.25}, {"lr": 0.1, "beta2": 0.9, "weight_decay": 0.0}]
    together = Ember([parameter(device=device)], implementation=name, **options[0])
    together.add_param_group({"params": [parameter(device=device, seed=8)]} | options[1])
    train(together, 3)
    for group, seed, of_group in zip(together.param_groups, (3, 8), options, strict=True):
        alone = train(Ember([parameter(device=device, seed=seed)], implementation=name, **of_group), 3)
        assert bits(*group["params"]) == bits(*tables_of(alone))


def test_named_tables_keep_their_names_and_errors_say_them():
    optimizer = Ember([("embed.weight", parameter()), ("head.weight", parameter())], lr=1e-3)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["embed.weight", "head.weight"]
    with pytest.raises(InputError, match="norm.weight"):
        Ember([("embed.weight", parameter()), ("norm.weight", torch.nn.Parameter(torch.ones(3)))], lr=1e-3)


def test_a_closure_runs_once_with_gradients_and_its_loss_comes_back():
    table = parameter()
    optimizer, calls = Ember([table], lr=0.25), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (3 * table).sum()
        loss.backward()
        return loss

    before = table.detach().clone()
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert (calls, loss.item()) == ([True], (3 * before).sum().item())
    torch.testing.assert_close(before - table.detach(), torch.full(SHAPE, 0.25), rtol=1e-5, atol=0)


def test_a_table_without_a_gradient_is_left_out_and_its_step_stands_still(implementation):
    optimizer = train(two_tables(implementation), 1)
    first, second = tables_of(optimizer)
    before = bits(second, *optimizer.state[second].values())
    optimizer.zero_grad(set_to_none=True)
    first.grad = torch.ones_like(first)
    optimizer.step()
    assert [optimizer.state[table]["step"].item() for table in (first, second)] == [2, 1]
    assert bits(second, *optimizer.state[second].values()) == before
    optimizer.zero_grad(set_to_none=False)  # a gradient of zeros is one: the statistics decay
    give(second, torch.zeros_like(second))
    optimizer.step()
    assert [optimizer.state[table]["step"].item() for table in (first, second)] == [3, 2]


@pytest.mark.parametrize("option", ["maximize", "foreach", "fused", "amsgrad", "betas"])
def test_options_of_other_optimizers_are_not_offered(option):
    with pytest.raises(TypeError, match=option):
        Ember([parameter()], lr=1e-3, **{option: True})


def test_step_hooks_and_repr():
    optimizer, seen = two_tables(), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(optimizer, 1)
    assert seen == ["before", "after"]
    assert "Ember" in repr(optimizer)
    assert "beta2: 0.999" in repr(optimizer)


def test_state_loaded_into_a_fresh_optimizer_continues_bit_for_bit(implementation):
    straight, first, second = (two_tables(implementation) for _ in range(3))
    train(straight, 5)
    saved = train(first, 2).state_dict()
    before = bits(*(value for state in saved["state"].values() for value in state.values()))
    for table, trained in zip(tables_of(second), tables_of(first), strict=True):
        table.data.copy_(trained.data)
    second.load_state_dict(saved)
    assert everything(second) == everything(first)
    assert everything(train(second, 3, first=2)) == everything(straight)
    # The loaded state is a copy: training on does not change what was saved.
    assert bits(*(value for state in saved["state"].values() for value in state.values())) == before


def test_a_new_process_continues_from_a_file_bit_for_bit(tmp_path):
    straight, first = (two_tables(lr=torch.tensor(1e-2)) for _ in range(2))
    train(straight, 4)
    train(first, 2)
    torch.save({"optimizer": first.state_dict(), "tables": tables_of(first)}, tmp_path / "before.pt")
    program = """
import sys, torch
from cuda_ref import Ember
folder = sys.argv[1]
saved = torch.load(folder + "/before.pt", weights_only=True, map_location="cpu")
tables = saved["tables"]
optimizer = Ember([{"params": tables[:1]}, {"params": tables[1:]}], lr=0.5)
optimizer.load_state_dict(saved["optimizer"])
for gradients in torch.load(folder + "/gradients.pt"):
    for table, gradient in zip(tables, gradients):
        table.grad_dtype = gradient.dtype
        table.grad = gradient
    optimizer.step()
torch.save({"optimizer": optimizer.state_dict(), "tables": tables}, folder + "/after.pt")
"""
    gradients = [[random_table(shape, seed=t, scale=1.0) for shape in (SHAPE, OTHER)] for t in (2, 3)]
    torch.save(gradients, tmp_path / "gradients.pt")
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    after = torch.load(tmp_path / "after.pt", weights_only=True)
    assert bits(*after["tables"]) == bits(*tables_of(straight))
    for found, expected in zip(after["optimizer"]["state"].values(), straight.state.values(), strict=True):
        assert bits(*found.values()) == bits(*expected.values())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_the_optimizer_steps_as_the_original_would(copied, implementation):
    original = train(two_tables(implementation), 2)
    twin = copied(original)
    assert twin.implementation == original.implementation
    assert everything(train(twin, 2, first=2)) == everything(train(original, 2, first=2))


def test_hooks_on_loading_are_heard():
    # PyTorch's way to adapt a checkpoint: here, one whose rows are twice as many.
    source, target = train(Ember([parameter((48, 8))], lr=1e-3), 1), Ember([parameter(dtype="bfloat16")], lr=1e-3)

    def halve(_, state_dict):
        state = {0: state_dict["state"][0] | {"r": state_dict["state"][0]["r"][:24]}}
        return state_dict | {"state": state}

    seen = []
    target.register_load_state_dict_pre_hook(halve)
    target.register_load_state_dict_post_hook(lambda optimizer: seen.extend(everything(optimizer)[1]))
    target.load_state_dict(source.state_dict())
    (state,), (given,) = target.state.values(), source.state.values()
    assert bits(state["r"], state["c"]) == bits(given["r"][:24], given["c"])
    assert seen == everything(target)[1]


SCHEDULERS = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (t + 1)),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=4),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5, cycle_momentum=False),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
}


@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_scheduler_sets_the_learning_rate_of_each_step(scheduler, kind):
    # A gradient of ones moves every weight by the learning rate.
    table = torch.nn.Parameter(torch.zeros(SHAPE))
    optimizer = Ember([table], lr=0.1 if kind == "float" else torch.tensor(0.1))
    schedule = SCHEDULERS[scheduler](optimizer)
    rates = []
    for _ in range(4):
        table.data.zero_()
        table.grad = torch.ones(SHAPE)
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
        torch.testing.assert_close(table.detach(), torch.full(SHAPE, -rates[-1]), rtol=1e-5, atol=0)
    assert len(set(rates)) > 2
    assert isinstance(optimizer.param_groups[0]["lr"], float if kind == "float" else torch.Tensor)


def test_a_gradscaler_skips_a_step_with_infinities_and_unscales_the_others():
    optimizer = train(two_tables(), 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    first, second = tables_of(optimizer)
    before = everything(optimizer)
    for value in (math.inf, 4.0):
        optimizer.zero_grad()
        scaler.scale((first * (value / 4)).sum() + (second.float() * 1.0).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if value == math.inf:
            assert everything(optimizer) == before
            assert scaler.get_scale() == 2.0
    assert torch.equal(first.grad, torch.ones(SHAPE))
    assert [optimizer.state[table]["step"].item() for table in (first, second)] == [2, 2]


def test_clipped_gradients_are_what_the_statistics_see():
    table = parameter()
    optimizer = Ember([table], lr=1e-3, beta2=0.0)
    table.grad = torch.ones_like(table)
    torch.nn.utils.clip_grad_norm_([table], max_norm=1.0)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[table]["r"], torch.full((24,), 1 / 192), rtol=1e-4, atol=0)


def follow_compiled(device, implementation):
    """Six compiled steps with a learning rate on a schedule, from before there is state, beside the oracle."""
    # Numbers that a step compiled before had otherwise become symbols; a kernel wants values: PyTorch begins again.
    torch.compiler.reset()
    shapes = {SHAPE: "float32", OTHER: "bfloat16"}
    tables = [parameter(shape, dtype, device=device) for shape, dtype in shapes.items()]
    lr = torch.tensor(1e-2, device=device)
    groups = [{"params": tables[:1]}, {"params": tables[1:], "weight_decay": 0.1}]
    optimizer = Ember(groups, lr=lr, implementation=implementation)
    graphs = []

    def counting(graph, inputs):
        from torch._inductor.compile_fx import compile_fx

        graphs.append(graph)
        return compile_fx(graph, inputs)

    step = torch.compile(optimizer.step, backend=counting, fullgraph=True)
    checks = [Check(EmberOracle(shape)) for shape in shapes]
    for t, gradients in enumerate(zip(*(gradient_stream("random", shape, 6) for shape in shapes), strict=True)):
        lr.fill_(1e-2 / (t + 1))  # as a scheduler does
        for table, gradient, check, group in zip(tables, gradients, checks, optimizer.param_groups, strict=True):
            table.grad = torch.tensor(gradient, device=device, dtype=table.dtype)
            check.expect(group, table)
        step()
        assert len(graphs) == 1
        for table, check in zip(tables, checks, strict=True):
            check.compare(optimizer.state[table], table)
            assert optimizer.state[table]["step"].item() == t + 1
    for check in checks:
        check.assert_within_bounds()


def test_the_step_compiles_once_into_one_graph():
    follow_compiled("cpu", "eager")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_the_step_compiles_once_into_one_graph_on_a_gpu(implementation):
    follow_compiled("cuda", implementation)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_a_cuda_graph_of_the_step_replays_with_new_gradients_and_learning_rates(implementation):
    shape = (1000, 96)
    plain, captured = (
        Ember([parameter(shape, "bfloat16", device="cuda")], lr=torch.tensor(1e-2, device="cuda"),
              weight_decay=0.1, implementation=implementation)
        for _ in range(2)
    )  # fmt: skip
    stream = [torch.tensor(g, device="cuda", dtype=torch.bfloat16) for g in gradient_stream("random", shape, 5)]
    for optimizer in (plain, captured):
        tables_of(optimizer)[0].grad = stream[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    plain.step()
    for t, gradient in enumerate(stream[1:], start=1):
        for optimizer in (plain, captured):
            tables_of(optimizer)[0].grad.copy_(gradient)
            optimizer.param_groups[0]["lr"].fill_(1e-2 / t)
        plain.step()
        graph.replay()
        assert everything(captured) == everything(plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_state_moves_from_a_gpu_to_the_cpu(tmp_path):
    source, target = train(two_tables(("auto", "cuda"), lr=torch.tensor(1e-2, device="cuda")), 2), two_tables()
    torch.save(source.state_dict(), tmp_path / "state.pt")
    target.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True, map_location="cpu"))
    assert everything(target)[1] == everything(source)[1]
    assert {value.device.type for state in target.state.values() for value in state.values()} == {"cpu"}
    train(target, 1)
