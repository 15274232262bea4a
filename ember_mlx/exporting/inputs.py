"""What is exported: a model with its adapter, and the folder that is written, whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model, hf_repo_to_path, save

from ember_mlx.finetune import safe_reading, safe_writing
from ember_mlx.finetune.adapter_saving import is_run_path
from ember_mlx.finetune.adapters import CONFIG, load
from ember_mlx.finetune.merging import QUANTIZATION, merge_adapters
from ember_mlx.shared.errors import InputError, reason_of

__all__ = ["SENTENCEPIECE", "Fused", "check_save_path", "export_folder", "load_fused", "source_folder", "write_fused"]

SENTENCEPIECE = "tokenizer.model"  # which mlx-lm does not copy, and llama.cpp reads before tokenizer.json


@dataclass(frozen=True)
class Fused:
    """A model with its adapter merged, its tables included, and nothing quantized."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    source: Path

    @property
    def weights(self) -> dict[str, mx.array]:
        """All parameters by name."""
        return dict(tree_flatten(self.model.parameters()))

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(array.nbytes for array in self.weights.values())


def check_save_path(folder: Path, *, overwrite: bool, model: str | Path, adapter: str | Path | None) -> None:
    """Refuse a ``--save-path`` that is an input itself, a run's, no folder, or has something in it.

    Args:
        folder: What ``--save-path`` names.
        overwrite: Whether something may be in it.
        model, adapter: The inputs, which are not written to.

    Raises:
        InputError: for such a folder.
    """
    where = f"--save-path {folder}"
    for other, what in ((model, "model"), (adapter, "adapter")):
        if other is not None and folder.resolve() == Path(other).resolve():
            raise InputError(f"{where}: is the {what} itself; give another path")
    if folder.is_symlink() and not folder.exists():
        raise InputError(f"{where}: is a link that leads nowhere; give another path")
    above = next((path for path in folder.absolute().parents if path.exists()), None)
    if (folder.exists() and not folder.is_dir()) or not above.is_dir():
        raise InputError(f"{where}: {folder if folder.exists() else above} is a file; give a folder")
    parent = folder.absolute().parent
    if (parent / CONFIG).is_file() and is_run_path(parent, folder):
        raise InputError(f"{where}: is of the run in {parent}, which may replace it; give another path")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise InputError(f"{where}: already exists; give another path, or --overwrite to replace what is in it")


def load_fused(model_path: str, adapter: Path | None, **options: Any) -> Fused:
    """Load a model and merge an adapter into it; quantized layers are dequantized.

    Args:
        model_path: A model folder or a name on the Hugging Face hub.
        adapter: The adapter folder; None for the model as it is.
        options: Whatever else ``mlx_lm.load`` takes.

    Raises:
        InputError: for a model or an adapter that does not load, and for a number that is not finite.
    """
    model, tokenizer, config = load(model_path, adapter, return_config=True, **options)
    merge_adapters(model, config)
    model = dequantize_model(model)
    for key in QUANTIZATION:
        config.pop(key, None)
    fused = Fused(model, tokenizer, config, source_folder(model_path))
    what = f"model {model_path}" if adapter is None else f"model {model_path} with {adapter}"
    safe_reading.check_finite(fused.weights, what, "export one of finite numbers")
    return fused


def source_folder(model_path: str) -> Path:
    """The folder of a model that was loaded: its own, or that of the hub's cache."""
    return Path(model_path) if Path(model_path).exists() else hf_repo_to_path(model_path)


def write_fused(folder: Path, fused: Fused) -> None:
    """Write a model folder in the form of Hugging Face."""
    save(folder, fused.source, fused.model, fused.tokenizer, fused.config, donate_model=False)
    if (fused.source / SENTENCEPIECE).is_file() and not (folder / SENTENCEPIECE).exists():
        shutil.copy(fused.source / SENTENCEPIECE, folder)


@contextmanager
def export_folder(folder: Path, needed: int, files: tuple[str, ...]) -> Iterator[Path]:
    """A folder to write into, which takes the place of ``folder``, whole, when the block ends.

    Args:
        folder: What ``--save-path`` names.
        needed: The bytes that will be written.
        files: Patterns of what an export of this form writes. Other files in the folder stay.

    Raises:
        InputError: for whatever keeps it from being written; what was there is unchanged.
    """
    safe_writing.check_space("--save-path", folder, needed)
    try:
        with safe_writing.new_folder(folder.resolve(), lambda path: not any(map(path.match, files))) as partial:
            yield partial
    except InputError:
        raise
    # RuntimeError of MLX, Exception of the tokenizers, OSError: a disk that is full, a folder that cannot be written.
    except Exception as error:
        raise InputError(
            f"--save-path {folder}: could not be written ({reason_of(error)}); what was there is unchanged"
        ) from error
