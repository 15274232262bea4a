"""A small model, its batches and its optimizers, for the tests of streamed steps."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss
from streaming_spy import randomized
from tiny_models import tiny_llama

from ember_mlx import Ember, PairedOptimizer

SHORT, LONG = 7, 41  # below and above half the features, 32, at two sequences


def batch_of(length, sequences=2):
    batch = mx.random.randint(0, 170, (sequences, length), key=mx.random.key(3))
    return batch, mx.array([[0, length - 1], [1, length - 2]] * (sequences // 2) or [[0, length - 1]])


def llama(tied=False, **options):
    return randomized(tiny_llama(tied=tied, hidden=64, **options)).train()


def paired(model, rest=None, **options):
    return PairedOptimizer(model, tables=Ember(1e-2), rest=rest or optim.AdamW(1e-3), **options)


def arrays_of(model, optimizer):
    return dict(tree_flatten({"model": model.parameters(), "optimizer": optimizer.state}))


def bits(arrays):
    return {name: bytes(np.array(mx.view(array, mx.uint8)) if array.ndim else repr(array.item()).encode())
            for name, array in arrays.items()}  # fmt: skip


def ordinary_steps(model, optimizer, batches, steps, loss=default_loss):
    losses = []
    for _ in range(steps):
        (value, _), gradients = nn.value_and_grad(model, loss)(model, *batches)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(value.item())
    return losses
