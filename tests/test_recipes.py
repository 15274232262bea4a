"""The recipes: each is complete, true, copied whole, and trains."""

import argparse
import re
import shlex
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import ember_mlx
from ember_mlx import InputError, cli
from ember_mlx.commands import recipes
from ember_mlx.finetune import options
from ember_mlx.finetune.build_optimizer import body_optimizer, check_rates
from ember_mlx.finetune.keywords import NAMES
from ember_mlx.finetune.mlx_lm_internals import load_yaml
from ember_mlx.recipes import RECIPES

ROOT = Path(__file__).parents[1]
TABLES, WHOLE = ((ROOT / f"examples/benchmarks/quality/{name}.md").read_text() for name in ("tables", "recipes"))
each = pytest.mark.parametrize("name", RECIPES)


def comments(name):
    return [line[1:].strip() for line in RECIPES[name].read_text().splitlines() if line.startswith("#")]


def test_all_are_there_and_in_the_wheel():
    assert list(RECIPES) == ["added-tokens", "first-lora", "from-nothing", "full-on-16gb", "new-language"]
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    # hatch takes every file in these folders that git does not ignore
    assert wheel == {"packages": ["ember_mlx", "cuda_ref"]}
    assert all(path.is_relative_to(Path(ember_mlx.__file__).parent) for path in RECIPES.values())


@each
def test_a_recipe_says_what_it_needs_and_every_key_is_an_option_with_a_reason(name):
    first, second, *_ = comments(name)
    assert re.fullmatch(r"[A-Z][^:]+: .+\.", first)
    assert re.fullmatch(r"Needs: .+\.", second)
    lines = RECIPES[name].read_text().splitlines()
    values = load_yaml("\n".join(lines))
    assert values.keys() <= NAMES - {"model", "data", "adapter_path"}
    blocks = "\n".join(lines).split("\n\n")[1:]
    assert all(block.startswith("#") for block in blocks if block.strip())
    assert max(map(len, lines)) <= 120


