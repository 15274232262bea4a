"""The suite over several processes finds what one process finds."""

from itertools import product

import pytest

from ember_mlx.parity import body, implementations, processes, suite


def test_several_processes_find_what_one_does(monkeypatch):
    here = [one.name for one in implementations.implementations() if not one.missing]
    chosen, _ = implementations.select([name for name in here if name in ("mlx cpu", "torch eager cpu")])
    cases = suite.select(["random", "random, beta2 schedule"], [1, 3])
    dtypes, of_the_body = ["float32", "bfloat16"], {"streams": ["random"], "steps": 2}
    names = ["SinkGD", "SinkGD 2 passes", "FlashLion"]
    entries = [entry for entry in body.OPTIMIZERS if entry.name in names]
    one_process = list(processes.run(chosen, cases, dtypes, optimizers=names, **of_the_body))
    expected = [*suite.run(chosen, cases, dtypes), *body.run(chosen, dtypes=dtypes, optimizers=entries, **of_the_body)]
    monkeypatch.setattr(processes, "workers", lambda parts, steps: 2)
    timings, told = [], []
    told_of = {"timed": timings.append, "progress": told.append}
    found = list(processes.run(chosen, cases, dtypes, optimizers=names, **told_of, **of_the_body))
    assert found == one_process
    assert sorted(found, key=repr) == sorted(expected, key=repr)
    assert len(timings) == len(chosen) * len(dtypes) * 3  # Ember, and two kinds of kernels of the body
    assert all(0 < one.first_steps < one.seconds for one in timings)
    assert [line.partition(":")[0] for line in told] == [
        f"{n + 1} of {len(timings)} jobs done" for n in range(len(timings))
    ]


def test_a_part_whose_process_fails_is_a_comparison_that_failed(monkeypatch):
    chosen, _ = implementations.select(["mlx cpu"])
    monkeypatch.setattr(processes, "workers", lambda parts, steps: 2)
    monkeypatch.setattr(processes, "_do", ends_its_process)
    found = list(processes.run(chosen, suite.select(["random"], [1]), ["float32"], optimizers=["SAGE"]))
    assert [one.passed for one in found] == [False, False]
    assert "process" in found[0].error


def ends_its_process(*arguments):
    import os

    os._exit(3)


def test_nothing_is_compiled_by_two_jobs_and_every_case_is_of_one():
    chosen = [one for one in implementations.implementations() if one.name in ("mlx cpu", "torch compiled cpu")]
    cases, dtypes = list(suite.cases()), ["float32", "bfloat16"]
    jobs = processes.jobs_of(chosen, cases, dtypes, ["SinkGD", "SAGE", "SinkGD 2 passes", "AdamMini"])
    for one, dtype in product(chosen, dtypes):
        of_ember = [job.cases for job in jobs if job.cases and (job.implementation, job.dtype) == (one.name, dtype)]
        assert sorted((case for of_job in of_ember for case in of_job), key=cases.index) == cases
        compiled = [{(case.shape, case.rule) for case in of_job} for of_job in of_ember]
        assert sum(map(len, compiled)) == len(set.union(*compiled))
        # Each process asks of g++ what the processor can before it compiles: few that compile, and no longer one.
        assert len(of_ember) == (2 if "compiled" in one.name else 1)
    of_body = [(job.implementation, job.dtype, job.optimizers) for job in jobs if not job.cases]
    by_kernels = ("AdamMini", "SAGE"), ("SinkGD", "SinkGD 2 passes")
    assert of_body == [("mlx cpu", dtype, names) for names in by_kernels for dtype in dtypes]


@pytest.mark.parametrize(
    ("parts", "steps", "cores", "gib", "expected"),
    [
        (180, 200_000, 16, 128, 15),
        (3, 200_000, 16, 128, 3),
        (180, 200_000, 10, 16, 4),
        (180, 200_000, 2, 24, 1),
        (180, 200_000, None, 128, 1),
        (180, 100, 16, 128, 1),
        (180, 200_000, 8, 2, 1),
    ],
)
def test_as_many_processes_as_there_is_work_and_room_for(monkeypatch, parts, steps, cores, gib, expected):
    monkeypatch.setattr(processes.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(processes, "_memory", lambda: gib * 2**30)
    assert processes.workers(parts, steps) == expected
