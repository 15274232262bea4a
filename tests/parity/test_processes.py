"""The suite over several processes finds what one process finds."""

import pytest

from ember_mlx.parity import body, implementations, processes, suite


def test_several_processes_find_what_one_does(monkeypatch):
    here = [one.name for one in implementations.implementations() if not one.missing]
    chosen, _ = implementations.select([name for name in here if name in ("mlx cpu", "torch eager cpu")])
    cases = suite.select(["random", "random, beta2 schedule"], [1, 3])
    dtypes, of_the_body = ["float32", "bfloat16"], {"streams": ["random"], "steps": 2}
    entries = [entry for entry in body.OPTIMIZERS if entry.name in ("SinkGD", "FlashLion")]
    expected = [*suite.run(chosen, cases, dtypes), *body.run(chosen, dtypes=dtypes, optimizers=entries, **of_the_body)]
    monkeypatch.setattr(processes, "workers", lambda parts, steps: 2)
    found = list(processes.run(chosen, cases, dtypes, optimizers=["SinkGD", "FlashLion"], **of_the_body))
    assert sorted(found, key=repr) == sorted(expected, key=repr)


def test_a_part_whose_process_fails_is_a_comparison_that_failed(monkeypatch):
    chosen, _ = implementations.select(["mlx cpu"])
    monkeypatch.setattr(processes, "workers", lambda parts, steps: 2)
    monkeypatch.setattr(processes, "_part", ends_its_process)
    found = list(processes.run(chosen, suite.select(["random"], [1]), ["float32"], optimizers=["SAGE"]))
    assert [one.passed for one in found] == [False, False]
    assert "process" in found[0].error


def ends_its_process(*arguments):
    import os

    os._exit(3)


@pytest.mark.parametrize(
    ("parts", "steps", "cores", "expected"),
    [(18, 200_000, 16, 8), (3, 200_000, 16, 3), (18, 200_000, 2, 1), (18, 200_000, None, 1), (18, 100, 16, 1)],
)
def test_as_many_processes_as_there_is_work_and_cores_for(monkeypatch, parts, steps, cores, expected):
    monkeypatch.setattr(processes.os, "cpu_count", lambda: cores)
    assert processes.workers(parts, steps) == expected
