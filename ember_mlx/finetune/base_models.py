"""The model that a run begins with, loaded by mlx-lm; its layers quantized if that is asked for."""

from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx_lm
from huggingface_hub import errors as of_hub
from huggingface_hub.utils import validate_repo_id
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ember_mlx.finetune.quantized_layers import quantize_layers
from ember_mlx.shared.errors import InputError, did_you_mean_path, reason_of

__all__ = ["check_model", "load_base", "why_not_loaded"]

GIVE = "give a model's folder, or a name on the Hugging Face hub"


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
    check_model(path_or_hf_repo)
    lazy = {} if quantize is None else {"lazy": True}
    try:
        model, tokenizer, config = mlx_lm.load(str(path_or_hf_repo), return_config=True, **(options | lazy))
        if quantize is not None:
            quantize_layers(model, config, quantize, f"--quantize {quantize}: model {path_or_hf_repo}")
        return model, tokenizer, config
    except InputError:
        raise
    # Whatever the hub's client, the model file or the tokenizer raises: the user gave a model that does not load.
    except Exception as error:
        raise InputError(f"model {path_or_hf_repo}: {why_not_loaded(path_or_hf_repo, error)}") from error


def check_model(path_or_hf_repo: str | Path, where: str | None = None) -> None:
    """Refuse what can be no model, by its name and its folder alone; nothing is loaded or downloaded.

    Args:
        path_or_hf_repo: What is meant to be a model folder or a name on the Hugging Face hub.
        where: Begins the message; default: "model NAME".

    Raises:
        InputError: for a file, a folder without config.json, and what is neither a folder nor a name that can be.
    """
    name, path = str(path_or_hf_repo), Path(path_or_hf_repo)
    where = where or f"model {name or repr(name)}"
    if not name:
        raise InputError(f"{where}: is empty; {GIVE}")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{where}: this folder has no config.json{_what_it_is(path)}")
    elif path.exists():
        raise InputError(f"{where}: is a file; {GIVE}")
    elif not _may_be_on_hub(name):
        raise InputError(f"{where}: no such folder here{_near(path)}, and no name that the hub can have; {GIVE}")


def why_not_loaded(path_or_hf_repo: str | Path, error: Exception) -> str:
    """Why a model, or its tokenizer, did not load, and the remedy, where there is one."""
    path = Path(path_or_hf_repo)
    near = _near(path)
    if path.exists():
        return f"mlx-lm cannot load it: {reason_of(error)}"
    if isinstance(error, of_hub.GatedRepoError):
        why = "its terms must be accepted: do so on its page there, then `hf auth login`"
    elif isinstance(error, of_hub.RepositoryNotFoundError):
        why = f"it has no public model of this name: {GIVE}; for a private one, `hf auth login`"
    elif isinstance(error, of_hub.LocalEntryNotFoundError | of_hub.OfflineModeIsEnabled | ConnectionError):
        why = "it cannot be reached, nor is all of the model in its cache"
        if not near:
            why += f": give a model's folder, or connect and run `hf download {path_or_hf_repo}`"
    else:
        why = reason_of(error)
    return f"no such folder here{near}, and the Hugging Face hub gave none: {why}"


def _may_be_on_hub(name):
    try:
        validate_repo_id(name)
    except of_hub.HFValidationError:
        return False
    return True


def _near(path):
    """A hint at the model whose folder is spelt most alike, or nothing."""
    return did_you_mean_path(path, lambda folder: (folder / "config.json").is_file())


def _what_it_is(folder):
    if (folder / "adapter_config.json").is_file():
        return ": it is an adapter; give it as --adapter-path, and as --model the model that it was trained on"
    within = next((path.parent for path in sorted(folder.glob("*/config.json"))), None)
    return f"; did you mean {str(within)!r}?" if within else f"; {GIVE}"
