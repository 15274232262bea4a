"""The optimizer of a run: mlx-lm's choice for the body, ours for the token tables."""

import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.tuner.utils import build_schedule

from ember_mlx.optimizers import Ember
from ember_mlx.optimizers.guarded import GuardedOptimizer
from ember_mlx.optimizers.in_float32 import in_float32, in_place
from ember_mlx.optimizers.paired import PairedOptimizer
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.float_formats import LARGEST, SMALLEST_NORMAL


def build_optimizer(model: nn.Module, args, tables) -> GuardedOptimizer:
    """A PairedOptimizer, or the body's optimizer alone when no table trains; either lets no NaN through.

    ``args.table_rounding`` then says how the tables are rounded, for the records of the run.
    """
    args.table_rounding = rounding_of_tables(args, [table.dtype for table in tables])
    # Without tables the run is stock mlx-lm's, to the bit: see in_float32.
    body = in_float32(body_optimizer(args), but=None if tables else mx.bfloat16)
    guard = {"skip_nonfinite": True, "clip_grad_norm": args.clip_grad_norm}
    if tables:
        return PairedOptimizer(model, tables=table_optimizer(args), rest=body, **guard)
    return GuardedOptimizer(model.trainable_parameters(), body, **guard)


def body_optimizer(args) -> optim.Optimizer:
    """The class that ``--optimizer`` names, with ``optimizer_config``'s settings: that of stock mlx-lm, to the bit.

    ``--bias-correction`` sets that of Adam and AdamW, unless ``optimizer_config`` does.
    """
    name = args.optimizer.lower()
    optimizer_class = {key.lower(): value for key, value in vars(optim).items()}[name]
    defaults = {}
    if args.bias_correction:
        if name not in ("adam", "adamw"):
            raise InputError(f"--bias-correction: is for adam and adamw, not for {name}; leave it out")
        defaults["bias_correction"] = True
    asked = args.optimizer_config.get(name) or {}
    learning_rate = body_learning_rate(args)
    try:
        _refuse_numbers(f"optimizer_config: {name}: ", asked)
        return in_place(optimizer_class(learning_rate=learning_rate, **defaults | asked))
    except (TypeError, ValueError) as error:
        raise InputError(f"optimizer_config: {name}: {asked}: {error}") from error


def rounding_of_tables(args, dtypes: list[mx.Dtype]) -> str:
    """What ``--table-rounding`` asks for; by default 16-bit tables are rounded stochastically where Ember trains them.

    To nearest they lose a part of what training them brings, up to half (examples/benchmarks/quality).
    """
    stochastic = args.table_optimizer == "ember" and any(dtype != mx.float32 for dtype in dtypes)
    return args.table_rounding or ("stochastic" if stochastic else "nearest")


def table_optimizer(args) -> optim.Optimizer:
    """Ember, or another for comparison; in every case at ``--table-learning-rate`` and with no scaling of its own."""
    learning_rate = table_learning_rate(args)
    decay = args.table_weight_decay
    beta2 = 0.999 if args.table_beta2 is None else args.table_beta2
    if args.table_optimizer == "ember":
        beta2 = beta2 if args.table_beta2_decay is None else growing_beta2(args.table_beta2_decay, args.table_beta2)
        how = {"row_clip": args.table_row_clip, "row_floor": args.table_row_floor}
        return Ember(learning_rate, beta2, weight_decay=decay, **how, rounding=args.table_rounding, seed=args.seed)
    if args.table_optimizer == "adamw":
        adamw = optim.AdamW(learning_rate, betas=[0.9, beta2], weight_decay=decay, bias_correction=True)
        return in_float32(in_place(adamw))
    if args.table_optimizer == "adafactor":
        adafactor = optim.Adafactor(learning_rate, weight_decay=decay, relative_step=False, scale_parameter=False)
        return in_float32(adafactor)
    return in_float32(optim.SGD(learning_rate, weight_decay=decay))


def _refuse_numbers(where, options):
    """Numbers that float32, in which they are used, does not have; an eps of 0 divides by 0."""
    for name, value in options.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(number, int | float) or isinstance(number, bool):
                continue
            if not abs(number) <= LARGEST or (name == "eps" and number < SMALLEST_NORMAL):
                least = f"at least {SMALLEST_NORMAL:.3g}, usually 1e-8" if name == "eps" else "finite in float32"
                raise InputError(f"{where}{name}: {value} must be {least}")


def growing_beta2(decay: float, most: float | None):
    """A schedule of beta2, 1 - t^-decay at step t from 1, as Adafactor's with 0.8 (arXiv 1804.04235, section 7.2)."""
    most = 1 - 2.0**-24 if most is None else most  # the largest float32 below 1
    return lambda steps_done: mx.minimum(1 - (steps_done + 1).astype(mx.float32) ** -decay, most)


def body_learning_rate(args):
    """A number, or the schedule that the YAML key lr_schedule describes."""
    return _schedule("lr_schedule", args.lr_schedule, updates(args)) if args.lr_schedule else args.learning_rate


def table_learning_rate(args):
    """A number, the schedule of table_lr_schedule, or the body's scaled so that it peaks at --table-learning-rate."""
    if args.table_lr_schedule:
        return _schedule("table_lr_schedule", args.table_lr_schedule, updates(args))
    body = body_learning_rate(args)
    if not callable(body):
        return args.table_learning_rate
    scale = args.table_learning_rate / peak(body, updates(args))
    return lambda step: scale * body(step)


def updates(args) -> int:
    """How often the run updates the weights, which is what schedules count."""
    return max(args.iters // args.grad_accumulation_steps, 1)


def peak(schedule, updates: int) -> float:
    """The highest learning rate of a schedule within so many updates."""
    return mx.max(schedule(mx.arange(updates))).item()


def _schedule(key, description, iters):
    try:
        schedule = build_schedule(description)
        rates = schedule(mx.arange(iters))
        if not mx.all((rates >= 0) & (rates < math.inf)).item() or not rates.max().item() > 0:
            raise ValueError("its learning rates are not all finite and at least 0, or never above 0")
        return schedule
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{key} {description}: {type(error).__name__} {error}; it takes the name of a schedule of mlx.optimizers "
            "and its arguments, as mlx_lm.lora does"
        ) from error
