"""QLoRA from a 16-bit model: the layers are quantized when they are loaded, and the token tables are not.

Affine quantization in groups of 64, the defaults of ``mlx_lm.convert``; of a model that names its own layers' bits (as
the gates of experts), these hold here too.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ember_mlx.finetune.choices import GROUP_SIZE
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.units import format_bytes
from ember_mlx.token_tables import find_token_tables

__all__ = ["quantize_layers", "quantized_in_words"]


def quantize_layers(model: nn.Module, config: dict[str, Any], bits: int, where: str) -> None:
    """Quantize all that can be but the token tables, in the model and in its config.

    Args:
        model: Changed in place. If it was loaded lazily, one layer of 16 bits exists at a time.
        config: The model's; gets MLX's ``quantization``.
        bits: Of a weight.
        where: What errors begin with.

    Raises:
        InputError: for a model that is quantized already, and for one without a layer whose rows are whole groups.
    """
    if any(hasattr(module, "bits") for module in model.modules()):
        raise InputError(f"{where}: is quantized already: leave --quantize out, or give the same model in 16 bits")
    tables = [table.module_path for table in find_token_tables(model)]
    of_model = getattr(model, "quant_predicate", None) or (lambda path, module: True)
    settings = {"group_size": GROUP_SIZE, "bits": bits, "mode": "affine"}

    def predicate(path, module):
        if path in tables or not hasattr(module, "to_quantized") or module.weight.shape[-1] % GROUP_SIZE:
            return False
        own = of_model(path, module)
        return settings.setdefault(path, own) if isinstance(own, dict) else own

    nn.quantize(model, GROUP_SIZE, bits, class_predicate=predicate)
    if not _quantized(model):
        raise InputError(f"{where}: no layer has rows of a multiple of {GROUP_SIZE} numbers: leave --quantize out")
    config["quantization"] = settings | dict.fromkeys(tables, False)
    for _, module in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module):
        mx.eval(module.parameters())
    mx.eval(model.parameters())


def quantized_in_words(model: nn.Module) -> str:
    """A line on the layers that :func:`quantize_layers` has quantized, with bytes before and after."""
    layers = _quantized(model)
    bits = " and ".join(str(bits) for bits in sorted({layer.bits for layer in layers}))
    after = sum(array.nbytes for layer in layers for _, array in tree_flatten(layer.parameters()))
    packed = sum(layer.weight.nbytes * 8 // layer.bits * layer.scales.itemsize for layer in layers)
    packing = ("weight", "scales", "biases")
    rest = after - sum(layer[name].nbytes for layer in layers for name in packing if name in layer)
    return (
        f"Quantized: {len(layers)} weights at {bits} bits, {format_bytes(packed + rest)} before, {format_bytes(after)} "
        f"now; the token tables stay in {str(layers[0].scales.dtype).rpartition('.')[2]}"
    )


def _quantized(model):
    return [module for module in model.modules() if hasattr(module, "bits")]
