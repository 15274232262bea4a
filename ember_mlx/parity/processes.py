"""The parity suite over several processes: one part for each implementation and dtype, as many at a time as fit.

A whole suite is 37,000 steps an implementation, each of which waits for its results, and 18 compilations of one that
compiles: on a GPU machine minutes of waiting for one core, where most others have nothing to do.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace

from ember_mlx.parity import implementations, suite
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
) -> Iterator[Comparison]:
    """As :func:`ember_mlx.parity.suite.run`, in several processes where the machine has cores for them."""
    parts = [(one.name, dtype) for one in chosen for dtype in dtypes if dtype in one.dtypes]
    count = workers(len(parts), len(parts) * sum(case.steps[-1] for case in cases))
    if count == 1:
        yield from suite.run(list(chosen), list(cases), dtypes, recordings, progress)
        return
    found: dict[tuple[str, str], list[Comparison]] = {}
    # Compiled ones first, which take longest.
    order = sorted(parts, key=lambda part: "compiled" not in part[0])
    # One thread each: PyTorch's compiler would start a pool of its own in every process.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {
            pool.submit(_part, name, dtype, list(cases), list(recordings)): (name, dtype) for name, dtype in order
        }
        for future in as_completed(futures):
            part = futures[future]
            try:
                found[part] = future.result()
            except Exception as error:  # a process may be killed, or a framework end it
                about = {"implementation": part[0], "dtype": part[1], "stream": cases[0].name, "shape": cases[0].shape}
                found[part] = [suite.failed(error, cases[0].steps[-1], about)]
            progress(f"{len(found)} of {len(parts)} parts done: {', '.join(part)}")
    for part in parts:
        yield from found[part]


def _part(name: str, dtype: str, cases: list[Case], recordings: list[Recording]) -> list[Comparison]:
    (implementation,), _ = implementations.select([name])
    return list(suite.run([replace(implementation, dtypes=(dtype,))], cases, [dtype], recordings))
