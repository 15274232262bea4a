"""What a run leaves behind, and models made from it: save, load, fuse.

An adapter folder is mlx-lm's: ``adapter_config.json`` and ``adapters.safetensors``. Beside a LoRA or DoRA adapter the
trained tables lie in ``token_tables.safetensors``, because stock mlx-lm takes nothing but adapter matrices in the first
file; a ``full`` adapter holds everything in it.
"""

import json
import os
import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters

from ember_mlx.errors import InputError
from ember_mlx.finetune.trainable import dequantize_modules
from ember_mlx.token_tables import find_token_tables

ADAPTERS = "adapters.safetensors"
CONFIG = "adapter_config.json"
TABLES = "token_tables.safetensors"
RUN_FILE = re.compile(r"adapter_config\.json|(\.partial_)?(\d{7,}_)?(adapters|token_tables)\.safetensors")


def load(path_or_hf_repo, adapter_path=None, *, return_config=False, **options):
    """``mlx_lm.load``, which also loads the token tables of an adapter folder that ``ember-mlx train`` wrote.

    Args:
        path_or_hf_repo (str): A model folder or a name on the Hugging Face hub.
        adapter_path (str, optional): The adapter folder.
        return_config (bool): Return the model's config too. Tables that the adapter holds dequantized are marked as
            not quantized in it.
        options: Whatever else ``mlx_lm.load`` takes.

    Returns:
        ``(model, tokenizer)``, or ``(model, tokenizer, config)``.

    Raises:
        InputError: (a ``ValueError``) when there is no such model or adapter, or when the two do not match; it names
            the tensor.
    """
    if adapter_path is not None:
        _read_config(Path(adapter_path))
    model, tokenizer, config = load_base(path_or_hf_repo, **options)
    if adapter_path is not None:
        apply_adapter(model, Path(adapter_path), config)
        model.eval()
    return (model, tokenizer, config) if return_config else (model, tokenizer)


def load_base(path_or_hf_repo, **options):
    """``mlx_lm.load`` with its config, and one clear error when that fails."""
    path = Path(path_or_hf_repo)
    try:
        return mlx_lm.load(str(path_or_hf_repo), return_config=True, **options)
    # Whatever the hub's client, the model file or the tokenizer raises: the user gave a model that does not load.
    except Exception as error:
        reason = " ".join(str(error).split())
        if path.exists():
            raise InputError(f"model {path_or_hf_repo}: mlx-lm cannot load it: {reason}") from error
        raise InputError(
            f"model {path_or_hf_repo}: no such folder here, and the Hugging Face hub gave none: {reason}"
        ) from error


def save_adapter(folder: Path, model: nn.Module, fine_tune_type: str, prefix: str = "") -> list[Path]:
    """Write the trainable parameters of ``model``; each file appears whole or not at all.

    ``prefix`` is "" for the adapter itself and "0000100_" for a checkpoint, as mlx-lm names them.
    """
    weights = dict(tree_flatten(model.trainable_parameters()))
    tables = {}
    if fine_tune_type != "full":
        paths = {table.path for table in find_token_tables(model)}
        tables = {name: weights.pop(name) for name in paths & weights.keys()}
    written = []
    for name, arrays in ((TABLES, tables), (ADAPTERS, weights)):
        if arrays or name == ADAPTERS:
            partial = folder / f".partial_{prefix}{name}"
            mx.save_safetensors(str(partial), arrays)
            os.replace(partial, folder / f"{prefix}{name}")
            written.insert(0, folder / f"{prefix}{name}")
    return written


def holds_a_run(folder: Path) -> list[Path]:
    """The files of an earlier run in ``folder``."""
    return sorted(path for path in folder.glob("*") if RUN_FILE.fullmatch(path.name))


def apply_adapter(model: nn.Module, folder: Path, config: dict):
    """Load the adapter of ``folder`` into ``model``, its token tables included."""
    adapter_config = _read_config(folder)
    adapters = _read_arrays(folder / ADAPTERS)
    full = adapter_config.get("fine_tune_type", "lora") == "full"
    has_tables = adapter_config.get("token_tables") and not full
    tables = _read_arrays(folder / TABLES) if has_tables else {}
    # A run of tables alone has no LoRA layers: mlx-lm would put them into all layers for num_layers 0.
    if adapters or not tables:
        try:
            load_adapters(model, str(folder))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"adapter {folder} does not match the model: {_first_lines(error)}") from error
        if not full:
            _refuse_missing(folder, model, adapters)
    _dequantize(model, tables, config)
    load_weights(model, tables, model.parameters(), f"adapter {folder}: {TABLES}")


def load_weights(model: nn.Module, weights: dict, parameters: dict, where: str):
    """``model.load_weights``, strict about what is there to load: names and shapes must be among ``parameters``."""
    parameters = dict(tree_flatten(parameters))
    for name, array in weights.items():
        if name not in parameters:
            raise InputError(f"{where}: {name} is no such parameter of this model; use the model it was trained on")
        if array.shape != parameters[name].shape:
            raise InputError(
                f"{where}: {name} has shape {array.shape}, but {parameters[name].shape} in this model; use the model "
                "it was trained on"
            )
    model.load_weights(list(weights.items()), strict=False)


def _read_config(folder):
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"adapter {folder}: there is no {CONFIG} in it; give the --adapter-path of a finished run")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"adapter {folder}: {CONFIG} is not JSON ({error}); train again") from error


def _read_arrays(path):
    if not path.is_file():
        raise InputError(f"adapter {path.parent}: there is no {path.name} in it; give the folder of a finished run")
    try:
        return mx.load(str(path))
    except RuntimeError as error:
        raise InputError(f"adapter {path.parent}: {path.name} cannot be read ({error}); train again") from error


def _dequantize(model, tables, config):
    """Tables that were trained dequantized take the place of quantized ones, in the model and in its config."""
    quantized = [t.module_path for t in find_token_tables(model) if t.quantized and t.path in tables]
    dequantize_modules(model, quantized)
    for key in ("quantization", "quantization_config"):
        if key in config:
            config[key] |= dict.fromkeys(quantized, False)


def _refuse_missing(folder, model, adapters):
    """mlx-lm does not mind an adapter for fewer layers than its config says; half an adapter is no adapter."""
    expected = {name for name, _ in tree_flatten(model.parameters()) if name.rpartition(".")[2] in ("lora_a", "lora_b")}
    missing = sorted(expected - adapters.keys())
    if missing:
        raise InputError(
            f"adapter {folder} does not match the model: {missing[0]} (and {len(missing) - 1} more) is not in "
            f"{ADAPTERS}; use the model that it was trained on"
        )


def _first_lines(error):
    lines = [line.strip() for line in str(error).splitlines()]
    more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
    return " ".join(lines[:2]) + more + "; use the model that it was trained on"
