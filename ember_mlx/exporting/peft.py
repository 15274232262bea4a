"""An adapter as Hugging Face's peft has it: ``adapter_config.json`` and ``adapter_model.safetensors``.

mlx-lm computes x W^T + scale (x A) B with A (in, r) and B (r, out). peft computes x W^T + (alpha / r) (x A^T) B^T with
A (r, in) and B (out, r): both are transposed, and alpha = scale r. DoRA is m / ||W + scale B A|| times that in both,
with a norm a row; m is peft's ``lora_magnitude_vector``. Trained tables are its ``modules_to_save``. A tied table is
among them twice, as embedding and as head: peft saves it so, and releases without ``ensure_weight_tying`` need both.
"""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear
from safetensors import safe_open

from ember_mlx.exporting.inputs import export_folder, source_folder
from ember_mlx.finetune import adapters, safe_writing
from ember_mlx.finetune.base_models import load_base
from ember_mlx.finetune.merging import QUANTIZATION
from ember_mlx.shared.errors import InputError
from ember_mlx.token_tables import find_token_tables

__all__ = ["ADAPTER", "CONFIG", "as_peft", "write_peft"]

CONFIG = "adapter_config.json"
ADAPTER = "adapter_model.safetensors"
FILES = (CONFIG, ADAPTER, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*")
HEAD = "lm_head.weight"  # of the causal models of Hugging Face, tied or not
PREFIX = "base_model.model."  # peft's model around Hugging Face's
FUSE = "export a model instead: `ember-mlx fuse`, whose folder Hugging Face's transformers loads"


def write_peft(folder: Path, model_path: str, adapter: Path, *, base_model: str | None = None, **options: Any) -> str:
    """Write the adapter of a run as a folder of peft's, and the tokenizer with it if the run added tokens.

    Args:
        folder: The folder to write.
        model_path: The model that the adapter was trained on.
        base_model: What peft is to load it on; ``model_path`` unless told.
        options: Whatever else ``mlx_lm.load`` takes.

    Returns:
        What was written, in words.

    Raises:
        InputError: for a model or an adapter that does not load, an adapter that peft cannot hold, and whatever keeps
            the folder from being written.
    """
    adapter_config = adapters.read_config(adapter)
    where = f"--adapter-path {adapter}"
    if adapter_config.get("fine_tune_type", "lora") == "full":
        raise InputError(f"{where}: every weight was trained, and peft holds adapters; {FUSE}")
    model, tokenizer, config = load_base(model_path, **options)
    quantized = any(key in config for key in QUANTIZATION)
    if quantized and base_model is None:
        raise InputError(
            f"--model {model_path}: is quantized in MLX's way, which peft cannot load; name the model that it was made "
            "from as --base-model"
        )
    tokenizer = adapters.add_tokens_of(adapter, model, tokenizer, config, adapter_config)
    adapters.apply_adapter(model, adapter, config, adapter_config)
    added = adapter_config.get("added_tokens") or []
    # Tables that grew have rows that the base model lacks, trained or not.
    tables = [table.path for table in find_token_tables(model)] if added else adapter_config.get("token_tables") or []
    if base_model is None:
        # A path that holds from wherever peft is run.
        base_model = str(Path(model_path).resolve()) if Path(model_path).exists() else model_path
    peft_config, arrays = as_peft(model, adapter_config["lora_parameters"], tables, base_model, where)
    _refuse_other_names(model_path, arrays)
    with export_folder(folder, sum(array.nbytes for array in arrays.values()), FILES) as partial:
        safe_writing.write_arrays(partial / ADAPTER, arrays, {"format": "pt"})
        safe_writing.write_bytes(partial / CONFIG, json.dumps(peft_config, indent=2).encode())
        if added:
            tokenizer.save_pretrained(str(partial))
    return _summary(peft_config, len(added), quantized or adapter_config.get("quantize") is not None)


def as_peft(
    model: nn.Module, lora_parameters: dict[str, Any], tables: list[str], base_model: str, where: str
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """An adapter that is loaded into ``model``, as peft's config and arrays.

    Args:
        model: With mlx-lm's adapter layers, all of one rank and scale.
        lora_parameters: Those of the run: rank, scale, dropout.
        tables: Paths of the token tables that go with it.
        base_model: What peft is to load it on.
        where: What errors begin with.

    Raises:
        InputError: for adapters in layers that peft has in another form, and where no layer has one.
    """
    layers = {path: module for path, module in model.named_modules() if "lora_a" in module}
    for path, module in layers.items():
        if not isinstance(module, LoRALinear | DoRALinear):
            raise InputError(f"{where}: {path} is a {type(module).__name__}, which peft has in another form; {FUSE}")
    if not layers:
        raise InputError(f"{where}: token tables alone were trained, and peft needs adapters in layers; {FUSE}")
    arrays = {}
    for path, module in layers.items():
        # Contiguous: MLX would save a transposed array by its strides.
        arrays[f"{PREFIX}{path}.lora_A.weight"] = mx.contiguous(module.lora_a.T)
        arrays[f"{PREFIX}{path}.lora_B.weight"] = mx.contiguous(module.lora_b.T)
        if isinstance(module, DoRALinear):
            arrays[f"{PREFIX}{path}.lora_magnitude_vector"] = module.m
    parameters = dict(tree_flatten(model.parameters()))
    saved = {path: parameters[path] for path in tables}
    tied = next((t.path for t in find_token_tables(model) if t.role == "tied" and t.path in tables), None)
    if tied:
        saved[HEAD] = parameters[tied]
    arrays |= {f"{PREFIX}{path}": array for path, array in saved.items()}
    rank = lora_parameters["rank"]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _whole(lora_parameters["scale"] * rank),
        "lora_dropout": lora_parameters["dropout"],
        "bias": "none",
        "use_dora": any(isinstance(module, DoRALinear) for module in layers.values()),
        "target_modules": list(layers),
        "modules_to_save": [path.rpartition(".")[0] for path in saved] or None,
        **({"ensure_weight_tying": True} if tied else {}),  # older releases do not know it
    }
    return config, arrays


def _refuse_other_names(model_path, arrays):
    """Of some architectures mlx-lm renames the weights; peft looks for the names in the model's files."""
    names = set()
    for path in source_folder(model_path).glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            names |= set(file.keys())
    for name in arrays:
        weight = re.sub(r"\.lora_(A|B|magnitude_vector)(?=\.|$)|\.weight$", "", name.removeprefix(PREFIX)) + ".weight"
        if weight not in names | {HEAD}:
            raise InputError(
                f"--model {model_path}: Hugging Face has another name for {weight} than mlx-lm, which peft would not "
                f"find; {FUSE}"
            )


def _whole(number):
    return int(number) if number == int(number) else number


def _summary(config, added, quantized):
    words = f"the adapters of {len(config['target_modules'])} weights"
    words += "".join(f", {path}" for path in config["modules_to_save"] or ())
    if added:
        words += f", and the tokenizer with {added} more tokens"
    if quantized:
        words += "; they were trained on quantized layers: on those of the base model the answers differ a little"
    return words
