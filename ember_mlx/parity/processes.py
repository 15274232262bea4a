"""The parity suite over several processes: parts by implementation, dtype and optimizer, as many at a time as fit.

A whole suite is 37,000 steps an implementation, each of which waits for its results, and 18 compilations of one that
compiles: on a GPU machine minutes of waiting for one core, where most others have nothing to do.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial

from ember_mlx.parity import body, implementations, suite
from ember_mlx.parity.implementations import Implementation
from ember_mlx.parity.recorded import Recording
from ember_mlx.parity.suite import Case, Comparison

__all__ = ["run", "workers"]

CORES_EACH = 2  # a compiler and a GPU's driver keep a second one busy
FEW_STEPS = 2_000  # less than that is done before the first process has started


def workers(parts: int, steps: int) -> int:
    """How many processes to use here for so many parts and steps in all; 1 is this one alone."""
    return 1 if steps < FEW_STEPS else max(1, min(parts, (os.cpu_count() or 1) // CORES_EACH))


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
) -> Iterator[Comparison]:
    """What :func:`ember_mlx.parity.suite.run` yields of Ember in ``cases``, then :func:`ember_mlx.parity.body.run`.

    The latter compares the body's ``optimizers``, by name, over ``streams`` and so many ``steps``. All of it is done in
    several processes where the machine has cores for them.
    """
    ember = [(one.name, (dtype,), "") for one in chosen for dtype in dtypes if dtype in one.dtypes and cases]
    others = [(one.name, tuple(dtypes), name) for name in optimizers for one in chosen if one.make_weights is not None]
    # Compiled ones first, which take longest.
    parts = sorted(ember, key=lambda part: "compiled" not in part[0]) + others
    count = workers(len(parts), len(ember) * sum(case.steps[-1] for case in cases))
    if count == 1:
        yield from suite.run(list(chosen), list(cases), dtypes, recordings, progress)
        yield from body.run(list(chosen), streams, dtypes, _entries(optimizers), steps, progress)
        return
    found: dict[tuple[str, tuple[str, ...], str], list[Comparison]] = {}
    # One thread each: PyTorch's compiler would start a pool of its own in every process.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    part_of = partial(_part, list(cases), list(recordings), tuple(streams), steps)
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(part_of, *part): part for part in parts}
        for future in as_completed(futures):
            part = futures[future]
            try:
                found[part] = future.result()
            except Exception as error:  # a process may be killed, or a framework end it
                found[part] = [_failed(error, *part, cases)]
            progress(f"{len(found)} of {len(parts)} parts done: {part[0]} {part[2] or part[1][0]}")
    for part in (*ember, *others):
        yield from found[part]


def _part(cases, recordings, streams, steps, name: str, dtypes: tuple[str, ...], optimizer: str) -> list[Comparison]:
    (implementation,), _ = implementations.select([name])
    if optimizer:
        return list(body.run([implementation], streams, dtypes, _entries([optimizer]), steps))
    return list(suite.run([replace(implementation, dtypes=dtypes)], cases, dtypes, recordings))


def _entries(optimizers):
    return [entry for entry in body.OPTIMIZERS if entry.name in optimizers]


def _failed(error, name, dtypes, optimizer, cases):
    about = {"implementation": f"{name} {optimizer}".strip(), "dtype": dtypes[0]}
    if optimizer:
        return suite.failed(error, body.STEPS, about | {"stream": body.STREAMS[0], "shape": suite.SMALL})
    return suite.failed(error, cases[0].steps[-1], about | {"stream": cases[0].name, "shape": cases[0].shape})
