"""The model that is made from what a run left behind: loading an adapter folder.

An adapter folder is mlx-lm's: ``adapter_config.json`` and ``adapters.safetensors``. Beside a LoRA or DoRA adapter the
trained tables lie in ``token_tables.safetensors``, because stock mlx-lm takes nothing but adapter matrices in the first
file; a ``full`` adapter holds everything in it. Where tables lie beside it, the first file holds one array more, whose
name is what stock mlx-lm says when it refuses the folder: it would load the adapter without its tables.

The files of one save know each other by ids in their metadata: ``settings_id`` and ``save_id``, of which
:mod:`~ember_mlx.finetune.adapter_saving` tells. An older adapter, or one of stock mlx-lm, has neither.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.utils import linear_to_lora_layers

from ember_mlx.finetune import safe_reading
from ember_mlx.finetune.added_tokens import add_tokens
from ember_mlx.finetune.base_models import load_base
from ember_mlx.finetune.choices import BITS
from ember_mlx.finetune.merging import QUANTIZATION
from ember_mlx.finetune.trainable import dequantize_modules
from ember_mlx.finetune.yaml_sections import check_lora_parameters
from ember_mlx.shared.errors import InputError, did_you_mean_path
from ember_mlx.token_tables import find_token_tables

__all__ = [
    "ADAPTERS",
    "BEST",
    "CONFIG",
    "REFUSAL",
    "SAVE_ID",
    "SETTINGS_ID",
    "TABLES",
    "add_tokens_of",
    "apply_adapter",
    "check_file",
    "load",
    "load_file",
    "load_weights",
    "read_arrays",
    "read_config",
    "refuse_other_tokens",
    "tables_of",
]

ADAPTERS = "adapters.safetensors"
BEST = "best"
CONFIG = "adapter_config.json"
TABLES = "token_tables.safetensors"
REFUSAL = (
    "This adapter has token tables, which mlx-lm would leave out. Use ember-mlx generate, chat, server or fuse, or in "
    "Python ember_mlx.load"
)
REMEDY = "use the model that it was trained on"
SETTINGS_ID = "settings_id"
SAVE_ID = "save_id"


def load(
    path_or_hf_repo: str | Path, adapter_path: str | Path | None = None, *, return_config: bool = False, **options: Any
) -> tuple[nn.Module, TokenizerWrapper] | tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    """``mlx_lm.load``, which also loads the token tables of an adapter folder that ``ember-mlx train`` wrote.

    Tokens that the run added are in the tokenizer.

    Args:
        path_or_hf_repo (str): A model folder or a name on the Hugging Face hub.
        adapter_path (str, optional): The adapter folder.
        return_config (bool): Return the model's config too. Tables that the adapter holds dequantized are marked as
            not quantized in it, and tokens that it adds are counted.
        options: Whatever else ``mlx_lm.load`` takes.

    Returns:
        ``(model, tokenizer)``, or ``(model, tokenizer, config)``.

    Raises:
        InputError: (a ``ValueError``) when there is no such model or adapter, when the two do not match, or when the
            adapter has a number that is not finite; it names the tensor.
    """
    adapter_config = {} if adapter_path is None else read_config(Path(adapter_path))
    model, tokenizer, config = load_base(path_or_hf_repo, quantize=adapter_config.get("quantize"), **options)
    if adapter_path is not None:
        tokenizer = add_tokens_of(Path(adapter_path), model, tokenizer, config, adapter_config)
        apply_adapter(model, Path(adapter_path), config, adapter_config)
        model.eval()
    return (model, tokenizer, config) if return_config else (model, tokenizer)


def add_tokens_of(
    folder: Path, model: nn.Module, tokenizer: TokenizerWrapper, config: dict, adapter_config: dict | None = None
) -> TokenizerWrapper:
    """Add the tokens that the run of the adapter in ``folder`` added; the new tokenizer. Before ``apply_adapter``."""
    adapter_config = adapter_config or read_config(folder)
    added = adapter_config.get("added_tokens")
    if not added:
        return tokenizer
    where = f"adapter {folder}: {CONFIG}: added_tokens"
    _dequantize(model, {table.path for table in find_token_tables(model)}, config)
    asked = [(each["content"], each["special"]) for each in added]
    tokenizer, tokens = add_tokens(model, tokenizer, config, asked, where)
    for token, each in zip(tokens, added, strict=True):
        if token.id != each["id"]:
            raise InputError(f"{where}: {token.content!r} has id {each['id']} there, but {token.id} here; {REMEDY}")
    return tokenizer


def apply_adapter(model: nn.Module, folder: Path, config: dict, adapter_config: dict | None = None) -> None:
    """Load the adapter of ``folder`` into ``model``, its token tables included; ``config`` is the model's."""
    adapter_config = adapter_config or read_config(folder)
    adapters = read_arrays(folder / ADAPTERS)
    full = adapter_config.get("fine_tune_type", "lora") == "full"
    trained = set() if full else set(adapter_config.get("token_tables") or ())
    tables = read_arrays(folder / TABLES) if trained else {}
    if trained != tables.keys():
        name = min(trained ^ tables.keys())
        is_there = "there, though its run did not train it" if name in tables else "missing"
        raise InputError(f"adapter {folder}: {TABLES}: {name} is {is_there}; give the folder of a finished run")
    ids = safe_reading.read_metadata(folder / ADAPTERS, f"adapter {folder}")
    if ids.get(SETTINGS_ID) != adapter_config.get(SETTINGS_ID):
        raise _mixed(folder, CONFIG, ADAPTERS)
    if tables:
        tables_of(folder / ADAPTERS)
    # A run of tables alone has no LoRA layers: mlx-lm would put them into all layers for num_layers 0.
    if adapters or not tables:
        _load_layers(model, adapters, adapter_config, folder)
    _dequantize(model, tables, config)
    load_weights(model, tables, model.parameters(), f"adapter {folder}: {TABLES}", REMEDY)


