"""``ember-mlx geometry``: checks, a few unmeasured steps for comparison, the measured run, and the report."""

import gc
import json
import tempfile
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.cli_ui import rprint

from ember_mlx.finetune import options, run_log_writer
from ember_mlx.finetune.as_given import naming_as_given
from ember_mlx.finetune.before_loading import check_inputs
from ember_mlx.finetune.given import Given
from ember_mlx.finetune.run import run, run_with
from ember_mlx.finetune.run_length import SCHEDULES
from ember_mlx.finetune.safe_writing import existing_parent
from ember_mlx.finetune.where_it_writes import check_adapter_folder
from ember_mlx.finetune.workers import Workers
from ember_mlx.geometry import page, pictures, report
from ember_mlx.geometry.observer import TIMED_UPDATES, Observer, Timed, Timer
from ember_mlx.planner.inputs import refuse_misfits
from ember_mlx.plots.style import require_matplotlib
from ember_mlx.shared.command_line import describe
from ember_mlx.shared.errors import InputError

__all__ = ["check", "main", "time_without_measuring", "write"]

# The fewest updates of the weights that each part of the report needs.
NEEDED = {
    "successive gradients": 4,
    "second moments": 8,  # with fewer squares the dense moment is mostly noise
    "paths": 16,  # with fewer points a random walk looks as straight as a line
}
HELP = {
    "the report": {
        "out": ("FOLDER", "Where the report goes, and the adapter, unless --adapter-path is given. Required."),
    }
}
EPILOG = """\
examples:
  ember-mlx geometry --model Qwen/Qwen3-0.6B --data my_data --iters 200 --out report
      then open report/index.html
  ember-mlx geometry --model Qwen/Qwen3-0.6B --data my_data --iters 200 --out head_alone --train-tables head
      of the head alone"""
REPORT, PAGE = "geometry.json", "index.html"


def main(arguments: list[str]) -> None:
    """Train and measure; print the verdict and the files of the report."""
    parser = options.build_parser(
        "ember-mlx geometry",
        usage="ember-mlx geometry --model MODEL --data DATA --out FOLDER [options of train]",
        description="Does Ember suit this model and this data? Trains as `ember-mlx train` does, with its options, and "
        "measures the gradients and steps of the token tables. Writes a page (index.html), its pictures and its "
        "numbers (geometry.json).",
        epilog=EPILOG,
    )
    parser.add_argument("--out", type=Path, required=True)
    describe(parser, HELP)
    out = parser.parse_args(arguments).out
    # The last of two equal flags counts: the user's own wins.
    own, args = options.parse_command(parser, ["--adapter-path", str(out / "adapters"), *arguments], data_required=True)
    with naming_as_given(args.given):
        check(args, own.out)
    args |= {"stream": False}
    # Nothing is saved there, but the run checks the free space of the disk that --out is on.
    with tempfile.TemporaryDirectory(prefix="timing-", dir=existing_parent(own.out)) as folder:
        timed = time_without_measuring(args, Path(folder))
    rprint("\n=== The measured run ===\n")
    own.out.mkdir(parents=True, exist_ok=True)
    observer = Observer(args, own.out)
    try:
        result, _, tokenizer = run_with(Given(), args, watchers=[observer])
        found = report.build(observer, result, timed, tokenizer, " ".join(["ember-mlx", "geometry", *arguments]))
    finally:
        observer.close()
    files = write(found, own.out)
    rprint(f"\n{report.to_text(found)}\n")
    rprint("\n".join(f"  {path}" for path in files))


def check(args: options.Options, out: Path) -> None:
    """Refuse what cannot be measured, before anything is loaded.

    Raises:
        InputError: for options that leave nothing to measure, a run too short, and a folder with another report.
    """
    require_matplotlib()
    if not args.train or args.test:
        raise InputError("train: false or --test: geometry measures a run that trains, and does not test; leave it out")
    if args.stream:
        raise InputError("--stream: geometry measures whole gradients, which a streamed step never has; leave it out")
    if args.resume is not None:
        raise InputError("--resume: geometry measures a run from its first step; leave it out")
    if args.train_tables == "none":
        raise InputError("--train-tables none: nothing to measure, since no token table trains; leave it out")
    if args.table_optimizer != "ember":
        raise InputError(
            f"--table-optimizer {args.table_optimizer}: geometry measures whether Ember suits; leave it out"
        )
    if not (args.table_learning_rate > 0 or args.table_lr_schedule):
        raise InputError("--table-learning-rate 0: no row would move; give a number above 0, usually 3e-4")
    if Workers.join().size > 1:
        raise InputError("several workers: geometry measures on one machine; start it without mlx.launch")
    if args.patience is not None:
        raise InputError(f"--patience {args.patience}: geometry measures all steps of --iters; leave it out")
    if args.epochs is not None:
        raise InputError(
            f"--epochs {args.epochs:g}: geometry must know its steps before its rows; give --iters instead"
        )
    updates, least = args.iters // args.grad_accumulation_steps, max(NEEDED.values())
    if updates < least:
        needed = ", ".join(f"{number} for {what}" for what, number in NEEDED.items())
        raise InputError(
            f"--iters {args.iters}: {updates} updates are too few to measure; it takes {needed}, and a hundred or more "
            f"for rare tokens; use --iters {least * args.grad_accumulation_steps} or more"
        )
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; give a folder")
    if (out / REPORT).exists() and not args.overwrite:
        raise InputError(f"--out {out}: holds another report; give another folder, or --overwrite")
    # As the run will, after the steps that are timed:
    refuse_misfits(args)
    check_inputs(args, None, Workers.join())
    check_adapter_folder(args)
    if args.log_jsonl:
        run_log_writer.check(args, goes_on=False)


def time_without_measuring(args: options.Options, folder: Path) -> tuple[np.ndarray, int]:
    """Seconds a position in each of the first updates of the same run without an observer, and its peak memory then."""
    rprint(f"\n=== {TIMED_UPDATES} updates without measuring, to compare time and memory ===\n")
    # The validation before the first step is part of the peak, so it is the same; nothing is saved.
    plain = args | {"iters": (TIMED_UPDATES + 2) * args.grad_accumulation_steps, "steps_per_eval": 10**9}
    plain |= {"save_every": 10**9, "keep_checkpoints": 0, "keep_best": False, "adapter_path": str(folder / "adapters")}
    plain |= {"report_to": None, "log_jsonl": None, "sample_prompts": None}
    # A warm-up may be longer than these few updates.
    schedules = {key: getattr(args, key) | {"warmup": 0} for key in SCHEDULES if getattr(args, key)}
    plain |= schedules | {"warmup": None}
    timer = Timer(args.grad_accumulation_steps)
    with suppress(Timed):
        run(plain, watchers=[timer])
    timed = timer.watch.seconds_a_position(), timer.watch.peak_memory
    del timer  # it holds the model, and would count in the peak of the next run
    gc.collect()
    mx.clear_cache()
    return timed


def write(found: dict, out: Path) -> list[Path]:
    """The report's files: numbers, pictures in light and dark, and the page."""
    (out / REPORT).write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    drawn = pictures.draw_all(found, out)
    (out / PAGE).write_text(page.html(found, drawn), encoding="utf-8")
    return [out / REPORT, *(path for paths in drawn.values() for path in paths), out / PAGE]
