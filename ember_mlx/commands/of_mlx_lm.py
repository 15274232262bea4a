"""Commands of mlx-lm that run as they are, with our ``load`` in the place of theirs, which cannot load token tables."""

import argparse
import json
import math
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

from ember_mlx.finetune.adapters import load, read_config
from ember_mlx.finetune.base_models import check_model
from ember_mlx.finetune.choices import BITS
from ember_mlx.finetune.mlx_lm_internals import is_size
from ember_mlx.shared.command_line import Help, actions_of, describe, flag, size_or_zero
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
# What mlx-lm takes in silence, or refuses once the model is loaded.
RANGES = {
    **dict.fromkeys(("top_p", "min_p", "xtc_probability"), (0, 1)),
    "xtc_threshold": (0, 0.5),
    **dict.fromkeys(("temp", "quantized_kv_start"), (0, math.inf)),
    **dict.fromkeys(("max_kv_size", "prefill_step_size", "num_draft_tokens", "min_tokens_to_keep"), (1, math.inf)),
    **dict.fromkeys(("decode_concurrency", "prompt_concurrency", "prompt_cache_size"), (1, math.inf)),
    "max_tokens": (-1, math.inf),  # -1: without an end
    "top_k": (-1, math.inf),  # -1: as 0
    "seed": (0, 2**64 - 1),
}
OF_SERVER = {"max_tokens": (1, math.inf), "top_k": (0, math.inf)}  # others it would take, and refuse each request
ONE_OF = {"kv_bits": BITS, "kv_group_size": (32, 64, 128)}  # what MLX quantizes to


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
            for action in actions_of(parser):
                if is_size(action):
                    action.type = size_or_zero
                elif action.type is json.loads:
                    action.type = _json
                elif action.dest == "chat_template_config":  # mlx-lm reads it once the model is loaded
                    action.type = _json_text
            args = describe(parser, help_texts).parse_args()
            _check(vars(args), RANGES | OF_SERVER if name == "server" else RANGES)
            return args

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


def _check(options, ranges):
    """Refuse what cannot be, before a model is loaded."""
    for name, value in options.items():
        if value is None:
            continue
        where = f"{flag(name)} {value}"
        if name in ranges:
            least, most = ranges[name]
            if not least <= value <= most or value == math.inf:
                raise InputError(
                    f"{where}: must be at least {least}{'' if most == math.inf else f' and at most {most}'}"
                )
        elif name in ONE_OF and value not in ONE_OF[name]:
            raise InputError(f"{where}: must be one of {', '.join(map(str, ONE_OF[name]))}")
        elif name == "prompt_cache_file" and not Path(value).is_file():
            raise InputError(f"{where}: no such file; give one that mlx_lm.cache_prompt saved")
        elif name in ("model", "draft_model"):
            check_model(value)
        elif name == "adapter_path":
            read_config(Path(value))


def _json(text):
    """The JSON object that a text holds, as argparse's ``type``."""
    try:
        found = json.loads(text)
    except (RecursionError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text}: must be a JSON object, such as {{"enable_thinking": false}}')
    return found


def _json_text(text):
    _json(text)
    return text
