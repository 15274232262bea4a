"""Adapters merged into the layers they change, and how much of the change is left in the numbers that are saved.

W is the weight of a layer as the model has it, M the weight with its adapter, both in float32, and S what is saved.
The share of the change that is left is its projection, <S - W, M - W> / <M - W, M - W> over all layers. Rounding to the
same grid gives back W where a change is smaller than half a step: that share falls, and the gain in loss with it.
Of a token table that is quantized again, M is the trained table.
"""

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ember_mlx.finetune.mlx_lm_internals import dequantized
from ember_mlx.shared.errors import InputError

__all__ = [
    "QUANTIZATION",
    "BaseTable",
    "Kept",
    "Merged",
    "base_tables",
    "merge_adapters",
    "quantize_tables",
    "table_settings",
]

QUANTIZATION = ("quantization", "quantization_config")
ROWS = 4096  # of a table that are compared at once


@dataclass(frozen=True)
class Kept:
    """What rounding left of a change.

    Args:
        share (float): Of the change, from 0 to 1.
        noise (float): ||S - M|| / ||M - W||, the rounding errors as a part of the change.
    """

    share: float
    noise: float


@dataclass(frozen=True)
class Merged:
    """What came of merging.

    Args:
        layers (int): How many layers had an adapter.
        bits_before, bits (tuple[int]): Of the quantized ones among these, before and as they are now; empty for none.
        dtype (mx.Dtype, optional): Of those that are not quantized now; None for none.
        kept (Kept): What is left of their change.
    """

    layers: int
    bits_before: tuple[int, ...]
    bits: tuple[int, ...]
    dtype: mx.Dtype | None
    kept: Kept


@dataclass(frozen=True)
class BaseTable:
    """A token table before it was trained: its module's path, its weight, and how it is to be quantized."""

    path: str
    weight: mx.array
    settings: dict[str, Any]


def merge_adapters(model: nn.Module, config: dict, *, requantize: int | None = None) -> Merged:
    """Put plain layers in the place of mlx-lm's adapter layers, in the model and in its config.

    A layer that was quantized stays in the dtype of its scales.

    Args:
        requantize (int, optional): Quantize it again, at so many bits.

    Raises:
        InputError: for fewer bits than a layer has.
    """
    before, after, dtypes = set(), set(), set()
    sums = _Sums()
    modules = [(path, module) for path, module in model.named_modules() if hasattr(module, "fuse")]
    for path, module in modules:
        settings = _quantization(module[_base_name(module)])
        before |= {settings["bits"]} if settings else set()
        layer, weight_before, dtype = _merged(module)
        weight = layer.weight
        layer.set_dtype(dtype)
        if settings and requantize:
            if requantize < settings["bits"]:
                raise InputError(f"--requantize {requantize}: {path} has {settings['bits']} bits; use at least that")
            settings = settings if settings["bits"] == requantize else _affine(settings, requantize)
            layer = layer.to_quantized(**settings)
            after.add(requantize)
        else:
            settings = False if settings else None
            dtypes.add(dtype)
        sums.add(weight_before, weight, _weight(layer), layer.parameters())
        model.update_modules(tree_unflatten([(path, layer)]))
        for key in QUANTIZATION:
            if settings is not None and key in config:
                config[key][path] = settings
    return Merged(len(modules), tuple(sorted(before)), tuple(sorted(after)), next(iter(dtypes), None), sums.kept())


def table_settings(model: nn.Module, config: dict, tables: list[str]) -> dict[str, dict[str, Any]]:
    """How token tables are quantized: as they are in the model, or else as its layers are; by the paths of modules.

    Raises:
        InputError: for a model that is not quantized.
    """
    of_layers = next((config[key] for key in QUANTIZATION if config.get(key)), None)
    if of_layers is None:
        raise InputError("--quantize-tables: the model is not quantized; leave it out, or give a quantized model")
    of_layers = {"group_size": 64, "bits": 4, "mode": "affine"} | {
        name: of_layers[name] for name in ("group_size", "bits", "mode") if name in of_layers
    }
    modules = dict(model.named_modules())
    # Of a table that the model lacks, loading the adapter tells.
    return {path: _quantization(modules[path]) or of_layers for path in tables if path in modules}


def base_tables(model: nn.Module, settings: dict[str, dict[str, Any]]) -> list[BaseTable]:
    """The tables of :func:`table_settings` before an adapter takes their place, with the rows of added tokens."""
    modules = dict(model.named_modules())
    return [BaseTable(path, dequantized(modules[path]).weight, own) for path, own in settings.items()]


def quantize_tables(model: nn.Module, config: dict, tables: list[BaseTable]) -> Kept:
    """Quantize trained token tables, in the model and in its config; what is left of their change.

    Raises:
        InputError: for a table whose rows are not whole groups.
    """
    sums, modules = _Sums(), dict(model.named_modules())
    for table in tables:
        trained, group_size = modules[table.path], table.settings["group_size"]
        if trained.weight.shape[1] % group_size:
            raise InputError(
                f"--quantize-tables: {table.path} has rows of {trained.weight.shape[1]} numbers, which are no whole "
                f"groups of {group_size}; leave it out"
            )
        module = trained.to_quantized(**table.settings)
        for start in range(0, trained.weight.shape[0], ROWS):
            rows = slice(start, start + ROWS)
            before, after = (weight[rows].astype(mx.float32) for weight in (table.weight, trained.weight))
            sums.add(before, after, _weight(module, rows), module.parameters())
        model.update_modules(tree_unflatten([(table.path, module)]))
        for key in QUANTIZATION:
            if key in config:
                config[key][table.path] = table.settings
    return sums.kept()


class _Sums:
    """Over all weights: <S - W, M - W>, ||M - W||^2 and ||S - M||^2."""

    def __init__(self):
        self.left = self.changed = self.errors = 0.0

    def add(self, before, after, saved, *along):
        """Weights in float32; ``along`` is evaluated with them."""
        change, error = after - before, saved - after
        sums = mx.stack([mx.sum((change + error) * change), mx.sum(mx.square(change)), mx.sum(mx.square(error))])
        mx.eval(sums, *along)
        left, changed, errors = sums.tolist()
        self.left, self.changed, self.errors = self.left + left, self.changed + changed, self.errors + errors

    def kept(self):
        if not self.changed:
            return Kept(1.0, 0.0)
        return Kept(min(1.0, max(0.0, self.left / self.changed)), math.sqrt(self.errors / self.changed))


def _merged(module):
    """The layer that an adapter layer stands for, and its weight without the adapter, in float32; its dtype."""
    name = _base_name(module)
    dtype = dequantized(module[name]).weight.dtype
    module.set_dtype(mx.float32)
    module[name] = dequantized(module[name])
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


def _weight(layer, rows=slice(None)):
    """In float32, as it is multiplied with."""
    if not hasattr(layer, "bits"):
        return layer.weight[rows].astype(mx.float32)
    scales, biases = layer.scales[rows], layer.biases[rows] if "biases" in layer else None
    if layer.mode == "affine":
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(layer.weight[rows], scales, biases, **_quantization(layer)).astype(mx.float32)
