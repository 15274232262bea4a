"""The optimizer of a run: mlx-lm's choice for the body, ours for the token tables."""

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.tuner.utils import build_schedule

from ember_mlx.finetune.choices import Choices
from ember_mlx.finetune.options import Options
from ember_mlx.optimizers import Ember
from ember_mlx.optimizers.guarded import GuardedOptimizer
from ember_mlx.optimizers.paired import PairedOptimizer
from ember_mlx.shared.errors import InputError

__all__ = [
    "Schedule",
    "body_learning_rate",
    "body_optimizer",
    "build_optimizer",
    "growing_beta2",
    "peak",
    "table_learning_rate",
    "table_optimizer",
    "updates",
]

Schedule = Callable[[mx.array], mx.array]
"""From the number of updates that are done, counted from 0, to a learning rate or a beta2."""


def build_optimizer(model: nn.Module, options: Options, choices: Choices) -> GuardedOptimizer:
    """A PairedOptimizer, or the body's optimizer alone when no table trains; either lets no NaN through.

    Args:
        model: Made ready to train by :func:`ember_mlx.finetune.trainable.make_trainable`.
        options: The run's.
        choices: What trains, and how tables are rounded.

    Raises:
        InputError: for settings of an optimizer or a schedule that MLX refuses.
    """
    body = body_optimizer(options)
    guard = {"skip_nonfinite": True, "clip_grad_norm": options.clip_grad_norm}
    if choices.tables:
        return PairedOptimizer(model, tables=table_optimizer(options, choices.table_rounding), rest=body, **guard)
    return GuardedOptimizer(model.trainable_parameters(), body, **guard)


def body_optimizer(options: Options) -> optim.Optimizer:
    """The class that ``--optimizer`` names, with ``optimizer_config``'s settings over these defaults of ours.

    Adam and AdamW correct their bias, as PyTorch's do (MLX's do not unless told to), and Adafactor takes the learning
    rate that it was given (MLX's ignores it unless told not to).
    """
    name = options.optimizer.lower()
    optimizer_class = {key.lower(): value for key, value in vars(optim).items()}[name]
    defaults = {
        "adam": {"bias_correction": True},
        "adamw": {"bias_correction": True},
        "adafactor": {"relative_step": False},
    }
    asked = options.optimizer_config.get(name) or {}
    learning_rate = body_learning_rate(options)
    try:
        return optimizer_class(learning_rate=learning_rate, **defaults.get(name, {}) | asked)
    except (TypeError, ValueError) as error:
        raise InputError(f"optimizer_config: {name}: {asked}: {error}") from error


def table_optimizer(options: Options, rounding: str) -> optim.Optimizer:
    """Ember, or another for comparison; in every case at ``--table-learning-rate`` and with no scaling of its own.

    ``rounding`` is "nearest" or "stochastic", of Ember alone.
    """
    learning_rate = table_learning_rate(options)
    decay = options.table_weight_decay
    beta2 = 0.999 if options.table_beta2 is None else options.table_beta2
    if options.table_optimizer == "ember":
        beta2 = (
            beta2
            if options.table_beta2_decay is None
            else growing_beta2(options.table_beta2_decay, options.table_beta2)
        )
        how = {"row_clip": options.table_row_clip, "row_floor": options.table_row_floor}
        return Ember(learning_rate, beta2, weight_decay=decay, **how, rounding=rounding, seed=options.seed)
    if options.table_optimizer == "adamw":
        return optim.AdamW(learning_rate, betas=[0.9, beta2], weight_decay=decay, bias_correction=True)
    if options.table_optimizer == "adafactor":
        return optim.Adafactor(learning_rate, weight_decay=decay, relative_step=False, scale_parameter=False)
    return optim.SGD(learning_rate, weight_decay=decay)


def growing_beta2(decay: float, most: float | None) -> Schedule:
    """A schedule of beta2, 1 - t^-decay at step t from 1, as Adafactor's with 0.8 (arXiv 1804.04235, section 7.2)."""
    most = 1 - 2.0**-24 if most is None else most  # the largest float32 below 1
    return lambda steps_done: mx.minimum(1 - (steps_done + 1).astype(mx.float32) ** -decay, most)


def body_learning_rate(options: Options) -> float | Schedule:
    """A number, or the schedule that the YAML key lr_schedule describes."""
    return (
        _schedule("lr_schedule", options.lr_schedule, updates(options))
        if options.lr_schedule
        else options.learning_rate
    )


def table_learning_rate(options: Options) -> float | Schedule:
    """A number, the schedule of table_lr_schedule, or the body's scaled so that it peaks at --table-learning-rate."""
    if options.table_lr_schedule:
        return _schedule("table_lr_schedule", options.table_lr_schedule, updates(options))
    body = body_learning_rate(options)
    if not callable(body):
        return options.table_learning_rate
    scale = options.table_learning_rate / peak(body, updates(options))
    return lambda step: scale * body(step)


def updates(options: Options, iters: int | None = None) -> int:
    """How many updates ``iters`` batches make (default: ``--iters``): schedules count updates, not batches."""
    return max((iters or options.iters) // options.grad_accumulation_steps, 1)


def peak(schedule: Schedule, number: int) -> float:
    """The highest learning rate of a schedule within so many updates."""
    return mx.max(schedule(mx.arange(number))).item()


def _schedule(key, description, number):
    try:
        schedule = build_schedule(description)
        rates = schedule(mx.arange(number))
        if not mx.all((rates >= 0) & (rates < math.inf)).item() or not rates.max().item() > 0:
            raise ValueError("its learning rates are not all finite and at least 0, or never above 0")
        return schedule
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{key} {description}: {type(error).__name__} {error}; it takes the name of a schedule of mlx.optimizers "
            "and its arguments, as mlx_lm.lora does"
        ) from error
