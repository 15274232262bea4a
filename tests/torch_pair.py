"""A small model with its pair of optimizers, for the tests of the pair in PyTorch."""

from functools import partial

import torch
from torch import nn
from torch.optim import SGD, Adafactor, AdamW

from cuda_ref import Ember, PairedOptimizer

V, D = 23, 4
TABLES = ["embed.weight", "head.weight"]


class Model(nn.Module):
    def __init__(self, rows=V):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(rows, D)
        self.mid = nn.Linear(D, D)
        self.head = nn.Linear(D, rows)

    def forward(self, ids):
        return self.head(torch.tanh(self.mid(self.embed(ids))))


def paired(model, **sides):
    return PairedOptimizer(model, **{"tables": partial(Ember, lr=1e-2), "rest": partial(AdamW, lr=1e-3)} | sides)


def backward(model, seed=0):
    ids = torch.randint(0, V, (9,), generator=torch.Generator().manual_seed(seed))
    loss = nn.functional.cross_entropy(model(ids[:-1]), ids[1:])
    loss.backward()
    return loss


def train(model, optimizer, steps, first=0):
    for seed in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()


def trained(steps, dtype=torch.float32, **sides):
    model = Model().to(dtype)
    optimizer = paired(model, **sides)
    train(model, optimizer, steps)
    return model, optimizer


def differing(a, b):
    return [name for name, w in a.state_dict().items() if not torch.equal(w, b.state_dict()[name])]


def same_state(a, b):
    a, b = a.state_dict()["state"], b.state_dict()["state"]
    return a.keys() == b.keys() and all(torch.equal(x, b[i][name]) for i in a for name, x in a[i].items())


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


RESTS = {
    "sgd": partial(SGD, lr=1e-1),
    "sgd with momentum": partial(SGD, lr=1e-1, momentum=0.9),
    "adafactor": partial(Adafactor, lr=1e-2),
    "fused adamw": partial(AdamW, lr=1e-3, fused=True),
    "two groups": lambda named: AdamW(
        [{"params": named[:1]}, {"params": named[1:], "weight_decay": 0.0}], lr=1e-3, weight_decay=0.1
    ),
}
