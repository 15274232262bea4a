"""What trains: LoRA or whole layers as mlx-lm has it, and the token tables."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import lora
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import dequantize_model

from ember_mlx.shared.errors import InputError
from ember_mlx.token_tables import LOOKED_FOR, TokenTable, find_token_tables

ROLES = {
    "auto": ("embedding", "head", "tied"),
    "embedding": ("embedding", "tied"),
    "head": ("head",),
    "none": (),
}


def choose_tables(model: nn.Module, train_tables: str, dequantize: bool) -> list[TokenTable]:
    """The tables to train. Quantized ones are dequantized in the model if that was asked for.

    Raises:
        InputError: when the model has none of that role, or has it quantized and ``dequantize`` is false.
    """
    if train_tables == "none":
        return []
    found = find_token_tables(model)
    if not found:
        raise InputError(
            f"--train-tables {train_tables}: no token table in {type(model).__module__}; looked for {LOOKED_FOR}; "
            "train without with --train-tables none"
        )
    chosen = [table for table in found if table.role in ROLES[train_tables]]
    if not chosen:
        tied = next((table for table in found if table.role == "tied"), None)
        why = f"the head is the embedding, {tied.path}" if tied else f"the model has {_roles(found)}"
        raise InputError(f"--train-tables {train_tables}: {why}; use --train-tables {'embedding' if tied else 'auto'}")
    quantized = [table.path for table in chosen if table.quantized]
    if quantized and not dequantize:
        raise InputError(
            f"--train-tables {train_tables}: {' and '.join(quantized)} are quantized, and a quantized table cannot be "
            "trained: add --dequantize-tables, or train without with --train-tables none"
        )
    dequantize_modules(model, [table.module_path for table in chosen if table.quantized])
    paths = {table.path for table in chosen}
    return [table for table in find_token_tables(model) if table.path in paths]


def dequantize_modules(model: nn.Module, module_paths: list[str]):
    """Put plain modules in the place of quantized ones, with the weights that those stand for."""
    modules = dict(model.named_modules())
    for path in module_paths:
        # mlx-lm's function takes a model: a module of one child makes it one.
        holder = nn.Module()
        holder.child = modules[path]
        model.update_modules(tree_unflatten([(path, dequantize_model(holder).child)]))


def refuse_quantized(model: nn.Module):
    """``full`` trains every parameter, and quantized ones cannot be trained."""
    quantized = next((path for path, module in model.named_modules() if hasattr(module, "bits")), None)
    if quantized is not None:
        raise InputError(
            f"--fine-tune-type full: {quantized} is quantized, and quantized weights cannot be trained: use "
            "--fine-tune-type lora, or a model that is not quantized"
        )


def make_trainable(model: nn.Module, args, tables: list[TokenTable]):
    """Freeze and unfreeze, or put LoRA layers in. Sets ``args.num_layers`` to the number of layers that train.

    ``lora`` and ``dora`` train adapters in the last ``num_layers`` layers, and ``tables``. ``full`` trains every
    parameter outside the layers too, but no token table that is not in ``tables``.
    """
    args.num_layers = _number_of_layers(args, len(model.layers))
    model.freeze()
    if args.fine_tune_type == "full":
        _unfreeze_all(model, args, {table.path for table in tables})
        args.lora_parameters = None
    else:
        _refuse_lora_on(tables, args)
        if args.num_layers:
            try:
                linear_to_lora_layers(model, args.num_layers, args.lora_parameters, args.fine_tune_type == "dora")
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"lora_parameters {args.lora_parameters}: {error}") from error
            if not tree_flatten(model.trainable_parameters()):
                raise InputError(
                    f"lora_parameters: keys {args.lora_parameters.get('keys')}: no layer has such a module"
                )
    modules = dict(model.named_modules())
    for table in tables:
        modules[table.module_path].unfreeze(keys=[table.path.rpartition(".")[2]], recurse=False)
    if not tree_flatten(model.trainable_parameters()):
        raise InputError("--num-layers 0 --train-tables none: nothing is left to train; ask for layers or for tables")


def _number_of_layers(args, there):
    """mlx-lm takes 0 for all layers, as ``layers[-0:]`` is; here 0 trains none, so that tables can train alone."""
    asked = args.num_layers
    if asked is None:
        return there if args.fine_tune_type == "full" else min(lora.CONFIG_DEFAULTS["num_layers"], there)
    if asked > there:
        raise InputError(f"--num-layers {asked}: the model has {there} layers; use at most that, or -1 for all")
    return there if asked < 0 else asked


def _unfreeze_all(model, args, table_paths):
    model.unfreeze()
    frozen_layers = len(model.layers) - args.num_layers
    for layer in model.layers[:frozen_layers]:
        layer.freeze()
    modules = dict(model.named_modules())
    untold = {table.path for table in find_token_tables(model)} - table_paths
    for path, parameter in tree_flatten(model.trainable_parameters()):
        if path in untold or not mx.issubdtype(parameter.dtype, mx.floating):
            owner, _, name = path.rpartition(".")
            while owner not in modules:  # an array in a list, not directly in a module
                owner, _, name = owner.rpartition(".")
            modules[owner].freeze(keys=[name], recurse=False)


def _refuse_lora_on(tables, args):
    for table in tables:
        if table.module_path in (args.lora_parameters.get("keys") or ()):
            raise InputError(
                f"lora_parameters: keys names {table.module_path}, which is to train as a whole: take it out of keys, "
                "or leave the tables to LoRA with --train-tables none"
            )


def _roles(tables):
    return ", ".join(f"{table.path} ({table.role})" for table in tables)
