"""``ember-mlx parity``: run what this machine can, and print one table."""

import argparse
import json
import math
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, astuple
from pathlib import Path

from ember_mlx.parity import body, implementations, processes, recorded, suite
from ember_mlx.parity.processes import Timing
from ember_mlx.parity.suite import ORACLE, Comparison
from ember_mlx.shared.command_line import describe
from ember_mlx.shared.environment import environment
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.text_tables import is_narrow, text_table

__all__ = ["format_ended", "format_failures", "format_summary", "format_table", "format_timings", "main"]

DESCRIPTION = """\
Compare every implementation of Ember, and of the optimizers for the body, that this machine can run (MLX, PyTorch, \
Triton; CPU and GPU) with a float64 oracle, step by step, over named and recorded streams of gradients, in float32, \
bfloat16 and float16; and with results recorded on a GPU. Exit code 1 when something is not within its tolerance."""

OPTIMIZERS = ("Ember", *(entry.name for entry in body.OPTIMIZERS))

HELP = {
    "what to compare": {
        "implementation": ("NAME", 'Only these, such as "mlx cpu" "triton". Default: all that run here.'),
        "stream": ("NAME", 'Only these gradients, such as "random" "real head". Default: all.'),
        "optimizer": ("NAME", f"Only these of {', '.join(OPTIMIZERS)}. Default: all."),
        "dtype": (None, "Only tables of these dtypes. Default: all."),
        "steps": ("N", "Look after so many steps; shorter streams are left out. Default: after 1, 10 and 1000."),
    },
    "what is reported": {
        "verbose": (None, "Print a line for each implementation, stream and quantity, and the seconds of each job."),
        "json": ("FILE", "Write every comparison and job, machine, versions and seed. Default: no file."),
    },
}
EPILOG = """\
examples:
  ember-mlx parity
      all that runs here, in one table
  ember-mlx parity --implementation "mlx cpu" --optimizer Ember --steps 10
      a quick look
  ember-mlx parity --verbose --json parity.json
      everything, for a report"""

SUMMARY_LEGEND = """\
A name alone is compared with the float64 oracle. r, c (second moments of rows and columns), step, w (weights, after a
step and after the whole run): the largest error as a part of what is allowed there. More than 1 fails; a rounding to 16
bits alone reaches 1. codes: of 8-bit state, 2 % may differ, by one. rounding: no bit of stochastic rounding may differ.
--verbose tells it of each stream, with where and how large it is."""

LEGEND = """\
r, c: second moments of rows and columns (float32); step: what one step subtracts, seen alone; w: the weights after a
step, from the same weights as the oracle's; w of the run: after all steps, the oracle on its own way (float32). ULP:
unit in the last place of the quantity's dtype. Each line is the worst, in ULPs, of all dtypes and steps; `where` names
it, with the steps that were searched. `of allowed` is the largest error of any of them as a part of what is allowed
there: a rounding to 16 bits alone reaches 1. Values below 2^-126, 8.39e+06 ULPs, may be rounded to zero, as GPUs do.
Against recorded results each side is allowed its own tolerance. rounding: stochastic, where no bit may differ."""

TIMES = "Seconds of each job, the longest first. First steps: until tables give a first result, where all is compiled."


def main(arguments: list[str]) -> int:
    """Run the suite and print its table; returns 0, or 1 when something failed.

    Raises:
        InputError: for options that cannot be used or leave nothing to compare, and where no implementation is here.
    """
    args = _parser().parse_args(arguments)
    if args.json is not None and not args.json.parent.is_dir():
        raise InputError(
            f"--json {args.json}: folder {args.json.parent} does not exist; give a path in one that exists"
        )
    if args.json is not None and args.json.is_dir():
        raise InputError(f"--json {args.json}: is a folder; give the path of a file")
    names = args.optimizer or OPTIMIZERS
    cases = suite.select(args.stream, args.steps)
    here, not_here = implementations.select(args.implementation)
    recordings = recorded.read_results()
    start = time.perf_counter()
    dtypes, progress = args.dtype or suite.DTYPES, _progress()
    timings: list[Timing] = []

    def timed(timing):
        timings.append(timing)
        if args.verbose:  # at once: a run that is cut off has told where its time went
            progress("")
            print(format_ended(timing), file=sys.stderr, flush=True)

    about = _about(here, not_here, recordings)
    rows, failures = [], 0  # a comparison is put into words once, not after each job again
    unfinished, held = _place_of_unfinished(args.json), (0, 0, 0)  # held: comparisons, jobs, all jobs

    def ended(comparisons, jobs):
        nonlocal failures, held
        rows.extend(_json_row(one) for one in comparisons)
        failures += sum(not one.passed for one in comparisons)
        if unfinished is not None and rows:
            seconds = time.perf_counter() - start
            _replace(unfinished, _report({"unfinished": True} | about, rows, failures, seconds, timings))
        held = len(rows), held[1] + 1, jobs

    with _telling_what_is_left(progress, lambda: _what_is_left(args.json, unfinished, *held)):
        comparisons = list(
            processes.run(
                here,
                cases if "Ember" in names else [],
                dtypes,
                recordings,
                progress,
                optimizers=[name for name in names if name != "Ember"],
                streams=args.stream or body.STREAMS,
                steps=max(args.steps or [body.STEPS]),
                timed=timed,
                ended=ended,
            )
        )
    seconds = time.perf_counter() - start
    if not comparisons:
        raise InputError("nothing is left to compare: no chosen implementation does the chosen streams in --dtype")
    failed = sum(not one.passed for one in comparisons)
    parts = [format_table(comparisons)] if args.verbose else [format_summary(comparisons), SUMMARY_LEGEND]
    parts += [f"Failed:\n\n{format_failures(comparisons)}"] if failed else []
    parts += [LEGEND] if failed or args.verbose else []
    parts += [f"{TIMES}\n\n{format_timings(timings)}"] if args.verbose else []
    print(*parts, "", sep="\n\n", end="")
    print(_closing(len(comparisons), failed, here, not_here, recordings, seconds))
    if args.json is not None:
        _replace(args.json, _report(about, map(_json_row, comparisons), failed, seconds, timings))
        if unfinished not in (None, args.json):
            unfinished.unlink(missing_ok=True)
    return 1 if failed else 0


