"""The YAML keys that hold names and values of their own: which names they take, and values of which kind.

What an optimizer or a schedule takes is read off its signature, so that mlx-lm's and ours are checked alike. No setting
reaches MLX that it would refuse in words of its own, or in no words.
"""

import inspect
from collections.abc import Iterable
from typing import Any, get_args

import mlx.optimizers as optim
from mlx.optimizers import schedulers

from ember_mlx import optimizers
from ember_mlx.finetune.choices import LORA_KEYS
from ember_mlx.finetune.mlx_lm_internals import CONFIG_DEFAULTS
from ember_mlx.finetune.optimizer_names import ALIASES, CLASSES, canonical
from ember_mlx.finetune.run_length import SCHEDULES
from ember_mlx.optimizers import SplitWeights
from ember_mlx.shared.errors import InputError, did_you_mean
from ember_mlx.shared.float_formats import LARGEST, ROUNDS_TO_INFINITY, ROUNDS_TO_ONE, SMALLEST_NORMAL

__all__ = ["check_lora_parameters", "check_schedule", "check_sections", "make_optimizer"]

OF_A_DATA_SET = (
    *("path", "config", "train_split", "valid_split", "test_split"),
    *("prompt_feature", "completion_feature", "chat_feature", "text_feature", "mask_prompt"),
)
FORGETS = (lambda number: 0 <= number < ROUNDS_TO_ONE, "at least 0 and, in float32, below 1")
RANGES = {  # of the settings of MLX's optimizers, which check hardly any
    **dict.fromkeys(("betas", "beta_1", "momentum", "dampening"), FORGETS),  # at 1 a moment sums up for ever
    "eps": (lambda number: number >= SMALLEST_NORMAL, f"at least {SMALLEST_NORMAL:.3g}, usually 1e-8"),  # a divisor
    "weight_decay": (lambda number: number >= 0, "at least 0"),
    "ns_steps": (lambda number: number >= 1, "at least 1"),
    "clip_threshold": (lambda number: number > 0, "above 0, usually 1"),
    "decay_rate": (lambda number: number < 0, "below 0, usually -0.8"),
}
MOST_STEPS = 2**31 - 1  # MLX counts them in int32
BY_NAME = {
    name: made
    for name, made in vars(schedulers).items()
    if inspect.isfunction(made) and name != "join_schedules"  # which takes schedules
}


def check_sections(options: Any) -> None:
    """Refuse what mlx-lm would leave out in silence, and what would end in an error of MLX's.

    Raises:
        InputError: for a name that is none, and for a value of the wrong kind or out of range.
    """
    for name in ("lora_parameters", "optimizer_config"):
        if not isinstance(getattr(options, name), dict):
            raise InputError(
                f"{name} {getattr(options, name)}: must hold `name: value` lines, as mlx_lm.lora takes them"
            )
    _check_optimizers(options.optimizer_config)
    for key in SCHEDULES:
        if getattr(options, key) not in (None, {}):
            check_schedule(key, getattr(options, key))
    if options.fine_tune_type != "full":
        hint = "; mlx-lm has no alpha: scale is alpha / rank" if "alpha" in options.lora_parameters else ""
        _refuse_unknown("lora_parameters", options.lora_parameters, (*LORA_KEYS, "keys"), hint)
        check_lora_parameters(options.lora_parameters)
    _check_data_sets(getattr(options, "hf_dataset", None))


def check_lora_parameters(parameters: dict[str, Any]) -> None:
    """Refuse a rank, scale, dropout or keys that cannot be."""
    ranges = {
        "rank": (1, 2**31, "a whole number of at least 1 and below 2^31"),
        "scale": (-LARGEST, ROUNDS_TO_INFINITY, "a number, finite in float32"),
        "dropout": (0, 1, "at least 0 and below 1"),
    }
    for name, (least, below, in_words) in ranges.items():
        value = parameters.get(name, least)  # what is missing, choices.py names
        fits = _is_real(value) and (name != "rank" or isinstance(value, int))
        if not fits or not least <= value < below:
            raise InputError(f"lora_parameters: {name}: {value!r} must be {in_words}")
    keys = parameters.get("keys")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise InputError(f"lora_parameters: keys: {keys} must be a list of modules, such as [self_attn.q_proj]")


def make_optimizer(name: str, learning_rate: Any, given: dict[str, Any], asked: dict[str, Any]) -> optim.Optimizer:
    """The optimizer ``name``, as ``given`` and with the settings ``asked`` of ``optimizer_config``, which go before.

    The setting ``weights: bf16+int8`` is of all of ours: those that do not split weights themselves are wrapped.

    Raises:
        InputError: for a setting that it does not take.
    """
    where = f"optimizer_config: {name}"
    made = getattr(optimizers, CLASSES[name]) if name in CLASSES else _of_mlx()[name]
    takes = {key: value for key, value in inspect.signature(made).parameters.items() if key != "model"}
    wrapped = name in CLASSES and "weights" not in takes
    if wrapped:
        takes["weights"] = inspect.signature(optimizers.FlashAdamW).parameters["weights"]
    for key, flag in _of_flags(name).items():
        if key in asked:
            raise InputError(f"{where}: {key}: is given by {flag}; leave it out here")
        del takes[key]
    _refuse_unknown(where, asked, takes)
    for key, value in asked.items():
        _check_setting(f"{where}: {key}", value, takes[key])
    own = given | asked
    split = own.pop("weights", None) if wrapped else None
    try:
        optimizer = made(learning_rate, **own)
        return SplitWeights(optimizer, split) if split else optimizer
    except ValueError as error:
        raise InputError(f"{where}: {asked}: {error}") from error


