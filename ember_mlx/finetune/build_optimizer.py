"""The optimizer of a run: one of mlx-lm's or ours for the body, ours for the token tables."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.cli_ui import rprint
from mlx_lm.tuner.utils import build_schedule

from ember_mlx.finetune.as_given import as_given
from ember_mlx.finetune.choices import Choices
from ember_mlx.finetune.optimizer_names import BODY, canonical, settings
from ember_mlx.finetune.options import Options
from ember_mlx.finetune.run_length import updates, warmup_of
from ember_mlx.finetune.without_effect import CORRECTED
from ember_mlx.finetune.yaml_sections import make_optimizer
from ember_mlx.optimizers import Ember
from ember_mlx.optimizers.guarded import SAFE_RATE, GuardedOptimizer
from ember_mlx.optimizers.in_float32 import in_float32, in_place
from ember_mlx.optimizers.paired import PairedOptimizer
from ember_mlx.optimizers.rounded import StochasticRounding
from ember_mlx.shared.errors import InputError

__all__ = [
    "Schedule",
    "body_learning_rate",
    "body_optimizer",
    "build_optimizer",
    "check_rates",
    "growing_beta2",
    "peak",
    "table_learning_rate",
    "table_optimizer",
]

FROM_MODULES = ("adam-mini", "sinkgd")  # that take a model
Schedule = Callable[[mx.array], mx.array]
"""From the number of updates that are done, counted from 0, to a learning rate or a beta2."""


def build_optimizer(model: nn.Module, options: Options, choices: Choices) -> GuardedOptimizer:
    """A PairedOptimizer, or the body's optimizer alone when no table trains; either lets no NaN through.

    Args:
        model: Made ready to train by :func:`ember_mlx.finetune.trainable.make_trainable`.
        options: The run's.
        choices: What trains, and how tables are rounded.

    Raises:
        InputError: for settings of an optimizer or a schedule that cannot be.
    """
    check_rates(options, bool(choices.tables))
    body = body_optimizer(options, model)
    guard = {"skip_nonfinite": True, "clip_grad_norm": options.clip_grad_norm}
    if canonical(options.optimizer) not in BODY:  # ours compute in float32 anyway
        body = in_float32(body, but=None if choices.body_in_float32 else mx.bfloat16)
    if choices.body_rounding == "stochastic":
        _tell_of_float32(model, options, {table.path for table in choices.tables})
        body = StochasticRounding(body, seed=(options.seed + 1) % 2**32)  # the tables have the seed itself
    if choices.tables:
        tables = table_optimizer(options, choices.table_rounding)
        return PairedOptimizer(model, tables=tables, rest=body, **guard)
    return GuardedOptimizer(model.trainable_parameters(), body, **guard)


def check_rates(options: Options, tables: bool) -> None:
    """Refuse learning rates that are not fit for the run, and a weight decay that makes weights larger at them.

    Args:
        options: The run's, settled.
        tables: Whether some train.
    """
    _refuse_growth(options, "--optimizer", body_optimizer(options), body_learning_rate(options))
    if tables:
        optimizer = table_optimizer(options, "nearest")
        _refuse_growth(options, "--table-optimizer", optimizer, table_learning_rate(options))


def body_optimizer(options: Options, model: nn.Module | None = None) -> optim.Optimizer:
    """The class that ``--optimizer`` names, with ``optimizer_config``'s settings: mlx-lm's are stock's, to the bit.

    Ours take the ``model``, with its adapters, for what modules say of their weights.

    ``--bias-correction`` sets that of Adam and AdamW, unless ``optimizer_config`` does. Others have no such option:
    without_effect.py says so.
    """
    name = canonical(options.optimizer)
    given = {"model": model} if name in FROM_MODULES else {}
    if options.bias_correction and name in CORRECTED:
        given = {"bias_correction": True}
    made = make_optimizer(name, body_learning_rate(options), given, settings(options, name))
    return made if name in BODY else in_place(made)


def _tell_of_float32(model, options, tables):
    """Where rounding is asked for that float32 weights do not have; the tables' Ember tells of its own."""
    wide = [
        array.dtype == mx.float32 for path, array in tree_flatten(model.trainable_parameters()) if path not in tables
    ]
    if options.body_rounding is not None and all(wide):
        line = "Warning: --body-rounding stochastic: no effect: what trains beside the tables is float32"
        rprint(as_given(line, options.given))


