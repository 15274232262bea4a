"""Reading logs: of runs that were resumed, were killed, or are none."""

import json

import pytest

from ember_mlx import InputError
from ember_mlx.finetune import run_log

pytestmark = pytest.mark.usefixtures("eager")


def start(step, **options):
    return {"event": "start", "step": step, "format": 1, "options": options, "versions": {"mlx": "1"}}


def train(step, loss=1.0):
    return {"event": "train", "step": step} | dict.fromkeys(run_log.TRAIN) | {"train_loss": loss}


def validation(step, loss=1.0):
    return {"event": "validation", "step": step, "validation_loss": loss}


def write(path, *rows, end=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return path


def test_what_a_resumed_run_tells_again_counts_once(tmp_path):
    rows = [start(0, seed=1), validation(0), train(10), train(20), validation(20), train(30)]
    rows += [start(20, seed=2), validation(20, 0.5), train(30, 0.3), train(40)]
    log = run_log.read(write(tmp_path / "log", *rows))
    assert [(row["step"], row["train_loss"]) for row in log.train] == [(10, 1.0), (20, 1.0), (30, 0.3), (40, 1.0)]
    assert [(row["step"], row["validation_loss"]) for row in log.validation] == [(0, 1.0), (20, 0.5)]
    assert log.options == {"seed": 2}
    # resumed, and killed before its first report
    log = run_log.read(write(tmp_path / "log", *rows[:7]))
    assert [row["step"] for row in log.train] == [10, 20]


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path):
    whole = json.dumps(train(20))
    for cut in range(1, len(whole) + 1):
        log = run_log.read(write(tmp_path / "log", start(0), train(10), end=whole[:cut]))
        assert [row["step"] for row in log.train] == [10]
        assert log.unfinished
    assert not run_log.read(write(tmp_path / "log", start(0), train(10))).unfinished


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "it has no line"),
        ([json.dumps(train(1))], "line 1: is not the start of a log"),
        (['{"prompt": "a", "completion": "b"}'], "line 1: is not of such a log: its event must be one of"),
        ([json.dumps(start(0)), '{"event": "tr', json.dumps(train(2))], "line 2: is not JSON"),
        ([json.dumps(start(0)), "", json.dumps(train(2))], "line 2: is not JSON"),
        ([json.dumps(start(0)), "[1]"], "line 2: is not of such a log"),
        ([json.dumps(start(0)), '{"event": []}'], "line 2: is not of such a log"),
        ([json.dumps(start(0)), '{"event": "train", "step": 1}'], "line 2 must hold event, step, train_loss"),
        (
            [json.dumps(start(0)), '{"event": "samples", "step": 1, "samples": [{"prompt": "a"}]}'],
            "line 2: samples",
        ),
        ([json.dumps(start(0)), json.dumps(train(1, "low"))], "line 2: train_loss is of type str, not int or float"),
        ([json.dumps(start(0)), json.dumps(train(1, float("nan")))], "line 2: is not JSON (NaN is no number)"),
        ([json.dumps(start(0)), json.dumps(validation(1)).replace("1.0", "1e999")], "line 2: has a number that cannot"),
        ([json.dumps(start(0)), json.dumps(train(-1))], "line 2: has a number that cannot be"),
        ([json.dumps(start(0) | {"format": 2})], "line 1: is of format 2; this release reads format 1"),
        ([json.dumps(start(0)), "\ud800"], "line 2: is not JSON"),
        (["[" * 100_000], "line 1: is not JSON"),
    ],
)
def test_what_is_no_log_is_refused_by_its_line(tmp_path, lines, message):
    path = tmp_path / "log.jsonl"
    path.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError) as raised:
        run_log.read(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("name", ["missing.jsonl", ".", "nul\0l"])
def test_what_cannot_be_read(tmp_path, name):
    with pytest.raises(InputError, match="cannot be read"):
        run_log.read(tmp_path / name)
