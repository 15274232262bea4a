"""What the tests of SAGE, FlashAdamW and FlashLion in PyTorch share: how they are made, trained and looked at."""

import numpy as np
import torch

import cuda_ref.optimizers as torch_optimizers

AGREEMENT = 2e-6  # of the way gone
KINDS = {
    "SAGE": {},
    "FlashAdamW": {},
    "FlashAdamW, split": {"weights": "bf16+int8"},
    "FlashAdamW, published": {"state_format": "published"},
    "FlashLion, split": {"weights": "bf16+int8"},
}


def as_float64(tensor):
    return tensor.detach().to("cpu", torch.float64).numpy()


def start(shape, dtype="float32", device="cpu", seed=0):
    values = torch.tensor(np.random.RandomState(seed).uniform(-0.02, 0.02, size=shape))
    return torch.nn.Parameter(values.to(device, getattr(torch, dtype)))


def gradient(shape, t):
    random = np.random.RandomState(t)
    values = (random.uniform(-1, 1, size=shape) * 10.0 ** random.randint(-3, 1, size=shape)).astype(np.float32)
    values[..., :1] = 0
    return values


def make(kind, parameters, implementation="eager", **options):
    name = kind.split(",")[0]
    options = KINDS[kind] | options | {"implementation": implementation}
    return getattr(torch_optimizers, name)(parameters, lr=1e-3, **options)


def train(optimizer, steps, first=0):
    for t in range(first, first + steps):
        for w in optimizer.param_groups[0]["params"]:
            w.grad = torch.tensor(gradient(tuple(w.shape), t)).to(w.device, w.dtype)
        optimizer.step()
    return optimizer


def contents(optimizer):
    """The bits of weights and state."""
    tensors = []
    for w in optimizer.param_groups[0]["params"]:
        tensors += [w, *(value for _, value in sorted(optimizer.state[w].items()))]
    return [tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() for tensor in tensors]
