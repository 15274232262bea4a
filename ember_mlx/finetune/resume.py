"""Going on from a checkpoint: whether this is the same run, and everything put back in its place."""

import hashlib
import json
import platform
from collections.abc import Collection
from dataclasses import replace
from functools import cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.cli_ui import rprint

from ember_mlx.finetune import checkpoints, options, safe_reading
from ember_mlx.finetune.adapters import ADAPTERS, BEST
from ember_mlx.finetune.build_optimizer import body_learning_rate, peak
from ember_mlx.finetune.checkpoints import Checkpoint
from ember_mlx.finetune.option_checks import check
from ember_mlx.finetune.position import Position, numpy_random, set_numpy_random, set_random
from ember_mlx.finetune.rows import TriedRows
from ember_mlx.finetune.run_length import asked, updates
from ember_mlx.finetune.workers import Workers, as_words
from ember_mlx.optimizers.guarded import GuardedOptimizer, fill
from ember_mlx.shared.environment import version_of
from ember_mlx.shared.errors import InputError

__all__ = [
    "CONTENTS",
    "as_json",
    "checksum",
    "made_of",
    "options_to_agree",
    "rates_as_before",
    "refuse_changes",
    "restore",
    "share_position",
    "versions",
    "weights_checksum",
]

# What may differ without a word: it does not reach the weights. What the data and the model are is told by their
# contents, so they may have moved.
FREE = {
    *("iters", "epochs", "sample_prompts", "sample_tokens"),
    *("steps_per_report", "save_every", "keep_checkpoints", "report_to", "project_name", "adapter_path"),
    *("overwrite", "resume", "resume_with_changes", "config", "train", "test", "test_batches", "data", "model"),
    *("clear_cache_threshold", "trust_remote_code", "token_tables", "log_jsonl", "add_tokens", "memory_limit"),
    *("prompt_feature", "completion_feature", "chat_feature", "text_feature", "valid_fraction"),  # as "data"
    *("streaming_notes", "peer_timeout", "keep_best", "patience"),
    "shard_optimizer",  # to the bit
    "shard_tables",  # as the number of workers, which is named: sums in another order
    "dequantize_tables",  # obsolete
    "auto_savings",  # what it switches on is compared itself
    "on_nonfinite",  # up to a step that is not finite both are one
}
# Of these, what decides at which steps the workers of one run meet.
SHARED = {
    *("iters", "epochs", "steps_per_report", "save_every", "train", "test", "test_batches", "on_nonfinite"),
    *("keep_best", "patience", "shard_optimizer", "shard_tables"),
}
version = cache(version_of)  # it reads and parses a file
CONTENTS = {"data": "rows (--data)", "tokens": "tokens (--model)", "model": "weights (--model)"}  # of `made_of`
BEFORE = {"stream": False, "body_rounding": "nearest"}  # what a release did that had no such choice
CONSTANTS = ("learning_rate", "weight_decay")  # kept by MLX in an optimizer's state, but given by the options
PART = 2**22  # words
MOST_ITERS = 10**7  # of a checkpoint for whose schedule every rate is computed


def as_json(values: dict) -> dict:
    """The same, as JSON gives it back."""
    return json.loads(json.dumps(values, default=str), parse_constant=str)  # YAML has dates and infinities, too


def made_of(model: nn.Module, train_set: TriedRows, valid_set: TriedRows, workers: int) -> dict:
    """What else a run hangs on: rows, their tokens, every number of every weight, the architecture, and the workers.

    The tokens stand for the tokenizer and its chat template: what changes no token of these rows changes no run.
    """
    return {
        "data": [train_set.checksum, valid_set.checksum],
        "tokens": [train_set.token_checksum, valid_set.token_checksum],
        "model": weights_checksum(model.parameters()),
        "architecture": _architecture(model),
        "workers": workers,
    }


