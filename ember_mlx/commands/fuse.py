"""``ember-mlx fuse``: merge an adapter, its token tables too, into an ordinary model folder."""

import argparse
from pathlib import Path

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model, save, upload_to_hub

from ember_mlx.exporting import gguf
from ember_mlx.exporting.inputs import Fused, check_save_path, export_folder, source_folder
from ember_mlx.finetune import adapters, safe_reading
from ember_mlx.finetune.base_models import check_model, load_base
from ember_mlx.finetune.merging import (
    QUANTIZATION,
    BaseTable,
    Kept,
    Merged,
    base_tables,
    merge_adapters,
    quantize_tables,
    table_settings,
)
from ember_mlx.finetune.model_card import model_card
from ember_mlx.shared.command_line import describe
from ember_mlx.shared.errors import InputError, reason_of
from ember_mlx.shared.units import format_bytes

__all__ = ["FILES_OF_A_MODEL", "main"]

HELP = {
    "what to fuse": {
        "model": ("MODEL", "A model folder, or a name on the Hugging Face hub."),
        "adapter_path": ("FOLDER", "The adapter folder."),
        "trust_remote_code": (None, "Run code that comes with the model or its tokenizer."),
    },
    "what is written": {
        "save_path": ("FOLDER", "The folder to write."),
        "overwrite": (None, "Replace the model that --save-path holds."),
        "requantize": (
            "BITS",
            "Quantize the weights with adapters again, to 2, 3, 4, 5, 6 or 8 bits. Rounding to 4 bits can undo most of "
            "what was learned. Default: they stay in 16 bits, or in the dtype of the model.",
        ),
        "quantize_tables": (
            None,
            "Quantize the trained token tables, as they were in the model, or as its layers are. Says what is left of "
            "their change: at 4 bits often little. Without it they stay in 16 bits. Default: off.",
        ),
        "dequantize": (None, "Write all layers in 16 bits."),
        "export_gguf": (None, "Write a GGUF file of 16 bits too."),
        "gguf_path": ("NAME", "Name of that file."),
        "upload_repo": ("REPO", "Upload the model to this repository of the Hugging Face hub. Default: no upload."),
    },
}
EPILOG = """\
examples:
  ember-mlx fuse --model Qwen/Qwen3-0.6B --adapter-path adapters
      a folder that stock mlx-lm loads: mlx_lm.server --model fused_model
  ember-mlx fuse --model mlx-community/Qwen3-0.6B-4bit --requantize 8
      of a quantized model; the weights with adapters at 8 bits
  ember-mlx fuse --model Qwen/Qwen3-0.6B --save-path other --overwrite
      replace the model in that folder"""
# What fuse itself writes. Other files in the folder stay.
FILES_OF_A_MODEL = (
    *("model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "README.md"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*"),
    *("additional_chat_templates", "*.py", "*.gguf"),
)
GGUF_MODELS = ("llama", "mixtral", "mistral")  # those of mlx-lm's converter
GGUF_NAME = "ggml-model-f16.gguf"
BITS = (2, 3, 4, 5, 6, 8)
ENOUGH = 0.95  # of a change


def main(arguments: list[str]) -> None:
    """Merge an adapter into an ordinary model folder, which is there whole or not at all.

    Raises:
        InputError: for bad options, a model or an adapter that does not load, and whatever keeps the folder from being
            written; what was there is unchanged.
    """
    args = _parser().parse_args(arguments)
    folder = Path(args.save_path)
    _check_folder(folder, args)
    check_model(args.model)
    adapter, adapter_config = Path(args.adapter_path), adapters.read_config(Path(args.adapter_path))
    print("Loading pretrained model")
    trust = {"trust_remote_code": args.trust_remote_code}
    model, tokenizer, config = load_base(args.model, quantize=adapter_config.get("quantize"), **trust)
    size_before = _size(model)
    settings = _table_settings(args, model, config, adapter_config)
    tokenizer = adapters.add_tokens_of(adapter, model, tokenizer, config, adapter_config)
    tables = base_tables(model, settings)
    adapters.apply_adapter(model, adapter, config, adapter_config)
    if args.export_gguf:
        _refuse_gguf(model, config, args)
    merged = merge_adapters(model, config, requantize=args.requantize)
    if args.requantize and not merged.layers:
        raise InputError(f"--requantize {args.requantize}: no layer has an adapter to be quantized again; leave it out")
    kept_of_tables = quantize_tables(model, config, tables)
    if args.dequantize:
        model = dequantize_model(model)
    if not _quantized(model):
        if args.requantize:
            raise InputError(f"--requantize {args.requantize}: the model is not quantized; leave it out")
        for key in QUANTIZATION:
            config.pop(key, None)
    safe_reading.check_finite(
        dict(tree_flatten(model.parameters())), f"model {args.model} with {adapter}", "use an adapter of finite numbers"
    )
    _write(folder, model, tokenizer, config, args, adapter_config)
    words = _summary(folder, size_before, _size(model), merged, tables, kept_of_tables)
    print(words + _trained_whole(adapter_config, tables))
    if args.upload_repo is not None:
        try:
            upload_to_hub(args.save_path, args.upload_repo)
        # Whatever the hub's client raises.
        except Exception as error:
            raise InputError(
                f"--upload-repo {args.upload_repo}: {reason_of(error)}; the model is in {folder}"
            ) from error


