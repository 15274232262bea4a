"""What a run is planned from: the model's config.json, its tokenizer, new tokens, and the rows of the data."""

import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from safetensors import SafetensorError, safe_open

from ember_mlx.finetune import options
from ember_mlx.finetune.added_tokens import grow_tokenizer, read_tokens
from ember_mlx.finetune.build_optimizer import check_rates
from ember_mlx.finetune.choices import choose
from ember_mlx.finetune.data import check_data_folder, file_of, is_local, split_off
from ember_mlx.finetune.longest_batch import LongestBatch, longest_batches
from ember_mlx.finetune.run_length import batches_an_epoch, passes, settled
from ember_mlx.finetune.samples import read_prompts
from ember_mlx.planner import Architecture, Run, read_architecture, run_of
from ember_mlx.shared.errors import InputError, did_you_mean_path, reason_of

__all__ = ["Inputs", "find_config", "read_inputs", "refuse_misfits", "with_rows_of_data"]

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken", "tiktoken.model")
# Above any length that a tokenizer's config allows: rows are cut by --max-seq-length, and need no warning here.
ANY_LENGTH = 10**12
USUAL_ROWS = 512  # tokens: of rows that nothing is known of
MOST_TOKENS = 10**9  # of a batch: far above any that fits, and the sizes can still be read
SECONDS_FOR_THE_HUB = 3
NO_DATA = "no --data is given"
EVALUATIONS = {"valid": "validation", "test": "the test"}


@dataclass(frozen=True)
class Inputs:
    """What a run is planned from, with rows as long as ``--max-seq-length`` allows.

    Args:
        model (Architecture): With the rows of new tokens.
        run (Run): What of the options matters.
        config_path (Path): Of the config.json; the tokenizer lies beside it.
        tokenizer (TokenizerWrapper, optional): The one that knows the new tokens, if there are any.
        assumptions (list[str]): Lines on what was assumed.
        iters (int): The steps of the run; of ``--epochs``, if the rows are known.
    """

    model: Architecture
    run: Run
    config_path: Path
    tokenizer: TokenizerWrapper | None
    assumptions: list[str]
    iters: int


def read_inputs(args: options.Options, workers: int = 1) -> Inputs:
    """Everything but the data.

    Args:
        args: The run's.
        workers: How many share each batch.

    Raises:
        InputError: for a model, new tokens or prompts that ``train`` would refuse, and a config.json that cannot be
            planned.
    """
    config, path = find_config(args.model)
    model = _with_asked_layers(args, read_architecture(config, path.name))
    if args.sample_prompts is not None:
        read_prompts(args.sample_prompts)  # as train will
    tokenizer, assumptions = None, []
    if args.add_tokens is not None:
        model, tokenizer, assumptions = _with_new_tokens(args, model, path)
    return Inputs(model, run_of(args, model, workers), path, tokenizer, assumptions, args.iters)


def refuse_misfits(args: options.Options) -> None:
    """Refuse what asks the model for what it lacks, by its config.json: ``train`` calls this before it loads a model.

    Raises:
        InputError: as ``train`` would. A model that is not there, or of another family than those that are planned
            exactly, passes: the loaded one is asked.
    """
    try:
        config, path = find_config(args.model)
        model = read_architecture(config, path.name)
    except InputError:
        return
    if model.is_exact:
        choose(args, _with_asked_layers(args, model).shapes())


def _with_asked_layers(args, model):
    """The same with the layers of ``--quantize``."""
    if args.quantize is None:
        return model
    if model.quantization:
        raise InputError(
            f"--quantize {args.quantize}: model {args.model}: is quantized already: leave --quantize out, or give "
            "the same model in 16 bits"
        )
    return model.with_layers_of(args.quantize)


