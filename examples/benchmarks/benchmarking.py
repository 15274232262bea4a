"""What the benchmarks share: the machine in words, a fresh process for each row, timing, and the JSON file."""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

from ember_mlx.shared.environment import environment

SEED = 0


def backend():
    """metal, cuda or cpu: what MLX computes on here."""
    import mlx.core as mx

    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def commit():
    """What EMBER_COMMIT says, for a copy whose git is not its own; else the checkout's, "-dirty" if it was changed."""
    if told := os.environ.get("EMBER_COMMIT"):
        return told
    with contextlib.suppress(OSError):
        words = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=7", "--exclude", "*"]
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip() or None
    return None


def machine(on=None):
    """The machine, the versions, the commit, the day and the seed. ``on`` is what was measured: metal, cuda or cpu.

    Without ``on`` that is what MLX computes on: call it in a process of its own then, for it starts MLX.
    """
    on = on or backend()  # first: environment() asks a framework that is imported already for the GPU
    here = environment()
    machine = here.pop("machine")
    device = machine["processor" if on == "cpu" else "gpu"]
    return {"backend": on, "device": device, **machine, **here, "commit": commit(), "seed": SEED}


def in_fresh_process(function, *arguments, environment=None):
    """What ``function`` returns in a process of its own; ``{"error": ...}`` if it raises or the process dies."""
    before = {name: os.environ.get(name) for name in environment or {}}
    os.environ.update(environment or {})
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return in_this_process(pool.submit(function, *arguments).result)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def in_this_process(function, *arguments):
    """What ``function`` returns; ``{"error": ...}`` if it raises, or if the process that it waits for dies."""
    try:
        return function(*arguments)
    except BrokenProcessPool:
        return {"error": "the process was killed, as it is when memory runs out"}
    except (RuntimeError, ValueError, ImportError) as error:
        return {"error": " ".join(str(error).split())[:300]}


def median_seconds(function, repeats):
    """The median of what a call takes; the function must wait for what it starts."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class CompiledStep:
    """Steps of an MLX optimizer on one table, compiled as mlx-lm compiles its own; three are taken at once.

    Args:
        optimizer (Optimizer): Its state is made here.
        weight (array): The table; afterwards ``table.weight`` is.
        gradient (array): Of every step.
    """

    def __init__(self, optimizer, weight, gradient):
        import mlx.core as mx
        import mlx.nn as nn

        self.gradient = gradient
        self.table = nn.Module()
        self.table.weight = weight
        optimizer.init(self.table.trainable_parameters())
        self.state = [self.table.state, optimizer.state]
        mx.eval(self.state, gradient)

        @partial(mx.compile, inputs=self.state, outputs=self.state)
        def step(gradient):
            optimizer.update(self.table, {"weight": gradient})

        self._step = step
        self.take(3)

    def take(self, count):
        """So many steps, and wait for them."""
        import mlx.core as mx

        for _ in range(count):
            self._step(self.gradient)
            mx.async_eval(self.state)
        mx.synchronize()

    def peak(self, held=None):
        """The peak of a step above what was there before it, in tables.

        ``held`` names what the caller goes on holding beside the gradient, from this step; None is nothing at all.
        """
        import mlx.core as mx

        dropped = [mx.array(self.gradient)]
        mx.eval(dropped)
        kept = [held(self), dropped[0]] if held else []
        mx.clear_cache()
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        self._step(dropped.pop())
        mx.eval(self.state)
        mx.synchronize()
        del kept
        return round((mx.get_peak_memory() - before) / self.table.weight.nbytes, 4)


def at_least_one(text):
    """An argument of a command line that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 or more")
    return int(text)


def write(path: Path | None, report: dict):
    """Write what there is so far; called after each row, so that a run that is cut off keeps its rows.

    And before the first, so that a path that cannot be written ends the program before it has measured anything.
    """
    if not path:
        return
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(report, indent=1) + "\n")
        partial.replace(path)
    except OSError as error:
        raise SystemExit(f"{path}: cannot be written: {error.strerror}") from error
