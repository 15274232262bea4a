"""The options of ``ember-mlx train``: those of the installed ``mlx_lm.lora``, as they are, and our own."""

import argparse
import copy
import difflib
import math
import types
from pathlib import Path

from mlx_lm import lora
from mlx_lm.cli_ui import rprint
from mlx_lm.utils import _parse_size

from ember_mlx.optimizers.guarded import check_clip_grad_norm
from ember_mlx.shared.ember_options import check_row_limit
from ember_mlx.shared.errors import InputError, with_one_line_errors
from ember_mlx.shared.float_formats import LARGEST, SMALLEST_NORMAL

# Beside mlx_lm.lora.CONFIG_DEFAULTS, which holds the defaults of every other option.
OWN_DEFAULTS = {
    "train_tables": "auto",
    "table_optimizer": "ember",
    "table_learning_rate": 1e-4,
    "table_lr_schedule": None,
    "table_weight_decay": 0.0,
    "table_beta2": None,
    "table_beta2_decay": None,
    "table_row_clip": None,
    "table_row_floor": None,
    "table_rounding": None,
    "dequantize_tables": False,
    "add_tokens": None,
    "chunked_loss": False,
    "overwrite": False,
    "resume": None,
    "resume_with_changes": False,
    "keep_checkpoints": 3,
    "on_nonfinite": "stop",
    "clip_grad_norm": None,
    "bias_correction": False,
    "memory_limit": None,
    "log_jsonl": None,
}
AT_LEAST = {
    "batch_size": 1,
    "iters": 1,
    "steps_per_report": 1,
    "steps_per_eval": 1,
    "save_every": 1,
    "keep_checkpoints": 0,
    "grad_accumulation_steps": 1,
    "max_seq_length": 2,
    "learning_rate": 0,
    "table_learning_rate": 0,
    "table_weight_decay": 0,
}


