"""Whether to use the kernels: where there is a GPU, and where they have been seen to work."""

import os
import platform
import warnings
from functools import cache

import mlx.core as mx

from ember_mlx.errors import InputError
from ember_mlx.kernels import statistics

VARIABLE = "EMBER_MLX_KERNELS"


def usable(dtype=mx.float32):
    """Whether the kernels can take a table of that dtype, on MLX's default device.

    The first call on a GPU tries them, once a process. ``EMBER_MLX_KERNELS=off`` in the environment says no.

    Raises:
        InputError: for another value of that variable than ``on`` and ``off``.
    """
    setting = os.environ.get(VARIABLE, "on")
    if setting not in ("on", "off"):
        raise InputError(f"{VARIABLE}={setting!r}: must be 'on' or 'off'; unset it, which is the same as 'on'")
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    return setting == "on" and on_gpu and dtype in statistics.DTYPES and fault() is None


@cache
def fault():
    """What is wrong with the kernels on this machine, or None. Found once a process, and then warned about."""
    try:
        found = differences()
    except (RuntimeError, ValueError) as error:  # MLX's for a source that does not compile and for a bad launch
        found = f"MLX says: {error}"
    if found:
        machine = f"{mx.device_info().get('device_name')}, {platform.platform()}, MLX {mx.__version__}"
        warnings.warn(
            f"ember_mlx: the statistics kernel does not work on this machine ({machine}). {found}. Ember goes on with "
            "plain operations: the results are the same, the scratch memory is several tables. Please report this "
            f"message to the authors of ember-mlx; {VARIABLE}=off silences it",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def differences():
    """Where the kernel differs from plain operations on an awkward table, in words, or None.

    The table has more than one threadgroup of rows, more columns than its threads take at once, and odd sizes: rows
    start at any address, and the last rows and columns are incomplete. It lies in memory as most gradients do, and then
    as that of an untied LM head.
    """
    for dtype in statistics.DTYPES:
        shape = (statistics.ROWS + 3, statistics.MOST_THREADS * statistics.BYTES_AT_ONCE // dtype.size + 37)
        g = mx.random.normal(shape, key=mx.random.key(0)) * mx.linspace(0.1, 2, shape[0])[:, None]
        g = (g * mx.linspace(1, 3, shape[1])).astype(dtype)
        squares = mx.square(g.astype(mx.float32))
        for way, table in {"": g, "transposed ": mx.contiguous(g.T).T}.items():
            for axis, (name, mean) in enumerate(zip(("row", "column"), statistics.mean_squares(table), strict=True)):
                expected = squares.mean(axis=1 - axis)
                error = (mx.abs(mean - expected) / expected).max().item()
                if not error < 1e-5:  # a NaN is not
                    return f"The {name} means of a {way}{dtype} table of {shape} are off by {error:.1e}"
    return None
