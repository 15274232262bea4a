"""What only the kernels do: many programs, wide rows, tables of more than 2^31 elements."""

import numpy as np
import pytest
import torch
from torch_tables import SHAPE, as_float64, bits, parameter, random_table

from cuda_ref import Ember, flash_triton, triton_body, triton_kernels
from ember_mlx.parity.gradient_streams import gradient_stream

TRITON_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = pytest.mark.skipif(not triton_kernels.available(TRITON_DEVICE), reason="Triton is not installed")


@pytest.mark.parametrize("module", [triton_kernels, triton_body, flash_triton])
def test_a_kernel_has_one_name_everywhere(module):
    """torch.compile writes out a kernel, and what it calls, under the names of their definitions."""
    names = {name: value.fn.__name__ for name, value in vars(module).items() if hasattr(value, "fn")}
    assert names
    assert all(name == of_the_definition for name, of_the_definition in names.items())


@pytest.mark.parametrize("rows", [1, 96, 97, 193])
def test_one_step_is_the_same_however_the_table_is_cut_into_tiles(rows, monkeypatch):
    shape = (rows, 5)
    gradient = next(gradient_stream("random", shape, 1))

    def trained(name):
        table = parameter(shape, device=TRITON_DEVICE)
        table.grad = torch.tensor(gradient, device=TRITON_DEVICE)
        optimizer = Ember([table], lr=1e-2, implementation=name)
        optimizer.step()
        return [as_float64(tensor) for tensor in (table, *optimizer.state[table].values())]

    expected = trained("eager")
    found = trained("triton")
    statistics, update = {"ROWS": 8, "COLUMNS": 4}, {"ROWS_PER_PROGRAM": 3, "ROWS": 2, "COLUMNS": 2}
    monkeypatch.setattr(triton_kernels, "statistics_tile", lambda *table: statistics)
    monkeypatch.setattr(triton_kernels, "update_tile", lambda *table: update)
    for results in (found, trained("triton")):
        for result, wanted in zip(results, expected, strict=True):
            np.testing.assert_allclose(result, wanted, rtol=2e-6, atol=1e-8)


def test_the_kernels_write_the_tensors_that_they_are_given():
    w, g = (random_table(seed=seed, device=TRITON_DEVICE) for seed in (1, 2))
    r, c = torch.zeros(SHAPE[0], device=TRITON_DEVICE), torch.zeros(SHAPE[1], device=TRITON_DEVICE)
    before = bits(g)
    t, options = torch.ones((), device=TRITON_DEVICE), {"learning_rate": 1e-3, "beta2": 0.999}
    result = triton_kernels.ember_step(w, g, r, c, t, **options, eps=1e-8, weight_decay=0.0)
    assert [tensor.data_ptr() for tensor in result] == [tensor.data_ptr() for tensor in (w, r, c)]
    assert (r > 0).all()
    assert (c > 0).all()
    assert bits(g) == before


def test_it_runs_on_a_gpu_and_elsewhere_in_the_interpreter_only():
    assert triton_kernels.available(torch.device("cuda"))
    assert triton_kernels.available(torch.device("cpu")) == (TRITON_DEVICE.type == "cpu")


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_row_of_a_table_of_more_than_2_to_the_31_elements_is_written(dtype):
    rows, columns = 300_000, 7_168
    assert rows * columns > 2**31
    table = torch.nn.Parameter(torch.zeros(rows, columns, dtype=dtype, device="cuda"))
    table.grad = torch.ones_like(table)
    table.grad[-1] = -3
    optimizer = Ember([table], lr=0.25, implementation="triton")
    optimizer.step()
    weights, state = table.detach(), optimizer.state[table]
    exact = 0.001 * (1 + 8 / rows)
    torch.testing.assert_close(state["c"], torch.full_like(state["c"], exact), rtol=5e-6, atol=0)
    torch.testing.assert_close(state["r"][:-1], torch.full_like(state["r"][:-1], 0.001), rtol=5e-6, atol=0)
    # The step is the learning rate, signed, for every row: that of the last is in its own scale.
    for block in weights[:-1].split(4096):
        assert torch.all((block + 0.25).abs() <= 2e-3)
    assert torch.all((weights[-1] - 0.25).abs() <= 2e-3)


@needs_cuda
def test_a_strided_gradient_may_reach_beyond_2_to_the_31_elements():
    # Every 3rd column of a larger storage: small in numbers, far apart in memory.
    storage = torch.zeros(250_000, 9_000, dtype=torch.bfloat16, device="cuda")
    gradient = storage[:, ::3000]
    gradient.copy_(torch.ones_like(gradient))
    table = torch.nn.Parameter(torch.zeros(250_000, 3, dtype=torch.bfloat16, device="cuda"))
    table.grad = gradient
    assert (table.shape[0] - 1) * gradient.stride(0) > 2**31
    Ember([table], lr=0.25, implementation="triton").step()
    torch.testing.assert_close(table.detach(), torch.full_like(table, -0.25), rtol=1e-2, atol=0)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_kernels_and_the_plain_operations_agree_at_the_size_of_a_model(dtype):
    shape = (32_001, 768)
    results = []
    for name in ("eager", "triton"):
        torch.manual_seed(0)
        table = torch.nn.Parameter((0.02 * torch.randn(shape, device="cuda")).to(dtype))
        optimizer = Ember([table], lr=1e-3, weight_decay=0.1, implementation=name)
        for _ in range(3):
            table.grad = torch.randn(shape, device="cuda").to(dtype)
            optimizer.step()
        results.append((table.detach(), *optimizer.state[table].values()))
    (w, _, r, c), (w2, _, r2, c2) = results
    torch.testing.assert_close(r2, r, rtol=3e-6, atol=0)
    torch.testing.assert_close(c2, c, rtol=1e-5, atol=0)
    # Where a sum is rounded the other way, weights may differ by a unit, of what they were before the last step.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(w2, w, rtol=2 * eps, atol=max(8e-3 * eps, 3e-8))
