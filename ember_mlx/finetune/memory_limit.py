"""``--memory-limit``: MLX's own limits while a run lasts, put back afterwards, and the end of a run that exceeds them.

MLX's own defaults end nothing. On Metal its memory limit is 1.5 times what the device recommends, and its cache may
grow as large. On CUDA both are 0.8 of the GPU's memory. On a CPU it is 0.8 of the machine's, with a cache of 32 MB.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.core as mx

from ember_mlx.finetune.choices import streams_by_default
from ember_mlx.finetune.optimizer_names import canonical, settings
from ember_mlx.finetune.workers import Workers
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.units import format_bytes

__all__ = [
    "NO_LIMIT",
    "cache_kept",
    "is_over",
    "limit_of",
    "limited_memory",
    "machine_limit",
    "refuse_over",
    "remedy",
    "telling_what_helps",
]

NO_LIMIT = "none"  # what --memory-limit says to turn it off
SHARE = 0.9  # of a memory that no system's recommendation divides: a tenth stays with the system
RECOMMENDED = "max_recommended_working_set_size"  # Metal's, in mx.device_info()
SIGNS = ("alloc", "out of memory", "outofmemory", "insufficient memory")  # of MLX's errors, in lower case


def machine_limit() -> int:
    """Bytes that a run may take on this machine: Metal's recommended working set, else 0.9 of the memory there is."""
    found = mx.device_info()
    if recommended := found.get(RECOMMENDED):
        return int(recommended)
    of_gpu = found.get("total_memory") if mx.default_device().type == mx.DeviceType.gpu else None
    return int(SHARE * (of_gpu or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))


def cache_kept() -> int:
    """Bytes of MLX's cache that stay after a step by default: none, as in mlx-lm; on CUDA half of what a run may take.

    CUDA takes long to give memory back and to take it again: steps of 45 GB took 0.62 s, and 0.51 without. A GPU that
    waits less is run further ahead, so such steps peak higher; where memory is scarce it is given back.
    """
    on_cuda = mx.cuda.is_available() and mx.default_device().type == mx.DeviceType.gpu
    return machine_limit() // 2 if on_cuda else 0


def limit_of(asked: int | str | None) -> int | None:
    """The limit in bytes, or None: ``asked`` is the option's value, bytes, "none", or None for the machine's."""
    return machine_limit() if asked is None else None if asked == NO_LIMIT else asked


@contextmanager
def limited_memory(args: Any) -> Iterator[None]:
    """Within ``with``, MLX frees its cache before it takes more than the limit, and its cache is never larger.

    Metal also keeps resident what it recommends, or the limit if that is less; without a limit only this is set, as
    mlx-lm does.

    Args:
        args: The run's options, with its limit.

    Raises:
        InputError: as :func:`telling_what_helps` does.
    """
    limit = limit_of(args.memory_limit)
    with ExitStack() as undo:
        if limit is not None:
            undo.callback(mx.set_memory_limit, mx.set_memory_limit(limit))
            cache = mx.set_cache_limit(limit)
            undo.callback(mx.set_cache_limit, cache)
            mx.set_cache_limit(min(limit, cache))
        if recommended := mx.device_info().get(RECOMMENDED):
            undo.callback(mx.set_wired_limit, mx.set_wired_limit(min(limit or recommended, recommended)))
            undo.callback(mx.synchronize)  # comes first: what is under way keeps the limits that it began with
        with telling_what_helps(args):
            yield


@contextmanager
def telling_what_helps(args: Any) -> Iterator[None]:
    """Raises InputError, in one line, for an allocation that fails within ``with``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(sign in str(error).lower() for sign in SIGNS):
            raise
        raise InputError(f"out of memory ({' '.join(str(error).split()) or 'Python'}); {remedy(args)}") from error


def remedy(args: Any) -> str:
    """What of a run's options would take less memory, in words; nothing that is on, or that streaming includes.

    Args:
        args: The options, with the choices or as they were given.
    """
    workers, stream = Workers.join().size, args.stream
    if stream is None:
        clipped = args.clip_grad_norm is not None
        stream = streams_by_default(args.fine_tune_type, args.train_tables != "none", workers, clipped)
    optimizer = canonical(args.optimizer)
    splits = settings(args, optimizer).get("weights") is not None and not optimizer.startswith("flash")
    off = {
        "--grad-checkpoint": not (args.grad_checkpoint or stream),
        "--chunked-loss": not (args.chunked_loss or stream),
        "--stream": not (stream or args.shard_tables or splits),  # others than flash split all weights at once
        "--keep-inputs": stream and args.keep_inputs is None,
        "--clear-cache-threshold 0": args.clear_cache_threshold,
    }
    ways = [
        f"a smaller {'--batch-size or ' if args.batch_size > workers else ''}--max-seq-length",
        *(name for name, helps in off.items() if helps),
        *(["fewer --num-layers"] if args.num_layers != 0 else []),
    ]
    return f"use {', '.join(ways[:-1])}{',' if len(ways) > 2 else ''}{' or ' if len(ways) > 1 else ''}{ways[-1]}"


def is_over(asked: int | str | None) -> bool:
    """Whether MLX has held more than the limit: its own makes it wait, and then take the memory."""
    limit = limit_of(asked)
    return limit is not None and mx.get_peak_memory() > limit


def refuse_over(args: Any) -> None:
    """Raises InputError when MLX has held more than the limit of a run's options."""
    asked = args.memory_limit
    if not is_over(asked):
        return
    limit, peak = limit_of(asked), mx.get_peak_memory()
    whose = " (the default on this machine)" if asked is None else ""
    raise InputError(
        f"--memory-limit {format_bytes(limit)}{whose}: a step took {format_bytes(peak)}; {remedy(args)}; "
        f"--memory-limit {NO_LIMIT} lets it take more"
    )
