"""The parity suite as jobs, the longest first, over as many processes as the machine has cores and memory for.

A whole suite is 37,000 steps an implementation, 18 compilations of one that compiles, and some 60 kernels for MLX's
CUDA backend: a quarter of an hour for one core. A job is as small as can be without compiling anything twice: Ember in
one implementation and dtype; optimizers of the body that share kernels in one implementation and dtype, since MLX keeps
ours on no disk.

PyTorch compiles anew for each shape and option. Still these share two jobs a dtype, without options and with them: each
process asks g++ ten questions of the processor first. PyTorch 2.11 answers each by a process that imports PyTorch, and
one process at a time: fifteen processes spent 43 to 79 seconds on a compilation of five.
"""

import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import cache, partial

from ember_mlx.parity import body, implementations, suite
from ember_mlx.parity.implementations import Implementation
from ember_mlx.parity.recorded import Recording
from ember_mlx.parity.suite import Case, Comparison

__all__ = ["Job", "Timing", "jobs_of", "run", "workers"]

EMBER = "Ember"
GIB_EACH = 4  # of memory: PyTorch, MLX and the host's side of a GPU's driver
FEW_STEPS = 2_000  # less than that is done before the first process has started
# Guesses that decide what starts first: seconds of one optimizer's compilations, by implementation, and of a step.
COMPILING = {"torch compiled cpu": 60, "torch compiled cuda": 25, "mlx cuda": 5, "triton": 5}
SECONDS_A_STEP = 0.002
STEPS_OF_BODY = 300  # of one optimizer in one dtype


@dataclass(frozen=True)
class Job:
    """One implementation and dtype of ``optimizers``, by name: of Ember in ``cases``, or without those of the body."""

    implementation: str
    dtype: str
    optimizers: tuple[str, ...]
    cases: tuple[Case, ...] = ()

    @property
    def steps(self) -> int:
        return sum(case.steps[-1] for case in self.cases) or STEPS_OF_BODY * len(self.optimizers)

    @property
    def what(self) -> str:
        """Whether its cases are those with options of Ember or those without, where they are not both."""
        kinds = {"with options" if case.rule else "without options" for case in self.cases}
        return kinds.pop() if len(kinds) == 1 else ""

    @property
    def expected_seconds(self) -> float:
        return COMPILING.get(self.implementation, 0) * len(self.optimizers) + SECONDS_A_STEP * self.steps


@dataclass(frozen=True)
class Timing:
    """When a job began, in seconds after :func:`run` did, how long it took, and how much of that its first steps.

    Those are the steps of each pair of tables up to the first that is waited for, with making the tables: what is
    compiled is compiled there. ``process`` is the worker's id.
    """

    implementation: str
    optimizers: str
    dtype: str
    what: str
    start: float
    seconds: float
    first_steps: float
    process: int