def build_parser() -> argparse.ArgumentParser:
    """mlx_lm.lora's parser and a group of our own. Every default is None, so that a YAML file can tell "not given"."""
    parser = lora.build_parser()
    parser.prog = "ember-mlx train"
    parser.description = "Fine-tune with mlx-lm (LoRA, DoRA or full) and train the token tables too, with Ember."
    group = parser.add_argument_group("token tables")
    group.add_argument(
        "--train-tables",
        choices=["auto", "embedding", "head", "none"],
        help="Which token tables to train. Default: auto, all there are.",
    )
    group.add_argument(
        "--table-optimizer",
        choices=["ember", "adamw", "adafactor", "sgd"],
        help="Optimizer for the tables. Default: ember; the others are for comparison.",
    )
    group.add_argument(
        "--table-learning-rate",
        type=float,
        help=f"Learning rate of the tables. Default: {OWN_DEFAULTS['table_learning_rate']}. If the YAML file has an "
        "lr_schedule, the tables follow it with this as its peak, unless it has a table_lr_schedule too.",
    )
    group.add_argument("--table-weight-decay", type=float, help="Decoupled weight decay of the tables. Default: 0.")
    group.add_argument("--table-beta2", type=float, help="Decay of the second moment, ember and adamw. Default: 0.999.")
    group.add_argument(
        "--table-beta2-decay",
        type=float,
        metavar="DECAY",
        help="Let beta2 grow as 1 - step^-DECAY, as Adafactor's does with 0.8, up to --table-beta2. ember only.",
    )
    group.add_argument(
        "--table-row-clip",
        type=float,
        metavar="CLIP",
        help="Let no row of a table step by more than so many learning rates (root mean square): a token seen late "
        "would step by up to 31. ember only. Default: no limit.",
    )
    group.add_argument(
        "--table-row-floor",
        type=float,
        metavar="FLOOR",
        help="Let rows whose gradients are smaller than so many times those of their whole table (root mean squares) "
        "step in proportion to them: tokens that the data does not have are then forgotten less. Wants a higher "
        "--table-learning-rate. ember only. Default: whole steps for all.",
    )
    group.add_argument(
        "--table-rounding",
        choices=["nearest", "stochastic"],
        help="How 16-bit tables are rounded after a step. Stochastic, the default, keeps steps on average that are too "
        "small for them, by chances that follow --seed; nearest takes less memory where the tables' step is the peak. "
        "ember only.",
    )
    group.add_argument(
        "--dequantize-tables",
        action="store_true",
        help="For a quantized model: train its tables in the dtype that they dequantize to.",
    )
    group.add_argument(
        "--add-tokens",
        metavar="FILE",
        type=str,
        help="Add the tokens in this file to tokenizer and tables: one a line, or a .json list of special ones. They "
        "start at the mean of what they were split into.",
    )
    group.add_argument(
        "--chunked-loss",
        action="store_true",
        help="The same loss without ever holding all logits: far less memory with long sequences and batches.",
    )
    group.add_argument(
        "--overwrite", action="store_true", help="Replace the run that --adapter-path holds. Default: refuse."
    )
    group = parser.add_argument_group("non-finite numbers")
    group.add_argument(
        "--on-nonfinite",
        choices=["stop", "skip"],
        help="When the loss or a gradient holds a NaN or an infinity, which never reaches the weights: end the run, or "
        "leave the step out and count it. Default: stop.",
    )
    group.add_argument(
        "--clip-grad-norm",
        type=float,
        help="Scale the gradients of all that trains together to at most this norm. Default: do not.",
    )
    group.add_argument(
        "--bias-correction",
        action="store_true",
        help="Correct the bias of adam and adamw on the body, as PyTorch does: the first steps are 3 to 6.5 times "
        "shorter. Default: off, as mlx_lm.lora has it.",
    )
    group.add_argument(
        "--memory-limit",
        type=_parse_size,
        metavar="SIZE",
        help="End the run when MLX needs more memory than this, such as 12GB. Default: no limit.",
    )
    group = parser.add_argument_group("checkpoints")
    group.add_argument(
        "--resume",
        nargs="?",
        const=True,
        type=str,
        metavar="FOLDER",
        help="Go on from a checkpoint as if the run had never stopped: the newest good one in --adapter-path, or this "
        "one, or the newest good one in this adapter folder. Give the options of that run again; --iters may be more. "
        "(--resume-adapter-file is another thing: a new run that begins with the weights of an old one.)",
    )
    group.add_argument(
        "--resume-with-changes",
        action="store_true",
        help="Go on although options, data or model are not those of the checkpoint. Default: refuse, and name them.",
    )
    group.add_argument(
        "--keep-checkpoints",
        type=int,
        metavar="N",
        help=f"Keep the newest N checkpoints; 0 writes none. Default: {OWN_DEFAULTS['keep_checkpoints']}. One is "
        "written every --save-every steps, at the end, and when Ctrl-C, SIGTERM or SIGHUP (a closed terminal) stops "
        "the run.",
    )
    group = parser.add_argument_group("log")
    group.add_argument(
        "--log-jsonl",
        metavar="FILE",
        type=str,
        help="Write losses, learning rates, speed, peak memory and how far the weights move, a line of JSON for each "
        "report; `ember-mlx plot FILE` draws it. With --resume it is appended to. Default: none.",
    )
    for action in parser._actions:
        if action.type is _parse_size:
            action.type = _size
    # mlx-lm gives some flags a default here, which hides what a YAML file says of them.
    parser.set_defaults(**dict.fromkeys(defaults()))
    return with_one_line_errors(parser)


def parse(arguments: list[str]) -> types.SimpleNamespace:
    """Options from the command line, then from the YAML file of ``--config``, then the defaults.

    Raises:
        InputError: for a value that cannot be, naming the option.
    """
    parser = build_parser()
    options = vars(parser.parse_args(arguments))
    if options["config"]:
        for key, value in _read_yaml(options["config"], parser).items():
            if options.get(key) is None:
                options[key] = value
    # `train` is the command's name; but as with mlx_lm.lora, --test without --train tests an adapter alone.
    if options["train"] is None:
        options["train"] = not options["test"]
    for key, value in defaults().items():
        if options.get(key) is None:
            options[key] = copy.deepcopy(value)
    args = types.SimpleNamespace(**options)
    check(args)
    return args


