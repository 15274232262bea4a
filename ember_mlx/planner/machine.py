"""What memory this machine has, and a warning for a run that will not fit."""

import math
import os
import sys

import mlx.core as mx
from mlx_lm.utils import _parse_size

from ember_mlx.planner.inputs import read_inputs, with_rows_of_data
from ember_mlx.planner.plan import plan
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.units import in_units

__all__ = ["backend", "memory", "warning"]

GPU_SHARE_OF_A_MAC = 0.75  # about what macOS lets the GPU use, unless told otherwise
LEAST_MEMORY = 10**6  # bytes: `--memory 16` is 16GB without its unit


def warning(args) -> str | None:
    """One line for ``train`` to say before it begins, if the run is planned to take more than there is; else None."""
    try:
        here = backend()
        available, whose = memory(None, here)
        inputs = read_inputs(args)
        if plan(inputs.model, inputs.run, here).peak <= available:
            return None  # however long the rows are: they need not be read, which may take seconds
        inputs = with_rows_of_data(args, inputs)
        peak = plan(inputs.model, inputs.run, here).peak
    except InputError:
        return None  # train itself says what is wrong, or it is no model that can be planned
    if peak <= available:
        return None
    run = inputs.run
    return (
        f"Warning: with batches of {run.batch_size} x {max(run.length, run.evaluation_length)} tokens this run is "
        f"planned to take {in_units(peak)}, and {whose} {in_units(available)}: `ember-mlx plan` with the same "
        "flags says what to change"
    )


def backend() -> str:
    """Where MLX computes here: metal, cuda or cpu."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def memory(asked: str | None, backend: str) -> tuple[int, str]:
    """Bytes, and whose they are, in words that end a sentence's first half."""
    if asked is not None:
        try:
            size = _parse_size(asked)
        except (ArithmeticError, KeyError, ValueError):
            size = 0
        if not LEAST_MEMORY <= size < math.inf:
            raise InputError(f"--memory {asked}: must be a size of at least 1MB, in MB or GB: such as 16GB or 512MB")
        if backend == "metal":
            return int(GPU_SHARE_OF_A_MAC * size), f"of --memory {asked} a Mac's GPU may use about 75 % by default,"
        return int(size), "--memory is"
    if backend == "cuda":
        size = mx.device_info().get("total_memory") if hasattr(mx, "device_info") else None
        if size:
            return int(size), "the GPU has"
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sys.platform == "darwin":
        return int(GPU_SHARE_OF_A_MAC * ram), f"of this Mac's {in_units(ram)} the GPU may use about 75 % by default,"
    return ram, "this machine has"