@contextmanager
def _telling_what_is_left(progress, left):
    """What stops the run says what is ``left()`` of it; nothing of a line of progress stays."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.left = left()
        raise
    finally:
        progress("")


def _parser():
    parser = argparse.ArgumentParser(prog="ember-mlx parity", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--implementation", nargs="+")
    parser.add_argument("--stream", nargs="+")
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS)
    parser.add_argument("--dtype", nargs="+", choices=suite.DTYPES)
    parser.add_argument("--steps", nargs="+", type=int)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--json", type=Path)
    return describe(parser, HELP)


# --- what is printed ----------------------------------------------------------------------------------------------


def format_summary(comparisons: list[Comparison]) -> str:
    """One line for each implementation and what it was compared with: the largest error of each quantity."""
    quantities = dict.fromkeys(one.quantity for one in comparisons)
    rows = [("implementation", "comparisons", "failed", *quantities)]
    for (against, implementation), group in _grouped(comparisons, lambda one: (one.against, one.implementation)):
        largest = dict.fromkeys(quantities, "")
        for one in sorted(group, key=lambda one: one.of_allowed):
            largest[one.quantity] = f"{one.of_allowed:.2f}"
        failed = sum(not one.passed for one in group)
        rows.append((_name(implementation, against), str(len(group)), str(failed), *largest.values()))
    return text_table(rows[0], rows[1:], right=range(1, len(rows[0])))


def format_table(comparisons: list[Comparison]) -> str:
    """One line for each implementation, stream and quantity; against recorded results one for all streams."""

    def key(one):
        return one.against, one.implementation, one.stream if one.against == ORACLE else "all streams", one.quantity

    return _format_rows(_row(*key, group) for key, group in _grouped(comparisons, key))


def format_failures(comparisons: list[Comparison]) -> str:
    """One line for each comparison that failed, as in the table."""
    failed = (one for one in comparisons if not one.passed)
    return _format_rows(_row(one.against, one.implementation, one.stream, one.quantity, [one]) for one in failed)


def format_timings(timings: list[Timing]) -> str:
    """One line for each job, the longest first: seconds from the start of all to its own, of itself, of first steps."""
    head = ("implementation", "optimizers", "dtype", "cases", "began", "seconds", "first steps", "process")
    rows = [map(_cell, astuple(one)) for one in _longest_first(timings)]
    return text_table(head, rows, right=range(4, 8))


def format_ended(timing: Timing) -> str:
    """One line for a job that has ended: seconds since the start of all, of itself, and of its first steps."""
    what = " ".join(part for part in (timing.implementation, timing.optimizers, timing.dtype, timing.what) if part)
    ended = timing.start + timing.seconds
    return f"{ended:.1f} s: {what} took {timing.seconds:.1f} s, first steps {timing.first_steps:.1f} s"


def _cell(value):
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _longest_first(timings):
    return sorted(timings, key=lambda one: -one.seconds)


def _grouped(comparisons, key):
    """Pairs of a key and its comparisons; sorted by each part of the keys, in the order in which those first appear."""
    groups: dict[tuple, list[Comparison]] = {}
    for one in comparisons:
        groups.setdefault(key(one), []).append(one)
    parts = [list(dict.fromkeys(column)) for column in zip(*groups, strict=True)]
    return sorted(groups.items(), key=lambda item: [of.index(part) for of, part in zip(parts, item[0], strict=True)])


def _format_rows(rows):
    numbers = ("ULPs", "allowed", "relative", "of allowed", "result")
    if is_narrow():
        rows = ((f"{', '.join(row[:3])}: {row[-1]}", *row[3:-1]) for row in rows)
        return text_table(("implementation, stream, quantity: where", *numbers), rows, right=range(1, 5))
    return text_table(("implementation", "stream", "quantity", *numbers, "where"), rows, right=range(3, 7))


def _row(against, implementation, stream, quantity, group):
    worst = max(group, key=lambda one: (not one.passed, one.ulps))
    where = f"{worst.dtype}, step{_steps(worst)}, {' x '.join(map(str, worst.shape))}"
    if stream != worst.stream:
        where = f"{worst.stream}, {where}"
    passed = all(one.passed for one in group)
    numbers = (f"{worst.ulps:.3g}", f"{worst.allowed_ulps:.3g}", f"{worst.relative:.1e}")
    of_allowed = f"{max(one.of_allowed for one in group):.2f}"
    name, result = _name(implementation, against), "pass" if passed else "FAIL"
    return (name, stream, quantity, *numbers, of_allowed, result, worst.error or where)


def _name(implementation, against):
    return implementation if against == ORACLE else f"{implementation} / {against}"


def _steps(one):
    return f" {one.steps}" if one.first_step == one.steps else f"s {one.first_step}-{one.steps}"


def _closing(comparisons, failed, here, not_here, recordings, seconds):
    parts = [f"{comparisons} comparisons, {failed} failed, {seconds:.0f} s"]
    parts += [f"run here: {', '.join(one.name for one in here)}"]
    parts += [f"not here: {implementations.listed(not_here)}"] if not_here else []
    parts += [", ".join(one.name for one in recordings) or "no recorded results"]
    for one in here:
        without = sorted(set(suite.DTYPES) - set(one.dtypes))
        without += [] if one.mixed else ["streams that need a gradient of another dtype than the table's"]
        parts += [f"{one.name} without {', '.join(without)}"] if without else []
    return "; ".join(parts)


def _progress():
    """A line that overwrites itself, where somebody is watching."""
    if not sys.stderr.isatty():
        return lambda what: None
    return lambda what: print(f"\r\x1b[K{what}\r", end="", file=sys.stderr, flush=True)


# --- what is written ----------------------------------------------------------------------------------------------


def _replace(path, text):
    """Write the whole file or leave the old one: a run may be cut off at any time."""
    if path.exists() and not path.is_file():  # a pipe or a device
        path.write_text(text)
        return
    beside = path.with_name(f"{path.name}.part")
    try:
        beside.write_text(text)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _place_of_unfinished(path):
    """Where an unfinished report goes: to ``path`` if nothing is there, else beside it; None where none is written."""
    if path is None or not path.exists():
        return path
    return path.with_name(f"{path.stem}.unfinished{path.suffix}") if path.is_file() else None


def _what_is_left(path, unfinished, comparisons, done, jobs):
    """What an interrupted run has written, and whether an earlier report stays."""
    if unfinished is None:
        return "nothing is written" if path is None else f"nothing is written to {path}"
    as_it_was = "" if unfinished == path else f"; {path} is as it was"
    if not comparisons:
        return f"nothing is compared yet{as_it_was}"
    return f"{unfinished} holds {comparisons} comparisons, of {done} of {jobs} jobs{as_it_was}"


def _about(here, not_here, recordings):
    """What all reports of a run say of it."""
    return environment() | {
        "seed": suite.SEED,
        "learning_rate": suite.LEARNING_RATE,
        "weight_decay": suite.WEIGHT_DECAY,
        "run_here": [one.name for one in here],
        "not_here": {one.name: one.missing for one in not_here},
        "recordings": [{"name": one.name} | one.about for one in recordings],
    }


def _report(about, rows, failures, seconds, timings):
    """Everything as JSON, one comparison or job a line; ``unfinished`` in ``about`` marks what is of some jobs only."""
    about = about | {"seconds": round(seconds, 1), "failed": failures}
    jobs = ",\n  ".join(json.dumps(_json_numbers(one)) for one in _longest_first(timings))
    lists = ' "jobs": [\n  ' + jobs + '\n ],\n "comparisons": [\n  ' + ",\n  ".join(rows) + "\n ]"
    return f"{json.dumps(about, indent=1)[:-2]},\n{lists}\n}}\n"


def _json_row(one):
    return json.dumps(_json_numbers(one) | {"passed": one.passed})


def _json_numbers(one):
    return {name: _json_number(value) if isinstance(value, float) else value for name, value in asdict(one).items()}


def _json_number(value):
    # JSON has no infinity; what is infinite here is an error that has no size.
    return float(f"{value:.4g}") if math.isfinite(value) else None
