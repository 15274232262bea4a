"""Rows of a benchmark, measured in other processes: one after another on each GPU, each within a time limit."""

import gc
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

from benchmarking import in_this_process

__all__ = ["LEFT_OVER", "Worker", "measured"]

LEFT_OVER = 2**20  # bytes of earlier rows that do no harm


class Worker:
    """A process that measures rows on one GPU. It is made anew after a row that failed or left something behind.

    Args:
        measure (callable): ``measure(row, *arguments)`` returns what is known of a row, in words and numbers.
        arguments (tuple): Its further arguments.
        gpu (int, optional): The one that it sees. Default: all.
        keeps (bool): Whether several rows share a process: imports and compiled kernels.
    """

    def __init__(self, measure: Callable, arguments: tuple, gpu: int | None = None, keeps: bool = False):
        self.task = measure, arguments, gpu
        self.gpu = gpu
        self.keeps = keeps
        self.process = None

    def __call__(self, row: str, limit: float) -> dict:
        """What ``measure`` returns; ``{"error": ...}`` if it raises, the process dies, or ``limit`` seconds pass."""
        if self.process is None:
            self._start()
        self.connection.send(row)
        clean = False
        try:
            if not self.connection.poll(limit):
                return {"error": f"timed out after {limit:.0f} s"}
            result, clean = self.connection.recv()
            return result
        except EOFError:
            return {"error": "the process was killed, as it is when memory runs out"}
        finally:
            if not (clean and self.keeps):
                self.end()

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, *self.task))
        self.process.start()
        other.close()

    def end(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.connection.close()
            self.process.kill()
            self.process.join()
            self.process = None


def _serve(connection, measure, arguments, gpu):
    """Of each row that arrives: send the result, and whether nothing of it is left."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)  # before MLX is imported
    while True:
        try:
            row = connection.recv()
        except EOFError:
            return
        result = in_this_process(measure, row, *arguments)
        connection.send((result, "error" not in result and _is_clean()))


def _is_clean():
    import mlx.core as mx

    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory() <= LEFT_OVER


def measured(rows: Iterable[str], workers: list[Worker], limit: float, seconds: float) -> Iterator[tuple[str, dict]]:
    """Of each row its name and result, as they are done: the rows in turn, each by the first worker that is free.

    Args:
        rows: The most important first.
        workers: One a GPU.
        limit: Seconds of a row.
        seconds: Of all rows; then those that are being measured are given up, and no more begin.
    """
    deadline, waiting, running = time.monotonic() + seconds, deque(rows), {}
    with ThreadPoolExecutor(len(workers)) as pool:
        try:
            free = list(workers)
            while waiting or running:
                while free and waiting and time.monotonic() < deadline:
                    worker, row = free.pop(0), waiting.popleft()
                    of_row = min(limit, max(deadline - time.monotonic(), 0))
                    running[pool.submit(worker, row, of_row)] = worker, row
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    worker, row = running.pop(done)
                    free.append(worker)
                    yield row, done.result() | ({} if worker.gpu is None else {"gpu": worker.gpu})
        finally:
            for worker in workers:
                worker.end()
