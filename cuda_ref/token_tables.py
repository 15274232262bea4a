"""Which parameters of a PyTorch model are token tables, decided once from its modules and never by running it.

What is read from the modules is here; the rules are those of MLX models, in ``ember_mlx/shared/token_table_rules.py``.
"""

from itertools import takewhile

from torch import nn

from ember_mlx.shared.errors import InputError
from ember_mlx.shared.token_table_rules import Candidate, TokenTable, decide, stated_vocabularies

__all__ = ["LOOKED_FOR", "TokenTable", "find_token_tables"]

LOOKED_FOR = (
    "an embedding (nn.Embedding, or a module with a two-dimensional weight and `num_embeddings`) with one row a token "
    "of the vocabulary, or a linear outside the decoder layers with one output a token"
)
"""What ``find_token_tables`` looks for, in words that fit into an error message."""

# Where PEFT keeps a wrapped weight, or the copy of it that is trained: below the place of the module.
_WRAPPED = {"base_layer", "original_module", "modules_to_save"}
_ADAPTER_FACTORS = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}


def find_token_tables(model: nn.Module) -> list[TokenTable]:
    """Find a model's token tables. Costs no computation: the model is not run and no weight is read.

    Args:
        model (nn.Module): Any module: of Hugging Face or one's own, tied or not, on the meta device too; inside
            ``DistributedDataParallel``, ``torch.compile`` or a PEFT model, or sharded by ``fully_shard``.

    Returns:
        list[TokenTable]: Embeddings (or tied) first, then heads, each in the model's order; empty when there is none.
        ``path`` is the name that ``model.named_parameters()`` gives, of a tied weight its only one there; ``shape`` is
        that of the whole table when its rows are sharded.

    Raises:
        InputError: ``model`` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"find_token_tables({type(model).__name__}): a torch.nn.Module is needed. "
            "Of a Hugging Face pipeline or Trainer, pass its .model."
        )
    return decide(_candidates(model), stated_vocabularies(model.modules()))


def _candidates(model):
    """Every two-dimensional weight of the model, in its order; one that stands in several places counts once."""
    uses = {}
    for module_path, module in model.named_modules():
        place = module_path.split(".")
        if _ADAPTER_FACTORS.isdisjoint(place):
            for name, weight in module.named_parameters(recurse=False):
                if weight.ndim == 2:
                    uses.setdefault(weight, []).append(_use(module, name, place))
    return [_candidate(path, weight, uses[weight]) for path, weight in model.named_parameters() if weight in uses]


def _use(module, name, place):
    """How a module uses its parameter, and the module's place without what wraps it."""
    unwrapped = list(takewhile(lambda part: part not in _WRAPPED, place)) or place
    if name != "weight":
        return "array", [*unwrapped, name]
    return "lookup" if hasattr(module, "num_embeddings") else "linear", unwrapped


def _candidate(path, weight, uses):
    kinds = [kind for kind, _ in uses]
    kind, place = uses[kinds.index("lookup") if "lookup" in kinds else 0]
    table = TokenTable(path, "", tuple(weight.shape), weight.dtype, quantized=not weight.is_floating_point())
    return Candidate(table, kind, place, is_also_linear=kind == "lookup" and "linear" in kinds)
