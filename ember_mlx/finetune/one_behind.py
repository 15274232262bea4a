"""Evaluation in parts. MLX takes memory for all that it hands a GPU ahead, so each part waits for the one before."""

import mlx.core as mx

__all__ = ["OneBehind"]


class OneBehind:
    """Evaluates what it is called with; a GPU may do so while the host lays out the next part, and no further.

    A CPU gains nothing by being ahead, and its peak would vary: there each part waits for itself.
    """

    def __init__(self):
        self._is_gpu = mx.default_device().type == mx.DeviceType.gpu
        self._before = []

    def __call__(self, *arrays: mx.array) -> None:
        mx.async_eval(*arrays)
        mx.eval(self._before if self._is_gpu else arrays)
        self._before = arrays

    def finish(self) -> None:
        """Wait for the last part."""
        mx.eval(self._before)
