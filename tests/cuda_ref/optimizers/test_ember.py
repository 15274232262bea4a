"""Ember for PyTorch against the float64 oracle: the numbers, with each implementation."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch_tables import DTYPES, SHAPE, Check, bits, give, parameter, random_table

import cuda_ref
import ember_mlx
from cuda_ref import Ember
from cuda_ref.optimizers.ember import blocks
from ember_mlx.parity.gradient_streams import SILENT_STEPS, STREAMS, gradient_stream
from ember_mlx.parity.oracle_float64 import EmberOracle

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def as_gradient(array, dtype, device):
    """float32 where float16 would make all of it infinite or zero."""
    gradient = torch.tensor(array)
    cast = gradient.to(getattr(torch, dtype))
    kept = cast.isfinite().all() and (cast.any() or not gradient.any())
    return (cast if kept else gradient).to(device)


def follow(stream, dtype, shape, steps, implementation, **options):
    name, device = implementation
    table = parameter(shape, dtype, device=device)
    optimizer = Ember([table], lr=1e-3, weight_decay=0.1, implementation=name, **options)
    check = Check(EmberOracle(shape, **options), interpreted=implementation == ("triton", "cpu"))
    for gradient in gradient_stream(stream, shape, steps):
        give(table, as_gradient(gradient, dtype, device))
        check.step(optimizer, table)
    check.assert_within_bounds()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stream", STREAMS)
def test_ember_follows_the_oracle(stream, dtype, implementation):
    follow(stream, dtype, SHAPE, 5, implementation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ember_follows_the_oracle_where_a_row_speaks_after_1000_silent_steps(dtype):
    follow("row silent then loud", dtype, SHAPE, SILENT_STEPS + 2, ("eager", "cpu"))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (257, 33), (7, 576), (7, 640), (2, 2560)])
def test_ember_follows_the_oracle_in_any_shape(shape, implementation):
    follow("random", "bfloat16", shape, 1, implementation)


def test_column_statistics_stay_exact_over_a_vocabulary_of_rows(implementation):
    # One float32 sum straight down 151,936 rows is off by up to 9e-5.
    rows = 5_000 if implementation == ("triton", "cpu") else 151_936  # its interpreter would take a minute
    follow("random", "float32", (rows, 3), 1, implementation)


@pytest.mark.parametrize("beta2", [0, 0.5, 0.9])  # 1 - beta2^t from all the ranges that the kernel tells apart
@pytest.mark.parametrize("eps", [1e-8, 0.5, 1])
def test_beta2_and_eps_are_used_as_given(beta2, eps, implementation):
    # An eps beside roots of about 1 tells whether it stands outside the root; integers are numbers, too.
    follow("random", "float32", SHAPE, 5, implementation, beta2=beta2, eps=eps)


@pytest.mark.parametrize("lr", [1, np.float32(0.25), torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)])
def test_a_learning_rate_is_any_number_or_a_tensor_of_one(lr, implementation):
    name, device = implementation
    table = parameter(device=device)
    optimizer = Ember([table], lr=lr, weight_decay=0.5, implementation=name)
    check = Check(EmberOracle(SHAPE))
    for gradient in gradient_stream("random", SHAPE, 2):
        table.grad = torch.tensor(gradient, device=device)
        check.step(optimizer, table)
    check.assert_within_bounds()


def test_a_learning_rate_on_the_cpu_serves_a_table_on_the_device(implementation):
    # And one that lies where the table is; both are read at every step.
    name, device = implementation
    for where in ("cpu", device):
        lr, table = torch.tensor(0.0, device=where), parameter(device=device)
        optimizer, before = Ember([table], lr=lr, implementation=name), table.detach().clone()
        table.grad = torch.ones_like(table)
        optimizer.step()
        assert bits(table) == bits(before)
        lr.fill_(0.25)
        optimizer.step()
        torch.testing.assert_close(before - table.detach(), torch.full_like(before, 0.25), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gradient_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_any_dtype_train_tables_of_any_dtype(dtype, gradient_dtype, implementation):
    # Squares of 300 and more are infinite in float16 and those of 1e-5 are zero: the arithmetic must be float32.
    name, device = implementation
    table = parameter(dtype=dtype, scale=1.0, device=device)
    gradient = random_table(dtype=gradient_dtype, scale=1000.0, seed=4, device=device)
    gradient[:12] *= 1e-8
    optimizer = Ember([table], lr=0.01, implementation=name)
    check = Check(EmberOracle(SHAPE), interpreted=implementation == ("triton", "cpu"))
    give(table, gradient)
    for _ in range(2):
        check.step(optimizer, table)
        assert table.dtype == getattr(torch, dtype)
        assert {value.dtype for value in optimizer.state[table].values()} == {torch.float32}
    check.assert_within_bounds()


def laid_out(kind, table):
    """The same values in another layout; a part of a larger storage lies between numbers that must not be touched."""
    rows, columns = table.shape
    if kind == "transposed":
        return table.t().contiguous().t()
    storage = torch.full((2 * rows + 1, 3 * columns + 1), 9.0, dtype=table.dtype, device=table.device)
    if kind == "strided":
        part = storage[1::2, 1::3]
    elif kind == "misaligned":
        part = storage.view(-1)[1 : 1 + rows * columns].view(rows, columns)
    part.copy_(table)
    return part


LAYOUTS = ["transposed", "strided", "misaligned"]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_gradient_in_any_layout_counts_as_its_copy_would(kind, implementation):
    name, device = implementation
    plain = random_table(scale=1.0, seed=4, device=device)
    given = laid_out(kind, plain)
    table = parameter(device=device)
    table.grad = given
    assert table.grad.data_ptr() == given.data_ptr()
    check = Check(EmberOracle(SHAPE))
    check.step(Ember([table], lr=1e-3, implementation=name), table)
    check.assert_within_bounds()
    assert bits(given) == bits(plain)


def test_an_expanded_gradient_counts_as_its_copy_would(implementation):
    # sum() of a table has one number as the gradient of all elements, with strides of 0.
    name, device = implementation
    table = parameter(device=device)
    table.sum().backward()
    table.grad = torch.tensor(2.0, device=device).expand(SHAPE)
    assert table.grad.stride() == (0, 0)
    check = Check(EmberOracle(SHAPE))
    check.step(Ember([table], lr=1e-3, implementation=name), table)
    check.assert_within_bounds()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_table_in_any_layout_trains_in_place(kind, implementation):
    name, device = implementation
    table = torch.nn.Parameter(laid_out(kind, random_table(device=device)))
    neighbours = table.untyped_storage().nbytes() // 4 - table.numel()
    table.grad = random_table(scale=1.0, seed=4, device=device)
    check = Check(EmberOracle(SHAPE))
    check.step(Ember([table], lr=1e-3, implementation=name), table)
    check.assert_within_bounds()
    whole = torch.empty(0, device=device).set_(table.untyped_storage())
    assert (whole == 9).sum() == neighbours  # nothing beside the table was written


def test_every_element_moves_by_the_learning_rate_in_the_first_step(implementation):
    name, device = implementation
    table = torch.nn.Parameter(torch.zeros(311, 37, device=device))
    table.grad = torch.full_like(table, 7.0)
    Ember([table], lr=0.25, implementation=name).step()
    torch.testing.assert_close(table.detach(), torch.full_like(table, -0.25), rtol=1e-6, atol=0)


def test_the_same_input_gives_the_same_bits_twice(implementation):
    name, device = implementation

    def trained():
        table = parameter((257, 33), device=device)
        optimizer = Ember([table], lr=1e-2, weight_decay=0.1, implementation=name)
        for gradient in gradient_stream("random", (257, 33), 3):
            table.grad = torch.tensor(gradient, device=device)
            optimizer.step()
        return bits(table, *optimizer.state[table].values())

    assert trained() == trained()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_or_an_infinity_spoils_the_same_weights_in_each_implementation(bad, implementation):
    name, device = implementation

    def spoilt(how, where):
        table = parameter(device=where)
        table.grad = torch.ones_like(table)
        table.grad[2, 3] = bad
        Ember([table], lr=1e-3, implementation=how).step()
        return table.isnan().cpu()

    found = spoilt(name, device)
    assert found.any()
    assert torch.equal(found, spoilt("eager", "cpu"))


class NewStorage(TorchDispatchMode):
    """The most bytes that tensors made within it had at one time."""

    def __init__(self):
        super().__init__()
        self.sizes, self.most = {}, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        given = {StorageWeakRef(t.untyped_storage()) for t in arguments if isinstance(t, torch.Tensor)}
        if isinstance(result, torch.Tensor) and StorageWeakRef(result.untyped_storage()) not in given:
            self.sizes[StorageWeakRef(result.untyped_storage())] = result.untyped_storage().nbytes()
        self.sizes = {storage: size for storage, size in self.sizes.items() if not storage.expired()}
        self.most = max(self.most, sum(self.sizes.values()))
        return result


@pytest.mark.parametrize(("rounding", "allowed"), [("nearest", 0.3), ("stochastic", 0.55)])
def test_scratch_of_eager_is_a_small_part_of_a_table(rounding, allowed):
    table = parameter((40_000, 256), "bfloat16")
    table.grad = torch.ones_like(table)
    optimizer = Ember([table], lr=1e-3, implementation="eager", rounding=rounding)
    optimizer.step()
    with NewStorage() as new:
        optimizer.step()
    assert 0.1 < new.most / (table.numel() * 2) < allowed


@pytest.mark.parametrize(("rows", "most"), [(1, 1), (1024, 1), (5000, 5), (50_257, 33), (151_936, 38)])
def test_eager_takes_few_blocks_of_rows_and_no_long_ones(rows, most):
    # 148 blocks of 151,936 rows took five times as long on an H100 as 38: the kernels of each wait to be launched.
    found = blocks(torch.empty(rows, 0))
    assert len(found) == most
    assert found[0].stop <= 4096
    assert [row for part in found for row in range(rows)[part]] == list(range(rows))


def test_state_is_v_plus_d_float32_numbers_and_the_step(implementation):
    name, device = implementation
    table = parameter(dtype="bfloat16", device=device)
    table.grad = torch.ones_like(table)
    optimizer = Ember([table], lr=1e-3, implementation=name)
    optimizer.step()
    state = optimizer.state[table]
    assert {name: tuple(value.shape) for name, value in state.items()} == {"step": (), "r": (24,), "c": (8,)}
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert {value.device for value in state.values()} == {table.device}


def functions_of(package, file="optimizers/ember.py"):
    tree = ast.parse((Path(package.__file__).parent / file).read_text())
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    return {node.name: [argument.arg for argument in node.args.args + node.args.kwonlyargs] for node in found}


def test_the_functions_are_those_of_the_mlx_twin_in_the_same_order():
    twin, here = functions_of(ember_mlx), functions_of(cuda_ref)
    assert twin["blocks"].pop() == "block"  # here every table has its own
    assert list(here.items()) == list(twin.items())
    twin = functions_of(ember_mlx, "kernels/stochastic_rounding.py")
    here = functions_of(cuda_ref, "optimizers/stochastic_rounding.py")
    del here["shift_right"]  # which MLX has
    assert list(here.items()) == list(twin.items())


@needs_cuda
@pytest.mark.parametrize("name", ["eager", "triton"])
@pytest.mark.parametrize("columns", [576, 640, 2560, 4096, 7168, 8200, 20_000])
def test_ember_follows_the_oracle_on_a_gpu_in_the_widths_of_models(columns, name):
    follow("random", "bfloat16", (301, columns), 2, (name, "cuda"))


@needs_cuda
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("implementation", "allowed"), [("eager", 1.1), ("triton", 0.03)])
@pytest.mark.parametrize("shape", [(151_936, 1024), (50_257, 768), (32_000, 4096)])
def test_scratch_on_a_gpu(shape, implementation, allowed, rounding):
    table = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16, device="cuda"))
    table.grad = torch.ones_like(table)
    optimizer = Ember([table], lr=1e-3, implementation=implementation, rounding=rounding)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    scratch = torch.cuda.max_memory_allocated() - before
    assert scratch <= allowed * table.numel() * 2
