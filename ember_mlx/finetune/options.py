"""The options of ``ember-mlx train``: those of the installed ``mlx_lm.lora``, and our own."""

import argparse
import copy
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from mlx_lm.cli_ui import rprint

from ember_mlx.finetune import run_length
from ember_mlx.finetune.as_given import as_given, naming_as_given
from ember_mlx.finetune.choices import BITS
from ember_mlx.finetune.memory_limit import NO_LIMIT, cache_kept
from ember_mlx.finetune.mlx_lm_internals import CONFIG_DEFAULTS, build_lora_parser, is_size
from ember_mlx.finetune.optimizer_names import ALIASES, BODY, TABLE_RATE, decided_defaults, named
from ember_mlx.finetune.option_checks import check
from ember_mlx.finetune.option_help import EPILOG, HELP, USAGE
from ember_mlx.finetune.without_effect import refuse_idle
from ember_mlx.finetune.yaml_reading import read_yaml
from ember_mlx.finetune.yaml_sections import passed_over
from ember_mlx.shared.command_line import actions_of, describe, flag, in_any_case, is_of_another, size_or_zero
from ember_mlx.shared.errors import InputError, did_you_mean
from ember_mlx.shared.units import A_SIZE, parse_size

__all__ = [
    "Options",
    "build_parser",
    "command_to_resume",
    "complete",
    "defaults",
    "flag",
    "parse",
    "parse_command",
    "parse_given",
    "typed",
]

SWITCH = {"action": "store_true"}