def check(args):
    """Refuse values out of range before anything is loaded."""
    for name, least in AT_LEAST.items():
        value = getattr(args, name)
        if not least <= value <= LARGEST:
            raise InputError(f"{flag(name)} {value}: must be a number of at least {least}, finite in float32")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed {args.seed}: must be at least 0 and below 2^32")
    if args.train and args.grad_accumulation_steps > args.iters:
        raise InputError(
            f"--grad-accumulation-steps {args.grad_accumulation_steps}: is more than --iters {args.iters}, so nothing "
            "would be learned; use at most that"
        )
    for name in ("val_batches", "test_batches"):
        if getattr(args, name) < 1 and getattr(args, name) != -1:
            raise InputError(f"{flag(name)} {getattr(args, name)}: must be at least 1, or -1 for all of the set")
    if args.table_beta2 is not None:
        if args.table_optimizer not in ("ember", "adamw"):
            raise InputError(f"--table-beta2: {args.table_optimizer} has no beta2; leave it out")
        if not 0 <= args.table_beta2 < 1:
            raise InputError(f"--table-beta2 {args.table_beta2}: must be at least 0 and below 1; the default is 0.999")
    _check_ember_options(args)
    check_clip_grad_norm(f"--clip-grad-norm {args.clip_grad_norm}", args.clip_grad_norm)
    if args.log_jsonl == "":
        raise InputError("--log-jsonl '': give the name of a file")
    if args.resume == "":
        raise InputError("--resume '': give the folder of a checkpoint, or nothing for the newest in --adapter-path")
    for name in ("lora_parameters", "optimizer_config"):
        if not isinstance(getattr(args, name), dict):
            raise InputError(f"{name} {getattr(args, name)}: must hold `name: value` lines, as mlx_lm.lora takes them")
    if args.fine_tune_type != "full":
        check_lora_parameters(args.lora_parameters)


def _check_ember_options(args):
    for name in ("table_beta2_decay", "table_row_clip", "table_row_floor", "table_rounding"):
        if args.table_optimizer != "ember" and getattr(args, name) not in (None, "nearest"):  # as all others round
            raise InputError(f"{flag(name)}: is for ember alone, not for {args.table_optimizer}; leave it out")
    decay = args.table_beta2_decay
    if decay is not None and not SMALLEST_NORMAL <= decay < math.inf:
        raise InputError(f"--table-beta2-decay {decay}: must be a positive number, usually 0.8")
    for name in ("row_clip", "row_floor"):
        check_row_limit(name, getattr(args, f"table_{name}"), flag=flag(f"table_{name}"))


def check_lora_parameters(parameters: dict):
    """Refuse a rank, scale, dropout or keys that cannot be."""
    ranges = {
        "rank": (1, 2**31, "a whole number of at least 1 and below 2^31"),
        "scale": (-math.inf, math.inf, "a number"),
        "dropout": (0, 1, "at least 0 and below 1"),
    }
    for name, (least, below, in_words) in ranges.items():
        value = parameters.get(name, least)  # what is missing, mlx-lm names
        if not isinstance(value, int if name == "rank" else int | float) or not least <= value < below:
            raise InputError(f"lora_parameters: {name}: {value} must be {in_words}")
    keys = parameters.get("keys")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        raise InputError(f"lora_parameters: keys: {keys} must be a list of modules, such as [self_attn.q_proj]")


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


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def defaults() -> dict:
    """The defaults of all options: mlx_lm.lora's, and our own."""
    # The default of 16 layers is more than many models have: what None means is settled once the model is known.
    return lora.CONFIG_DEFAULTS | OWN_DEFAULTS | {"num_layers": None}


def _read_yaml(path, parser):
    if not Path(path).is_file():
        raise InputError(f"--config {path}: there is no such file")
    try:
        config = lora.yaml.load(Path(path).read_text(encoding="utf-8"), lora.yaml_loader)
    except (lora.yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise InputError(f"--config {path}: must hold `option: value` lines, as mlx_lm.lora takes them")
    actions = {action.dest: action for action in parser._actions}
    for key, value in config.items():
        near = difflib.get_close_matches(str(key), defaults(), n=1, cutoff=0.8)
        if near and near != [key]:
            rprint(f"Warning: --config {path}: {key} is not an option; did you mean {near[0]}?")
        if key in actions and value is not None:
            config[key] = _typed(f"--config {path}: {key}: {value}", value, actions[key])
    return config


def _typed(where, value, action):
    """The value as the command line would have read it."""
    if action.nargs == "?" and isinstance(value, bool):
        return action.const if value else None
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(f"{where} must be true or false")
        return value
    if action.choices:
        if str(value).lower() not in action.choices:
            raise InputError(f"{where} must be one of {', '.join(action.choices)}")
        return str(value).lower()
    if action.type is str and not isinstance(value, str):
        raise InputError(f"{where} must be text")
    try:
        typed = action.type(str(value) if action.type is _size else value)
    except (argparse.ArgumentTypeError, TypeError, ValueError):
        typed = None
    changed = action.type is int and typed != value
    if typed is None or changed or isinstance(value, bool):
        kind = {int: "a whole number", float: "a number"}.get(action.type, "a size such as 2GB")
        raise InputError(f"{where} must be {kind}")
    return typed


def _size(text):
    try:
        return _parse_size(text)
    except (ArithmeticError, KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} must be a size such as 500MB or 2GB") from None