def _load_layers(model, adapters, adapter_config, folder):
    """As mlx-lm's ``load_adapters``, which reads the file itself and so would meet its refusal."""
    kind, where = adapter_config.get("fine_tune_type", "lora"), f"adapter {folder}: {ADAPTERS}"
    if kind == "full":
        load_weights(model, adapters, model.parameters(), where, REMEDY)
        return
    try:
        linear_to_lora_layers(
            model, adapter_config["num_layers"], adapter_config["lora_parameters"], use_dora=kind == "dora"
        )
    # OverflowError: a rank beyond what an array can have
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"adapter {folder} does not match the model: {_first_lines(error)}; {REMEDY}") from error
    parameters = tree_flatten(model.parameters())
    allowed = {name: array for name, array in parameters if name.rpartition(".")[2] in ("lora_a", "lora_b", "m")}
    load_weights(model, adapters, allowed, where, REMEDY)
    # mlx-lm does not mind an adapter for fewer layers than its config says; half an adapter is no adapter.
    missing = sorted(name for name in allowed if name not in adapters and not name.endswith(".m"))
    if missing:
        raise InputError(
            f"adapter {folder} does not match the model: {missing[0]} (and {len(missing) - 1} more) is not in "
            f"{ADAPTERS}; {REMEDY}"
        )


def refuse_other_tokens(path: Path, added_tokens: list[dict] | None) -> None:
    """Raises InputError when the run that wrote the adapter at ``path`` added other tokens than these."""
    if (path.parent / CONFIG).is_file() and (read_config(path.parent).get("added_tokens") or None) != added_tokens:
        raise InputError(f"--resume-adapter-file {path}: its run added other tokens; give its file as --add-tokens")


def tables_of(path: Path) -> Path | None:
    """The file with the token tables that were saved with the adapter file at ``path``, if there were any.

    Raises:
        InputError: when it is not there, or is of another save.
    """
    where = f"adapter {path.parent}"
    tables = path.with_name(path.name.replace(ADAPTERS, TABLES))
    save_id = safe_reading.read_metadata(path, where).get(SAVE_ID)
    if tables == path or not tables.exists():
        if save_id is None:
            return None
        raise InputError(
            f"{where}: the token tables that were saved with {path.name} are not there; put both files into one folder "
            f"under the names that they had, such as {ADAPTERS} and {TABLES}"
        )
    if safe_reading.read_metadata(tables, where).get(SAVE_ID) != save_id:
        raise _mixed(path.parent, path.name, tables.name)
    return tables


def check_file(path: Path) -> None:
    """Raises InputError for a ``--resume-adapter-file`` that is none."""
    if path.is_dir() and (path / ADAPTERS).is_file():
        raise InputError(f"--resume-adapter-file {path}: is a folder; give {path / ADAPTERS}")
    if not path.is_file():
        raise InputError(
            f"--resume-adapter-file {path}: this file does not exist{did_you_mean_path(path)}; give an {ADAPTERS}"
        )


def load_file(model: nn.Module, path: Path) -> None:
    """Put the trained weights of an earlier run, of ``--resume-adapter-file``, into a model that is ready to train.

    Raises:
        InputError: for a file that cannot be read, and for weights that do not train here.
    """
    tables = tables_of(path)
    for file in (path, tables) if tables else (path,):
        # What this run does not train, it would not save either.
        trainable = model.trainable_parameters()
        remedy = "use the --fine-tune-type, --train-tables and --num-layers of the run that wrote it"
        load_weights(model, read_arrays(file), trainable, f"--resume-adapter-file {file}", remedy)


