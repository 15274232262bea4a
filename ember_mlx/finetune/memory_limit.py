"""``--memory-limit``: MLX's own limits while a run lasts, put back afterwards, and the end of a run that exceeds them.

MLX's own defaults end nothing. On Metal its memory limit is 1.5 times what the device recommends, and its cache may
grow as large. On CUDA both are 0.8 of the GPU's memory. On a CPU it is 0.8 of the machine's, with a cache of 32 MB.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import mlx.core as mx

from ember_mlx.shared.errors import InputError
from ember_mlx.shared.units import format_bytes

__all__ = ["NO_LIMIT", "is_over", "limit_of", "limited_memory", "machine_limit", "refuse_over"]

NO_LIMIT = "none"  # what --memory-limit says to turn it off
SHARE = 0.9  # of a memory that no system's recommendation divides: a tenth stays with the system
RECOMMENDED = "max_recommended_working_set_size"  # Metal's, in mx.device_info()
SIGNS = ("alloc", "out of memory", "outofmemory", "insufficient memory")  # of MLX's errors, in lower case
REMEDY = "use a smaller --batch-size or --max-seq-length, --grad-checkpoint, --chunked-loss, or fewer --num-layers"


def machine_limit() -> int:
    """Bytes that a run may take on this machine: Metal's recommended working set, else 0.9 of the memory there is."""
    found = mx.device_info()
    if recommended := found.get(RECOMMENDED):
        return int(recommended)
    of_gpu = found.get("total_memory") if mx.default_device().type == mx.DeviceType.gpu else None
    return int(SHARE * (of_gpu or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))


def limit_of(asked: int | str | None) -> int | None:
    """The limit in bytes, or None: ``asked`` is the option's value, bytes, "none", or None for the machine's."""
    return machine_limit() if asked is None else None if asked == NO_LIMIT else asked


@contextmanager
def limited_memory(limit: int | None) -> Iterator[None]:
    """Within ``with``, MLX frees its cache before it takes more than ``limit`` bytes, and its cache is never larger.

    Metal also keeps resident what it recommends, or ``limit`` if that is less; without a limit only this is set, as
    mlx-lm does.

    Raises:
        InputError: when an allocation fails, in one line.
    """
    with ExitStack() as undo:
        if limit is not None:
            undo.callback(mx.set_memory_limit, mx.set_memory_limit(limit))
            cache = mx.set_cache_limit(limit)
            undo.callback(mx.set_cache_limit, cache)
            mx.set_cache_limit(min(limit, cache))
        if recommended := mx.device_info().get(RECOMMENDED):
            undo.callback(mx.set_wired_limit, mx.set_wired_limit(min(limit or recommended, recommended)))
            undo.callback(mx.synchronize)  # comes first: what is under way keeps the limits that it began with
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not any(sign in str(error).lower() for sign in SIGNS):
                raise
            raise InputError(f"out of memory ({' '.join(str(error).split()) or 'Python'}); {REMEDY}") from error


def is_over(asked: int | str | None) -> bool:
    """Whether MLX has held more than the limit: its own makes it wait, and then take the memory."""
    limit = limit_of(asked)
    return limit is not None and mx.get_peak_memory() > limit


def refuse_over(asked: int | str | None) -> None:
    """Raises InputError when MLX has held more than the limit."""
    if not is_over(asked):
        return
    limit, peak = limit_of(asked), mx.get_peak_memory()
    whose = " (the default on this machine)" if asked is None else ""
    raise InputError(
        f"--memory-limit {format_bytes(limit)}{whose}: a step took {format_bytes(peak)}; {REMEDY}; --memory-limit "
        f"{NO_LIMIT} lets it take more"
    )
