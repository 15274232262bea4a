"""Tables and gradients for the tests of cuda_ref."""

import numpy as np
import torch

from cuda_ref import Ember
from ember_mlx.parity.tolerances import bound, weight_bound, worst
from ember_mlx.shared.float_formats import unit_in_the_last_place

DTYPES = ["float32", "bfloat16", "float16"]
SHAPE = (24, 8)
OTHER = (5, 3)


def as_float64(tensor):
    return tensor.detach().to("cpu", torch.float64).numpy()


def random_table(shape=SHAPE, dtype="float32", scale=0.02, seed=3, device="cpu"):
    values = np.random.RandomState(seed).uniform(-scale, scale, size=shape)
    return torch.tensor(values).to(device, getattr(torch, dtype))


def parameter(shape=SHAPE, dtype="float32", **how):
    return torch.nn.Parameter(random_table(shape, dtype, **how))


def give(table, gradient):
    """Let the table have that gradient, of whatever dtype."""
    table.grad_dtype = None
    table.grad = gradient


def bits(*tensors):
    """The bytes of each: 0 and -0 differ, and a NaN equals itself."""
    return [tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() for tensor in tensors]


def everything(optimizer):
    """The bits of all weights, of their state, and which state there is."""
    tables = tables_of(optimizer)
    state = [optimizer.state.get(table, {}) for table in tables]
    return bits(*tables), [{name: bits(value) for name, value in of_table.items()} for of_table in state]


def two_tables(implementation=("eager", "cpu"), **options):
    name, device = implementation
    tables = [parameter(SHAPE, device=device), parameter(OTHER, "bfloat16", device=device)]
    groups = [{"params": tables[:1]}, {"params": tables[1:], "weight_decay": 0.1}]
    return Ember(groups, **{"lr": 1e-2, "implementation": name} | options)


def tables_of(optimizer):
    return [table for group in optimizer.param_groups for table in group["params"]]


def train(optimizer, steps, first=0):
    """Steps with gradients that their number alone decides, so that a run can be taken up again."""
    for t in range(first, first + steps):
        for table in tables_of(optimizer):
            give(table, random_table(table.shape, seed=t, scale=1.0, device=table.device))
        optimizer.step()
    return optimizer


class Check:
    """Follows an optimizer, step by step, with the oracle; the worst errors, as parts of their bounds, are kept."""

    def __init__(self, oracle, interpreted=False):
        self.oracle = oracle
        self.interpreted = interpreted
        self.errors = dict.fromkeys(["r", "c", "weight"], 0.0)

    def step(self, optimizer, table):
        """Take one step, of the optimizer and of the oracle from the same weights, and compare."""
        self.expect(optimizer.param_groups[0], table)
        optimizer.step()
        self.compare(optimizer.state[table], table)

    def expect(self, group, table):
        self.group, self.before = group, as_float64(table)
        learning_rate = float(group["lr"])
        self.change = self.oracle.change(as_float64(table.grad), learning_rate)
        self.after = (1 - learning_rate * group["weight_decay"]) * self.before - self.change

    def compare(self, state, table):
        t, dtype = self.oracle.step_number, str(table.dtype).removeprefix("torch.")
        allowed = weight_bound(dtype, self.before, self.after, self.change, t)
        if self.interpreted and dtype == "bfloat16":  # its interpreter cuts off where a GPU rounds
            allowed = allowed + 0.5 * unit_in_the_last_place(self.after, dtype)
        self._note("weight", as_float64(table), self.after, allowed)
        for name, exact in (("r", self.oracle.row_mean_square), ("c", self.oracle.column_mean_square)):
            quantity = "c of many rows" if name == "c" and len(table) > 4096 and t == 1 else name
            self._note(name, as_float64(state[name]), exact, bound(quantity, "float32", exact, t))

    def _note(self, name, *comparison):
        self.errors[name] = max(self.errors[name], worst(*comparison))

    def assert_within_bounds(self):
        assert all(error <= 1 for error in self.errors.values()), f"errors as parts of their bounds: {self.errors}"
