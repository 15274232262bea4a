"""How far a GPU is run ahead: results are asked for as they are built, and one waits for those of a little earlier.

What has been handed to a GPU keeps its memory until it is done. A wait at each weight would leave the GPU idle, no
wait at all would keep several layers' gradients.

MLX gives memory back on a thread of its own, now and then long after an array is there. So where much is let go of, one
waits by ``mx.synchronize``, which waits for that thread too, and for all that the GPU has been handed.
"""

from collections import deque

import mlx.core as mx

__all__ = ["Pace"]


class Pace:
    """Evaluates weights with at most ``ahead`` bytes of them unfinished; on the CPU, which gains nothing, with none."""

    def __init__(self, ahead: int):
        self.ahead = ahead if mx.default_device().type == mx.DeviceType.gpu else 0
        self._group, self._group_bytes = [], 0
        self._under_way, self._bytes = deque(), 0  # an array of each start, and its bytes
        self._before = None

    def __call__(self, *arrays: mx.array) -> None:
        """Start these, small ones several together: each start costs a GPU as much as many operations."""
        if not self.ahead or not arrays:
            mx.eval(arrays)
            return
        size = sum(array.nbytes for array in arrays)
        if self._group_bytes + size > self.ahead // 2:
            self.start()
        self._group += arrays
        self._group_bytes += size

    def takes_together(self, nbytes: int) -> bool:
        """Whether a GPU may start what makes so many bytes along with its cotangents: they fit into one group."""
        return 0 < nbytes <= self.ahead // 2

    def start(self) -> None:
        """Start what is together so far; first wait for the oldest under way, until there is room beside the others."""
        if not self._group:
            return
        while self._under_way and self._bytes + self._group_bytes > self.ahead:
            array, nbytes = self._under_way.popleft()
            mx.eval(array)
            self._bytes -= nbytes
        mx.async_eval(self._group)
        self._under_way.append((self._group[-1], self._group_bytes))
        self._bytes += self._group_bytes
        self._group, self._group_bytes = [], 0

    def one_behind(self, *arrays: mx.array) -> None:
        """Start these, which took much more memory to make than they have; wait for those before them."""
        if not self.ahead or not arrays:
            mx.eval(arrays)
            return
        mx.async_eval(arrays)
        if self._before is not None:
            mx.eval(self._before)
        self._before = arrays[0]

    def in_turn(self, *arrays: mx.array) -> None:
        """Wait for those before, then start these: the scratch of one alone is there, while the next is built."""
        if not self.ahead or not arrays:
            mx.eval(arrays)
            return
        if self._before is not None:
            self._wait()
        mx.async_eval(arrays)
        self._before = arrays[0]

    def finish(self) -> None:
        """Wait for all, and let go of it: what a table's rows are written into must be held by nobody else."""
        self.start()
        if self.ahead:
            self._wait()

    def _wait(self):
        mx.synchronize()
        self._under_way.clear()
        self._bytes, self._before = 0, None
