"""What the tables' rate and Ember's row floor are where they are not given."""

import json
import re
import shutil

import mlx.core as mx
import pytest

import ember_mlx
from ember_mlx import InputError
from ember_mlx.commands import train
from ember_mlx.finetune import checkpoints, options, resume
from ember_mlx.finetune.keywords import options_of
from ember_mlx.finetune.model_card import model_card
from ember_mlx.finetune.workers import Workers

pytestmark = pytest.mark.usefixtures("eager")

FLOORED, PLAIN, NONE = (3, 3e-4), (0, 1e-4), (None, 1e-4)


def decided(args):
    return args.table_row_floor, args.table_learning_rate


@pytest.mark.parametrize(
    ("words", "text", "expected"),
    [
        ("", "{}", FLOORED),
        ("--table-optimizer Ember", "{}", FLOORED),
        ("", "{table_row_floor: null, table_learning_rate: null}", FLOORED),
        ("--table-row-floor 0", "{}", PLAIN),
        ("", "table_row_floor: 0", PLAIN),
        ("--table-row-floor 10", "table_row_floor: 0", (10, 3e-4)),
        ("--table-row-floor 0", "table_learning_rate: 5e-4", (0, 5e-4)),
        ("--table-learning-rate 1e-4", "{}", (3, 1e-4)),
        ("--table-learning-rate 0", "{}", (3, 0)),
        ("", "table_lr_schedule: {name: cosine_decay, arguments: [1e-3, 9]}", FLOORED),
        *((f"--table-optimizer {name}", "{}", NONE) for name in ("adamw", "adafactor", "sgd", "sage")),
        ("", "table_optimizer: adamw", NONE),
        ("--table-optimizer adamw --table-row-floor 0", "table_row_floor: 3", PLAIN),  # a recipe beside AdamW
        ("--train-tables none", "{}", NONE),
    ],
)
def test_ember_has_a_floor_and_its_rate_unless_told_otherwise(tmp_path, words, text, expected):
    (tmp_path / "c.yaml").write_text(text)
    assert decided(options.parse(["--config", str(tmp_path / "c.yaml"), *words.split()])) == expected


def test_a_keyword_of_python_decides_as_a_flag_does():
    for given, expected in [({}, FLOORED), ({"table_row_floor": 0}, PLAIN), ({"table_row_floor": None}, FLOORED)]:
        assert decided(options_of({"data": "x"} | given)[0]) == expected
    for name in ("adamw", "sgd"):
        with pytest.raises(InputError, match="^--table-row-floor: is for ember alone.*or give 0$"):
            options_of({"data": "x", "table_optimizer": name, "table_row_floor": 3.0})


def test_what_is_decided_is_recorded_and_told(tmp_path, folders):
    short = {"iters": 1, "batch_size": 1, "val_batches": 1, "quiet": True}
    result = ember_mlx.train(folders["untied"], folders["data"], adapter_path=tmp_path / "a", **short)
    assert [line.optimizer for line in result.trained if line.table] == ["Ember, row floor 3"] * 2
    assert [line.learning_rate for line in result.trained if line.table] == ["0.0003"] * 2
    record = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (record["table_row_floor"], record["table_learning_rate"]) == FLOORED


def test_a_model_card_names_them_so_that_its_options_make_the_same_run(tmp_path):
    record = vars(options.parse([]))
    floor, rate = "table_row_floor: 3.0", "table_learning_rate: 0.0003"
    for changed, shown in [
        ({}, {floor, rate}),
        ({"table_learning_rate": 1e-4}, {floor, "table_learning_rate: 0.0001"}),
        ({"table_row_floor": 0.0, "table_learning_rate": 1e-4}, {"table_row_floor: 0.0"}),
        ({"table_row_floor": None, "table_learning_rate": 1e-4}, {"table_row_floor: 0.0"}),  # of a run of before
        ({"table_optimizer": "sgd", "table_row_floor": None, "table_learning_rate": 1e-4}, {"table_optimizer: sgd"}),
        ({"optimizer": "sinkgd", "learning_rate": 1e-5}, {"optimizer: sinkgd", "learning_rate: 1.0e-05", floor, rate}),
        ({"optimizer": "sinkgd", "learning_rate": 1e-4}, {"optimizer: sinkgd", "learning_rate: 0.0001", floor, rate}),
    ]:
        lines = model_card(str(tmp_path), "mine", record | changed).splitlines()
        assert {line for line in lines if re.match("(table_)?(row_floor|learning_rate|optimizer):", line)} == shown


