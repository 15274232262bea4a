"""The checks of sharded weights under the optimizers of the body; sharded_checks.py has those of tables under Ember."""

import itertools

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from sharded_table import CUDA, DEVICE, FOLDER, IMPLEMENTATIONS, RANK, RANKS, raises, run_checks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from cuda_ref import SplitWeights, optimizers, sharding

KINDS = {
    "AdamMini": {},
    "AdamMini int8": {"momentum": "int8"},
    "SinkGD": {},
    "SAGE": {"still_rows": True},
    "FlashAdamW": {},
    "FlashAdamW split": {"weights": "bf16+int8"},
    "FlashLion": {},
}
IN_CODES = ("AdamMini int8", "FlashAdamW", "FlashAdamW split", "FlashLion")
# Three heads of 4 rows: on two ranks the second lies on both. Of one row, a rank has none.
UNEVEN = {"matrix": (7, 5), "vector": (9,), "one row": (1, 6), "one number": (1,), "experts": (3, 4, 5)}
EVEN = {"matrix": (8, 32), "vector": (128,), "experts": (4, 8, 16)}
AGREEMENT = 2e-6  # of the way gone


class Attention(nn.Module):
    head_dim = 4

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(16, 12, bias=False)


class Weights(nn.Module):
    """The parameters of those shapes, and queries by head, sharded or whole on this rank."""

    def __init__(self, shapes, kind, sharded, mesh=None):
        super().__init__()
        self.kind = kind
        self.attention = Attention()
        shapes = {name: shape for name, shape in shapes.items() if kind != "SAGE" or len(shape) < 3}
        self.others = nn.ParameterDict({name: torch.empty(shape) for name, shape in shapes.items()})
        self.to(DEVICE, torch.bfloat16 if kind == "FlashAdamW split" else torch.float32)
        for number, w in enumerate(self.parameters()):
            w.data.copy_(values(tuple(w.shape), number))
        if sharded:
            fully_shard(self, mesh=mesh or init_device_mesh(DEVICE.type, (RANKS,)))

    def optimizer(self, **options):
        name = self.kind.split()[0]
        by_modules = {"model": self} if name in ("AdamMini", "SinkGD") else {}
        settings = {"lr": 1e-2, "weight_decay": 0.1} | KINDS[self.kind] | by_modules | options
        return getattr(optimizers, name)(self.parameters(), **settings)

    def take_gradients(self, step):
        for number, w in enumerate(self.parameters()):
            g = values(tuple(w.shape), 100 * step + number)
            g[: step % 3] = 0
            w.grad = as_sharded(g.to(w.device, w.dtype), w)


def values(shape, seed):
    random = np.random.RandomState(seed)
    return torch.tensor(random.uniform(-1, 1, size=shape) * 10.0 ** random.randint(-2, 1, size=shape))


def as_sharded(tensor, w):
    if not isinstance(w, DTensor):
        return tensor
    return distribute_tensor(tensor, w.device_mesh, w.placements, src_data_rank=None)


def train(weights, optimizer, first, last):
    for step in range(first, last):
        weights.take_gradients(step)
        optimizer.step()


def contents(weights, optimizer):
    """All weights and all state of all ranks, on the CPU."""
    parameters = list(weights.parameters())
    state = [optimizer.state[w][name] for w in parameters for name in sorted(optimizer.state[w])]
    return [sharding.whole(tensor.detach()).cpu().clone() for tensor in (*parameters, *state)]