def _parser():
    parser = argparse.ArgumentParser(
        prog="ember-mlx fuse",
        description="Merge an adapter, its token tables too, into an ordinary model folder.",
        epilog=EPILOG,
    )
    parser.add_argument("--model", default="mlx_model")
    parser.add_argument("--adapter-path", default="adapters")
    parser.add_argument("--save-path", default="fused_model")
    parser.add_argument("--overwrite", action="store_true")
    quantized = parser.add_mutually_exclusive_group()
    quantized.add_argument("--requantize", type=int, choices=BITS)
    quantized.add_argument("--dequantize", action="store_true")
    parser.add_argument("--quantize-tables", action="store_true")
    parser.add_argument("--export-gguf", action="store_true")
    parser.add_argument("--gguf-path", default=GGUF_NAME)
    parser.add_argument("--upload-repo")
    parser.add_argument("--trust-remote-code", action="store_true")
    return describe(parser, HELP)


def _table_settings(args, model, config, adapter_config):
    """How each trained table is to be quantized: none without --quantize-tables."""
    if not args.quantize_tables:
        return {}
    if args.dequantize:
        raise InputError("--quantize-tables: --dequantize writes the whole model in 16 bits; leave one of the two out")
    trained = [path.rpartition(".")[0] for path in adapter_config.get("token_tables") or ()]
    if not trained:
        raise InputError(f"--quantize-tables: adapter {args.adapter_path} has no token tables; leave it out")
    return table_settings(model, config, trained)


def _check_folder(folder, args):
    check_save_path(folder, overwrite=args.overwrite, model=args.model, adapter=args.adapter_path)
    name = args.gguf_path
    if name != GGUF_NAME and not args.export_gguf:
        raise InputError(f"--gguf-path {name}: no effect: no such file is written; add --export-gguf, or leave it out")
    if args.export_gguf and (Path(name).name != name or not name.endswith(".gguf")):
        raise InputError(f"--gguf-path {name}: must be a name that ends in .gguf; it is written into --save-path")


def _refuse_gguf(model, config, args):
    kind = config.get("model_type")
    if kind not in GGUF_MODELS:
        raise InputError(
            f"--export-gguf: mlx-lm converts {', '.join(GGUF_MODELS)}, and this model is of type {kind}; use "
            "`ember-mlx export --format gguf --llama-cpp FOLDER`"
        )
    if _quantized(model) and not args.dequantize:
        raise InputError("--export-gguf: the model is quantized, which mlx-lm does not convert; add --dequantize")


def _write(folder, model, tokenizer, config, args, adapter_config):
    fused = Fused(model, tokenizer, config, source_folder(args.model))
    needed = fused.nbytes * (2 if args.export_gguf else 1)
    with export_folder(folder, needed, FILES_OF_A_MODEL) as partial:
        reason = gguf.not_by_mlx_lm(fused) if args.export_gguf else None
        if reason:
            print(
                f"Warning: --export-gguf: llama.cpp will not read this file rightly: {reason}; use `ember-mlx export "
                "--format gguf --llama-cpp FOLDER`"
            )
        save(partial, fused.source, model, tokenizer, config, donate_model=False)
        card = model_card(args.model, folder.name, adapter_config, len(model.layers))
        (partial / "README.md").write_text(card, encoding="utf-8")
        for path in partial.glob("*.safetensors"):
            safe_reading.read_metadata(path, f"--save-path {folder}")  # is as long as its header says
        if args.export_gguf:
            gguf.convert_by_mlx_lm(fused, partial, partial / args.gguf_path)


def _summary(folder, size_before, size, merged: Merged, tables: list[BaseTable], kept_of_tables: Kept):
    words = f"The fused model is in {folder}: {format_bytes(size)}, of {format_bytes(size_before)} before"
    words += _of_layers(merged) if merged.layers else ""
    if tables:
        bits = _words(sorted({table.settings["bits"] for table in tables}))
        words += f"; {' and '.join(table.path for table in tables)} {'are' if len(tables) > 1 else 'is'} quantized at "
        words += f"{bits} bits{_left(kept_of_tables, 'leave --quantize-tables out')}"
    return words


def _trained_whole(adapter_config, quantized):
    """What has no adapter to be merged, and is not quantized."""
    if adapter_config.get("fine_tune_type") == "full":
        return "; all weights that trained are as trained"
    paths = [path.rpartition(".")[0] for path in adapter_config.get("token_tables") or ()]
    paths = [path for path in paths if path not in {table.path for table in quantized}]
    return f"; {' and '.join(paths)} {'are' if len(paths) > 1 else 'is'} as trained" if paths else ""


def _of_layers(merged):
    of = f"the {merged.layers} weights with adapters"
    if merged.bits:
        words = f"; {of} are quantized at {_words(merged.bits)} bits again"
    elif merged.bits_before:
        words = f"; {of}, of {_words(merged.bits_before)} bits before, are in {str(merged.dtype).rpartition('.')[2]}"
    else:
        words = f"; the adapters of {merged.layers} weights are merged"
    remedy = "leave --requantize out, or give more bits" if merged.bits else "use the adapter as it is, unfused"
    return words + _left(merged.kept, remedy)


def _left(kept: Kept, remedy):
    words = f"; {kept.share:.1%} of their change is left".replace("%", " %")
    if kept.noise >= 0.05:
        words += f", with rounding errors of {kept.noise:.2f} times its size"
    return words + (f": to keep more, {remedy}" if kept.share < ENOUGH else "")


def _words(numbers):
    return " and ".join(map(str, numbers))


def _size(model: nn.Module):
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def _quantized(model):
    return any(hasattr(module, "bits") for module in model.modules())
