"""A step of each optimizer under torch.compile: one graph, compiled once, with the numbers of the eager step."""

import numpy as np
import pytest
import torch
from torch import nn

from cuda_ref import optimizers

KINDS = {
    "AdamMini": {},
    "AdamMini int8": {"momentum": "int8"},
    "SinkGD": {"passes": 2},
    "SAGE": {},
    "FlashAdamW": {"weights": "bf16+int8"},
    "FlashLion": {},
}
SHAPES = {(6, 33): torch.bfloat16, (5,): torch.float32}
STEPS = 3


def made(kind, lr, device, implementation):
    random = np.random.RandomState(0)
    parameters = [nn.Parameter(torch.tensor(random.uniform(-1, 1, size=shape), dtype=dtype, device=device))
                  for shape, dtype in SHAPES.items()]  # fmt: skip
    options = KINDS[kind] | {"lr": lr, "weight_decay": 0.1, "implementation": implementation}
    return getattr(optimizers, kind.split()[0])(parameters, **options)


def weights_of(optimizer):
    return optimizer.param_groups[0]["params"]


def follow(kind, device, implementation, backend):
    """Steps with a learning rate on a schedule, from before there is state: what it began with, and both optimizers."""
    torch.compiler.reset()
    lr = torch.tensor(1e-2, device=device)
    compiled, eager = (made(kind, lr, device, implementation) for _ in range(2))
    start = [w.detach().double() for w in weights_of(compiled)]
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return backend(graph, inputs)

    step = torch.compile(compiled.step, backend=counting, fullgraph=True)
    for t in range(STEPS):
        lr.fill_(1e-2 / (t + 1))
        random = np.random.RandomState(t)
        for w, twin in zip(weights_of(compiled), weights_of(eager), strict=True):
            w.grad = torch.tensor(random.uniform(-1, 1, size=tuple(w.shape)), dtype=w.dtype, device=device)
            twin.grad = w.grad.clone()
        step()
        eager.step()
        assert len(graphs) == 1
    assert all(state["step"] == STEPS for state in compiled.state.values())
    return start, compiled, eager


def in_order(graph, inputs):
    return graph.forward


def inductor(graph, inputs):
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_one_graph_with_the_bits_of_the_eager_step(kind):
    _, compiled, eager = follow(kind, "cpu", "eager", in_order)
    for w, twin in zip(weights_of(compiled), weights_of(eager), strict=True):
        assert torch.equal(w, twin)
        for name, value in compiled.state[w].items():
            assert torch.equal(value, eager.state[twin][name]), name


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# C++ takes a minute to compile all of them, so on a CPU one is; on a GPU each.
FUSED = [pytest.param("SAGE", "cpu", "eager")]
FUSED += [pytest.param(kind, "cuda", name, marks=needs_cuda) for kind in KINDS for name in ("eager", "triton")]


@pytest.mark.parametrize(("kind", "device", "implementation"), FUSED)
def test_as_the_compiler_fuses_it_the_weights_are_those_of_the_eager_step(kind, device, implementation):
    start, compiled, eager = follow(kind, device, implementation, inductor)
    for before, w, twin in zip(start, weights_of(compiled), weights_of(eager), strict=True):
        way = (twin.double() - before).abs().max()
        # What is fused rounds elsewhere; a code of the momentum that flips by that moves a step by 1/127 at most.
        allowed = (2e-6 if kind in ("AdamMini", "SinkGD", "SAGE") else 1 / 127) * way
        unit = 2.0**-7 if w.dtype == torch.bfloat16 else 2.0**-22
        assert ((w.double() - twin.double()).abs() <= allowed + unit * before.abs().clamp(min=0.02)).all()
