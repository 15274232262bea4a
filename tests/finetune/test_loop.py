"""The loop's two exchangeable parts: the step it takes, and those who look on."""

import mlx.core as mx
import pytest

from ember_mlx import InputError
from ember_mlx.finetune.run import run
from ember_mlx.finetune.step import Step
from ember_mlx.finetune.watchers import Measurement

ITERS, ACCUMULATION = 5, 2


class Diary:
    """A watcher that writes down when it was called, and has the sum of the new weights measured."""

    def __init__(self):
        self.calls = []
        self.readings = []

    def before_training(self, model, optimizer, tables, rows):
        self.calls.append(("training", len(tables), len(rows)))

    def before_step(self, step, batch):
        self.calls.append(("before", step))
        return Measurement("sum", lambda update: sum(w.sum() for w in update.new.values()))

    def after_step(self, step, result):
        self.calls.append(("after", step, result.updated))
        self.readings += result.measurements

    def after_validation(self, step, loss):
        self.calls.append(("validation", step))


@pytest.fixture
def flags():
    return ["--iters", f"{ITERS}", "--grad-accumulation-steps", f"{ACCUMULATION}", "--steps-per-eval", "2"]


def test_watchers_are_called_around_each_step_and_measure_updates_alone(parse, flags):
    diary = Diary()
    run(parse(*flags), watchers=[diary])
    assert diary.calls[0][0] == "training"
    expected = []
    for step in range(1, ITERS + 1):
        expected += [("validation", step)] * (step in (1, ITERS) or step % 2 == 0)
        expected += [("before", step), ("after", step, step % ACCUMULATION == 0)]
    assert diary.calls[1:] == expected
    assert diary.readings == ["sum"] * (ITERS // ACCUMULATION)


def test_another_step_is_made_of_the_runs_parts_and_taken(parse, flags):
    made, taken = [], []

    def make_step(model, optimizer, loss, accumulation):
        made.append(accumulation)
        step = Step(model, optimizer, loss, accumulation)
        return lambda batch, last, measurements: taken.append(last) or step(batch, last, measurements)

    run(parse(*flags), make_step=make_step)
    assert made == [ACCUMULATION]
    assert taken == [step % ACCUMULATION == 0 for step in range(1, ITERS + 1)]


def test_a_run_over_its_memory_limit_ends_with_a_line_and_puts_mlxs_limits_back(parse, flags):
    before, most = mx.set_memory_limit(10**9), r"--memory-limit 100\.00 kB: a step took .*; use a smaller --batch-size"
    try:
        with pytest.raises(InputError, match=most):
            run(parse(*flags) | {"memory_limit": 10**5})
        assert mx.set_memory_limit(before) == 10**9
    finally:
        mx.set_memory_limit(before)
