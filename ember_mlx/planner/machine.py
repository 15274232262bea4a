"""What memory this machine has for a run."""

import mlx.core as mx

from ember_mlx.finetune.memory_limit import NO_LIMIT, machine_limit
from ember_mlx.finetune.options import Options
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.units import parse_size

__all__ = ["backend", "limited", "memory"]

LACKS = {"metal": "this machine has no Metal", "cuda": "this machine has no CUDA GPU", "cpu": "MLX computes on its GPU"}
GPU_SHARE_OF_A_MAC = 0.75  # about what macOS lets the GPU use, unless told otherwise


def backend() -> str:
    """Where MLX computes here: metal, cuda or cpu."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def memory(asked: str | None, where: str) -> tuple[int | None, str]:
    """Bytes that a run may take, and whose they are, as the subject and verb of a sentence: "this machine has".

    Of another backend than this machine's they are not known: None, and what to give.

    Args:
        asked: What ``--memory`` says, or None for this machine's.
        where: The backend on which the run will train: of a Mac's memory its GPU gets a share.

    Raises:
        InputError: for a size that cannot be.
    """
    if asked is not None:
        try:
            size = parse_size(asked)
        except ValueError as error:
            raise InputError(f"--memory {error}") from None
        if where == "metal":
            return int(GPU_SHARE_OF_A_MAC * size), f"of --memory {asked} a Mac's GPU may use about 75 % by default,"
        return size, "--memory is"
    if where != backend():
        return None, f"give --memory: {LACKS[where]}"
    return machine_limit(), "this machine has"


def limited(options: Options, memory: int | None, source: str, asked: str | None = None) -> tuple[int | None, str]:
    """The same two, or what ``--memory-limit`` leaves of that memory.

    Args:
        options: The run's.
        memory, source: Of :func:`memory`.
        asked: What ``--memory`` says, if it is given: then the words say which of the two flags counts.
    """
    limit = options.memory_limit
    if limit in (None, NO_LIMIT):
        return memory, source
    if memory is None or limit < memory:
        return limit, "--memory-limit is" if asked is None else f"--memory-limit, below what --memory {asked} gives, is"
    return memory, source if asked is None else f"as --memory-limit is no lower, {source}"