class _OnOrOff(argparse.BooleanOptionalAction):
    """Refuses ``--x --no-x``, of which argparse takes the last."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        super().__call__(parser, namespace, values, option_string)
        if before not in (None, getattr(namespace, self.dest)):
            on, off = self.option_strings
            raise InputError(f"{on} {off}: contradict each other; leave one of the two out")


ON_OR_OFF = {"action": _OnOrOff}
NUMBER_OR_ZERO = "a number; 0 turns it off"


def _limit(text):
    try:
        return NO_LIMIT if text.lower() == NO_LIMIT else parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, or {NO_LIMIT}") from None


def _number_or_zero(text):
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be {NUMBER_OR_ZERO}") from None


# Our own options: each with its default, and what argparse is told. option_help.py has the texts.
OWN_OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "train_tables": ("auto", {"choices": ["auto", "embedding", "head", "none"]}),
    "table_optimizer": ("ember", {"choices": ["ember", "adamw", "adafactor", "sgd", "sage"]}),
    "table_learning_rate": (TABLE_RATE, {"type": float}),
    "table_weight_decay": (0.0, {"type": float}),
    "table_beta2": (None, {"type": float}),
    "table_beta2_decay": (None, {"type": float}),
    "table_row_clip": (None, {"type": float}),
    "table_row_floor": (None, {"type": _number_or_zero}),
    "table_rounding": (None, {"choices": ["nearest", "stochastic"]}),
    "body_rounding": (None, {"choices": ["nearest", "stochastic"]}),
    "quantize": (None, {"type": int, "choices": BITS}),
    "dequantize_tables": (False, SWITCH),
    "add_tokens": (None, {"type": str}),
    "prompt_feature": ("prompt", {"type": str}),
    "completion_feature": ("completion", {"type": str}),
    "chat_feature": ("messages", {"type": str}),
    "text_feature": ("text", {"type": str}),
    "valid_fraction": (None, {"type": float}),
    "epochs": (None, {"type": float}),
    "warmup": (None, {"type": float}),
    "sample_prompts": (None, {"type": str}),
    "sample_tokens": (64, {"type": int}),
    "packing": (False, SWITCH),
    "auto_savings": (True, ON_OR_OFF),
    "chunked_loss": (False, ON_OR_OFF),
    "stream": (None, ON_OR_OFF),
    "keep_inputs": (None, {"type": int}),
    "shard_optimizer": (False, SWITCH),
    "overwrite": (False, SWITCH),
    "resume": (None, {"type": str, "nargs": "?", "const": True}),
    "resume_with_changes": (False, SWITCH),
    "keep_checkpoints": (None, {"type": int}),
    "keep_best": (None, ON_OR_OFF),
    "patience": (None, {"type": int}),
    "on_nonfinite": ("stop", {"choices": ["stop", "skip"]}),
    "clip_grad_norm": (None, {"type": float}),
    "clip_layer_norm": (None, {"type": float}),
    "bias_correction": (False, SWITCH),
    "memory_limit": (None, {"type": _limit}),
    "peer_timeout": (300, {"type": int}),
    "log_jsonl": (None, {"type": str}),
    "shard_tables": (False, SWITCH),
}
HOW_LONG = {"iters": "epochs", "epochs": "iters"}  # each with the other
YAML_ONLY = {"table_lr_schedule": None}  # beside mlx-lm's: lora_parameters, lr_schedule, optimizer_config, ...
RENAMED = {"lora_layers": "num_layers", "wandb": "report_to"}  # keys of older files for mlx-lm


class Options(types.SimpleNamespace):
    """The options of one run, as attributes. They are decided once: nothing can be assigned.

    ``options | {"iters": 5}`` makes others, and ``vars(options)`` is the dictionary that mlx-lm and JSON take.

    ``given`` is no option: where each one that was given is, as :func:`ember_mlx.finetune.as_given.as_given` has it.
    """

    __slots__ = ("given",)

    def __init__(self, given: Mapping[str, str] | None = None, /, **options: Any):
        super().__init__(**options)
        object.__setattr__(self, "given", given or {})

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"options are never written to: make others, as options | {{{name!r}: ...}}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"options are never written to: {name!r} stays")

    def __or__(self, changes: Mapping[str, Any]) -> "Options":
        return Options(self.given, **(vars(self) | changes))


def build_parser(prog: str = "ember-mlx train", **how: Any) -> argparse.ArgumentParser:
    """mlx_lm.lora's parser with our options, texts and groups. Every default is None: then YAML can tell "not given".

    Args:
        prog: The command that takes these options.
        how: Whatever else differs from ``train``: usage, description, epilog.
    """
    parser = build_lora_parser()
    parser.prog = prog
    parser.usage = how.get("usage", USAGE)
    parser.description = how.get(
        "description", "Fine-tune with mlx-lm (LoRA, DoRA or full) and train the token tables too, with Ember."
    )
    parser.epilog = how.get("epilog", EPILOG)
    actions = {action.dest: action for action in actions_of(parser)}
    actions["optimizer"].choices = [*actions["optimizer"].choices, *BODY, *ALIASES]
    for name, (_, settings) in OWN_OPTIONS.items():
        actions[name] = parser.add_argument(flag(name), **settings)
    values = defaults()
    describe(parser, HELP, values)
    for action in actions_of(parser):
        if is_size(action):
            action.type = size_or_zero
    # mlx-lm gives some flags a default here, which hides what a YAML file says of them.
    parser.set_defaults(**dict.fromkeys(values))
    return parser


def parse(arguments: list[str], *, data_required: bool = False) -> Options:
    """Options from the command line, then from the YAML file of ``--config``, then the defaults.

    Args:
        arguments: The words of a command line.
        data_required: Refuse mlx-lm's default of ``--data``, a download that nobody asked for.

    Raises:
        InputError: for a value that cannot be, naming the option.
    """
    return parse_given(arguments, data_required=data_required)[0]


def parse_given(arguments: list[str], *, data_required: bool = False) -> tuple[Options, frozenset[str]]:
    """The same as :func:`parse`, and the names of the options that the flags or the YAML file give."""
    parser = build_parser()
    return complete(parser, vars(parser.parse_args(arguments)), data_required, warn=rprint)


def parse_command(
    parser: argparse.ArgumentParser, arguments: list[str], *, data_required: bool = False
) -> tuple[argparse.Namespace, Options]:
    """The options of a command that takes those of ``train`` and some of its own: its own, and those of ``train``.

    Its own have ``given`` too: the names of all options that the flags or the YAML file give. Warnings go to stderr:
    what such a command prints may be read by a program.

    Args:
        parser: That of :func:`build_parser`, to which the command has added its own.
        arguments, data_required: As for :func:`parse`.

    Raises:
        InputError: as :func:`parse` does.
    """
    made, given = complete(parser, vars(parser.parse_args(arguments)), data_required, _warn_aside)
    options = vars(made)
    own = {action.dest for action in actions_of(parser)} - {action.dest for action in actions_of(build_parser())}
    return (
        argparse.Namespace(given=given, **{name: options[name] for name in own}),
        Options(made.given, **{name: value for name, value in options.items() if name not in own}),
    )


def complete(
    parser: argparse.ArgumentParser,
    options: dict[str, Any],
    data_required: bool,
    warn: Callable[[str], None],
) -> tuple[Options, frozenset[str]]:
    """The checked options of what was given by name, with None for what was not: then ``config``, then the defaults.

    Args:
        parser: That of :func:`build_parser`.
        options: By name.
        data_required: As for :func:`parse`.
        warn: Is told a line of each option that has no effect and is not refused, or that another one replaces.

    Returns:
        The options, and the names of those that were given, in ``config`` too.

    Raises:
        InputError: as :func:`parse` does.
    """
    flags = frozenset(name for name, value in options.items() if value is not None)
    if options["config"]:
        where = f"--config {options['config']}"
        config = _read_config(options["config"], parser, warn)
        for name, other in HOW_LONG.items():
            if name in flags and config.get(other) is not None:
                warn(f"{flag(name)} {options[name]:g} replaces {other} {config.pop(other):g} of {where}")
        for key, value in config.items():
            if options.get(key) is None:
                options[key] = value
    given = {
        name: "" if name in flags else f"--config {options['config']}: "
        for name, value in options.items()
        if value is not None
    }
    with naming_as_given(given):
        return _completed(options, given, data_required, lambda line: warn(as_given(line, given))), frozenset(given)


def _completed(options, given, data_required, warn):
    if data_required and options["data"] is None and not options.get("hf_dataset"):
        raise InputError(
            f"--data is required: a folder with train.jsonl, or a file. (mlx-lm's default, {CONFIG_DEFAULTS['data']}, "
            "must be given by name, and needs: pip install 'mlx-lm[train]')"
        )
    if options["iters"] is not None and options["epochs"] is not None:
        first, second = (name if given[name] else flag(name) for name in HOW_LONG)  # both are in one place
        both = f"{first} {options['iters']} and {second} {options['epochs']:g}"
        raise InputError(f"{both}: each says how long to train; give one of them")
    # `train` is the command's name; but as with mlx_lm.lora, --test without --train tests an adapter alone.
    if options["train"] is None:
        options["train"] = not options["test"]
    for key, value in (defaults() | decided_defaults(options)).items():
        if options.get(key) is None:
            options[key] = copy.deepcopy(value)
    options["optimizer_config"] = named(options["optimizer_config"], CONFIG_DEFAULTS["optimizer_config"])
    for key in run_length.SCHEDULES:
        options[key] = run_length.named(options[key])
    args = Options(given, **options)
    check(args)
    for line in passed_over(args):
        warn(line)
    refuse_idle(args, _own_defaults(), warn)
    return run_length.settled(args)


def command_to_resume(arguments: list[str], resume_words: list[str]) -> list[str]:
    """The same arguments, but for what they said of resuming."""
    kept, skip = [], False
    for word in arguments:
        if skip and not word.startswith("-"):
            skip = False
            continue
        skip = word == "--resume"
        if not skip and word not in ("--overwrite", "--resume-with-changes") and not word.startswith("--resume="):
            kept.append(word)
    return [*kept, *resume_words]


def defaults() -> dict[str, Any]:
    """The defaults of all options: mlx_lm.lora's, and our own."""
    # The default of 16 layers is more than many models have: what None means is settled once the model is known.
    return CONFIG_DEFAULTS | _own_defaults() | {"num_layers": None, "clear_cache_threshold": cache_kept()}


