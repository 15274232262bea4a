"""Commands of mlx-lm that run as they are, with our ``load`` in the place of theirs, which cannot load token tables."""

import argparse
import sys
from importlib import import_module
from types import SimpleNamespace

from ember_mlx.finetune.adapters import load
from ember_mlx.shared.command_line import Help, actions_of, describe
from ember_mlx.shared.errors import InputError, reason_of
from ember_mlx.shared.replacing import replaced

__all__ = ["run_command", "texts"]

# Of options that several of these commands have.
TEXTS = {
    "model": (
        "MODEL",
        "A model folder, or a name on the Hugging Face hub. Default: mlx-community/Llama-3.2-3B-Instruct-4bit.",
    ),
    "adapter_path": ("FOLDER", "An adapter folder, with token tables or without. Default: the model alone."),
    "trust_remote_code": (None, "Run code that comes with the model or its tokenizer."),
    "draft_model": ("MODEL", "A small model with the same tokenizer, to propose tokens. Default: none."),
    "num_draft_tokens": ("N", "Tokens that it proposes at a time."),
    "use_default_chat_template": (None, "Use the tokenizer's default chat template."),
    "temp": ("T", "Temperature; 0: always the likeliest token."),
    "top_p": ("P", "Draw from the likeliest tokens that add up to P; 1: from all."),
    "top_k": ("K", "Draw from the K likeliest tokens; 0: from all."),
    "min_p": ("P", "Leave out tokens below P times the likeliest; 0: none."),
    "xtc_probability": ("P", "How often XTC sampling leaves out the likeliest tokens."),
    "xtc_threshold": ("P", "Which tokens XTC sampling may leave out: those above P."),
    "prefill_step_size": ("TOKENS", "Read a prompt in parts of so many tokens; fewer take less memory."),
    "kv_group_size": ("N", "Group size of that quantization."),
    "quantized_kv_start": ("TOKENS", "Quantize the cache from this token on."),
    "pipeline": (None, "On several machines, split the model by layers; without, by tensors."),
}


def texts(*names: str) -> dict[str, tuple[str | None, str]]:
    """The metavars and texts of these options."""
    return {name: TEXTS[name] for name in names}


def run_command(name: str, arguments: list[str], description: str, help_texts: Help, epilog: str) -> None:
    """Run ``mlx_lm.{name}`` with ``arguments``: its code and its options, our ``load`` and our help.

    Raises:
        InputError: for whatever mlx-lm raises, but an EOFError or an OSError, which pass.
    """
    module = import_module(f"mlx_lm.{name}")

    def our_parser(**_):
        parser = argparse.ArgumentParser(description=description, epilog=epilog)

        def describe_and_parse():  # which mlx-lm calls once, when the parser has all its options
            del parser.parse_args
            nothing = {action.dest: None for action in actions_of(parser) if action.default == ""}
            parser.set_defaults(**nothing)
            return describe(parser, help_texts).parse_args()

        parser.parse_args = describe_and_parse
        return parser

    try:
        with (
            replaced(module, "load", load),
            replaced(module, "argparse", SimpleNamespace(**vars(argparse) | {"ArgumentParser": our_parser})),
            replaced(sys, "argv", [f"ember-mlx {name}", *arguments]),
        ):
            module.main()
    except (EOFError, InputError, OSError):
        raise
    # Such as a prompt cache that does not exist, or a chat template that the tokenizer lacks.
    except Exception as error:
        raise InputError(f"mlx_lm.{name} cannot do that: {type(error).__name__}: {reason_of(error)}") from error
