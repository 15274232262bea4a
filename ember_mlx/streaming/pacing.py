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
        """Start these, the first of which is held until it is waited for; wait for the oldest."""
        if not self.ahead or not arrays:
            mx.eval(arrays)
            return
        mx.async_eval(arrays)
        size = sum(array.nbytes for array in arrays)
        self._unfinished.append((arrays[0], size))
        self._bytes += size
        while self._bytes > self.ahead and len(self._unfinished) > 1:
            array, size = self._unfinished.popleft()
            self._bytes -= size
            mx.eval(array)

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