def check_schedule(key: str, described: Any) -> None:
    """Raises InputError where the YAML key ``key`` describes no schedule that mlx-lm can make."""
    example = "{name: cosine_decay, arguments: [1e-5, 1000]}"
    if not isinstance(described, dict):
        raise InputError(f"{key}: {described!r}: must hold a name and arguments, such as {example}")
    _refuse_unknown(key, described, ("name", "arguments", "warmup", "warmup_init"))
    name = described.get("name")
    if not isinstance(name, str) or name not in BY_NAME:
        near = did_you_mean(str(name), BY_NAME)
        raise InputError(f"{key}: name: {name!r} is no schedule{near}; use one of {', '.join(BY_NAME)}")
    takes = inspect.signature(BY_NAME[name]).parameters
    arguments = described.get("arguments")
    in_words = ", ".join(one if value.default is value.empty else f"{one} (if need be)" for one, value in takes.items())
    least = sum(value.default is value.empty for value in takes.values())
    if not isinstance(arguments, list) or not least <= len(arguments) <= len(takes):
        raise InputError(f"{key}: arguments: {arguments!r}: {name} takes a list of {in_words}")
    for value, (one, parameter) in zip(arguments, takes.items(), strict=False):
        where = f"{key}: arguments: {one} of {name}: {value!r}"
        if not _is_number(value):
            raise InputError(f"{where} must be a number, finite in float32")
        if parameter.annotation is int and not (1 <= value <= MOST_STEPS and value == int(value)):
            raise InputError(f"{where} must be a whole number of at least 1 and below 2^31")
    warmup, start = (described.get(one) or 0 for one in ("warmup", "warmup_init"))
    if not _is_number(warmup) or not (0 <= warmup < 1 or (1 <= warmup <= MOST_STEPS and warmup == int(warmup))):
        raise InputError(f"{key}: warmup: {warmup!r} must be a share below 1, such as 0.03, or a number of updates")
    if not _is_number(start):
        raise InputError(f"{key}: warmup_init: {start!r} must be a number, finite in float32")


def _of_mlx():
    return {key.lower(): value for key, value in vars(optim).items() if inspect.isclass(value)}


def _of_flags(name):
    """What flags alone say of an optimizer, by the names of its settings."""
    if name == "sage":
        return {"learning_rate": "--table-learning-rate", "weight_decay": "--table-weight-decay"}
    return {"learning_rate": "--learning-rate"}


def _check_optimizers(config):
    """A key that names no optimizer would be left out in silence, and so would one of two names of the same."""
    known, asked = (*CONFIG_DEFAULTS["optimizer_config"], *CLASSES, *ALIASES), {}
    for name, settings in config.items():
        if name not in known:
            raise InputError(
                f"optimizer_config: {name}: is the name of no optimizer{did_you_mean(str(name), known)}; it takes "
                f"{', '.join(known)}"
            )
        if settings is not None and not isinstance(settings, dict):
            raise InputError(
                f"optimizer_config: {name}: {settings!r}: must hold settings, such as {{weight_decay: 0.1}}"
            )
        if settings:
            other = asked.setdefault(canonical(name), name)
            if other != name:
                raise InputError(f"optimizer_config: {name}: is another name of {other}, which is there too; keep one")
            make_optimizer(canonical(name), 1e-3, {}, settings)


def _check_setting(where, value, parameter):
    """A value of the kind of the default; where that is None, of the kind that the signature names."""
    default = parameter.default
    if value is None and default is None:
        return
    if isinstance(default, bool):
        fits, kind = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        fits, kind = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    elif isinstance(default, list | tuple):
        fits = isinstance(value, list) and len(value) == len(default) and all(map(_is_real, value))
        kind = f"a list of {len(default)} numbers, such as {list(default)}"
    elif isinstance(default, float) or float in get_args(parameter.annotation):
        fits, kind = _is_real(value), "a number"
    else:
        fits, kind = isinstance(value, str), "text"
    if not fits:
        raise InputError(f"{where}: {value!r} must be {kind}")
    in_range, in_words = RANGES.get(parameter.name, (lambda _: True, ""))
    for number in filter(_is_real, value if isinstance(value, list) else [value]):
        if not _is_number(number) or not in_range(number):
            raise InputError(f"{where}: {value} must be {in_words if _is_number(number) else 'finite in float32'}")


def _check_data_sets(described):
    for one in described if isinstance(described, list) else [described] * (described is not None):
        if not isinstance(one, dict) or not isinstance(one.get("path"), str):
            raise InputError(
                f"hf_dataset: {one!r}: must hold the name of a data set as path, such as {{path: billsum}}"
            )
        _refuse_unknown("hf_dataset", one, OF_A_DATA_SET)


def _refuse_unknown(where: str, found: Iterable[str], known: Iterable[str], hint: str = "") -> None:
    for key in found:
        if key not in known:
            near = did_you_mean(str(key), known)
            raise InputError(f"{where}: {key}: is no setting here{near}; it takes {', '.join(known)}{hint}")


def _is_real(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_number(value):
    """Whether it is a number that float32 has."""
    return _is_real(value) and abs(value) <= LARGEST
