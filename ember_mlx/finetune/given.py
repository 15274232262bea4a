"""What a caller in Python has at hand, and what a run gives back beside its result."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.nn as nn
from mlx_lm.cli_ui import rprint
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ember_mlx.finetune import adapters
from ember_mlx.finetune.base_models import load_base
from ember_mlx.finetune.data import Rows
from ember_mlx.finetune.options import Options, defaults
from ember_mlx.finetune.quantized_layers import quantized_in_words
from ember_mlx.finetune.summary import Result
from ember_mlx.shared.errors import InputError

__all__ = ["Given", "Outcome"]

Loaded = tuple[nn.Module, TokenizerWrapper, dict[str, Any]]


@dataclass(frozen=True)
class Given:
    """Takes the place of ``--model`` and ``--data``: a model with its tokenizer and config, and rows.

    The run changes that model.
    """

    loaded: Loaded | None = None
    rows: Rows | None = None

    def load(self, args: Options) -> Loaded:
        """The model of a run.

        Raises:
            InputError: for ``--quantize`` beside a loaded model or an adapter of other bits, and for a model that
                cannot be loaded.
        """
        bits = args.quantize if args.train else _bits_of_adapter(args)
        if self.loaded:
            if bits:
                raise InputError(f"--quantize {bits}: is for a model that is loaded here; give its path")
            return self.loaded
        default = f" {args.model} (the default of --model)" if args.model == defaults()["model"] else ""
        rprint(f"Loading pretrained model{default}")
        trust = {"trust_remote_code": args.trust_remote_code}
        loaded = load_base(args.model, quantize=bits, tokenizer_config=trust, **trust)
        if bits:
            rprint(quantized_in_words(loaded[0]))
        return loaded


class Outcome(NamedTuple):
    """What came of the training, or None after a test alone; the model and its tokenizer as the run leaves them."""

    result: Result | None
    model: nn.Module
    tokenizer: TokenizerWrapper


def _bits_of_adapter(args):
    """The bits of the run that is tested: its adapter knows."""
    if not args.adapter_path:
        return args.quantize
    bits = adapters.read_config(Path(args.adapter_path)).get("quantize")
    if args.quantize not in (None, bits):
        trained = f"on layers of {bits} bits" if bits else "on the model as it is"
        raise InputError(f"--quantize {args.quantize}: adapter {args.adapter_path} was trained {trained}; leave it out")
    return bits