def weights_checksum(weights: dict) -> str:
    """Of the names, shapes, dtypes and numbers of a tree of weights."""
    found = hashlib.sha256()
    for name, array in sorted(tree_flatten(weights)):
        found.update(f"{name} {array.shape} {array.dtype} {checksum(array)}".encode())
    return found.hexdigest()


def checksum(array: mx.array) -> int:
    """32 bits that depend on every byte of an array and on their order; another value of any one element changes them.

    Each word w_i counts as (2 i + 1) w_i modulo 2^32, an odd multiple, over parts that fit the memory; a part's sum
    counts as an odd multiple of its number too.
    """
    words = as_words(array)
    total = 0
    for number, start in enumerate(range(0, words.size, PART)):
        part = words[start : start + PART].astype(mx.uint32)
        odd = 2 * mx.arange(part.size, dtype=mx.uint32) + 1
        total += (2 * number + 1) * mx.sum(part * odd).item()
    return total % 2**32


def _architecture(model):
    """The settings that the model was built from, as JSON, by name."""
    args = getattr(model, "args", None) or getattr(model, "config", None)
    named = json.dumps(
        getattr(args, "__dict__", {}), default=lambda value: getattr(value, "__dict__", str(type(value)))
    )
    return as_json(json.loads(named))


def versions() -> dict:
    """What a run runs with: packages, device and machine, by name."""
    packages = ("ember-mlx", "mlx", "mlx-lm", "numpy")
    return {name: version(name) for name in packages} | {
        "device": str(mx.default_device()),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def rates_as_before(args: options.Options, given: Collection[str], workers: Workers) -> options.Options:
    """The options of a run; one that is resumed keeps row floor and rates where they are not given, and says so.

    So it goes on as it began, whatever decided them: the defaults of then, a flag or a file. Other tables and another
    optimizer have their own.

    Args:
        args: The run's.
        given: The names of the options that the user has given.
        workers: All of them call this; rank 0 alone needs the checkpoint.

    Raises:
        InputError: for a number of the checkpoint that no run can have.
    """
    taken = json.loads(workers.text_of_leader(json.dumps(_defaults_then(args, given) if workers.leads else {})))
    if taken:
        with workers.one_outcome():
            check(args | taken)
        flags = " and ".join(f"{options.flag(name)} {of:g}" for name, of in taken.items())
        rprint(f"As in the run that is resumed: {flags}")
    return args | taken


def _defaults_then(args, given):
    """What the checkpoint has otherwise, by name, of the options of which defaults are decided."""
    before = {} if args.resume is None else checkpoints.options_of(Path(args.adapter_path), args.resume)
    then = {}
    if all(before.get(name) == getattr(args, name) for name in ("table_optimizer", "train_tables")):
        then["table_row_floor"] = before.get("table_row_floor") or 0.0  # null is none
        then["table_learning_rate"] = before.get("table_learning_rate")
    if before.get("optimizer") == args.optimizer:
        then["learning_rate"] = before.get("learning_rate")
    numbers = {name: of for name, of in then.items() if name not in given and type(of) in (int, float)}
    return {name: of for name, of in numbers.items() if of != (getattr(args, name) or 0.0)}


def options_to_agree(args: options.Options) -> dict:
    """What all workers of a run must have alike, by name: options but the free ones, and versions."""
    own = as_json(vars(args))
    own["resume_adapter_file"] = own["resume_adapter_file"] is not None  # its weights are compared, not its place
    chosen = {options.flag(name): own[name] for name in own.keys() - (FREE - SHARED)}
    return chosen | {"--resume": args.resume is not None} | {f"version: {name}": of for name, of in versions().items()}


def share_position(
    workers: Workers, position: Position | None, model: nn.Module, optimizer: GuardedOptimizer
) -> Position:
    """Put all workers where rank 0 has been put by :func:`restore`, bit for bit; it alone needs the checkpoint's files.

    Args:
        workers: All of them call this.
        position: Of rank 0; not used of the others.
        model, optimizer: Of the same structure everywhere.

    Returns:
        The position of rank 0.
    """
    if workers.size == 1:
        return position
    position = Position(**json.loads(workers.text_of_leader(json.dumps(position.to_json()) if position else "")))
    weights = tree_flatten(model.trainable_parameters())
    model.load_weights([(name, workers.array_of_leader(array)) for name, array in weights], strict=False)
    state = tree_flatten(optimizer.state)
    fill(optimizer.state, {name: workers.array_of_leader(array) for name, array in state})
    set_random(position)
    return position


def refuse_changes(
    args: options.Options, checkpoint: Checkpoint, own_made_of: dict, model: nn.Module, optimizer: GuardedOptimizer
) -> None:
    """Refuse, by name, what would make the rest another run; with ``--resume-with-changes`` tell it only.

    Raises:
        InputError: for that, when ``--iters`` is below the steps that are done, and also with ``--resume-with-changes``
            when the checkpoint's weights or optimizer state do not fit what was changed.
    """
    step, where = checkpoint.position.step, f"--resume: checkpoint {checkpoint.folder}"
    if args.iters < step:
        raise InputError(
            f"{asked(args)}: checkpoint {checkpoint.folder} has {step} steps done; ask for at least that many"
        )
    changed = [*_changed_options(args, checkpoint.options), *_changed_contents(own_made_of, checkpoint.made_of)]
    weights_fit = _fit(checkpoint.weights, model.trainable_parameters())
    fits = weights_fit and _fit(checkpoint.optimizer, optimizer.state)
    if changed and not (args.resume_with_changes and fits):
        if added := _other_added_tokens(args, checkpoint.options):
            raise InputError(f"{where} is of a run {added}")
        or_else = ""
        if fits:
            or_else = ", or --resume-with-changes to use its weights and state anyway"
        elif weights_fit:
            or_else = f". The optimizer's state cannot be used with that; {_weights_alone(checkpoint)}"
        raise InputError(f"{where} is of another run: {'; '.join(changed)}. Give what it was made with{or_else}")
    if changed:
        rprint(f"Resuming with changes: {'; '.join(changed)}")
    own_versions = versions()
    other = [
        f"{name} {checkpoint.versions.get(name)}, now {own}"
        for name, own in own_versions.items()
        if checkpoint.versions.get(name) != own
    ]
    if other:
        rprint(f"The checkpoint was made with {'; '.join(other)}: the last bits may differ")


def restore(
    args: options.Options,
    checkpoint: Checkpoint,
    own_made_of: dict,
    model: nn.Module,
    optimizer: GuardedOptimizer,
    batches_an_epoch: int,
) -> Position:
    """Put weights, optimizer state and random states back; where the data goes on.

    Raises:
        InputError: for arrays that are not this run's by name, shape and dtype, or a position that cannot be.
    """
    where, position = f"checkpoint {checkpoint.folder}", checkpoint.position
    weights = dict(tree_flatten(model.trainable_parameters()))
    state = dict(tree_flatten(optimizer.state))
    remedy = "it is of another model, or of other options"
    safe_reading.check_arrays(checkpoint.weights, weights, f"{where}: weights.safetensors", remedy)
    safe_reading.check_arrays(checkpoint.optimizer, state, f"{where}: optimizer.safetensors", remedy)
    saved = dict(checkpoint.optimizer)
    if args.resume_with_changes:
        saved |= {name: array for name, array in state.items() if name.rpartition(".")[2] in CONSTANTS}
    try:
        mx.eval(checkpoint.weights, saved)
        for random in (position.epoch_random, position.first_evaluation):
            if random is not None:
                set_numpy_random(random)
        set_random(position)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{where}: cannot be resumed from ({error}); use another checkpoint") from error
    model.load_weights(list(checkpoint.weights.items()), strict=False)
    fill(optimizer.state, saved)
    of = [made_of | {"workers": 1} for made_of in (own_made_of, checkpoint.made_of)]  # all draw the whole batch
    same_batches = of[0] == of[1] and args.batch_size == checkpoint.options.get("batch_size")
    if not same_batches:
        return replace(position, drawn=0, epoch_random=numpy_random(), first_evaluation=None)
    if position.drawn >= batches_an_epoch:
        raise InputError(f"{where}: {position.drawn} batches drawn, of {batches_an_epoch} an epoch; use another one")
    return position


def _fit(arrays, tree):
    own = dict(tree_flatten(tree))
    return arrays.keys() == own.keys() and all(
        (array.shape, array.dtype) == (own[name].shape, own[name].dtype) for name, array in arrays.items()
    )


def _weights_alone(checkpoint):
    """In words, how another run begins with what this one has learned; a run that was stopped has saved no adapter."""
    folder = checkpoint.folder.absolute().parents[1]
    begin = "the weights alone can, by a new run: --resume-adapter-file"
    end = ", without --resume, and with a new --adapter-path"
    saved = [path for path in (folder / ADAPTERS, folder / BEST / ADAPTERS) if path.is_file()]
    if saved:
        return f"{begin} {saved[0]}{end}"
    if not checkpoint.position.step:
        return "no weight is trained yet: start without --resume"
    first = f"end this run first, as it was made, with --resume --iters {checkpoint.position.step}"
    return f"{begin} {folder / ADAPTERS}{end}. To have that file, {first}"


def _other_added_tokens(args, saved):
    """In words, with the remedy, or None: other tables, tokens and settings of the model all come of them."""
    then, now = saved.get("added_tokens") or [], getattr(args, "added_tokens", None) or []
    if then == now:
        return None
    if not then:
        return "that added no tokens: leave out --add-tokens"
    return f"that added {'other ' if now else ''}tokens: give its file, --add-tokens FILE"


def _changed_options(args, saved):
    own = as_json(vars(args))
    saved = as_json(options.defaults()) | BEFORE | saved  # of a release that had fewer
    for each in (own, saved):
        each["table_row_floor"] = each.get("table_row_floor") or 0.0  # null is none
    in_parser = {action.dest for action in options.build_parser()._actions}
    for name in sorted((own.keys() | saved.keys()) - FREE):
        if own.get(name) != saved.get(name):
            shown = options.flag(name) if name in in_parser else name
            yield f"{shown} was {_short(saved.get(name))} and is now {_short(own.get(name))}"
    if _iters_matter(args, saved.get("iters")):
        yield (
            f"--iters was {_short(saved['iters'])} and is now {args.iters}, which moves the peak of lr_schedule and "
            "with it the tables' learning rate (give a table_lr_schedule)"
        )


def _iters_matter(args, iters):
    """Only where --table-learning-rate is the peak of the body's schedule within the run: see build_optimizer."""
    if not (args.lr_schedule and args.token_tables and not args.table_lr_schedule) or iters == args.iters:
        return False
    if type(iters) is not int or not 0 < iters <= MOST_ITERS:
        return True
    schedule = body_learning_rate(args)
    return peak(schedule, updates(args, iters)) != peak(schedule, updates(args))


def _changed_contents(own, saved):
    words = {
        "data": "--data: its rows are not those of the checkpoint",
        "tokens": "--model: its tokenizer or chat template makes other tokens of the rows than at the checkpoint",
        "model": "--model: its weights are not those of the checkpoint",
        "architecture": f"--model: config.json: {_changed_settings(own['architecture'], saved.get('architecture'))}",
        "workers": f"{own['workers']} workers, but {_short(saved.get('workers'))} before",
    }
    changed = [name for name in own if saved.get(name) != own[name]]
    if "data" in changed and "tokens" in changed:
        changed.remove("tokens")  # other rows have other tokens
    return [words[name] for name in changed]


def _changed_settings(own, saved):
    saved = saved if isinstance(saved, dict) else {}
    names = [name for name in sorted(own.keys() | saved.keys()) if own.get(name) != saved.get(name)]
    return ", ".join(f"{name} was {_short(saved.get(name))} and is now {_short(own.get(name))}" for name in names)


def _short(value):
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."
