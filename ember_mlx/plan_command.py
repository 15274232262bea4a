"""``ember-mlx plan``: the flags of ``train``, and what that run will take."""

import argparse
import json
import math
import os
import sys

import mlx.core as mx
from mlx_lm.utils import _parse_size

from ember_mlx.errors import InputError, with_one_line_errors
from ember_mlx.finetune import options
from ember_mlx.plan_inputs import read_inputs, with_rows_of_data
from ember_mlx.planner import advice, alternatives, plan
from ember_mlx.planner.report import Report, in_units

GPU_SHARE_OF_A_MAC = 0.75  # about what macOS lets the GPU use, unless told otherwise
LEAST_MEMORY = 10**6  # bytes: `--memory 16` is 16GB without its unit


def main(arguments: list[str]):
    """What ``ember-mlx plan`` does.

    Raises:
        InputError: for options, new tokens and data that ``train`` would refuse, a config.json that cannot be planned,
            or no memory.
    """
    own, theirs = _parser().parse_known_args(arguments)
    args = options.parse(theirs)
    backend = own.backend or _backend()
    memory, whose = _memory(own.memory, backend)
    inputs = with_rows_of_data(args, read_inputs(args))
    model, run = inputs.model, inputs.run
    planned = plan(model, run, backend)
    report = Report(
        name=args.model,
        model=model,
        run=run,
        backend=backend,
        planned=planned,
        said=inputs.said,
        others={flags: plan(model, other, backend) for flags, other in alternatives(run).items()},
        changes=advice(model, run, backend, memory) if planned.peak > memory else [],
        memory=memory,
        whose=whose,
    )
    print(json.dumps(report.to_json(), indent=1) if own.json else report.to_text())


def warning(args) -> str | None:
    """One line for ``train`` to say before it begins, if the run is planned to take more than there is; else None."""
    try:
        backend = _backend()
        memory, whose = _memory(None, backend)
        inputs = read_inputs(args)
        if plan(inputs.model, inputs.run, backend).peak <= memory:
            return None  # however long the rows are: they need not be read, which may take seconds
        inputs = with_rows_of_data(args, inputs)
        peak = plan(inputs.model, inputs.run, backend).peak
    except InputError:
        return None  # train itself says what is wrong, or it is no model that can be planned
    if peak <= memory:
        return None
    run = inputs.run
    return (
        f"Warning: with batches of {run.batch_size} x {max(run.length, run.evaluation_length)} tokens this run is "
        f"planned to take {in_units(peak)}, and {whose} {in_units(memory)}: `ember-mlx plan` with the same flags says "
        "what to change"
    )


def _parser():
    parser = argparse.ArgumentParser(
        prog="ember-mlx plan",
        usage="ember-mlx plan [FLAGS OF ember-mlx train] [--memory SIZE] [--backend {metal,cuda,cpu}] [--json]",
        description="Say how much memory `ember-mlx train` with the same flags will take; no weights are needed.",
        epilog="--model may be a model's folder, its config.json alone, or a hub name that is in the cache. Where "
        "--data is a folder here and the model has its tokenizer, rows are planned as long as they will be; otherwise "
        "as long as --max-seq-length. For a Mac with 16 GB: ember-mlx plan --model FOLDER --data FOLDER --backend "
        "metal --memory 16GB",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--memory", metavar="SIZE", help="Plan for a machine with so much: 16GB. Default: what this one has."
    )
    parser.add_argument(
        "--backend", choices=["metal", "cuda", "cpu"], help="Where it will train. Default: where MLX computes here."
    )
    parser.add_argument("--json", action="store_true", help="Print bytes, as JSON.")
    return with_one_line_errors(parser)


def _backend():
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def _memory(asked, backend):
    """Bytes, and whose they are, in words that end a sentence's first half."""
    if asked is not None:
        try:
            memory = _parse_size(asked)
        except (ArithmeticError, KeyError, ValueError):
            memory = 0
        if not LEAST_MEMORY <= memory < math.inf:
            raise InputError(f"--memory {asked}: must be a size of at least 1MB, in MB or GB: such as 16GB or 512MB")
        if backend == "metal":
            return int(GPU_SHARE_OF_A_MAC * memory), f"of --memory {asked} a Mac's GPU may use about 75 % by default,"
        return int(memory), "--memory is"
    if backend == "cuda":
        size = mx.device_info().get("total_memory") if hasattr(mx, "device_info") else None
        if size:
            return int(size), "the GPU has"
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sys.platform == "darwin":
        return int(GPU_SHARE_OF_A_MAC * ram), f"of this Mac's {in_units(ram)} the GPU may use about 75 % by default,"
    return ram, "this machine has"