def load_weights(model: nn.Module, weights: dict, parameters: dict, where: str, remedy: str) -> None:
    """``model.load_weights``, strict about what is there to load: names and shapes must be among ``parameters``."""
    parameters = dict(tree_flatten(parameters))
    for name, array in weights.items():
        if name not in parameters:
            raise InputError(f"{where}: {name} is not among the parameters to load; {remedy}")
        if array.shape != parameters[name].shape:
            raise InputError(
                f"{where}: {name} has shape {array.shape}, but {parameters[name].shape} in this model; {remedy}"
            )
    model.load_weights(list(weights.items()), strict=False)


def read_config(folder: Path) -> dict:
    """The adapter_config.json of an adapter folder.

    Raises:
        InputError: when there is none, and for what no run writes.
    """
    if not folder.is_dir():
        kept = " (best/ is kept once a validation is better than the untrained model)" if folder.name == BEST else ""
        near = did_you_mean_path(folder, lambda other: (other / CONFIG).is_file())
        raise InputError(f"adapter {folder}: no such folder{near}{kept}; give the --adapter-path of a finished run")
    if not (folder / CONFIG).is_file():
        raise InputError(f"adapter {folder}: it has no {CONFIG}{_unfinished(folder)}")
    config = safe_reading.read_json(folder / CONFIG, f"adapter {folder}")
    where = f"adapter {folder}: {CONFIG}"
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora", "full"):
        raise InputError(f"{where}: fine_tune_type {kind!r}: must be lora, dora or full")
    safe_reading.check_types(config.get("token_tables") or [], [str], f"{where}: token_tables")
    added = config.get("added_tokens") or []
    safe_reading.check_types(added, [{"content": str, "special": bool, "id": int}], f"{where}: added_tokens")
    if (bits := config.get("quantize")) is not None and (type(bits) is not int or bits not in BITS):
        raise InputError(f"{where}: quantize {bits!r}: must be one of {', '.join(map(str, BITS))}")
    if kind != "full":
        safe_reading.check_types(config.get("num_layers"), int, f"{where}: num_layers")
        safe_reading.check_types(config.get("lora_parameters"), dict, f"{where}: lora_parameters")
        try:
            check_lora_parameters(config["lora_parameters"])
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    return config


def _unfinished(folder):
    """Why a folder may have no adapter yet, and what to do."""
    from ember_mlx.finetune import checkpoints  # which imports this module

    run = checkpoints.adapter_folder_of(folder.parent if checkpoints.NAME.fullmatch(folder.name) else folder)
    if run is None or not checkpoints.in_folder(run):
        return "; give the --adapter-path of a finished run"
    if (run / CONFIG).is_file():
        return f": checkpoints are for `ember-mlx train --resume`; give {run}, which has the adapter"
    step = int(checkpoints.NAME.fullmatch(checkpoints.in_folder(run)[-1].name)[1])
    end = f", or ends it there with --resume --iters {step}" if step else ""
    best = f"give {run / BEST}, which has the lowest validation loss; or " if (run / BEST / CONFIG).is_file() else ""
    return (
        f": the run in {run} stopped at step {step}, before it saved an adapter; {best}the same `ember-mlx train` "
        f"command goes on with --resume{end}"
    )


def read_arrays(path: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file of an adapter, by name.

    Raises:
        InputError: when it cannot be read, and for an array that is not of floats or not finite.
    """
    if not path.is_file():
        raise InputError(f"adapter {path.parent}: it has no file {path.name}; give that of a finished run")
    arrays = safe_reading.read_arrays(path, f"adapter {path.parent}")
    arrays.pop(REFUSAL, None)
    for name, array in arrays.items():
        if not mx.issubdtype(array.dtype, mx.floating):
            raise InputError(
                f"adapter {path.parent}: {path.name}: {name} is of dtype {array.dtype}, which never trains"
            )
    remedy = "give an earlier save, or train anew with lower learning rates"
    safe_reading.check_finite(arrays, f"adapter {path.parent}: {path.name}", remedy)
    return arrays


def _mixed(folder, one, other):
    return InputError(
        f"adapter {folder}: {one} and {other} are not of one save, which was broken off between them: `ember-mlx train "
        "... --resume`, with the options of that run, saves them anew from its newest checkpoint"
    )


def _dequantize(model, tables, config):
    """Tables that were trained dequantized take the place of quantized ones, in the model and in its config."""
    quantized = [t.module_path for t in find_token_tables(model) if t.quantized and t.path in tables]
    dequantize_modules(model, quantized)
    for key in QUANTIZATION:
        if key in config:
            config[key] |= dict.fromkeys(quantized, False)


def _first_lines(error):
    lines = [line.strip() for line in str(error).splitlines()]
    more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
    return " ".join(lines[:2]) + more
