"""A model made ready to train: LoRA or whole layers as mlx-lm has it, and the token tables, as was chosen."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.cli_ui import rprint
from mlx_lm.tuner.utils import linear_to_lora_layers

from ember_mlx.finetune.choices import Choices, Shapes
from ember_mlx.finetune.mlx_lm_internals import dequantized
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.units import format_bytes
from ember_mlx.token_tables import LOOKED_FOR, find_token_tables

__all__ = ["dequantize_modules", "dequantize_to_train", "make_trainable", "shapes_of"]


def shapes_of(model: nn.Module) -> Shapes:
    """What :func:`ember_mlx.finetune.choices.choose` asks of a loaded model. No weight is read."""
    layers = getattr(model, "layers", None)
    names = [frozenset(name for name, _ in layer.named_modules()) for layer in layers or ()]
    return Shapes(
        looked_for=f"{type(model).__module__}; looked for {LOOKED_FOR}",
        layers=None if layers is None else len(layers),
        tables=tuple(find_token_tables(model)),
        quantized=min((path for path, module in model.named_modules() if hasattr(module, "bits")), default=None),
        layer_modules=tuple(names),
        modules=frozenset(name for name, _ in model.named_modules()),
    )


def make_trainable(model: nn.Module, options: Any, choices: Choices) -> None:
    """Dequantize, freeze and unfreeze, or put LoRA layers in.

    ``lora`` and ``dora`` train adapters in the last ``num_layers`` layers, and the tables. ``full`` trains
    these layers whole. With tables it also trains what is outside the layers, but no table that was not chosen;
    without, the layers alone, as stock mlx-lm does.

    Args:
        model: Changed in place.
        options: The run's.
        choices: Those that ``choose(options, shapes_of(model))`` made.

    Raises:
        InputError: for LoRA settings that mlx-lm refuses.
    """
    dequantize_to_train(model, list(choices.dequantize))
    model.freeze()
    if options.fine_tune_type == "full":
        _unfreeze_whole(model, choices)
    elif choices.num_layers:
        lora = choices.lora_parameters
        try:
            linear_to_lora_layers(model, choices.num_layers, lora, options.fine_tune_type == "dora")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"lora_parameters {lora}: {error}") from error
    modules = dict(model.named_modules())
    for table in choices.tables:
        modules[table.module_path].unfreeze(keys=[table.path.rpartition(".")[2]], recurse=False)


def dequantize_modules(model: nn.Module, module_paths: list[str]) -> None:
    """Replace quantized modules by plain ones of the weights that they stand for."""
    modules = dict(model.named_modules())
    for path in module_paths:
        model.update_modules(tree_unflatten([(path, dequantized(modules[path]))]))


def dequantize_to_train(model: nn.Module, tables: list[str]) -> None:
    """Dequantize token tables, by the paths of their modules, and say how many bytes that takes."""
    if not tables:
        return
    before = _nbytes(model, tables)
    dequantize_modules(model, tables)
    rprint(
        f"Dequantized, so that they can train: {' and '.join(tables)}, {format_bytes(before)} before, "
        f"{format_bytes(_nbytes(model, tables))} now (--train-tables none leaves them quantized)"
    )


def _nbytes(model, paths):
    modules = dict(model.named_modules())
    return sum(array.nbytes for path in paths for _, array in tree_flatten(modules[path].parameters()))


def _unfreeze_whole(model, choices):
    frozen = len(model.layers) - choices.num_layers
    if choices.tables:
        model.unfreeze()
        for layer in model.layers[:frozen]:
            layer.freeze()
    else:
        for layer in model.layers[frozen:]:
            layer.unfreeze()
    modules = dict(model.named_modules())
    frozen_tables = {table.path for table in find_token_tables(model)} - {table.path for table in choices.tables}
    for path, parameter in tree_flatten(model.trainable_parameters()):
        if path in frozen_tables or not mx.issubdtype(parameter.dtype, mx.floating):
            owner, _, name = path.rpartition(".")
            while owner not in modules:  # an array in a list, not directly in a module
                owner, _, name = owner.rpartition(".")
            modules[owner].freeze(keys=[name], recurse=False)
