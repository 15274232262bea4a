"""The log that a run writes: complete, once, also over a resumption and on a full disk."""

import json
import math
import resource
import signal

import pytest
from finetune.breaking import BreakAt, Breaks

from ember_mlx import InputError
from ember_mlx.finetune import run_log
from ember_mlx.finetune.run import run
from ember_mlx.finetune.run_log_writer import RunLogWriter

pytestmark = pytest.mark.usefixtures("eager")


def without_times(rows):
    return [{key: x for key, x in row.items() if key not in ("tokens_per_second", "peak_memory")} for row in rows]


def test_a_run_tells_everything_and_a_resumed_one_the_same(parse, tmp_path):
    common = ["--iters", 9, "--steps-per-eval", 3, "--save-every", 4, "--fine-tune-type", "full", "--no-stream"]
    result = run(parse(*common, "--log-jsonl", tmp_path / "new" / "whole.jsonl", adapter="whole"))
    whole = run_log.read(tmp_path / "new" / "whole.jsonl")
    assert whole.options["iters"] == 9
    assert "mlx" in whole.versions
    assert [row["step"] for row in whole.train] == [*range(1, 10)]
    assert [row["step"] for row in whole.validation] == [0, 2, 5, 8]
    assert whole.validation[0]["validation_loss"] == result.loss_before
    assert [row["validation_loss"] for row in whole.end] == [result.loss_after]
    for row, perplexity in ((whole.validation[0], result.perplexity_before), (whole.end[0], result.perplexity_after)):
        assert row["perplexity"] == perplexity == pytest.approx(math.exp(row["validation_loss"]))
    for row in whole.train:
        assert all(row[name] > 0 for name in run_log.TRAIN)
        assert row["table_learning_rate"] == pytest.approx(3e-4)
        assert row["peak_memory"] < 1e9

    log = ["--log-jsonl", tmp_path / "broken" / "log.jsonl"]
    with pytest.raises(Breaks):
        run(parse(*common, *log, adapter="broken"), BreakAt(7))
    with open(log[1], "a") as file:
        file.write('{"event": "tra')  # as a kill may leave it
    run(parse(*common, *log, "--resume", adapter="broken"))
    resumed = run_log.read(log[1])
    assert without_times(resumed.train) == without_times(whole.train)
    assert (resumed.validation, resumed.end) == (whole.validation, whole.end)
    starts = [row["step"] for row in map(json.loads, log[1].open()) if row["event"] == "start"]
    assert starts == [0, 4]


def test_steps_between_reports_and_gathered_gradients_are_measured(parse, tmp_path):
    log = tmp_path / "log.jsonl"
    accumulate = ["--grad-accumulation-steps", 3, "--steps-per-report", 4, "--iters", 14]
    run(parse(*accumulate, "--train-tables", "none", "--log-jsonl", log))
    rows = run_log.read(log).train
    assert [row["step"] for row in rows] == [4, 8, 12, 14]
    assert [row["table_learning_rate"] for row in rows] == [None] * 4
    assert [row["update_ratio_tables"] for row in rows] == [None] * 4
    ratios = [row["update_ratio_body"] for row in rows]
    assert all(ratios)
    assert ratios[2] == ratios[3]  # 14 comes before the next update, of step 15


def test_a_full_disk_costs_no_line_and_not_the_run(parse, tmp_path, capsys):
    args = parse("--log-jsonl", tmp_path / "log.jsonl") | {"token_tables": []}
    (tmp_path / "log.jsonl").touch()
    writer = RunLogWriter(args, 0, goes_on=False)
    size = (tmp_path / "log.jsonl").stat().st_size
    before, soft = signal.getsignal(signal.SIGXFSZ), resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, soft[1]))  # as if the disk took ten bytes more
        for step in (1, 2):
            writer.on_val_loss_report({"iteration": step, "val_loss": float("nan")})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
        signal.signal(signal.SIGXFSZ, before)
    assert (tmp_path / "log.jsonl").stat().st_size == size
    writer.end(3, 0.5)
    log = run_log.read(tmp_path / "log.jsonl")
    assert [(row["step"], row["validation_loss"]) for row in log.validation + log.end] == [
        (1, None),
        (2, None),
        (3, 0.5),
    ]
    assert capsys.readouterr().out.count("not logged") == 1


def test_what_is_there_is_not_replaced_unasked(parse, folders, tmp_path):
    log = tmp_path / "log.jsonl"
    run(parse("--log-jsonl", log, adapter="one"))
    before = log.read_bytes()
    with pytest.raises(InputError, match="already holds the log of a run; give another path, or --overwrite"):
        run(parse("--log-jsonl", log, adapter="two"))
    # rows of a data set, even with --overwrite; a folder; a folder that cannot be made
    data = tmp_path / "train.jsonl"
    data.write_bytes((folders["data"] / "train.jsonl").read_bytes())
    for path, message in ((data, "exists and is not a log"), (tmp_path, "ordinary file"), (log / "log", "be written")):
        with pytest.raises(InputError, match=message):
            run(parse("--log-jsonl", path, "--overwrite", adapter="two"))
    assert not (tmp_path / "two").exists()
    assert (log.read_bytes(), data.stat().st_size) == (before, (folders["data"] / "train.jsonl").stat().st_size)
    run(parse("--log-jsonl", log, "--overwrite", adapter="two"))
    assert log.read_bytes() != before
    assert run_log.read(log).options["adapter_path"].endswith("two")