def table_optimizer(options: Options, rounding: str) -> optim.Optimizer:
    """Ember, or another for comparison; in every case at ``--table-learning-rate`` and with no scaling of its own.

    ``rounding`` is "nearest" or "stochastic", of Ember alone.
    """
    learning_rate = table_learning_rate(options)
    decay = options.table_weight_decay
    beta2 = 0.999 if options.table_beta2 is None else options.table_beta2
    if options.table_optimizer == "ember":
        if options.table_beta2_decay is not None:
            beta2 = growing_beta2(options.table_beta2_decay, options.table_beta2)
        how = {"row_clip": options.table_row_clip, "row_floor": options.table_row_floor or None}
        return Ember(learning_rate, beta2, weight_decay=decay, **how, rounding=rounding, seed=options.seed)
    if options.table_optimizer == "sage":
        return make_optimizer("sage", learning_rate, {"weight_decay": decay}, settings(options, "sage"))
    if options.table_optimizer == "adamw":
        return optim.AdamW(learning_rate, betas=[0.9, beta2], weight_decay=decay, bias_correction=True)
    if options.table_optimizer == "adafactor":
        return optim.Adafactor(learning_rate, weight_decay=decay, relative_step=False, scale_parameter=False)
    return optim.SGD(learning_rate, weight_decay=decay)


def _refuse_growth(options, flag, optimizer, learning_rate):
    """A weight decay that makes weights larger, until they overflow: each step multiplies them by 1 - rate * decay."""
    rate = peak(learning_rate, updates(options)) if callable(learning_rate) else learning_rate
    decay = optimizer.state.get("weight_decay", getattr(optimizer, "weight_decay", 0.0))
    decay = decay.item() if isinstance(decay, mx.array) else decay
    if rate * decay > 2:
        raise InputError(
            f"{flag} {type(optimizer).__name__}: its learning rate of {rate:.3g} times its weight decay of {decay:.3g} "
            "must be at most 2, or each step makes the weights larger; lower one of them"
        )


def growing_beta2(decay: float, most: float | None) -> Schedule:
    """A schedule of beta2, 1 - t^-decay at step t from 1, as Adafactor's with 0.8 (arXiv 1804.04235, section 7.2).

    At a decay of 1 the moment is the mean of all steps; above it, early steps would outweigh later ones for ever.
    """
    most = 1 - 2.0**-24 if most is None else most  # the largest float32 below 1
    return lambda steps_done: mx.minimum(1 - (steps_done + 1).astype(mx.float32) ** -decay, most)


def body_learning_rate(options: Options) -> float | Schedule:
    """A number, or the schedule that the YAML key lr_schedule describes; after ``--warmup`` if there is one."""
    if options.lr_schedule:
        return _schedule("lr_schedule", options)
    return _warmed_up(options.learning_rate, options)


def table_learning_rate(options: Options) -> float | Schedule:
    """A number, the schedule of table_lr_schedule, or the body's scaled so that it peaks at --table-learning-rate.

    A run that ends within the warm-up reaches no peak, and its tables no more of theirs than the body of its own.
    """
    if options.table_lr_schedule:
        return _schedule("table_lr_schedule", options)
    if not options.lr_schedule:
        return _warmed_up(options.table_learning_rate, options)
    body = body_learning_rate(options)
    warmup = int(options.warmup or warmup_of(options.lr_schedule) or 0)
    highest = max(peak(body, updates(options)), body(mx.array(warmup)).item())
    return lambda step: options.table_learning_rate * (body(step) / highest)  # a quotient cannot overflow


def peak(schedule: Schedule, number: int) -> float:
    """The highest learning rate of a schedule within so many updates."""
    return mx.max(schedule(mx.arange(number))).item()


def _warmed_up(rate, options):
    """A constant rate after ``--warmup``, whose ramp is mlx-lm's own: its first update has a rate of 0."""
    if not (options.warmup and rate):
        return rate
    return build_schedule({"name": "linear_schedule", "arguments": [rate, rate, 1], "warmup": options.warmup})


def _schedule(key, options):
    description = getattr(options, key)
    schedule = build_schedule(description | {"warmup": options.warmup} if options.warmup else description)
    rates = schedule(mx.arange(updates(options)))
    if not mx.all((rates >= 0) & (rates <= SAFE_RATE)).item() or not rates.max().item() > 0:
        raise InputError(
            f"{key} {description}: its learning rates must all be finite, at least 0 and at most {SAFE_RATE:.3g}, and "
            "not all 0"
        )
    return schedule
