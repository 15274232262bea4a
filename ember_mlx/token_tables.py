"""Which parameters of an MLX model are token tables, decided once from its modules and never by running it.

What is read from the modules is here; the rules stand in `token_table_rules`, which PyTorch models go through too.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ember_mlx.shared.errors import InputError
from ember_mlx.shared.token_table_rules import Candidate, TokenTable, decide, stated_vocabularies

__all__ = ["LOOKED_FOR", "TokenTable", "find_token_tables"]

LOOKED_FOR = (
    "an embedding (nn.Embedding, nn.QuantizedEmbedding, or a module with a two-dimensional weight and `as_linear`) "
    "with one row a token of the vocabulary, or a linear outside the decoder layers with one output a token"
)
"""What `find_token_tables` looks for, in words that fit into an error message."""

_TYING_FLAGS = ("tie_word_embeddings", "tie_embeddings", "tie_weights", "weight_tying")


def find_token_tables(model: nn.Module) -> list[TokenTable]:
    """Find a model's token tables. Costs no computation: the model is not run and no weight is read.

    Args:
        model: Any `nn.Module`; plain, quantized, or with mlx-lm's LoRA or DoRA layers in it (the path is then that of
            the wrapped weight).

    Returns:
        The tables, embeddings (or tied) first, then heads, each in the model's order. Empty when there is none.

    Raises:
        InputError: `model` is no `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"find_token_tables({type(model).__name__}): an mlx.nn.Module is needed. "
            "If this is what mlx_lm.load returned, pass its first item, the model."
        )
    return decide(_candidates(model), stated_vocabularies(model.modules()))


def _ties_instead(user: nn.Module | None) -> bool:
    """Whether the module that holds a head was told to let the embedding answer, and does so.

    A flag counts only where the forward pass reads it: `helium` builds a head and then obeys `args`, while several
    models carry the same flag in `args` and always use their head.
    """
    code = getattr(type(user).__call__, "__code__", None)
    read = set(_TYING_FLAGS) & set(code.co_names if code else ())
    sources = (user, getattr(user, "args", None), getattr(user, "config", None))
    return any(getattr(source, flag, False) is True for flag in read for source in sources)


def _candidates(model: nn.Module) -> list[Candidate]:
    """Every two-dimensional weight of the model, in its order; a module that stands in two places counts once."""
    modules = dict(model.named_modules())
    found, seen = [], set()
    for path, array in tree_flatten(model.parameters()):
        module_path, _, parameter = path.rpartition(".")
        module = modules.get(module_path)  # None: an array in a list or a dict
        if module is None or array.ndim != 2 or (id(module), parameter) in seen:
            continue
        seen.add((id(module), parameter))
        place = module_path
        if parameter == "weight":
            kind = "lookup" if isinstance(module, nn.Embedding) or hasattr(module, "as_linear") else "linear"
            wrapper = module_path.rpartition(".")[0]
            if "lora_a" in modules.get(wrapper, {}):
                place = wrapper
        elif "weight" in module or "lora_a" in module:
            continue  # the scales of a packed weight, the factors of an adapter
        else:
            kind, place = "array", path
        is_unused = _ties_instead(modules.get(place.rpartition(".")[0]))
        found.append(Candidate(_undecided(path, module, array), kind, place.split("."), is_unused=is_unused))
    return found


def _undecided(path: str, module: nn.Module, array: mx.array) -> TokenTable:
    rows, columns = array.shape
    if array.dtype != mx.uint32 or "scales" not in module:
        return TokenTable(path, "", (rows, columns), array.dtype, False)
    # The scales of the 4- and 8-bit float modes are bytes; those modes dequantize to bfloat16.
    dtype = mx.bfloat16 if module.scales.dtype == mx.uint8 else module.scales.dtype
    return TokenTable(path, "", (rows, module.scales.shape[-1] * module.group_size), dtype, True)
