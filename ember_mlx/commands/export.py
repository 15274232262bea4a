"""``ember-mlx export``: what was trained, in the forms of peft, llama.cpp and Ollama."""

import argparse
from pathlib import Path

from ember_mlx.commands.fuse import FILES_OF_A_MODEL
from ember_mlx.exporting.gguf import OUTTYPES, choose_converter, script_of, write_gguf
from ember_mlx.exporting.inputs import check_save_path, load_fused
from ember_mlx.exporting.ollama import write_model_for_ollama
from ember_mlx.exporting.peft import write_peft
from ember_mlx.shared.command_line import describe
from ember_mlx.shared.errors import InputError, did_you_mean_path

__all__ = ["main"]

FORMATS = ("peft", "gguf", "ollama")
HELP = {
    "what to export": {
        "format": (
            None,
            "Required. peft: an adapter for Hugging Face's peft. gguf: a file for llama.cpp and LM Studio, with a "
            "Modelfile for Ollama. ollama: a fused model folder with a Modelfile.",
        ),
        "model": ("MODEL", "The model that was trained: a folder, or a name on the Hugging Face hub."),
        "adapter_path": ("FOLDER", "The adapter folder."),
        "no_adapter": (None, "Export the model as it is, such as one that fuse wrote."),
        "trust_remote_code": (None, "Run code that comes with the model or its tokenizer."),
    },
    "what is written": {
        "save_path": ("FOLDER", "The folder to write."),
        "overwrite": (None, "Replace the export that --save-path holds."),
    },
    "peft": {
        "base_model": ("MODEL", "What peft is to load the adapter on. Default: --model."),
    },
    "gguf": {
        "llama_cpp": (
            "FOLDER",
            "The folder of llama.cpp, whose convert_hf_to_gguf.py then converts. Default: mlx-lm's converter, or, for "
            "models that it cannot write, the one on the PATH.",
        ),
        "outtype": (None, "How the weights are written. mlx-lm's converter writes f16."),
    },
}
EPILOG = """\
examples:
  ember-mlx export --format peft --model Qwen/Qwen3-0.6B --save-path for_peft
      AutoPeftModelForCausalLM.from_pretrained("for_peft")
  ember-mlx export --format gguf --model Qwen/Qwen3-0.6B --llama-cpp ~/llama.cpp --save-path for_llama
      llama-cli -m for_llama/model-f16.gguf, or: ollama create mine -f for_llama/Modelfile
  ember-mlx export --format ollama --model fused_model --no-adapter --save-path for_ollama
      ollama create mine -f for_ollama/Modelfile"""


def main(arguments: list[str]) -> None:
    """Export a model with its adapter, or the adapter.

    Raises:
        InputError: for bad options, a model or an adapter that does not load or does not fit the format, and whatever
            keeps the folder from being written; what was there is unchanged.
    """
    args = _parser().parse_args(arguments)
    _check(args)
    folder, adapter = Path(args.save_path), None if args.no_adapter else Path(args.adapter_path)
    check_save_path(folder, overwrite=args.overwrite, model=args.model, adapter=adapter)
    trust = {"trust_remote_code": args.trust_remote_code}
    print("Loading the model")
    if args.format == "peft":
        words = write_peft(folder, args.model, adapter, base_model=args.base_model, **trust)
    else:
        fused = load_fused(args.model, adapter, **trust)
        if args.format == "gguf":
            converter = choose_converter(fused, args.llama_cpp, args.outtype)
            print(f"Writing GGUF with {converter.words}")
            words = write_gguf(folder, fused, converter, args.outtype)
        else:
            words = write_model_for_ollama(folder, fused, FILES_OF_A_MODEL)
    print(f"In {folder}: {words}")


def _parser():
    parser = argparse.ArgumentParser(
        prog="ember-mlx export",
        description="Write what was trained in the forms of Hugging Face's peft, llama.cpp and Ollama.",
        epilog=EPILOG,
    )
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--model", default="mlx_model")
    adapter = parser.add_mutually_exclusive_group()
    adapter.add_argument("--adapter-path", default="adapters")
    adapter.add_argument("--no-adapter", action="store_true")
    parser.add_argument("--save-path", default="exported")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--base-model")
    parser.add_argument("--llama-cpp")
    parser.add_argument("--outtype", choices=OUTTYPES, default="f16")
    parser.add_argument("--trust-remote-code", action="store_true")
    return describe(parser, HELP)


def _check(args):
    if args.format == "peft" and args.no_adapter:
        raise InputError("--no-adapter: peft holds adapters; give --adapter-path, or --format gguf or ollama")
    for name, value, form in (("base-model", args.base_model, "peft"), ("llama-cpp", args.llama_cpp, "gguf")):
        if value is not None and args.format != form:
            raise InputError(f"--{name} {value}: is of --format {form}, not {args.format}; leave it out")
    if args.outtype != "f16" and args.format != "gguf":
        raise InputError(f"--outtype {args.outtype}: is of --format gguf, not {args.format}; leave it out")
    if args.llama_cpp is not None:
        script_of(args.llama_cpp)  # as the converter will, once the model is loaded
    if not args.no_adapter and not Path(args.adapter_path).is_dir() and args.format != "peft":
        near = did_you_mean_path(args.adapter_path, Path.is_dir)
        raise InputError(
            f"--adapter-path {args.adapter_path}: there is no such folder{near}; give that of a run, or --no-adapter "
            "to export the model as it is"
        )
