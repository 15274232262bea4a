"""``--memory-limit``: MLX's own limits while a run trains, put back afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
from mlx_lm.utils import maybe_set_recommended_wired_limit

from ember_mlx.shared.errors import InputError
from ember_mlx.shared.units import format_bytes

__all__ = ["limited_memory", "refuse_over"]

REMEDY = "use a smaller --batch-size or --max-seq-length, --grad-checkpoint, --chunked-loss, or fewer --num-layers"


@contextmanager
def limited_memory(limit: int | None) -> Iterator[None]:
    """Within ``with``, MLX frees its cache before it takes more than ``limit`` bytes, and :func:`refuse_over` refuses.

    Without a limit only the wired limit is set, to what the machine recommends, as mlx-lm does.

    Raises:
        InputError: when the allocator fails, in one line.
    """
    wired = maybe_set_recommended_wired_limit()
    before = None if limit is None else (mx.set_memory_limit(limit), mx.set_cache_limit(limit))
    if limit is not None and wired is not None:
        recommended = mx.device_info()["max_recommended_working_set_size"]
        mx.set_wired_limit(min(limit, recommended))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if "alloc" not in str(error).lower() and "out of memory" not in str(error).lower():
            raise
        raise InputError(f"out of memory ({' '.join(str(error).split())}); {REMEDY}") from error
    finally:
        if before is not None:
            mx.set_memory_limit(before[0])
            mx.set_cache_limit(before[1])
        if wired is not None:
            mx.set_wired_limit(wired)


def refuse_over(limit: int | None) -> None:
    """Raises InputError when MLX has held more than ``limit`` bytes: its own limit makes it wait and then take them."""
    if limit is not None and mx.get_peak_memory() > limit:
        took = format_bytes(mx.get_peak_memory())
        raise InputError(f"--memory-limit {format_bytes(limit)}: a step took {took}; {REMEDY}")
