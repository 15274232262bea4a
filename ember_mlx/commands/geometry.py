"""``ember-mlx geometry``: checks, a few steps to compare the time with, the run that is measured, and the report."""

import argparse
import copy
import gc
import json
import tempfile
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
from mlx_lm.cli_ui import rprint

from ember_mlx.finetune import options
from ember_mlx.finetune.adapters import add_tokens_of, load_base
from ember_mlx.finetune.run import check_adapter_folder, run
from ember_mlx.geometry import page, pictures, report
from ember_mlx.geometry.observer import TIMED_UPDATES, Observer, Timed, Timer
from ember_mlx.plots.style import require_matplotlib
from ember_mlx.shared.errors import InputError, with_one_line_errors

# What each part of the report needs at the least, in updates of the weights.
NEEDED = {
    "successive gradients": 4,
    "second moments": 8,  # with fewer squares the dense moment is mostly noise
    "paths": 16,  # with fewer points a random walk looks as straight as a line
}
REPORT, PAGE = "geometry.json", "index.html"


def main(arguments: list[str]):
    """Train and measure; print the verdict, and where the report is."""
    parser = argparse.ArgumentParser(
        prog="ember-mlx geometry",
        description="Train as `ember-mlx train` does, with its options, while measuring the gradients and the steps of "
        "the token tables: does Ember suit this model and this data? Writes a report for people (index.html), its "
        "pictures and its numbers (geometry.json).",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", required=True, help="For the report. The adapter goes to its folder "
        "adapters, unless --adapter-path is given.",
    )  # fmt: skip
    if {"-h", "--help"} & set(arguments):
        print(parser.format_help(), "and the options of `ember-mlx train`:\n", sep="\n")
        options.build_parser().print_help()
        return
    own, theirs = with_one_line_errors(parser).parse_known_args(arguments)
    # The last of two flags counts, so one that was given does.
    args = options.parse(["--adapter-path", str(own.out / "adapters"), *theirs])
    check(args, own.out)
    # Nothing is saved there; but what the run asks of the disk, it asks of the one that has to have it.
    there = next(path for path in (own.out, *own.out.absolute().parents) if path.exists())
    with tempfile.TemporaryDirectory(prefix="timing-", dir=there) as folder:
        timed = time_without_measuring(args, Path(folder))
    rprint("\n=== The run that is measured ===\n")
    own.out.mkdir(parents=True, exist_ok=True)
    observer = Observer(args, own.out)
    try:
        result = run(args, watchers=[observer])
        trust = {"trust_remote_code": args.trust_remote_code}
        model, tokenizer, config = load_base(args.model, lazy=True, tokenizer_config=trust, **trust)
        tokenizer = add_tokens_of(Path(args.adapter_path), model, tokenizer, config)
        found = report.build(observer, result, timed, tokenizer, " ".join(["ember-mlx", "geometry", *arguments]))
    finally:
        observer.close()
    files = write(found, own.out)
    rprint(f"\n{report.in_words(found)}\n")
    rprint("\n".join(f"  {path}" for path in files))


def check(args, out: Path):
    """Refuse what cannot be measured, before anything is loaded.

    Raises:
        InputError: for options with which there is nothing to measure, a run that is too short, and a folder that
            holds another report.
    """
    require_matplotlib()
    if not args.train or args.test:
        raise InputError("train: false or --test: geometry measures a run that trains, and tests nothing; leave it out")
    if args.resume is not None:
        raise InputError("--resume: geometry measures a run from its first step; leave it out")
    if args.train_tables == "none":
        raise InputError("--train-tables none: nothing to measure: geometry is of the token tables; leave it out")
    if args.table_optimizer != "ember":
        raise InputError(
            f"--table-optimizer {args.table_optimizer}: geometry measures whether Ember suits; leave it out"
        )
    if not (args.table_learning_rate > 0 or args.table_lr_schedule):
        raise InputError("--table-learning-rate 0: no row would move; give a number above 0, usually 1e-4")
    if mx.distributed.init().size() > 1:
        raise InputError("several workers: geometry measures on one machine; start it without mlx.launch")
    updates, least = args.iters // args.grad_accumulation_steps, max(NEEDED.values())
    if updates < least:
        needed = ", ".join(f"{number} for {what}" for what, number in NEEDED.items())
        raise InputError(
            f"--iters {args.iters}: {updates} updates are too few to measure; it takes {needed}, and rare tokens want "
            f"a hundred or more: use --iters {least * args.grad_accumulation_steps} at the least"
        )
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; give a folder")
    if (out / REPORT).exists() and not args.overwrite:
        raise InputError(f"--out {out}: holds another report; give another folder, or --overwrite")
    check_adapter_folder(args)  # as the run will, after the steps that are timed


def time_without_measuring(args, folder: Path):
    """Seconds a position in each of the first updates of the same run without an observer, and its peak memory then."""
    rprint(f"\n=== {TIMED_UPDATES} updates without measuring, to compare time and memory with ===\n")
    plain = copy.deepcopy(args)
    # The validation before the first step is part of the peak, so it is the same; nothing is saved.
    plain.iters = (TIMED_UPDATES + 2) * args.grad_accumulation_steps
    plain.steps_per_eval, plain.save_every, plain.keep_checkpoints = 10**9, 10**9, 0
    plain.adapter_path, plain.report_to, plain.log_jsonl = str(folder / "adapters"), None, None
    timer = Timer(args.grad_accumulation_steps)
    with suppress(Timed):
        run(plain, watchers=[timer])
    timed = timer.watch.seconds_a_position(), timer.watch.peak_memory
    del timer  # it holds the model, and would count in the peak of the next run
    gc.collect()
    mx.clear_cache()
    return timed


def write(found: dict, out: Path):
    """The report's files: numbers, pictures in light and dark, and the page."""
    (out / REPORT).write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    drawn = pictures.draw_all(found, out)
    (out / PAGE).write_text(page.html(found, drawn), encoding="utf-8")
    return [out / REPORT, *(path for paths in drawn.values() for path in paths), out / PAGE]