def test_a_run_of_before_the_floor_is_resumed_without_it_bit_for_bit(folders, tmp_path, capsys):
    kept = {"model": folders["untied"], "data": folders["data"], "batch_size": 2, "val_batches": 1}
    kept |= {"save_every": 2, "keep_checkpoints": 2, "steps_per_report": 1}
    words = [str(word) for name, value in (kept | {"iters": 4}).items() for word in (options.flag(name), value)]
    of_then = ["--table-row-floor", "0", "--table-learning-rate", "1e-4"]
    train.main([*words, *of_then, "--adapter-path", str(tmp_path / "whole")])
    shutil.copytree(tmp_path / "whole", tmp_path / "old")
    shutil.rmtree(tmp_path / "old" / "checkpoints" / "step-0000004")
    index = tmp_path / "old" / "checkpoints" / "step-0000002" / checkpoints.INDEX
    content = json.loads(index.read_text())["content"]
    content["options"]["table_row_floor"] = None  # as before
    index.write_text(json.dumps({"sha256": checkpoints._checksum(content), "content": content}))

    words += ["--adapter-path", str(tmp_path / "old"), "--resume"]
    for given, message in [
        ("--table-row-floor 3", "run: --table-row-floor was 0.0 and is now 3.0. Give"),
        ("--table-learning-rate 3e-4", "run: --table-learning-rate was 0.0001 and is now 0.0003. Give"),
    ]:
        with pytest.raises(InputError, match=message):
            train.main([*words, *given.split()])
    capsys.readouterr()
    train.main(words)
    said = " ".join(capsys.readouterr().out.split())
    assert "As in the run that is resumed: --table-row-floor 0 and --table-learning-rate 0.0001 " in said
    assert "Resuming after step 2" in said
    old, whole = (checkpoints.find(tmp_path / name, True) for name in ("old", "whole"))
    assert old.position == whole.position
    assert all(mx.array_equal(old.weights[name], array) for name, array in whole.weights.items())
    assert all(mx.array_equal(old.optimizer[name], array) for name, array in whole.optimizer.items())
    # Its record says 0 by now, and the next one to go on keeps that too.
    again = ember_mlx.train(**kept, iters=6, resume=True, adapter_path=tmp_path / "old", quiet=True)
    assert decided(again.options) == PLAIN


@pytest.mark.parametrize(
    ("began", "resumed", "said"),
    [
        ("--table-row-floor 0 --table-learning-rate 3e-4", "", "--table-row-floor 0"),
        ("--table-row-floor 0", "", "--table-row-floor 0 and --table-learning-rate 0.0001"),
        ("--table-row-floor 10 --table-learning-rate 1e-3", "", "--table-row-floor 10 and --table-learning-rate 0.001"),
        ("--table-learning-rate 5e-4", "", "--table-learning-rate 0.0005"),
        ("--table-row-floor 0", "--table-row-floor 0", ""),
        ("--table-row-floor 0 --table-learning-rate 3e-4", "--table-row-floor 0", "--table-learning-rate 0.0003"),
        ("", "", ""),
        ("--optimizer sinkgd --learning-rate 2e-4", "--optimizer sinkgd", "--learning-rate 0.0002"),
        ("--optimizer sinkgd --learning-rate 3e-4", "--optimizer sinkgd --learning-rate 1e-4", ""),
        ("--optimizer adamw --learning-rate 3e-4", "--optimizer adamw", "--learning-rate 0.0003"),
        ("--optimizer adamw --learning-rate 3e-4", "--optimizer sgd", ""),  # has its own
        ("--table-optimizer adamw", "--table-optimizer adamw", ""),
        (
            "--table-row-floor 10 --table-learning-rate 5e-4",
            "--table-optimizer sgd",
            None,
        ),  # another optimizer's floor and rate
    ],
)
def test_a_resumed_run_keeps_the_floor_and_the_rate_that_are_not_given(monkeypatch, capsys, began, resumed, said):
    before = options.parse(began.split())
    monkeypatch.setattr(checkpoints, "options_of", lambda folder, asked: resume.as_json(vars(before)))
    args, given = options.parse_given(["--resume", *resumed.split()])
    kept = resume.rates_as_before(args, given, Workers(0, 1))
    assert (decided(kept) == decided(before)) == (said is not None)
    assert capsys.readouterr().out == (f"As in the run that is resumed: {said}\n" if said else "")


def test_a_rate_of_a_checkpoint_that_no_run_can_have_is_refused(monkeypatch):
    args, given = options.parse_given(["--resume"])
    for wrong, message in [
        ({"table_learning_rate": -1.0}, "rate -1.0: must"),
        ({"table_row_floor": 1e99}, "r 1e.99: "),
    ]:
        before = resume.as_json(vars(args)) | wrong
        monkeypatch.setattr(checkpoints, "options_of", lambda folder, asked, before=before: before)
        with pytest.raises(InputError, match=message):
            resume.rates_as_before(args, given, Workers(0, 1))