def workers(parts: int, steps: int) -> int:
    """How many processes to use here for so many parts and steps in all; 1 is this one alone.

    One core is left to what all of them start: compilers, drivers and threads of MLX.
    """
    room = min((os.cpu_count() or 1) - 1, _memory() // (GIB_EACH * 2**30))
    return 1 if steps < FEW_STEPS else max(1, min(parts, room))


def _memory():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def jobs_of(
    chosen: Sequence[Implementation], cases: Sequence[Case], dtypes: Sequence[str], optimizers: Sequence[str]
) -> list[Job]:
    """All jobs, in the order in which :func:`run` yields what they find of each optimizer."""
    jobs = []
    for one in chosen:
        groups: dict[bool, list[Case]] = {}
        for case in cases:
            groups.setdefault("compiled" in one.name and bool(case.rule), []).append(case)
        of_dtypes = [dtype for dtype in dtypes if dtype in one.dtypes]
        jobs += [Job(one.name, dtype, (EMBER,), tuple(group)) for dtype in of_dtypes for group in groups.values()]
    by_kernels: dict[str, list[str]] = {}
    for entry in _entries(optimizers):
        by_kernels.setdefault(entry.kernels, []).append(entry.name)
    for names in by_kernels.values():
        for one in (one for one in chosen if one.make_weights is not None):
            jobs += [Job(one.name, dtype, tuple(names)) for dtype in dtypes if dtype in one.dtypes]
    return jobs


def run(
    chosen: Sequence[Implementation],
    cases: Sequence[Case],
    dtypes: Sequence[str],
    recordings: Sequence[Recording] = (),
    progress: Callable[[str], None] = lambda what: None,
    *,
    optimizers: Sequence[str] = (),
    streams: Sequence[str] = body.STREAMS,
    steps: int = body.STEPS,
    timed: Callable[[Timing], None] = lambda timing: None,
    ended: Callable[[list[Comparison], int], None] = lambda comparisons, jobs: None,
) -> Iterator[Comparison]:
    """What :func:`ember_mlx.parity.suite.run` finds of Ember in ``cases``, then :func:`ember_mlx.parity.body.run`.

    The latter compares the body's ``optimizers``, by name, over ``streams`` and so many ``steps``. All of it is done in
    several processes where the machine has cores for them, and yielded in the same order however many they are.
    ``timed`` is called with the times of each job that ends, then ``ended`` with its comparisons and the number of all
    jobs.
    """
    jobs = jobs_of(chosen, cases, dtypes, optimizers)
    count = workers(len(jobs), sum(job.steps for job in jobs if job.cases))
    settings = list(recordings), tuple(streams), steps, time.time()
    found: dict[Job, dict[str, list[Comparison]]] = {}
    done = _in_pool(count, jobs, settings) if count > 1 else _in_turn(chosen, jobs, settings, progress)
    with closing(done):
        for job, result in done:
            if isinstance(result, Exception):
                found[job] = {name: [_failed(result, job, name)] for name in job.optimizers}
            else:
                found[job], timing = result
                timed(timing)
            ended([comparison for group in found[job].values() for comparison in group], len(jobs))
            progress(f"{len(found)} of {len(jobs)} jobs done: {_named(job)}")
    for name in (EMBER, *(entry.name for entry in _entries(optimizers))):
        for job in jobs:
            yield from found[job].get(name, ())


def _in_turn(chosen, jobs, settings, progress):
    """Pairs of a job and its result: one dtype after the other, whose implementations share what the oracle makes."""
    work, by_name = _Work(*settings), {one.name: one for one in chosen}
    dtypes = list(dict.fromkeys(job.dtype for job in jobs))
    for job in sorted(jobs, key=lambda job: dtypes.index(job.dtype)):
        yield job, work.do(by_name[job.implementation], job, progress)


def _in_pool(count, jobs, settings):
    """Pairs of a job and its result, or the error that ended it, as they come; left early, no process stays."""
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="ember-mlx-parity-") as folder,
        ProcessPoolExecutor(count, mp_context=spawn, initializer=_start, initargs=(folder, *settings)) as pool,
    ):
        longest_first, others = sorted(jobs, key=lambda job: -job.expected_seconds), multiprocessing.active_children()
        try:
            # Processes start here, and inherit what is blocked: Ctrl-C goes to all, and is this one's to answer.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                futures = {pool.submit(_do, job): job for job in longest_first}
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for future in as_completed(futures):
                # A process may be killed, or a framework end it.
                yield futures[future], future.exception() or future.result()
        except BaseException:
            for process in set(multiprocessing.active_children()) - set(others):
                with suppress(ProcessLookupError):  # of one that has not got so far
                    os.killpg(process.pid, signal.SIGTERM)
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def _start(folder, *settings):
    """Make this process a worker: one thread for each compiler and framework, of which none is imported yet.

    It heads a group, with the compilers that it starts, and ends when the process that started it has, in whatever way.
    MLX writes those kernels that it keeps in place, and another process might read half of one: each has its folder.
    That PyTorch's vectors compile, four of its ten questions to g++, is taken as given: every g++ of today does it.
    """
    os.setpgrp()
    threading.Thread(target=_end_with, args=[multiprocessing.parent_process()], daemon=True).start()
    os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    os.environ["MLX_PTX_CACHE_DIR"] = tempfile.mkdtemp(dir=folder)
    global _work
    _work = _Work(*settings)


def _end_with(parent):
    parent.join()
    os.killpg(0, signal.SIGTERM)


def _do(job):
    return _work.do(implementations.named(job.implementation), job)


class _Work:
    """What one process needs for its jobs."""

    def __init__(self, recordings, streams, steps, began):
        self.recordings, self.streams, self.steps, self.began = recordings, streams, steps, began
        self.expected = cache(suite.Expected)

    def do(self, implementation, job, progress=lambda what: None):
        """The comparisons of a job by optimizer, and its `Timing`."""
        first_steps: list[float] = []
        one = [replace(_timed(implementation, first_steps), dtypes=(job.dtype,))]
        start, clock = time.time() - self.began, time.perf_counter()
        if job.cases:
            run = suite.run(one, job.cases, [job.dtype], self.recordings, progress, self.expected)
            found = {EMBER: list(run)}
        else:
            run_of = partial(body.run, one, self.streams, [job.dtype], steps=self.steps, progress=progress)
            found = {entry.name: list(run_of(optimizers=[entry])) for entry in _entries(job.optimizers)}
        seconds = start, time.perf_counter() - clock, sum(first_steps)
        names = ", ".join(job.optimizers)
        return found, Timing(job.implementation, names, job.dtype, job.what, *seconds, os.getpid())


def _timed(implementation, first_steps):
    """The implementation, which adds to ``first_steps`` the seconds of making each pair of tables and of its first."""

    def timed(make):
        def made(*settings, **options):
            start = time.perf_counter()
            tables = make(*settings, **options)
            making, steps = time.perf_counter() - start, tables.steps

            def timed_steps(*arguments):
                del tables.steps  # from now on that of its class
                start = time.perf_counter()
                try:
                    return steps(*arguments)
                finally:
                    first_steps.append(making + time.perf_counter() - start)

            tables.steps = timed_steps
            return tables

        return made

    make_weights = implementation.make_weights and timed(implementation.make_weights)
    return replace(implementation, make=timed(implementation.make), make_weights=make_weights)


def _entries(optimizers):
    return [entry for entry in body.OPTIMIZERS if entry.name in optimizers]


def _named(job):
    return " ".join(part for part in (job.implementation, *job.optimizers, job.dtype, job.what) if part)


def _failed(error, job, optimizer):
    about = {"implementation": job.implementation, "dtype": job.dtype}
    if job.cases:
        case = job.cases[0]
        return suite.failed(error, case.steps[-1], about | {"stream": case.name, "shape": case.shape})
    about["implementation"] += f" {optimizer}"
    return suite.failed(error, body.STEPS, about | {"stream": body.STREAMS[0], "shape": suite.SMALL})
