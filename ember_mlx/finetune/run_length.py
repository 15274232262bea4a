"""How long a run is: batches an epoch, steps, updates, warm-up. All of it is settled once the rows are known.

A step is a batch, as in mlx-lm. Schedules and warm-up count updates of the weights: one every
``--grad-accumulation-steps`` batches.
"""

import math
from collections.abc import Mapping
from typing import Any

from ember_mlx.shared.errors import InputError
from ember_mlx.shared.units import counted

__all__ = ["SCHEDULES", "asked", "batches_an_epoch", "check", "named", "passes", "settled", "updates", "warmup_of"]

MOST_EPOCHS = 10**6
FEW_BATCHES = 10  # of packs, each of many rows: as few steps an epoch learn little
SCHEDULES = ("lr_schedule", "table_lr_schedule")


def batches_an_epoch(options: Any, rows: int) -> int:
    """How many batches mlx-lm makes of so many rows: what does not fill one is left out."""
    return max(rows // options.batch_size, 1)


def updates(options: Any, iters: int | None = None) -> int:
    """How many updates ``iters`` batches make (default: ``--iters``): schedules count updates, not batches."""
    return max((iters or options.iters) // options.grad_accumulation_steps, 1)


def named(schedule: Any) -> Any:
    """A schedule of the YAML file with its name in lower case, as MLX has it; what describes none stays."""
    name = schedule.get("name") if isinstance(schedule, Mapping) else None
    return schedule | {"name": name.lower()} if isinstance(name, str) else schedule


def check(options: Any) -> None:
    """Refuse an ``--epochs`` or a ``--warmup`` that cannot be, as far as that needs no rows.

    Raises:
        InputError: for that, and where a schedule of the YAML file has a warm-up of its own beside ``--warmup``.
    """
    epochs, warmup = options.epochs, options.warmup
    if epochs is not None and not 0 < epochs <= MOST_EPOCHS:
        raise InputError(f"--epochs {epochs:g}: must be a number above 0 and at most {MOST_EPOCHS:,}, such as 2 or 0.5")
    if options.train and epochs is None and options.grad_accumulation_steps > options.iters:
        raise InputError(
            f"--grad-accumulation-steps {options.grad_accumulation_steps}: exceeds --iters {options.iters}, so nothing "
            "would be learned; lower it"
        )
    if warmup is None:
        return
    if not 0 <= warmup < math.inf or (warmup > 1 and warmup != int(warmup)):
        raise InputError(
            f"--warmup {warmup:g}: must be a share of the run below 1, such as 0.03, or a whole number of updates"
        )
    for key in SCHEDULES:
        own = warmup_of(getattr(options, key))
        if own:
            raise InputError(f"--warmup {warmup:g}: {key} has a warmup of its own, {own}; give one of them")


def settled(options: Any, batches: int | None = None) -> Any:
    """The options with ``iters`` of ``--epochs``, and with each warm-up that is a share as a number of updates.

    Both are recorded so: a resumed run compares numbers, not shares. Settled options stay as they are.

    Args:
        options: The run's.
        batches (int, optional): An epoch has so many. As long as they are not known, ``--epochs`` leaves all open.

    Raises:
        InputError: for a ``--warmup`` that the run would never leave.
    """
    if options.epochs is not None:
        if batches is None:
            return options
        each = options.grad_accumulation_steps
        # Rounded first: 0.07 * 100 is a little above 7. Then up, to whole updates: no batch is drawn in vain.
        options |= {"iters": math.ceil(round(options.epochs * batches / each, 9)) * each}
    number = updates(options)
    for key in SCHEDULES:
        share = warmup_of(getattr(options, key))
        if isinstance(share, float) and 0 < share < 1:
            options |= {key: getattr(options, key) | {"warmup": round(share * number)}}
    if options.warmup is not None:
        warmup = round(options.warmup * number) if options.warmup < 1 else int(options.warmup)
        if options.train and warmup and warmup >= number:
            raise InputError(
                f"--warmup {options.warmup:g}: must be fewer than the {number:,} updates of {asked(options)}; a share, "
                "such as 0.03, suits every run"
            )
        options |= {"warmup": warmup}
    return options


def asked(options: Any) -> str:
    """What says how long the run is: "--iters 600" or "--epochs 2.4 (600 steps)"."""
    if options.epochs is None:
        return f"--iters {options.iters}"
    return f"--epochs {options.epochs:g} ({options.iters} steps)"


def passes(options: Any, rows: int) -> str:
    """A line on the passes of a settled run over its training rows, or with ``--packing`` over so many packs of rows.

    "600 steps of 4 rows: 2.4 passes over 1,000 rows (250 batches)", and what there is to say beside it.
    """
    batches = batches_an_epoch(options, rows)
    made = options.iters / batches
    left_out = rows - batches * options.batch_size
    row = "pack" if options.packing else "row"
    steps = f"{counted(options.iters, 'step')} of {counted(options.batch_size, row)}"
    if options.grad_accumulation_steps > 1:
        steps += f", {updates(options):,} updates"
    number = f"{made:,.1f}".removesuffix(".0") if made >= 0.1 else f"{made:.2g}"
    line = f"{steps}: {number} {'pass' if number == '1' else 'passes'} over {counted(rows, row)} ("
    line += f"{batches:,} {'batch' if batches == 1 else 'batches'}"
    if left_out > 0:
        line += f"; the longest {row} fills" if left_out == 1 else f"; the {left_out:,} longest {row}s fill"
        line += " no batch"
    line += ")"
    if options.packing and batches < FEW_BATCHES:
        line += "; a lower --max-seq-length or --batch-size makes more steps"
    if options.warmup:
        line += f"; learning rates rise over the first {options.warmup:,} updates"
    return line


def warmup_of(schedule: Any) -> Any:
    """The warm-up that a schedule of the YAML file has of its own, if it has one."""
    return schedule.get("warmup") if isinstance(schedule, Mapping) else None
