"""Whether to use the kernels: where there is a GPU, and where they have been seen to work."""

import os
import platform
import warnings
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ember_mlx.shared.errors import InputError

__all__ = ["DTYPES", "VARIABLE", "fault", "try_all", "usable"]

VARIABLE = "EMBER_MLX_KERNELS"
DTYPES = (mx.float32, mx.bfloat16, mx.float16)


def usable(kernel: ModuleType, *dtypes: mx.Dtype) -> bool:
    """Whether a kernel can take arrays of those dtypes, on MLX's default device.

    The first call on a GPU tries it, once a process for each combination. ``EMBER_MLX_KERNELS=off`` in the environment
    says no to all.

    Args:
        kernel (module): Of this package.
        dtypes: Of its arrays, as its ``differences`` takes them.

    Raises:
        InputError: for another value of that variable than ``on`` and ``off``.
    """
    setting = os.environ.get(VARIABLE, "on")
    if setting not in ("on", "off"):
        raise InputError(f"{VARIABLE}={setting!r}: must be 'on' or 'off'; unset it, which is the same as 'on'")
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    if setting == "off" or not on_gpu or not all(dtype in DTYPES for dtype in dtypes):
        return False
    return fault(kernel, *dtypes) is None


def try_all(kernel: ModuleType, parameters: Mapping[str, Any]) -> None:
    """Try a kernel of one dtype, now, for each dtype in a tree of parameters: MLX may trace the first step."""
    for dtype in {parameter.dtype for _, parameter in tree_flatten(parameters)}:
        usable(kernel, dtype)


@cache
def fault(kernel: ModuleType, *dtypes: mx.Dtype) -> str | None:
    """What is wrong with a kernel on this machine, or None. Found once a process, and then warned about."""
    try:
        found = kernel.differences(*dtypes)
    except (RuntimeError, ValueError) as error:  # MLX's for a source that does not compile and for a bad launch
        found = f"MLX says: {error}"
    if found:
        machine = f"{mx.device_info().get('device_name')}, {platform.platform()}, MLX {mx.__version__}"
        warnings.warn(
            f"ember_mlx: the kernel {kernel.TEXT.name} does not work on this machine ({machine}). {found}. Ember "
            "falls back to plain operations: the results are the same, the scratch memory is several tables. Please "
            f"report this message to the authors of ember-mlx; {VARIABLE}=off silences it",
            RuntimeWarning,
            stacklevel=2,
        )
    return found
