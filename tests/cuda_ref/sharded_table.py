"""A table on several ranks, sharded in one of the ways that Ember takes; and how checks of it are run."""

import datetime
import json
import os
import re
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh

from cuda_ref import Ember, InputError, triton_kernels

RANK, RANKS, FOLDER = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(os.environ["CHECK_FOLDER"])
CUDA = torch.cuda.device_count() >= RANKS
DEVICE = torch.device("cuda", RANK) if CUDA else torch.device("cpu")
IMPLEMENTATIONS = ["eager", *(["triton"] if triton_kernels.available(DEVICE) else [])]
WAYS = ["fsdp2", "slices", "skewed slices"]  # the last: none on the first rank, most on the last
LEARNING_RATE, WEIGHT_DECAY = 1e-2, 0.1
OPTIONS = {"beta2": lambda steps_done: 1 - 1 / (2 + steps_done), "row_clip": 0.8, "row_floor": 1.0}


class Table(nn.Module):
    """A table of all ``values``, sharded in one of the WAYS, or whole on this rank."""

    def __init__(self, values, way, mesh=None):
        super().__init__()
        self.way = way
        self.weight = nn.Parameter(values[self._rows(len(values))].to(DEVICE, copy=True))
        if way == "fsdp2":
            fully_shard(self, mesh=mesh or init_device_mesh(DEVICE.type, (RANKS,)))

    def _rows(self, total):
        if self.way == "slices":
            each = -(-total // RANKS)
            return slice(min(total, RANK * each), min(total, (RANK + 1) * each))
        edges = [0, *range(RANKS - 1), total]
        return slice(edges[RANK], edges[RANK + 1]) if self.way == "skewed slices" else slice(None)

    def ember(self, learning_rate=LEARNING_RATE, **options):
        group = dist.group.WORLD if "slices" in self.way else None
        return Ember(self.parameters(), learning_rate, weight_decay=WEIGHT_DECAY, row_shard_group=group, **options)

    def take_gradient(self, g):
        g = torch.as_tensor(g, dtype=self.weight.dtype, device=DEVICE)[self._rows(len(g))]
        if self.way == "fsdp2":
            g = distribute_tensor(g, self.weight.device_mesh, self.weight.placements, src_data_rank=None)
        self.weight.grad = g

    def whole(self, tensor):
        """All rows of a tensor, or of ``r``, that lies like the table."""
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            return tensor.full_tensor().cpu()
        return tensor.cpu() if self.way == "whole" else torch.cat(on_all_ranks(tensor.cpu()))


def on_all_ranks(value):
    everyone = [None] * RANKS
    dist.all_gather_object(everyone, value)
    return everyone


def random_values(shape, dtype=torch.float32):
    return torch.from_numpy(np.random.RandomState(5).uniform(-1, 1, size=shape)).to(dtype)


def state_of(table, optimizer):
    """r of all rows, c, the step, and q and seed where there are any, on the CPU."""
    state = optimizer.state[table.weight]
    assert all(value.dtype == torch.float32 for name, value in state.items() if name != "seed"), state
    numbers = (state[name].item() for name in ("step", "q", "seed") if name in state)
    return table.whole(state["r"]), state["c"].cpu().clone(), *numbers


def train(table, optimizer, gradients):
    for g in gradients:
        table.take_gradient(g)
        optimizer.step()


def raises(text, call, *arguments, **keywords):
    with pytest.raises(InputError, match=re.escape(text)):
        call(*arguments, **keywords)


def equal(left, right):
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(left, right, strict=True))


def run_checks(checks):
    """Run the checks, name -> function, one after the other, and leave what they found."""
    torch.set_num_threads(1)
    if CUDA:
        torch.cuda.set_device(DEVICE)
    dist.init_process_group(
        "nccl" if CUDA else "gloo",
        init_method=f"file://{FOLDER}/store",
        rank=RANK,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=30),
    )
    results = {"device": torch.cuda.get_device_name() if CUDA else "CPU", "implementations": IMPLEMENTATIONS}
    for name, check in checks.items():
        try:
            begin = time.perf_counter()
            numbers = check() or {}
            results[name] = {"seconds": time.perf_counter() - begin, "numbers": numbers}
        except BaseException:
            # The others may wait for this rank: what comes after would not mean anything.
            results[name] = {"traceback": traceback.format_exc()}
            break
        finally:
            Path(FOLDER, f"rank{RANK}.json").write_text(json.dumps(results))
    if "traceback" in results[name]:
        os._exit(1)  # without waiting for the communicators
    dist.destroy_process_group()
