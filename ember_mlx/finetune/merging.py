"""Adapters merged into the layers they change, and how much of the change is left in the numbers that are saved.

W is the weight of a layer as the model has it, M the weight with its adapter, both in float32, and S what is saved.
The share of the change that is left is its projection, <S - W, M - W> / <M - W, M - W> over all layers. Rounding to the
same grid gives back W where a change is smaller than half a step: that share falls, and the gain in loss with it.
"""

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.utils import dequantize_model

from ember_mlx.shared.errors import InputError

__all__ = ["QUANTIZATION", "Merged", "merge_adapters"]

QUANTIZATION = ("quantization", "quantization_config")


@dataclass(frozen=True)
class Merged:
    """What came of merging.

    Args:
        layers (int): How many layers had an adapter.
        bits_before, bits (tuple[int]): Of the quantized ones among these, before and as they are now; empty for none.
        dtype (mx.Dtype, optional): Of those that are not quantized now; None for none.
        kept (float): The share of the change that is left, from 0 to 1.
        noise (float): ||S - M|| / ||M - W||, the rounding errors as a part of the change.
    """

    layers: int
    bits_before: tuple[int, ...]
    bits: tuple[int, ...]
    dtype: mx.Dtype | None
    kept: float
    noise: float


def merge_adapters(model: nn.Module, config: dict, *, requantize: int | None = None) -> Merged:
    """Put plain layers in the place of mlx-lm's adapter layers, in the model and in its config.

    A layer that was quantized stays in the dtype of its scales.

    Args:
        requantize (int, optional): Quantize it again, at so many bits.

    Raises:
        InputError: for fewer bits than a layer has.
    """
    before, after, dtypes = set(), set(), set()
    left = changed = errors = 0.0
    modules = [(path, module) for path, module in model.named_modules() if hasattr(module, "fuse")]
    for path, module in modules:
        settings = _quantization(module[_base_name(module)])
        layer, weight_before, dtype = _merged(module)
        weight = layer.weight
        layer.set_dtype(dtype)
        if settings and requantize:
            if requantize < settings["bits"]:
                raise InputError(f"--requantize {requantize}: {path} has {settings['bits']} bits; use at least that")
            before.add(settings["bits"])
            settings = settings if settings["bits"] == requantize else _affine(settings, requantize)
            layer = layer.to_quantized(**settings)
            after.add(requantize)
        else:
            before |= {settings["bits"]} if settings else set()
            settings = False if settings else None
            dtypes.add(dtype)
        change = weight - weight_before
        error = _weight(layer) - weight
        sums = mx.stack([mx.sum((change + error) * change), mx.sum(mx.square(change)), mx.sum(mx.square(error))])
        mx.eval(layer.parameters(), sums)
        left, changed, errors = left + sums[0].item(), changed + sums[1].item(), errors + sums[2].item()
        model.update_modules(tree_unflatten([(path, layer)]))
        for key in QUANTIZATION:
            if settings is not None and key in config:
                config[key][path] = settings
    kept = min(1.0, max(0.0, left / changed)) if changed else 1.0
    noise = math.sqrt(errors / changed) if changed else 0.0
    return Merged(len(modules), tuple(sorted(before)), tuple(sorted(after)), next(iter(dtypes), None), kept, noise)


def _merged(module):
    """The layer that an adapter layer stands for, and its weight without the adapter, in float32; its dtype."""
    name = _base_name(module)
    dtype = _plain(module[name]).weight.dtype
    module.set_dtype(mx.float32)
    module[name] = _plain(module[name])
    module[name].set_dtype(mx.float32)  # of some modes the scales are no floats
    return module.fuse(), module[name].weight, dtype


def _base_name(module):
    return "embedding" if "embedding" in module else "linear"


def _quantization(layer):
    if not hasattr(layer, "bits"):
        return None
    return {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}


def _affine(settings, bits):
    """At other bits: of other modes than the affine one there is only one number of bits."""
    return {"group_size": max(32, settings["group_size"]), "bits": bits, "mode": "affine"}


def _plain(layer):
    # mlx-lm's function takes a model: a module of one child makes it one.
    holder = nn.Module()
    holder.child = layer
    return dequantize_model(holder).child


def _weight(layer):
    """In float32, as it is multiplied with."""
    if not hasattr(layer, "bits"):
        return layer.weight.astype(mx.float32)
    scales, biases = layer.scales, getattr(layer, "biases", None)
    if layer.mode == "affine":
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(layer.weight, scales, biases, **_quantization(layer)).astype(mx.float32)
