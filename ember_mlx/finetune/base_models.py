"""The model that a run begins with, loaded by mlx-lm; its layers quantized if that is asked for."""

from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx_lm
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ember_mlx.finetune.quantized_layers import quantize_layers
from ember_mlx.shared.errors import InputError, reason_of

__all__ = ["load_base"]


def load_base(
    path_or_hf_repo: str | Path, *, quantize: int | None = None, **options: Any
) -> tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    """``mlx_lm.load`` with its config.

    Args:
        path_or_hf_repo: A model folder or a name on the Hugging Face hub.
        quantize: Quantize the layers to so many bits, as ``train --quantize`` does.
        options: Whatever else ``mlx_lm.load`` takes.

    Raises:
        InputError: for whatever mlx-lm raises, and for a model that cannot be quantized.
    """
    path = Path(path_or_hf_repo)
    try:
        if quantize is None:
            return mlx_lm.load(str(path_or_hf_repo), return_config=True, **options)
        model, tokenizer, config = mlx_lm.load(str(path_or_hf_repo), return_config=True, **(options | {"lazy": True}))
        quantize_layers(model, config, quantize, f"--quantize {quantize}: model {path_or_hf_repo}")
        return model, tokenizer, config
    except InputError:
        raise
    # Whatever the hub's client, the model file or the tokenizer raises: the user gave a model that does not load.
    except Exception as error:
        reason = reason_of(error)
        if path.exists():
            raise InputError(f"model {path_or_hf_repo}: mlx-lm cannot load it: {reason}") from error
        raise InputError(
            f"model {path_or_hf_repo}: no such folder here, and the Hugging Face hub gave none: {reason}"
        ) from error