def same_bits(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def check_the_steps_are_those_of_one_process():
    """Blocks, columns and dampers are those of the whole weight, wherever its rows lie."""
    numbers = {}
    for kind, implementation in itertools.product(KINDS, IMPLEMENTATIONS):
        # Where groups of codes are the same ones; others are looked at below.
        shapes = EVEN if kind in IN_CODES else UNEVEN
        if implementation == "triton" and not CUDA:  # in its interpreter, which is slow
            shapes = {name: shape for name, shape in shapes.items() if name in ("matrix", "one row")}
        sharded, alone = (Weights(shapes, kind, sharded) for sharded in (True, False))
        runs = [weights.optimizer(implementation=implementation) for weights in (sharded, alone)]
        start = contents(alone, runs[1])
        for weights, optimizer in zip((sharded, alone), runs, strict=True):
            train(weights, optimizer, 0, 3 if implementation == "eager" or CUDA else 1)
        ours, theirs = contents(sharded, runs[0]), contents(alone, runs[1])
        unit = 2.0**-7 if kind == "FlashAdamW split" else 2.0**-22
        worst = 0.0
        for before, mine, single in zip(start, ours, theirs, strict=False):  # the weights, which come first
            way = (single.double() - before.double()).abs().max()
            allowed = AGREEMENT * way + unit * before.double().abs()
            worst = max(worst, ((mine.double() - single.double()).abs() / allowed).max().item())
        assert worst <= 1, (kind, implementation, worst)
        numbers[f"{kind} {implementation}"] = {"w": worst}
    return numbers


def check_groups_of_codes_end_with_the_rows_of_a_rank():
    """Each rank steps its rows as a weight of its own: bit for bit, also where they are no whole groups."""
    for kind in IN_CODES:
        sharded = Weights(UNEVEN, kind, True)
        optimizer = sharded.optimizer(implementation="eager")
        w = sharded.others["matrix"]
        own = nn.Parameter(w.to_local().detach().clone())
        alone = type(optimizer)([own], lr=1e-2, weight_decay=0.1, implementation="eager", **KINDS[kind])
        for step in range(4):
            sharded.take_gradients(step)
            own.grad = w.grad.to_local().clone()
            optimizer.step()
            alone.step()
        assert torch.equal(w.to_local(), own), kind
        for name, mine in alone.state[own].items():
            ours = sharding.local_part(optimizer.state[w][name])
            if mine.ndim:
                assert torch.equal(ours[: len(mine)], mine), (kind, name)
                assert not ours[len(mine) :].any(), (kind, name)


def check_weights_that_are_replicated_too():
    """HSDP: over one dimension of the mesh copies, over the other rows; one of the two has a single rank here."""
    for kind in ("AdamMini", "SinkGD", "SAGE", "FlashAdamW"):
        shapes = EVEN if kind in IN_CODES else UNEVEN
        alone = Weights(shapes, kind, False)
        one_process = alone.optimizer(implementation="eager")
        train(alone, one_process, 0, 3)
        for shape in ((1, RANKS), (RANKS, 1)):
            mesh = init_device_mesh(DEVICE.type, shape, mesh_dim_names=("replicate", "shard"))
            weights = Weights(shapes, kind, True, mesh)
            optimizer = weights.optimizer(implementation="eager")
            train(weights, optimizer, 0, 3)
            for mine, single in zip(contents(weights, optimizer), contents(alone, one_process), strict=True):
                torch.testing.assert_close(mine, single, rtol=1e-6, atol=1e-7)


def check_a_run_goes_on_from_a_checkpoint_bit_for_bit():
    for kind in KINDS:
        stays = Weights(UNEVEN, kind, True)
        optimizer = stays.optimizer()
        train(stays, optimizer, 0, 2)
        place = FOLDER / kind
        dcp.save(get_optimizer_state_dict(stays, optimizer), checkpoint_id=place)
        again = Weights(UNEVEN, kind, True)
        again.load_state_dict(stays.state_dict())
        resumed = again.optimizer(lr=123.0)
        state = get_optimizer_state_dict(again, resumed)
        dcp.load(state, checkpoint_id=place)
        set_optimizer_state_dict(again, resumed, state)
        assert same_bits(contents(again, resumed), contents(stays, optimizer)), kind
        train(stays, optimizer, 2, 4)
        train(again, resumed, 2, 4)
        assert same_bits(contents(again, resumed), contents(stays, optimizer)), kind


def check_state_of_one_process_goes_to_all_ranks():
    """Where shards are whole groups of codes; else it is refused, and the words say why."""
    for kind in KINDS:
        alone = Weights(EVEN, kind, False)
        one_process = alone.optimizer()
        train(alone, one_process, 0, 2)
        sharded = Weights(EVEN, kind, True)
        with torch.no_grad():
            for w, whole in zip(sharded.parameters(), alone.parameters(), strict=True):
                w.copy_(as_sharded(whole.detach(), w))
        optimizer = sharded.optimizer()
        optimizer.load_state_dict(one_process.state_dict())
        assert same_bits(contents(sharded, optimizer), contents(alone, one_process)), kind
        train(sharded, optimizer, 2, 3)
        if kind in IN_CODES:
            uneven, other = Weights(UNEVEN, kind, False), Weights(UNEVEN, kind, True)
            one_process, optimizer = uneven.optimizer(), other.optimizer()
            train(uneven, one_process, 0, 1)
            raises("and sharded alike", optimizer.load_state_dict, one_process.state_dict())
            assert not optimizer.state


def check_ranks_that_disagree_and_other_placements_are_refused():
    """On every rank, before anything is written."""
    for kind in KINDS:
        weights = Weights(UNEVEN, kind, True)
        optimizer = weights.optimizer(lr=1e-2 * (1 + RANK))
        before = [sharding.whole(w.detach()) for w in weights.parameters()]
        raises("disagree on lr of parameter 0", train, weights, optimizer, 0, 1)
        optimizer = weights.optimizer()
        weights.take_gradients(0)
        weights.others["vector"].grad = weights.others["vector"].grad if RANK else None
        raises("disagree on having a gradient of parameter", optimizer.step)
        assert not optimizer.state
        assert same_bits(before, [sharding.whole(w.detach()) for w in weights.parameters()])
        mesh = init_device_mesh(DEVICE.type, (RANKS,))
        w = nn.Parameter(distribute_tensor(torch.ones(8, 6, device=DEVICE, dtype=before[0].dtype), mesh, (Shard(1),)))
        w.grad = torch.ones_like(w)
        options = {"lr": 1e-2} | KINDS[kind]
        raises("a weight of shape (8, 6) has the placements (Shard(dim=1),)", type(optimizer)([w], **options).step)
    raises("SplitWeights(AdamMini): a weight of shape (8, 6) is a DTensor", SplitWeights, optimizers.AdamMini([w]))


if __name__ == "__main__":
    run_checks({name: check for name, check in globals().items() if name.startswith("check_")})
