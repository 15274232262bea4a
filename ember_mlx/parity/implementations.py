"""The implementations of Ember by name, each behind the same few calls, and why one is not here.

Neither MLX nor PyTorch is imported before `implementations` is called. What runs are the public classes,
``ember_mlx.Ember`` and ``cuda_ref.Ember``.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from ember_mlx.parity.stepping import Tables, Weights
from ember_mlx.parity.stepping_mlx import MLXTables, MLXWeights
from ember_mlx.parity.stepping_torch import TorchTables, TorchWeights
from ember_mlx.shared.errors import InputError

__all__ = ["Implementation", "implementations", "listed", "named", "select"]


@dataclass(frozen=True)
class Implementation:
    """One implementation. ``make(shape, dtype, learning_rate, weight_decay, **options)`` gives its `Tables`.

    ``missing`` says in a few words why it is not here, and is None where it is. ``dtypes`` are those that tables may
    have, and ``mixed`` tells whether a gradient may have another dtype than its table.
    ``make_weights(class_name, shape, dtype, learning_rate, weight_decay, **options)`` gives `Weights` for an optimizer
    of the body; None where it does not run those.
    """

    name: str
    missing: str | None
    make: Callable[..., Tables]
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    mixed: bool = True
    make_weights: Callable[..., Weights] | None = None


def implementations() -> list[Implementation]:
    """All of them, those that are not here too."""
    return [*_of_mlx(), *_of_torch()]


def named(name: str) -> Implementation:
    """The one of that name; the other framework is not imported, which takes seconds."""
    return next(one for one in (_of_mlx if name.startswith("mlx ") else _of_torch)() if one.name == name)


def select(names: list[str] | None) -> tuple[list[Implementation], list[Implementation]]:
    """Those to run, and those that are not here: of the ``names``, or of all.

    Raises:
        InputError: for a name that there is not, one that is not here, and where none is here.
    """
    known = {implementation.name: implementation for implementation in implementations()}
    for name in names or ():
        if name not in known:
            raise InputError(f"--implementation {name!r}: unknown name; the names are {', '.join(known)}")
        if known[name].missing:
            raise InputError(f"--implementation {name!r}: cannot run here ({known[name].missing})")
    chosen = [known[name] for name in names] if names else list(known.values())
    here = [implementation for implementation in chosen if not implementation.missing]
    not_here = [implementation for implementation in chosen if implementation.missing]
    if not here:
        raise InputError(f"nothing can be compared here: {listed(not_here)}; install MLX or PyTorch")
    return here, not_here


def listed(not_here: list[Implementation]) -> str:
    """Names with their reasons, the reasons that several share said once."""
    by_reason: dict[str, list[str]] = {}
    for implementation in not_here:
        by_reason.setdefault(implementation.missing, []).append(implementation.name)
    return ", ".join(f"{' and '.join(names)} ({reason})" for reason, names in by_reason.items())


def _of_mlx():
    try:
        import mlx.core as mx
    except ImportError as error:
        missing = dict.fromkeys(("cpu", "metal", "cuda"), f"MLX: {error}")
    else:
        missing = {
            "cpu": None,
            "metal": None if mx.metal.is_available() else "no Metal",
            "cuda": None if mx.cuda.is_available() else "no CUDA in this MLX",
        }
    return [
        Implementation(f"mlx {backend}", why, _with(MLXTables, mx_device), make_weights=_with(MLXWeights, mx_device))
        for (backend, why), mx_device in zip(missing.items(), ("cpu", "gpu", "gpu"), strict=True)
    ]


def _of_torch():
    how = {
        "eager cpu": ("cpu", "eager", False),
        "eager cuda": ("cuda", "eager", False),
        "compiled cpu": ("cpu", "eager", True),
        "compiled cuda": ("cuda", "eager", True),
        "triton": ("cuda", "triton", False),
        "triton interpreted": ("cpu", "triton", False),
    }
    missing = dict.fromkeys(how)
    try:
        import torch

        from cuda_ref import triton_kernels
    except ImportError as error:
        missing = dict.fromkeys(missing, f"PyTorch: {error}")
    else:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        no_triton = None if triton_kernels.available() else "Triton is not installed"
        no_cuda = None if torch.cuda.is_available() else "PyTorch sees no CUDA device"
        no_compiler = None if any(map(shutil.which, ("c++", "g++", "clang++"))) else "no C++ compiler"
        missing["eager cuda"] = missing["compiled cuda"] = no_cuda
        missing["compiled cpu"] = no_compiler
        missing["triton"] = no_cuda or no_triton or ("TRITON_INTERPRET=1 is set" if interpreted else None)
        missing["triton interpreted"] = no_triton or (None if interpreted else "needs TRITON_INTERPRET=1")
    limits = {
        # PyTorch's compiler cannot trace a gradient of another dtype than its table's.
        "compiled cpu": {"mixed": False},
        "compiled cuda": {"mixed": False},
        # Triton's interpreter cuts float32 off to bfloat16 where a GPU rounds.
        "triton interpreted": {"dtypes": ("float32", "float16")},
    }
    return [
        Implementation(
            name if "triton" in name else f"torch {name}",
            why,
            _with(TorchTables, *how[name]),
            make_weights=None if "compiled" in name else _with(TorchWeights, *how[name][:2]),
            **limits.get(name, {}),
        )
        for name, why in missing.items()
    ]


def _with(tables, *how):
    return lambda *settings, **options: tables(*how, *settings, **options)
