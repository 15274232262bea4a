"""`--help` is true: every option is described here, in a group, with its default; and mistyped flags get a hint."""

import shlex

import pytest

from ember_mlx import InputError
from ember_mlx.commands import geometry, plan
from ember_mlx.finetune import options
from ember_mlx.finetune.option_help import EPILOG, HELP
from ember_mlx.shared.command_line import actions_of

ENTRIES = {name: entry for group in HELP.values() for name, entry in group.items()}
PARSER = options.build_parser()
ACTIONS = {action.dest: action for action in actions_of(PARSER) if action.dest != "help"}


def test_every_option_is_described_once_in_a_group():
    assert ENTRIES.keys() == ACTIONS.keys()
    assert len(ENTRIES) == sum(map(len, HELP.values()))


@pytest.mark.parametrize("name", ACTIONS)
def test_every_option_names_its_default(name):
    text, value = ACTIONS[name].help, getattr(options.parse([]), name)
    if name == "data":
        assert "Required" in text
        return
    default = text.partition("Default: ")[2].rstrip(".")
    assert default
    if isinstance(value, bool) and name != "train":
        assert default.partition(",")[0] == ("on" if value else "off")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        assert float(default.partition(",")[0]) == value
    elif isinstance(value, str):
        assert default == value


@pytest.mark.parametrize("name", ACTIONS)
def test_what_takes_a_value_says_which(name):
    action = ACTIONS[name]
    assert (action.metavar is None) == (action.nargs == 0 or action.choices is not None)
    assert action.metavar is None or action.metavar.isupper()


def test_the_examples_are_command_lines_that_it_takes():
    lines = [line.strip() for line in EPILOG.splitlines() if line.strip().startswith("ember-mlx ")]
    assert len(lines) == 3
    for line in lines:
        assert options.parse(shlex.split(line)[2:], data_required=True).data == "my_data"


@pytest.mark.parametrize(("command", "own"), [(plan, "--memory"), (geometry, "--out")])
def test_commands_that_take_the_options_of_train_show_them(command, own, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    assert not end.value.code
    shown = capsys.readouterr().out
    assert own in shown
    assert all(action.option_strings[-1] in shown for action in ACTIONS.values())


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("--tabel-row-clip 3", "(did you mean '--table-row-clip'?)"),
        ("--batchsize=3", "--batchsize=3 (did you mean '--batch-size'?)"),
        ("--lerning-rate 1", "(did you mean '--learning-rate'?)"),
        ("--optimizer adamw8bit", "(did you mean 'adamw_8bit'?)"),
        ("--table-optimizer adamm", "(did you mean 'adamw'?)"),
        ("--zzz 1", "--zzz 1; ember-mlx train --help"),
    ],
)
def test_a_mistyped_flag_gets_a_hint(words, hint):
    with pytest.raises(InputError) as error:
        options.parse(words.split())
    assert hint in str(error.value)


def test_a_mistyped_flag_of_a_command_of_its_own_gets_one_too():
    with pytest.raises(InputError, match=r"did you mean '--memory'\?\); ember-mlx plan --help"):
        plan.main(["--memroy", "16GB"])


def test_data_is_required_unless_the_yaml_file_names_some(tmp_path):
    with pytest.raises(InputError, match=r"^--data is required: a folder with train.jsonl"):
        options.parse(["--model", "x"], data_required=True)
    for text in ("data: here\n", "hf_dataset: {path: imdb}\n"):
        (tmp_path / "c.yaml").write_text(text)
        options.parse(["--config", str(tmp_path / "c.yaml")], data_required=True)
