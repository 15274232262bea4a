"""Collectives are left to the stream that MLX chooses: on the CPU's, NCCL fails."""

import mlx.core as mx
import pytest

from ember_mlx.finetune.run import run
from ember_mlx.finetune.workers import Workers


@pytest.fixture
def asked(monkeypatch):
    """The stream and the dtype of each collective that is asked for; each does what two equal workers would get."""
    found = []

    def spy(name, result):
        def collective(x, group=None, stream=None):
            found.append((name, stream, getattr(x, "dtype", None)))
            return result(mx.array(x))

        monkeypatch.setattr(mx.distributed, name, collective)

    spy("all_sum", lambda x: x)
    spy("all_max", lambda x: x)
    spy("all_gather", lambda x: mx.concatenate([x, x]))
    return found


def test_of_workers(asked):
    workers = Workers(0, 2)
    workers.agree({"--seed": 0})
    with workers.one_outcome():
        pass
    assert workers.text_of_leader("text") == "text"
    for array in (mx.ones(3, mx.bfloat16), mx.ones(2, mx.float32), mx.array([True])):
        assert mx.array_equal(workers.array_of_leader(array), array)
    assert {name for name, *_ in asked} == {"all_sum", "all_max", "all_gather"}
    assert {stream for _, stream, _ in asked} == {None}
    assert not {dtype for *_, dtype in asked} & {mx.uint16, mx.int16, mx.bool_}, "NCCL does not send these"


def test_of_a_run(asked, parse):
    run(parse("--iters", 1))
    assert [name for name, *_ in asked].count("all_sum") >= 4  # a report's two, and a validation's two
    assert {stream for _, stream, _ in asked} == {None}