@each
def test_the_flags_names_and_commands_in_its_comments_exist(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipes.main([name])
    text = " ".join(comments(name))
    flags = {flag for action in options.build_parser()._actions for flag in action.option_strings}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - {"--memory"} <= flags
    commands = [shlex.split(line)[1:] for line in comments(name) if line.startswith("ember-mlx ")]
    assert commands
    for command, *words in commands:
        assert f"{name}.yaml" in words
        if command == "train":
            options.parse(words, data_required=True)
        else:
            parser = import_module(f"ember_mlx.commands.{command}")._parser()
            assert isinstance(parser.parse_args(words), argparse.Namespace)


@each
def test_every_optimizer_and_its_own_advice_go_over_it_without_a_word(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipes.main([name])
    capsys.readouterr()
    (choices,) = (action.choices for action in options.build_parser()._actions if action.dest == "optimizer")
    advice = re.findall(r"`(--[^`]+)`", " ".join(comments(name)))
    assert len(advice) == (name == "full-on-16gb")
    for flags in (*(f"--optimizer {optimizer}" for optimizer in choices), *advice):
        args = options.parse(["--config", f"{name}.yaml", *flags.split()])
        check_rates(args, tables=True)
        assert args.optimizer == flags.split()[1]
    assert body_optimizer(options.parse(["--config", f"{name}.yaml"])).bias_correction
    assert capsys.readouterr().out == ""


def section_of(text, setting):
    return text.partition(f"\n## {setting}\n")[2].partition("\n## ")[0]


def losses_with_a_floor(setting):
    """By the half decades of the rates of body and tables, with a row floor of 3: the loss of the search's seed."""
    line = re.search(
        r"^\| AdamW; Ember, row_floor 3\b[^|]*\|([^|]+: [^|]+)\|$", section_of(WHOLE, setting), re.MULTILINE
    )
    tried = (one.partition(":") for one in line[1].split(";"))
    losses = {tuple(map(float, rates.split())): float(loss) for rates, _, loss in tried}
    return {rates: loss for rates, loss in losses.items() if {f"{rate:.1e}"[:3] for rate in rates} <= {"1.0", "3.2"}}


def rates_of(setting, tables):
    """The rates of the body and, by the optimizer of the tables, of these, as the benchmark's tables have them."""
    section = section_of(TABLES, setting)
    body = float(re.search(r"body at ([\d.e-]+)\.\n", section)[1])
    row = next(line for line in section.splitlines() if line.startswith(f"| {tables} |"))
    return body, float(row.split("|")[-2])


def test_the_rates_are_those_of_the_benchmark():
    values = {name: load_yaml(path.read_text()) for name, path in RECIPES.items()}
    body, table = rates_of("smollm2-shakespeare", "Ember")
    assert values["new-language"]["lr_schedule"]["arguments"] == [body, 360, body / 10]
    assert values["new-language"]["table_learning_rate"] == table
    assert values["full-on-16gb"]["learning_rate"] == body
    for data, body, off in (("rasbt", 0.00032, 0), ("wikisql", 0.00032, 0.0019), ("shakespeare", 3.2e-5, 0)):
        losses = losses_with_a_floor(f"smollm2-{data}")
        ours = losses[body, values["full-on-16gb"]["table_learning_rate"]]
        assert ours - min(losses.values()) == pytest.approx(off, abs=1e-6)
    settings = [f"smollm2-{name}-lora-constant" for name in ("shakespeare", "wikisql", "rasbt")]
    assert [rates_of(setting, "Ember") for setting in settings] == [(1e-4, 1e-4), (3.2e-4, 1e-4), (3.2e-4, 1e-4)]
    with_a_floor = [losses_with_a_floor(setting) for setting in settings]
    best = [min(losses, key=losses.get) for losses in with_a_floor]
    assert best == [(1e-4, 3.2e-4), (3.2e-4, 3.2e-4), (3.2e-4, 3.2e-4)]
    for name in ("first-lora", "added-tokens"):
        assert (values[name]["learning_rate"], values[name]["table_learning_rate"]) == (1e-4, 3.2e-4)
    for name, recipe in values.items():
        assert recipe["table_row_floor"] == (0 if name in ("new-language", "from-nothing") else 3)
    for name in ("first-lora", "added-tokens"):
        assert values[name]["lora_parameters"] == options.defaults()["lora_parameters"]
    for setting in ("untied-16k", "tied-16k"):
        body, table = rates_of(setting, "Ember, beta2 1 - t^-0.8")
        assert values["from-nothing"]["lr_schedule"]["arguments"] == [body, 1900, body / 10]
        assert values["from-nothing"]["table_learning_rate"] == table
    for recipe in values.values():
        if schedule := recipe.get("lr_schedule"):
            assert schedule["warmup"] + schedule["arguments"][1] == recipe["iters"]


def test_the_fresh_model_of_its_comments_is_random_and_trains(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [line.partition("#")[2].removeprefix("   ") for line in RECIPES["from-nothing"].read_text().splitlines()]
    begin = lines.index("from mlx_lm.utils import load, save")
    exec("\n".join(lines[begin : begin + 3]).replace("MODEL", str(folders["untied"])))
    fresh, _ = ember_mlx.load("fresh")
    old, _ = ember_mlx.load(folders["untied"])
    assert not (fresh.lm_head.weight == old.lm_head.weight).any()


@each
def test_two_steps_of_it_train(folders, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    recipes.main([name])
    Path("tokens.txt").write_text("zebra\n")
    # No learning is asked of two steps, of which the first is the warm-up's in some.
    result = ember_mlx.train(
        folders["untied"], data=folders["data"], config=f"{name}.yaml", iters=2, batch_size=1, val_batches=1, quiet=True
    )
    asked = load_yaml(RECIPES[name].read_text())
    kept = {key: value for key, value in asked.items() if key not in ("iters", "batch_size", "val_batches")}
    assert {key: vars(result.options)[key] for key in kept} == kept
    assert [line.table is not None for line in result.trained] == [True, True, False]
    assert len(result.files) >= 2


def test_they_are_listed_with_what_each_needs(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    recipes.main([])
    said = capsys.readouterr().out
    for name in RECIPES:
        assert re.search(rf"^{name} +\S", said, re.MULTILINE)
        first, second, *_ = comments(name)
        assert first.partition(": ")[2] in said
        assert second.partition(": ")[2] in said


def test_a_copy_is_whole_and_replaces_nothing_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipes.main(["first-lora"])
    copy = Path("first-lora.yaml")
    assert copy.read_bytes() == RECIPES["first-lora"].read_bytes()
    copy.write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        recipes.main(["first-lora"])
    assert copy.read_text() == "mine"
    recipes.main(["first-lora", "--overwrite"])
    assert copy.read_bytes() == RECIPES["first-lora"].read_bytes()
    recipes.main(["new-language", "--save-path", "other.yaml"])
    assert Path("other.yaml").read_bytes() == RECIPES["new-language"].read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("frist-lora", "NAME frist-lora: is no recipe (did you mean 'first-lora'?)"),
        ("zzz", "NAME zzz: is no recipe; the recipes are added-tokens, first-lora,"),
        ("--save-path x.yaml", "NAME is required to copy a recipe"),
        ("first-lora --save-path .", "--save-path .: is a folder"),
        ("first-lora --save-path no/such/x.yaml", "no/such is no folder; give a path in one that exists"),
        ("first-lora --out x", "unrecognized arguments: --out x"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ember-mlx", "recipes", *arguments.split()])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())
