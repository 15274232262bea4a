"""Errors and warnings name a flag, or the file with its key: as the option was given."""

import json

import pytest

import ember_mlx
from ember_mlx import InputError
from ember_mlx.commands import data, plan, train
from ember_mlx.finetune import options
from ember_mlx.finetune.as_given import as_given, naming_as_given


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--batch-size 0: must be", "--config a: batch_size 0: must be"),
        ("Warning: --batch-size 9 cuts", "Warning: --config a: batch_size 9 cuts"),
        ("lora_parameters: rank: 0 must be", "--config a: lora_parameters: rank: 0 must be"),
        ("--iters 9 and --batch-size 0: must be", "--iters 9 and --batch-size 0: must be"),
        ("--config a: batch_size: 'x' must be", "--config a: batch_size: 'x' must be"),
        ("--batch-sizes: no option", "--batch-sizes: no option"),
        ("the data has no rows", "the data has no rows"),
        ("", ""),
    ],
)
def test_the_option_that_a_text_begins_with_is_named_as_it_was_given(text, shown):
    given = {"config": "", "iters": "", "batch_size": "--config a: ", "lora_parameters": "--config a: "}
    assert as_given(text, given) == shown
    with pytest.raises(InputError) as raised, naming_as_given(given):
        raise InputError(text)
    assert str(raised.value) == shown


FAULTS = [  # of lines of a file, found earlier and later in a run
    ({"batch_size": 0}, "batch_size 0: must be a whole number"),
    ({"warmup": -1}, "warmup -1: must be a share"),
    ({"optimizer_config": {"adam": {"eps": 0}}}, "optimizer_config: adam: eps: 0 must be"),
    ({"lr_schedule": {"name": "x"}}, "lr_schedule: name: 'x' is no schedule"),
    ({"table_weight_decay": 1e9}, "table_optimizer Ember: its learning rate"),
    ({"num_layers": 99}, "num_layers 99: the model has"),
    ({"train_tables": "head"}, "train_tables head: the head is the embedding"),
    ({"lora_parameters": {"rank": 8}}, "lora_parameters "),
]


@pytest.mark.parametrize(("lines", "says"), FAULTS)
def test_each_command_names_the_file_and_python_its_keyword(folders, tmp_path, monkeypatch, lines, says):
    monkeypatch.chdir(tmp_path)
    lines = {"table_optimizer": "ember", "model": str(folders["tied"]), "data": str(folders["data"])} | lines
    (tmp_path / "c.yaml").write_text(json.dumps(lines))
    for main in (train.main, plan.main):
        with pytest.raises(InputError) as raised:
            main(["--config", "c.yaml"])
        assert str(raised.value).startswith(f"--config c.yaml: {says}")
    with pytest.raises(InputError) as raised:
        ember_mlx.train(folders["tied"], config="c.yaml", quiet=True)
    assert str(raised.value).startswith(f"config c.yaml: {says}")


def test_what_a_flag_goes_over_is_the_flags(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(json.dumps({"data": "none/such", "batch_size": 9, "num_layers": 99}))
    with pytest.raises(InputError, match="^--batch-size 0: must be"):
        options.parse(["--config", "c.yaml", "--batch-size", "0"])
    with pytest.raises(InputError, match="^--config c.yaml: data none/such"):
        data.main(["--config", "c.yaml", "--model", str(folders["tied"])])
    with pytest.raises(InputError, match="^--data other"):
        data.main(["other", "--config", "c.yaml", "--model", str(folders["tied"])])


def test_warnings_of_the_run_name_the_file_too(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    idle = {"valid_fraction": 0.2, "peer_timeout": 9, "patience": 5, "body_rounding": "stochastic"}
    full = {"fine_tune_type": "full", "stream": False, "iters": 1, "batch_size": 1, "val_batches": 1}
    cut = {"max_seq_length": 4}
    (tmp_path / "c.yaml").write_text(json.dumps(idle | full | cut))
    train.main(["--config", "c.yaml", "--model", str(folders["untied"]), "--data", str(folders["data"])])
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning: ")]
    for name in (*idle, *cut):
        assert any(line.startswith(f"Warning: --config c.yaml: {name} ") for line in warned), (name, warned)
    assert not any(line.startswith("Warning: --") and "c.yaml" not in line for line in warned)