def _warn_aside(line):
    print(line, file=sys.stderr)


def _own_defaults():
    return {name: default for name, (default, _) in OWN_OPTIONS.items()} | YAML_ONLY


def _read_config(path, parser, warn):
    where = f"--config {path}"
    config = read_yaml(Path(path), where)
    actions = {action.dest: action for action in actions_of(parser)}
    known = (actions.keys() | defaults() | {"hf_dataset"}) - {"help", "config"}
    for key, value in config.items():
        if key not in known:
            now = f"; mlx-lm has {RENAMED[key]} now" if key in RENAMED else did_you_mean(key, known)
            warn(f"Warning: {where}: {key!r}: no effect: it is no option here{now}")
        if key in actions and value is not None:
            shown = repr(value) if isinstance(value, str) else value  # quotes and commas may be the fault
            config[key] = typed(f"{where}: {key}: {shown}", value, actions[key])
    return config


def typed(where: str, value: Any, action: argparse.Action) -> Any:
    """The value as the command line would have read it.

    Raises:
        InputError: for one that it would refuse; ``where`` names it.
    """
    if action.nargs == "?" and isinstance(value, bool):
        return action.const if value else None
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(f"{where} must be true or false{', without quotes' if isinstance(value, str) else ''}")
        return value
    if action.choices:
        found = in_any_case(action.choices)(str(value))
        if found not in action.choices:
            words = [str(choice) for choice in action.choices]
            hint = did_you_mean(str(value), words) + is_of_another(str(value), actions_of(build_parser()))
            raise InputError(f"{where} must be one of {', '.join(words)}{hint}")
        return found
    if action.type is str and not isinstance(value, str):
        raise InputError(f"{where} must be text")
    try:
        read = action.type(str(value) if action.type in (size_or_zero, _limit) else value)
    except (argparse.ArgumentTypeError, OverflowError, TypeError, ValueError):  # int(inf) overflows
        read = None
    changed = action.type is int and not isinstance(value, str) and read != value
    if read is None or changed or isinstance(value, bool):
        kinds = {int: "a whole number", float: "a number", _number_or_zero: NUMBER_OR_ZERO}
        kind = kinds.get(action.type, A_SIZE)
        raise InputError(f"{where} must be {kind}")
    return read
