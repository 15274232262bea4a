"""The ranges of ``train``'s options: what is refused before anything is loaded."""

from typing import Any

from ember_mlx.finetune import run_length
from ember_mlx.finetune.choices import refuse_frozen_rows
from ember_mlx.finetune.yaml_sections import check_sections
from ember_mlx.optimizers.guarded import SAFE_RATE, check_clip_grad_norm
from ember_mlx.shared.command_line import flag
from ember_mlx.shared.ember_options import BETA2_RANGE, check_row_limit
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.float_formats import LARGEST, SMALLEST_NORMAL

__all__ = ["check"]

AT_LEAST = {
    "batch_size": 1,
    "iters": 1,
    "steps_per_report": 1,
    "steps_per_eval": 1,
    "save_every": 1,
    "keep_checkpoints": 0,
    "patience": 1,
    "peer_timeout": 1,
    "grad_accumulation_steps": 1,
    "max_seq_length": 2,
    "sample_tokens": 1,
    "keep_inputs": 1,
}
"""The least of each whole number."""
MOST_WHOLE = 2**63 - 1
NUMBERS = {"learning_rate": SAFE_RATE, "table_learning_rate": SAFE_RATE, "table_weight_decay": LARGEST}
"""The most of each number; the least is 0."""
OF_EMBER = {"table_beta2_decay": None, "table_row_clip": None, "table_row_floor": 0, "table_rounding": "nearest"}
"""Ember's alone, each with what asks for what all others do; a flag gives it over a recipe's."""


def check(args: Any) -> None:
    """Refuse values out of range before anything is loaded."""
    for name, least in AT_LEAST.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= MOST_WHOLE:
            in_words = f"of at least {least}" if value < least else "below 2^63"
            raise InputError(f"{flag(name)} {value}: must be a whole number {in_words}")
    for name, most in NUMBERS.items():
        value = getattr(args, name)
        if not 0 <= value <= most:
            raise InputError(f"{flag(name)} {value}: must be a number of at least 0 and at most {most:.3g}")
    if args.num_layers is not None and args.num_layers < -1:
        raise InputError(
            f"--num-layers {args.num_layers}: must be how many of the last layers train, 0 for none or -1 for all"
        )
    if args.valid_fraction is not None and not 0 <= args.valid_fraction < 1:
        raise InputError(f"--valid-fraction {args.valid_fraction}: must be at least 0 and below 1; 0 is for none")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed {args.seed}: must be at least 0 and below 2^32")
    run_length.check(args)
    for name in ("val_batches", "test_batches"):
        if getattr(args, name) < 1 and getattr(args, name) != -1:
            raise InputError(f"{flag(name)} {getattr(args, name)}: must be at least 1, or -1 for all of the set")
    if args.table_beta2 is not None:
        if args.table_optimizer not in ("ember", "adamw"):
            raise InputError(f"--table-beta2: {args.table_optimizer} has no beta2; leave it out")
        least, below, in_words = BETA2_RANGE
        if not least <= args.table_beta2 < below:
            raise InputError(f"--table-beta2 {args.table_beta2}: must be {in_words}")
    _check_ember_options(args)
    for name in ("clip_grad_norm", "clip_layer_norm"):
        check_clip_grad_norm(f"{flag(name)} {getattr(args, name)}", getattr(args, name))
    if args.log_jsonl == "":
        raise InputError("--log-jsonl '': give the name of a file")
    if args.resume == "":
        raise InputError("--resume '': give the folder of a checkpoint, or nothing for the newest in --adapter-path")
    if args.train:
        refuse_frozen_rows(args)
    check_sections(args)
    if args.fine_tune_type == "full" and args.quantize is not None:
        raise InputError(
            f"--quantize {args.quantize}: quantized layers cannot be trained, and --fine-tune-type full trains them: "
            "use lora or dora, or leave --quantize out"
        )


def _check_ember_options(args):
    for name, off in OF_EMBER.items():
        if args.table_optimizer != "ember" and getattr(args, name) not in (None, off):
            or_off = "" if off is None else f", or give {off}"
            raise InputError(f"{flag(name)}: is for ember alone, not for {args.table_optimizer}; leave it out{or_off}")
    decay = args.table_beta2_decay
    if decay is not None and not SMALLEST_NORMAL <= decay <= 1:
        raise InputError(
            f"--table-beta2-decay {decay}: must be above 0 and at most 1, usually 0.8; 1 is the mean of all steps"
        )
    check_row_limit("row_clip", args.table_row_clip, flag="--table-row-clip")
    if args.table_row_floor != 0:
        check_row_limit("row_floor", args.table_row_floor, flag="--table-row-floor", off="; 0 turns it off")
