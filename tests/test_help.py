"""`--help` of every command: each option in a group, with our text and its default; examples that are true; hints."""

import argparse
import re
import shlex
from importlib import import_module

import pytest

from ember_mlx import InputError
from ember_mlx.cli import COMMANDS
from ember_mlx.shared.command_line import actions_of


class Parsed(Exception):
    """Carries a command's parser out of its ``main``."""


def parser_of(command, monkeypatch, arguments=()):
    """The parser that a command makes; it is asked for nothing else."""

    def stop(parser, *_):
        raise Parsed(parser)

    with monkeypatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises((Parsed, InputError)) as found:  # generate makes an InputError of what it does not know
            import_module(f"ember_mlx.commands.{command}").main(list(arguments))
    error = found.value if isinstance(found.value, Parsed) else found.value.__cause__
    return error.args[0]


@pytest.fixture(params=COMMANDS)
def parser(request, monkeypatch):
    return parser_of(request.param, monkeypatch)


def test_every_option_names_its_default(parser):
    for action in actions_of(parser):
        if isinstance(action, argparse._HelpAction):
            continue
        text = action.help % vars(action) if action.help else ""
        default = text.partition("Default: ")[2].rstrip(".")
        assert default or "Required" in text, action.dest
        assert "None" not in default, action.dest
        assert text[0].isupper(), action.dest
        assert text.endswith("."), action.dest
        if isinstance(action.default, str | int | float) and not isinstance(action.default, bool):
            assert default == str(action.default) or float(default) == action.default, action.dest
        elif action.default is False:
            assert default == "off", action.dest


def test_names_of_a_fixed_list_are_taken_in_any_case_and_are_then_as_help_shows_them(parser):
    for action in actions_of(parser):
        for choice in action.choices or ():
            for word in (str(choice), str(choice).upper(), str(choice).lower(), str(choice).title()):
                assert parser._get_value(action, word) == choice, action.dest


def test_every_option_stands_in_a_group_with_what_it_takes(parser):
    titles = {id(action): group.title for group in parser._action_groups for action in group._group_actions}
    for action in actions_of(parser):
        if not isinstance(action, argparse._HelpAction):
            assert titles[id(action)] not in ("options", "positional arguments"), action.dest
            takes_any = action.nargs != 0 and not action.choices
            assert not takes_any or action.metavar.isupper(), action.dest


def test_there_are_examples_and_they_are_command_lines_that_it_takes(parser):
    lines = [line.strip() for line in parser.epilog.splitlines() if re.match(r"  (cat .* \| )?ember-mlx ", line)]
    assert len(lines) >= 2
    for line in lines:
        words = shlex.split(line.partition("ember-mlx")[2])
        assert f"ember-mlx {words[0]}" == parser.prog
        parser.parse_args(words[1:])


def test_mistyped_flags_get_a_hint_in_one_line(parser):
    flag = max((flag for action in actions_of(parser) for flag in action.option_strings), key=len)
    needed = [action for action in actions_of(parser) if action.required]
    required = [word for a in needed for word in (*a.option_strings[-1:], next(iter(a.choices or "x")))]
    with pytest.raises(InputError) as error:
        parser.parse_args([*required, flag[:4] + flag[5:]])
    assert f"did you mean '{flag}'?" in str(error.value)
    assert str(error.value).endswith(f"; {parser.prog} --help lists the options")


def test_the_help_is_shown(parser, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--help"])
    assert not end.value.code
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: {parser.prog}")
    assert max(len(line) for line in shown.splitlines()[1:] if not line.startswith(" ")) <= 80


def test_the_default_model_of_generate_is_mlx_lms(monkeypatch):
    [model] = [action for action in actions_of(parser_of("generate", monkeypatch)) if action.dest == "model"]
    assert import_module("mlx_lm.generate").DEFAULT_MODEL in model.help
