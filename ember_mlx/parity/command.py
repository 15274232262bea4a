"""``ember-mlx parity``: run what this machine can, and print one table."""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from ember_mlx.errors import InputError, with_one_line_errors
from ember_mlx.parity import implementations, recorded, suite
from ember_mlx.parity.environment import environment
from ember_mlx.parity.suite import ORACLE, Comparison

DESCRIPTION = """\
Compare every implementation of Ember that this machine can run (MLX, PyTorch, Triton; CPU and GPU) with a float64
oracle, step by step, over named and recorded streams of gradients, in float32, bfloat16 and float16; and with results
recorded on a GPU. Exit code 1 when something is not within its tolerance."""

LEGEND = """\
r, c: second moments of rows and columns (float32); step: what one step subtracts, seen alone; w: the weights after a
step, from the same weights as the oracle's; w of the run: after all steps, the oracle on its own way (float32). ULP:
unit in the last place of the quantity's dtype. Each line is the worst, in ULPs, of all dtypes and steps; `where` names
it, with the steps that were searched. `of allowed` is the largest error of any of them as a part of what is allowed
there: a rounding to 16 bits alone reaches 1. Values below 2^-126, 8.39e+06 ULPs, may be rounded to zero, as GPUs do.
Against recorded results each side is allowed its own tolerance."""


def main(arguments: list[str]) -> int:
    """Run the suite and print its table; returns 0, or 1 when something failed.

    Raises:
        InputError: for options that cannot be used or leave nothing to compare, and where no implementation is here.
    """
    args = _parser().parse_args(arguments)
    if args.json is not None and not args.json.parent.is_dir():
        raise InputError(f"--json {args.json}: there is no folder {args.json.parent}; give a path in one that exists")
    if args.json is not None and args.json.is_dir():
        raise InputError(f"--json {args.json}: is a folder; give the path of a file")
    cases = suite.select(args.stream, args.steps)
    here, not_here = implementations.select(args.implementation)
    recordings = recorded.read_results()
    start = time.perf_counter()
    comparisons = list(suite.run(here, cases, args.dtype or suite.DTYPES, recordings, _progress()))
    seconds = time.perf_counter() - start
    if not comparisons:
        raise InputError("nothing is left to compare: no chosen implementation does the chosen streams in --dtype")
    print(format_table(comparisons))
    print(f"\n{LEGEND}\n")
    print(_closing(comparisons, here, not_here, recordings, seconds))
    if args.json is not None:
        args.json.write_text(_report(comparisons, here, not_here, recordings, seconds))
    return 0 if all(comparison.passed for comparison in comparisons) else 1


def _parser():
    parser = argparse.ArgumentParser(
        prog="ember-mlx parity", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--implementation", nargs="+", metavar="NAME", help='only these, such as "mlx cpu" "triton"')
    parser.add_argument("--stream", nargs="+", metavar="NAME", help='only these, such as "random" "real head"')
    parser.add_argument("--dtype", nargs="+", choices=suite.DTYPES, help="only tables of these")
    parser.add_argument(
        "--steps",
        nargs="+",
        type=int,
        metavar="N",
        help="look after so many steps, not after 1, 10 and 1000; shorter streams are left out",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every comparison, machine, versions and seed")
    return with_one_line_errors(parser)


# --- what is printed ----------------------------------------------------------------------------------------------


def format_table(comparisons: Iterable[Comparison]) -> str:
    """One line for each implementation, stream and quantity; against recorded results one for all streams."""
    groups: dict[tuple, list[Comparison]] = {}
    for one in comparisons:
        stream = one.stream if one.against == ORACLE else "all streams"
        groups.setdefault((one.against, one.implementation, stream, one.quantity), []).append(one)
    head = ("implementation", "stream", "quantity", "ULPs", "allowed", "relative", "of allowed", "result", "where")
    rows = [head]
    for against in dict.fromkeys(key[0] for key in groups):
        # Sorted, stably: the streams on tables of another shape come later.
        of_these = [key for key in groups if key[0] == against]
        order = list(dict.fromkeys(key[1] for key in of_these)), list(dict.fromkeys(key[2] for key in of_these))
        for key in sorted(of_these, key=lambda key: (order[0].index(key[1]), order[1].index(key[2]))):
            rows.append(_row(key, groups[key]))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _row(key, group):
    against, implementation, stream, quantity = key
    worst = max(group, key=lambda one: (not one.passed, one.ulps))
    name = implementation if against == ORACLE else f"{implementation} / {against}"
    where = f"{worst.dtype}, step{_steps(worst)}, {worst.shape[0]} x {worst.shape[1]}"
    if against != ORACLE:
        where = f"{worst.stream}, {where}"
    passed = all(one.passed for one in group)
    numbers = (f"{worst.ulps:.3g}", f"{worst.allowed_ulps:.3g}", f"{worst.relative:.1e}")
    of_allowed = f"{max(one.of_allowed for one in group):.2f}"
    return (name, stream, quantity, *numbers, of_allowed, "pass" if passed else "FAIL", worst.error or where)


def _steps(one):
    return f" {one.steps}" if one.first_step == one.steps else f"s {one.first_step}-{one.steps}"


def _aligned(row, widths):
    text, numbers, rest = row[:3], row[3:7], row[7:]
    yield from (cell.ljust(width) for cell, width in zip(text, widths[:3], strict=True))
    yield from (cell.rjust(width) for cell, width in zip(numbers, widths[3:7], strict=True))
    yield from (cell.ljust(width) for cell, width in zip(rest, widths[7:], strict=True))


def _closing(comparisons, here, not_here, recordings, seconds):
    failed = sum(not one.passed for one in comparisons)
    parts = [f"{len(comparisons)} comparisons, {failed} failed, {seconds:.0f} s"]
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


def _report(comparisons, here, not_here, recordings, seconds):
    """Everything as JSON, one comparison a line."""
    about = environment() | {
        "seed": suite.SEED,
        "learning_rate": suite.LEARNING_RATE,
        "weight_decay": suite.WEIGHT_DECAY,
        "seconds": round(seconds, 1),
        "run_here": [one.name for one in here],
        "not_here": {one.name: one.missing for one in not_here},
        "recordings": [{"name": one.name} | one.about for one in recordings],
        "failed": sum(not one.passed for one in comparisons),
    }
    rows = ",\n  ".join(json.dumps(_json_row(one)) for one in comparisons)
    return f'{json.dumps(about, indent=1)[:-2]},\n "comparisons": [\n  {rows}\n ]\n}}\n'


def _json_row(one):
    row = {name: _json_number(value) if isinstance(value, float) else value for name, value in asdict(one).items()}
    return row | {"passed": one.passed}


def _json_number(value):
    # JSON has no infinity; what is infinite here is an error that has no size.
    return float(f"{value:.4g}") if math.isfinite(value) else None
