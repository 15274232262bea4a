"""All that we hold on to of mlx-lm's insides, in one file: what to try at its next release (pinned to ``<0.33``).

None of it is declared API. Each item says what it is used for and what would show that it changed.
"""

import argparse
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm import lora
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _parse_size, dequantize_model

__all__ = [
    "CONFIG_DEFAULTS",
    "PAD_TO",
    "YamlError",
    "build_lora_parser",
    "dequantized",
    "is_size",
    "load_yaml",
    "marked_tokens",
    "rate_schedule",
    "yaml_nodes",
]

# The defaults of mlx_lm.lora's options, by their names in YAML files. A new key is an option that we do not know.
CONFIG_DEFAULTS: dict[str, Any] = lora.CONFIG_DEFAULTS

# mlx_lm.tuner.trainer.iterate_batches pads rows to one more than a multiple of this, and names the number nowhere. The
# widths that `plan` foretells hang on it (tests/finetune/test_longest_batch.py).
PAD_TO = 32

YamlError = lora.yaml.YAMLError


def load_yaml(text: str) -> Any:
    """What a YAML text holds, by mlx_lm.lora's loader: it reads 1e-5 as a number, where YAML 1.1 does not.

    Raises:
        YamlError: for what is not YAML.
    """
    return lora.yaml.load(text, lora.yaml_loader)


def yaml_nodes(text: str) -> Any:
    """The same as PyYAML's nodes, which know their lines, before values are made of them; None for an empty text.

    Raises:
        YamlError: for what is not YAML.
    """
    return lora.yaml.compose(text, lora.yaml_loader)


def build_lora_parser() -> argparse.ArgumentParser:
    """mlx_lm.lora's parser of options; tests/finetune/test_options.py compares ours with it, flag by flag."""
    return lora.build_parser()


def is_size(action: argparse.Action) -> bool:
    """Whether an option of mlx-lm's takes a size."""
    return action.type is _parse_size


def marked_tokens(tokenizer: TokenizerWrapper, turns: list[dict[str, Any]], tools: Any) -> tuple[list[int], list[int]]:
    """The tokens of a conversation, and 1 for each that the template marks as the assistant's, 0 for the others.

    mlx-lm's wrapper asks for the tokens alone, so the tokenizer within is called, with what the wrapper would add.
    """
    thinking = {tokenizer._thinking_kwarg: tokenizer.has_thinking}
    found = tokenizer._tokenizer.apply_chat_template(
        turns, tools=tools, return_dict=True, return_assistant_tokens_mask=True, **thinking
    )
    return found["input_ids"], found["assistant_masks"]


def dequantized(module: nn.Module) -> nn.Module:
    """A plain module of the weights that a quantized one stands for.

    mlx-lm's ``dequantize_model`` takes a whole model: one with this module as its only child will do.
    """
    holder = nn.Module()
    holder.child = module
    return dequantize_model(holder).child


def rate_schedule(optimizer: optim.Optimizer) -> Callable[[mx.array], mx.array] | None:
    """The schedule of an MLX optimizer's learning rate, or None. MLX (not mlx-lm) keeps schedules to itself."""
    return optimizer._schedulers.get("learning_rate")