def with_rows_of_data(args: options.Options, inputs: Inputs, *, usual_rows: bool = False) -> Inputs:
    """The same with rows as long as those of ``--data``, where these can be known.

    Args:
        args: The run's.
        inputs: Of :func:`read_inputs`.
        usual_rows: Without ``--data``, plan rows of 512 tokens, and not as long as ``--max-seq-length`` allows.

    Raises:
        InputError: for data that ``train`` would refuse, and for batches that could never be trained on.
    """
    tokenizer, without = _tokenizer_of_rows(args, inputs)
    if without == NO_DATA and usual_rows:
        run = replace(inputs.run, length=min(USUAL_ROWS, inputs.run.length))
        line = f"rows of {run.length} tokens: {NO_DATA}; --data or --max-seq-length plans for other rows"
        return replace(inputs, run=run, assumptions=[*inputs.assumptions, line])
    if without:
        return _with_full_rows(args, inputs, without)
    batches = longest_batches(args, tokenizer)
    rows = batches["train"].packs or batches["train"].all_rows
    args = settled(args, batches_an_epoch(args, rows))
    if args.epochs is not None:  # only now is it known how far a schedule goes
        check_rates(args, tables=args.train_tables != "none")
    run = replace(inputs.run, length=batches["train"].width - 1)  # the last token is only predicted
    lines = [f"{run.length} tokens: {_why_so_long(args, 'train', batches['train'])}"]
    if args.epochs is not None:
        lines.insert(0, f"--epochs {args.epochs:g} is {passes(args, rows)}")
    if not file_of(args, "valid"):
        every = sum(batches[name].all_rows for name in ("train", "valid") if name in batches)
        lines.insert(0, split_off(args, every)[1])
    name = max(batches, key=lambda name: batches[name].width)
    if name != "train":
        run = replace(run, evaluation_length=batches[name].width - 1)
        taken = f"{run.batch_size} x {run.evaluation_length} tokens"
        lines.append(f"{EVALUATIONS[name]} takes {taken}: {_why_so_long(args, name, batches[name])}")
    return replace(inputs, run=run, iters=args.iters, assumptions=[*inputs.assumptions, *lines])


def _tokenizer_of_rows(args, inputs):
    """The tokenizer of the rows of ``--data``, or None and why these cannot be known."""
    if not args.train:
        return None, "a test alone is planned as if it trained"
    if not is_local(args):
        if getattr(args, "hf_dataset", None):
            return None, "hf_dataset is no folder here"
        none_given = args.data == options.defaults()["data"]
        return None, NO_DATA if none_given else f"--data {args.data} is no folder here"
    check_data_folder(args)
    return (inputs.tokenizer, None) if inputs.tokenizer else _load_tokenizer(inputs.config_path, args)


def _with_full_rows(args, inputs, why):
    if inputs.run.batch_size * inputs.run.length > MOST_TOKENS:
        raise InputError(
            f"--batch-size {args.batch_size} and --max-seq-length {args.max_seq_length}: batches of more than "
            f"{MOST_TOKENS:,} tokens are not planned; use lower ones"
        )
    line = f"as if every row filled --max-seq-length {args.max_seq_length}: {why}; shorter rows take less, and a row's "
    line += "last token is only predicted"
    return replace(inputs, assumptions=[*inputs.assumptions, line])


def _why_so_long(args, name, batch: LongestBatch):
    path = file_of(args, name) or file_of(args, "train")  # of which validation rows are split off
    if batch.packs:
        about = "" if batch.tokenized == batch.rows else "about "
        reason = f"--packing makes {about}{batch.packs:,} packs of the {batch.rows:,} rows of {path}"
    elif batch.is_cut:
        limit = f"--max-seq-length {args.max_seq_length}"
        reason = f"{limit} cuts the longest rows of {path}, and the last token is only predicted"
    else:
        reason = f"batches of {path} have rows of up to {batch.longest}, and mlx-lm pads them"
        if batch.tokenized < batch.rows:
            reason += f" (of {batch.rows:,} rows, the {batch.tokenized:,} of most characters were tokenized)"
    batches = batches_an_epoch(args, batch.packs or batch.rows)
    if name == "train" and args.iters < batches:
        reason += f"; {args.iters:,} steps may draw only shorter ones of the {batches:,} batches"
    return reason


def _load_tokenizer(config_path, args):
    """The tokenizer, or None and why there is none."""
    folder, why = config_path.parent, ""
    if not _has_tokenizer(folder) and not Path(args.model).exists():
        why = _fetch_tokenizer(args.model, folder)
    if not _has_tokenizer(folder):
        return None, f"no tokenizer exists beside {config_path.name}{why}"
    settings = {"trust_remote_code": args.trust_remote_code, "model_max_length": ANY_LENGTH}
    try:
        return load_tokenizer(folder, settings), None
    # Whatever a tokenizer of its own kind raises.
    except Exception as error:
        return None, f"the tokenizer cannot be loaded ({reason_of(error)})"


