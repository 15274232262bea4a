"""What the modules of a model say of its weights: heads of attention, adapters, convolutions, token tables."""

import mlx.nn as nn

from ember_mlx.token_tables import find_token_tables

__all__ = ["attention_heads", "convolutions", "lora_factors", "token_tables"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
HEADS = {
    "q_proj": ("n_heads", "num_heads", "num_attention_heads"),
    "k_proj": ("n_kv_heads", "num_kv_heads", "num_key_value_heads"),
}


def attention_heads(model: nn.Module) -> dict[str, int]:
    """Path of each query and key weight -> its number of heads, as the attention module around it counts them.

    So a head has its true head_dim, whatever the width of the model. A weight whose rows the heads do not divide, and
    one of a quantized or adapted layer, is left out.
    """
    found = {}
    for path, module in model.named_modules():
        for projection, names in HEADS.items():
            layer = module.get(projection)
            heads = next((count for name in names if isinstance(count := getattr(module, name, None), int)), None)
            if type(layer) is nn.Linear and heads and layer.weight.shape[0] % heads == 0:
                found[f"{path}.{projection}.weight".lstrip(".")] = heads
    return found


def lora_factors(model: nn.Module) -> set[str]:
    """Paths of ``lora_a`` (inputs, rank) and ``lora_b`` (rank, outputs), whose rank and outputs are columns."""
    modules = [(path, module) for path, module in model.named_modules() if {"lora_a", "lora_b"} <= module.keys()]
    return {f"{path}.{name}".lstrip(".") for path, m in modules for name in ("lora_a", "lora_b") if m[name].ndim == 2}


def convolutions(model: nn.Module) -> set[str]:
    """Paths of the weights of convolutions, (outputs, ..., inputs)."""
    return {f"{path}.weight".lstrip(".") for path, module in model.named_modules() if isinstance(module, CONVOLUTIONS)}


def token_tables(model: nn.Module) -> set[str]:
    """Paths of the token tables."""
    return {table.path for table in find_token_tables(model)}
