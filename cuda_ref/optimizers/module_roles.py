"""What the modules of a model say of its weights: heads of attention, convolutions, token tables."""

from torch import nn

from cuda_ref.token_tables import find_token_tables
from ember_mlx.shared.errors import InputError

__all__ = ["attention_heads", "convolutions", "token_tables"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def attention_heads(model: nn.Module) -> dict[nn.Parameter, int]:
    """Each query and key weight -> its number of heads, by the ``head_dim`` of the attention module around it.

    So a head has its true head_dim, whatever the width of the model. Left out is a weight whose rows the heads do not
    divide, and one of an adapted layer, which does not train.
    """
    found = {}
    for module in _modules(model):
        for projection in ("q_proj", "k_proj"):
            layer, head_dim = getattr(module, projection, None), getattr(module, "head_dim", None)
            if type(layer) is nn.Linear and isinstance(head_dim, int) and layer.out_features % head_dim == 0:
                found[layer.weight] = layer.out_features // head_dim
    return found


def convolutions(model: nn.Module) -> set[nn.Parameter]:
    """The weights of convolutions, (outputs, inputs, ...)."""
    return {module.weight for module in _modules(model) if isinstance(module, CONVOLUTIONS)}


def token_tables(model: nn.Module) -> set[nn.Parameter]:
    """The token tables."""
    return {model.get_parameter(table.path) for table in find_token_tables(model)}


def _modules(model):
    if not isinstance(model, nn.Module):
        raise InputError(f"model={type(model).__name__}: must be the torch.nn.Module whose weights are trained")
    return model.modules()
