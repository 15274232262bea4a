"""How far a GPU is run ahead: results are asked for as they are built, and one waits for those of a little earlier.

What has been handed to a GPU keeps its memory until it is done. A wait at each weight would leave the GPU idle, no
wait at all would keep several layers' gradients.
"""

from collections import deque

import mlx.core as mx

__all__ = ["Pace"]


class Pace:
    """Evaluates weights with at most ``ahead`` bytes of them unfinished; on the CPU, which gains nothing, with none."""

    def __init__(self, ahead: int):
        self.ahead = ahead if mx.default_device().type == mx.DeviceType.gpu else 0
        self._unfinished = deque()
        self._bytes = 0
        self._before = None

    def __call__(self, *arrays):
        """Wait for the oldest until there is room for these, and start them."""
        if not self.ahead or not arrays:
            mx.eval(arrays)
            return
        size = sum(array.nbytes for array in arrays)
        while self._unfinished and self._bytes + size > self.ahead:
            array, of_array = self._unfinished.popleft()
            self._bytes -= of_array
            mx.eval(array)
        mx.async_eval(arrays)
        self._unfinished.append((arrays[0], size))
        self._bytes += size

    def one_behind(self, *arrays):
        """Start these, which took much more memory to make than they have; wait for those before them."""
        if not self.ahead or not arrays:
            mx.eval(arrays)
            return
        mx.async_eval(arrays)
        if self._before is not None:
            mx.eval(self._before)
        self._before = arrays[0]

    def finish(self):
        """Wait for all, and let go of it: what a table's rows are written into must be held by nobody else."""
        self._unfinished.clear()
        self._bytes = 0
        self._before = None
        if self.ahead:
            mx.synchronize()