def _has_tokenizer(folder):
    return any(any(folder.glob(name)) for name in VOCABULARIES)


def _with_new_tokens(args, model, config_path):
    """Model and tokenizer as ``--add-tokens`` makes them, and a line on how many rows the tables have then.

    Raises:
        InputError: as ``train`` would.
    """
    where = f"--add-tokens {args.add_tokens}"
    asked = read_tokens(Path(args.add_tokens))
    tokenizer, _ = _load_tokenizer(config_path, args)
    if tokenizer is None:
        line = f"as if the {len(asked)} new tokens found no rows to spare: without the tokenizer that is not known"
        return model.with_rows(model.vocabulary + len(asked)), None, [line]
    tokenizer, tokens = grow_tokenizer(tokenizer, asked, where)
    rows = max(model.vocabulary, *(token.id + 1 for token in tokens))
    more = rows - model.vocabulary
    growth = f"the token tables grow by {more} rows" if more else "the token tables have rows to spare for them"
    line = f"{len(asked)} new tokens: {growth}"
    return model.with_rows(rows), tokenizer, [line]


def find_config(model: str) -> tuple[dict[str, Any], Path]:
    """The config.json of a model folder, of a file, or of a name on the Hugging Face hub; and its path.

    Of a name on the hub, config.json alone is downloaded, if it is not in the cache.

    Raises:
        InputError: when there is none, or it holds no object of JSON.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise InputError(f"--model {model}: has no config.json; give a model's folder, or a config.json")
    elif not path.is_file():
        if path.suffix == ".json" or path.is_absolute() or model.count("/") != 1:
            near = did_you_mean_path(path, Path.exists)
            raise InputError(f"--model {model}: no such file or folder{near}; give a model's folder, or a config.json")
        path = _from_hub(model)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--model {model}: {path.name} cannot be read: {reason_of(error)}") from error
    if not isinstance(config, dict):
        raise InputError(f"--model {model}: {path.name} holds no names and values; give the config.json of a model")
    return config | _stored_dtype(path.parent), path


def _stored_dtype(folder):
    """The dtype of the weights that lie beside a config.json, as its key: mlx_lm.convert leaves the old one there."""
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    found = Counter()
    for path in sorted(folder.glob("*.safetensors"))[:1]:
        with suppress(OSError, SafetensorError), safe_open(path, "numpy") as weights:
            found.update(weights.get_slice(name).get_dtype() for name in weights.keys())  # noqa: SIM118
    return next(({"torch_dtype": names[dtype]} for dtype, _ in found.most_common() if dtype in names), {})


def _from_hub(name):
    """The config.json of a model on the Hugging Face hub: from the cache, or these kilobytes are downloaded."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        path = try_to_load_from_cache(name, "config.json")
        if isinstance(path, str):
            return Path(path)
        _ask_hub(name, None)
        return Path(hf_hub_download(name, "config.json", etag_timeout=SECONDS_FOR_THE_HUB))
    # Whatever the hub's client raises: a name that cannot be, no such model, no connection.
    except Exception as error:
        raise InputError(
            f"--model {name}: no such folder here{did_you_mean_path(name, Path.is_dir)}, and the Hugging Face hub gave "
            f"no config.json ({reason_of(error)}): give a model's folder or its config.json"
        ) from error


def _fetch_tokenizer(name, folder):
    """Download the tokenizer's files to the config.json in the hub's cache; words on why they did not come, if so."""
    from huggingface_hub import snapshot_download

    commit = folder.name
    try:
        _ask_hub(name, commit)
        snapshot_download(name, revision=commit, allow_patterns=TOKENIZER_FILES, etag_timeout=SECONDS_FOR_THE_HUB)
    # As above.
    except Exception as error:
        return f", and the Hugging Face hub gave none ({reason_of(error)})"
    return ""


def _ask_hub(name, commit):
    """Raises whatever it may, at once: a download without a connection would try again for half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    get_hf_file_metadata(hf_hub_url(name, "config.json", revision=commit), timeout=SECONDS_FOR_THE_HUB)
