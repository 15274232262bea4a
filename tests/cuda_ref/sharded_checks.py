"""The checks of sharded tables, which several ranks run together; test_sharding.py starts them and reads the results.

Each rank gets RANK, WORLD_SIZE and CHECK_FOLDER in its environment, and leaves rank<RANK>.json in that folder. On CUDA
through NCCL where every rank can have a GPU, otherwise on the CPU through gloo.
"""

import copy
import itertools
import warnings
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_table import (
    CUDA,
    DEVICE,
    FOLDER,
    IMPLEMENTATIONS,
    LEARNING_RATE,
    OPTIONS,
    RANK,
    RANKS,
    WAYS,
    WEIGHT_DECAY,
    Table,
    equal,
    on_all_ranks,
    raises,
    random_values,
    run_checks,
    state_of,
    train,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

from cuda_ref import Ember, PairedOptimizer
from ember_mlx.parity import stochastic_rounding
from ember_mlx.parity.gradient_streams import gradient_stream, round_to_bfloat16
from ember_mlx.parity.oracle_float64 import EmberOracle
from ember_mlx.parity.tolerances import bound, weight_bound, worst


def check_against_the_oracle_and_one_process():
    """r, c and w within the tolerance table, of uneven tables and ones with ranks without rows."""
    numbers = {}
    cases = [(way, (7, 5), dtype, {}) for way in WAYS for dtype in ("float32", "bfloat16")]
    cases += [("fsdp2", (4, 6), "float32", {}), ("slices", (4, 6), "bfloat16", {}), ("fsdp2", (131, 33), "float32", {})]
    cases += [("fsdp2", (4, 6), "float32", OPTIONS), ("skewed slices", (7, 5), "float32", OPTIONS)]
    for (way, shape, dtype, options), implementation in itertools.product(cases, IMPLEMENTATIONS):
        if implementation == "triton" and not CUDA and (way, shape) != ("fsdp2", (4, 6)):
            continue  # Triton's interpreter is slow, and to bfloat16 it cuts bits off where the GPU rounds
        steps = 3 if implementation == "triton" and not CUDA else 5
        table = Table(random_values(shape, getattr(torch, dtype)), way)
        alone = Table(table.whole(table.weight), "whole")
        optimizer = table.ember(implementation=implementation, **options)
        one_process = alone.ember(implementation=implementation, **options)
        oracle = EmberOracle(shape, **options)
        errors = {}

        def compare(name, mine, single, true, most, errors=errors, dtype=dtype):
            mine, single = mine.double().numpy(), single.double().numpy()
            errors[name] = max(errors.get(name, 0.0), worst(mine, true, most))
            if name == "w" and dtype != "float32":
                most = 2 * most  # both are rounded to 16 bits, and may be to either side
            name = f"{name} of one process"
            errors[name] = max(errors.get(name, 0.0), worst(mine, single, most))

        weights = table.whole(table.weight)
        for t, g in enumerate(gradient_stream("random", shape, steps=steps), start=1):
            g = round_to_bfloat16(g)
            with torch.no_grad():
                alone.weight.copy_(weights)
            train(table, optimizer, [g])
            train(alone, one_process, [g])
            before, weights = weights.double().numpy(), table.whole(table.weight)
            change = oracle.change(g, LEARNING_RATE)
            w = (1 - LEARNING_RATE * WEIGHT_DECAY) * before - change
            compare("w", weights, alone.weight.detach().cpu(), w, weight_bound(dtype, before, w, change, t))
        truth = {"r": oracle.row_mean_square, "c": oracle.column_mean_square}
        ours, theirs = state_of(table, optimizer), state_of(alone, one_process)
        for (name, true), mine, single in zip(truth.items(), ours, theirs, strict=False):
            compare(name, mine, single, true, bound(name, "float32", true, steps))
        numbers[f"{way} {shape} {dtype} {implementation} {', '.join(options)}"] = errors
        assert max(errors.values()) <= 1, (way, shape, dtype, implementation, errors)
    return numbers


def check_same_bits():
    """From run to run; and c is the same on all ranks."""
    for way, implementation in itertools.product(WAYS, IMPLEMENTATIONS if CUDA else ["eager"]):
        runs = []
        for _ in range(2):
            table = Table(random_values((7, 5)), way)
            optimizer = table.ember(implementation=implementation)
            train(table, optimizer, gradient_stream("random", (7, 5), steps=5))
            runs.append((*state_of(table, optimizer), table.whole(table.weight)))
        assert equal(*runs), (way, implementation)
        for c in on_all_ranks(runs[0][1]):
            assert torch.equal(c, runs[0][1]), (way, implementation)


def check_slices_are_rounded_as_the_whole_table_would_be():
    """A float32 table of zeros, sharded alike, has what is rounded; eps is too small to be fused into anything."""
    shape, seed = (7, 5), 3
    for way, implementation in itertools.product(WAYS, IMPLEMENTATIONS if CUDA else ["eager"]):
        exact, rounded = (Table(torch.zeros(shape, dtype=dtype), way) for dtype in (torch.float32, torch.bfloat16))
        options = {"implementation": implementation, "eps": 2.0**-126}
        optimizers = exact.ember(**options), rounded.ember(rounding="stochastic", seed=seed, **options)
        for t, g in enumerate(gradient_stream("random", shape, steps=3), start=1):
            for table, optimizer in zip((exact, rounded), optimizers, strict=True):
                with torch.no_grad():
                    table.weight.zero_()
                train(table, optimizer, [round_to_bfloat16(g)])
            bits = stochastic_rounding.random_bits(seed, 0, t, *map(np.arange, shape))
            values = exact.whole(exact.weight).double().numpy()
            expected = stochastic_rounding.round_stochastically(values, bits, "bfloat16")
            assert np.array_equal(rounded.whole(rounded.weight).double().numpy(), expected), (way, implementation, t)


def check_one_all_reduce_a_step():
    """Of D numbers, on a communicator that nobody else uses; after the first step nothing else is sent."""
    sent = []
    all_reduce, all_gather_object = dist.all_reduce, dist.all_gather_object

    def counted(tensor, *arguments, group=None, **keywords):
        sent.append(("sum", tensor.numel(), tensor.dtype, group in (None, dist.group.WORLD)))
        return all_reduce(tensor, *arguments, group=group, **keywords)

    def counted_gather(*arguments, **keywords):
        sent.append("gather")
        return all_gather_object(*arguments, **keywords)

    for way in WAYS:
        table = Table(random_values((7, 5)), way)
        optimizer = table.ember()
        gradients = list(gradient_stream("random", (7, 5), steps=3))
        train(table, optimizer, gradients[:1])
        dist.all_reduce, dist.all_gather_object = counted, counted_gather
        try:
            train(table, optimizer, gradients[1:])
        finally:
            dist.all_reduce, dist.all_gather_object = all_reduce, all_gather_object
        assert sent == [("sum", 5, torch.float32, False)] * 2, sent
        sent.clear()


def check_disagreement():
    """An InputError on every rank, before anything is written; and they go on once they agree again."""
    gradients = list(gradient_stream("random", (7, 5), steps=2))
    for way in WAYS:
        for name, options in {
            "lr": {"learning_rate": 1e-2 * (1 + RANK)},
            "beta2": {"beta2": 0.9 + 0.01 * RANK},
            "eps": {"eps": 1e-8 * (1 + RANK)},
        }.items():
            table = Table(random_values((7, 5)), way)
            optimizer = table.ember(**options)
            raises(f"disagree on {name} of parameter 0", train, table, optimizer, gradients[:1])
            assert not optimizer.state
            assert torch.equal(table.whole(table.weight), random_values((7, 5)))

        table = Table(random_values((7, 5)), way)
        optimizer = table.ember()
        train(table, optimizer, gradients[:1])
        saved = optimizer.state_dict()
        right = saved["state"][0]["step"]
        saved["state"][0]["step"] = right + RANK
        optimizer.load_state_dict(saved)
        before = *state_of(table, optimizer)[:2], table.whole(table.weight)
        raises("disagree on the step of parameter 0", train, table, optimizer, gradients[1:])
        table.weight.grad = table.weight.grad if RANK else None
        raises("disagree on having a gradient of parameter 0", optimizer.step)
        assert equal(before, (*state_of(table, optimizer)[:2], table.whole(table.weight)))
        saved["state"][0]["step"] = right
        optimizer.load_state_dict(saved)
        train(table, optimizer, gradients[1:])
        assert state_of(table, optimizer)[2] == 2

        # State that one rank refuses: the others, which took it, must not be left waiting.
        saved = optimizer.state_dict()
        state = saved["state"][0]
        saved["state"] = {0: state | {"step": state["step"] + 1, "c": state["c"][: 4 if RANK == 1 else 5]}}
        if RANK == 1:
            raises("c of shape (4,)", optimizer.load_state_dict, saved)
        else:
            optimizer.load_state_dict(saved)
        raises("disagree on the step of parameter 0", train, table, optimizer, gradients[1:])

        table = Table(random_values((7, 5)), way)
        optimizer = table.ember(rounding="stochastic", seed=RANK)
        raises("disagree on seed", train, table, optimizer, gradients[:1])

        # A fault that only one rank can see must not leave the others waiting.
        table = Table(random_values((7, 5)), way)
        optimizer = table.ember()
        optimizer.param_groups[0]["lr"] = -1.0 if RANK == 1 else 1e-2
        raises("lr=-1.0", train, table, optimizer, gradients[:1])

    slices = Table(random_values((7, 5)), "slices").ember()
    raises("cannot be copied or pickled", copy.copy, slices)

    columns = nn.Parameter(torch.ones(3, 5 + RANK, device=DEVICE))
    raises("disagree on columns and dtype of table 0", Ember, [columns], 1e-2, row_shard_group=dist.group.WORLD)
    tables = [nn.Parameter(torch.ones(3, 5, device=DEVICE)) for _ in range(1 + RANK)]
    raises("disagree on the number of tables", Ember, tables, 1e-2, row_shard_group=dist.group.WORLD)
    fault = nn.Parameter(torch.ones((5,) if RANK else (3, 5), device=DEVICE))
    raises("has shape", Ember, [fault], 1e-2, row_shard_group=dist.group.WORLD)
    nothing = nn.Parameter(torch.ones(0, 5, device=DEVICE))
    raises("no rows on any rank", Ember, [nothing], 1e-2, row_shard_group=dist.group.WORLD)


def check_other_placements_are_refused():
    mesh = init_device_mesh(DEVICE.type, (RANKS,))
    two = init_device_mesh(DEVICE.type, (RANKS, 1))
    values = random_values((8, 6)).to(DEVICE)
    for placements, on in (((Shard(1),), mesh), ((Shard(0), Shard(0)), two), ((Shard(0), Shard(1)), two)):
        w = nn.Parameter(distribute_tensor(values, on, placements))
        w.grad = torch.ones_like(w)
        raises(f"has the placements {tuple(placements)}", Ember([w], 1e-2).step)
    w = nn.Parameter(DTensor.from_local(values, mesh, (Partial(),)))
    w.grad = torch.ones_like(w)
    raises("Partial", Ember([w], 1e-2).step)
    both = init_device_mesh(DEVICE.type, (1, RANKS), mesh_dim_names=("data", "tensor"))
    table = Table(values, "whole")
    table.weight = nn.Parameter(distribute_tensor(values, both["tensor"], (Shard(0),)))  # tensor parallelism below FSDP
    fully_shard(table, mesh=both["data"])
    table.weight.grad = torch.ones_like(table.weight)
    raises("has the placements", Ember([table.weight], 1e-2).step)
    w = nn.Parameter(DTensor.from_local(values.to("meta"), mesh, (Shard(0),)))
    w.grad = torch.ones_like(w)
    raises("takes no offloaded tables", Ember([w], 1e-2).step)

    w = Table(values, "fsdp2", mesh).weight
    w.grad = distribute_tensor(values, mesh, (Replicate(),))
    optimizer = Ember([w], 1e-2)
    raises("has a gradient with", optimizer.step)
    assert not optimizer.state
    raises("is a DTensor", Ember, [w], 1e-2, row_shard_group=dist.group.WORLD)
    raises("must be a ProcessGroup", Ember, [nn.Parameter(values)], 1e-2, row_shard_group=mesh)


def check_hsdp():
    """Replicated over one dimension of the mesh, sharded over the other."""
    gradients = list(gradient_stream("random", (7, 5), steps=5))
    alone = Table(random_values((7, 5)), "whole")
    one_process = alone.ember(implementation="eager")
    train(alone, one_process, gradients)
    for shape in ((1, RANKS), (RANKS, 1), (RANKS // 2, 2))[: 2 if RANKS % 2 else 3]:
        mesh = init_device_mesh(DEVICE.type, shape, mesh_dim_names=("replicate", "shard"))
        table = Table(random_values((7, 5)), "fsdp2", mesh)
        optimizer = table.ember(implementation="eager")
        train(table, optimizer, gradients)
        ours, theirs = state_of(table, optimizer), state_of(alone, one_process)
        for mine, single, quantity in zip(ours, theirs, ("r", "c"), strict=False):
            single = single.double().numpy()
            assert worst(mine.double().numpy(), single, bound(quantity, "float32", single, 5)) <= 1
        torch.testing.assert_close(table.whole(table.weight), alone.weight.detach().cpu(), rtol=1e-6, atol=1e-7)
        for c in on_all_ranks(ours[1]):
            assert torch.equal(c, ours[1])


def check_checkpoints_move():
    """Through torch.distributed.checkpoint, from all ranks to one process and back; bit for bit where it stays."""
    shape = (7, 5)
    gradients = list(gradient_stream("random", shape, steps=9))
    rounded = OPTIONS | {"rounding": "stochastic", "seed": 3}
    cases = [("fsdp2", torch.float32, {}), ("fsdp2", torch.bfloat16, {}), ("slices", torch.bfloat16, {})]
    for way, dtype, options in [*cases, ("fsdp2", torch.bfloat16, rounded)]:
        places = [FOLDER / f"{way} {dtype} {len(options)} {number}" for number in (1, 2)]
        stays = Table(random_values(shape, dtype), way)
        optimizer = stays.ember(**options)
        train(stays, optimizer, gradients[:3])
        dcp.save(get_optimizer_state_dict(stays, optimizer), checkpoint_id=places[0])
        values, saved = stays.whole(stays.weight), state_of(stays, optimizer)

        again = Table(values, way)  # the same ranks: bit for bit
        resumed = load(again, places[0], options)
        assert equal(state_of(again, resumed), saved), way
        train(stays, optimizer, gradients[3:])
        train(again, resumed, gradients[3:])
        final = *state_of(stays, optimizer), stays.whole(stays.weight)
        assert equal((*state_of(again, resumed), again.whole(again.weight)), final), way

        if RANK == 0:  # one process that knows nothing of the others
            alone = Table(values, "whole")
            one_process = load(alone, places[0], options, no_dist=True)
            assert equal(state_of(alone, one_process), saved), way
            train(alone, one_process, gradients[3:6])
            dcp.save(get_optimizer_state_dict(alone, one_process), checkpoint_id=places[1], no_dist=True)
            moved = state_of(alone, one_process), alone.weight.detach().cpu()
        dist.barrier()
        moved = on_all_ranks(moved if RANK == 0 else None)[0]
        back = Table(moved[1], way)
        resumed = load(back, places[1], options)
        assert equal(state_of(back, resumed), moved[0]), way
        train(back, resumed, gradients[6:])
        # A sum in another order may round to another neighbour by chance.
        apart = 2**-7 if "rounding" in options else 1e-6
        for mine, unmoved in zip((*state_of(back, resumed), back.whole(back.weight)), final, strict=True):
            torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(unmoved), rtol=1e-5, atol=apart)


def load(table, place, options, **how):
    optimizer = table.ember(learning_rate=123.0, **options)  # the right one is in the checkpoint
    state = get_optimizer_state_dict(table, optimizer)
    dcp.load(state, checkpoint_id=place, **how)
    set_optimizer_state_dict(table, optimizer, state)
    assert optimizer.param_groups[0]["lr"] == LEARNING_RATE
    return optimizer


def check_state_dicts():
    """A state of one process goes into any sharding, float32 stays, and a table of another shape is refused."""
    gradients = list(gradient_stream("random", (7, 5), steps=2))
    alone = Table(random_values((7, 5), torch.bfloat16), "whole")
    one_process = alone.ember()
    train(alone, one_process, gradients)
    for way in WAYS:
        table = Table(random_values((7, 5), torch.bfloat16), way)
        optimizer = table.ember()
        optimizer.load_state_dict(one_process.state_dict())
        assert equal(state_of(table, optimizer), state_of(alone, one_process)), way
        resumed = table.ember()
        resumed.load_state_dict(optimizer.state_dict())
        assert equal(state_of(table, resumed), state_of(alone, one_process)), way
        train(table, resumed, gradients)

        other = Table(random_values((6, 5), torch.bfloat16), way)
        refuses = other.ember()
        raises("needs shape (6,)", refuses.load_state_dict, one_process.state_dict())
        if way != "skewed slices":  # their r is of the rows here alone, on the first rank none in both
            raises("needs shape (6,)", refuses.load_state_dict, optimizer.state_dict())
        assert not refuses.state


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mid, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.to(DEVICE)
        fully_shard(self, mesh=init_device_mesh(DEVICE.type, (RANKS,)))

    def forward(self, ids):
        return self.head(torch.tanh(self.mid(self.embed(ids))))


def check_a_pair_with_every_option_goes_through_a_checkpoint():
    """Both sides of a PairedOptimizer, from FSDP2 to a checkpoint and back: the run goes on bit for bit."""
    tables = partial(Ember, lr=LEARNING_RATE, weight_decay=0.1, rounding="stochastic", seed=3, **OPTIONS)

    def made():
        model = Model()
        return model, PairedOptimizer(model, tables=tables, rest=partial(torch.optim.AdamW, lr=1e-3))

    def train_pair(model, optimizer, seeds):
        for seed in seeds:
            ids = torch.randint(0, 7, (9,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(ids[:-1]), ids[1:]).backward()
            optimizer.step()

    warnings.simplefilter("ignore")  # rounding does nothing to float32
    model, optimizer = made()
    train_pair(model, optimizer, range(3))
    dcp.save(get_state_dict(model, optimizer)[1], checkpoint_id=FOLDER / "pair")
    resumed, other = made()
    resumed.load_state_dict(model.state_dict())
    state = get_optimizer_state_dict(resumed, other)
    dcp.load(state, checkpoint_id=FOLDER / "pair")
    set_optimizer_state_dict(resumed, other, state)
    assert other.param_groups[-1]["beta2"] is OPTIONS["beta2"]
    train_pair(model, optimizer, range(3, 6))
    train_pair(resumed, other, range(3, 6))
    for w, same in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(w.full_tensor(), same.full_tensor())


if __name__ == "__main__":
    run_checks({name: check for name, check in globals().items() if name.startswith("check_")})
