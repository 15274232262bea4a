"""Options: mlx_lm.lora's, taken from it, and the token tables'."""

import json
import re
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm import lora

from ember_mlx import InputError
from ember_mlx.commands import plan
from ember_mlx.finetune import optimizer_names, option_help, options
from ember_mlx.finetune.keywords import options_of
from ember_mlx.shared.command_line import size_or_zero


def test_every_flag_of_mlx_lm_is_taken_with_its_type_and_choices():
    theirs = {flag: action for action in lora.build_parser()._actions for flag in action.option_strings}
    ours = {flag: action for action in options.build_parser()._actions for flag in action.option_strings}
    assert theirs.keys() < ours.keys()
    for flag, action in theirs.items():
        more = [*optimizer_names.BODY, *optimizer_names.ALIASES] if flag == "--optimizer" else []
        choices = action.choices and [*action.choices, *more]
        assert (ours[flag].choices, ours[flag].dest, ours[flag].nargs) == (choices, action.dest, action.nargs)
        # Sizes are read by mlx-lm's function too, behind one that turns what it raises into a message.
        if not action.choices:
            assert ours[flag].type is (size_or_zero if flag == "--clear-cache-threshold" else action.type)


def test_the_defaults_are_those_of_mlx_lm():
    args = vars(options.parse([]))
    differing = {key for key, value in lora.CONFIG_DEFAULTS.items() if args[key] != value}
    # `train` is the command's name; how many layers the default means is settled when the model is known.
    assert differing == {"train", "num_layers"} | ({"clear_cache_threshold"} if mx.cuda.is_available() else set())


def test_as_in_mlx_lm_test_alone_does_not_train():
    asked = {(): (True, False), ("--test",): (False, True), ("--train", "--test"): (True, True)}
    for arguments, (train, test) in asked.items():
        args = options.parse(list(arguments))
        assert (args.train, args.test) == (train, test)


def test_the_defaults_of_mlx_lm_are_not_changed_by_a_run():
    options.parse([]).lora_parameters["rank"] = 99
    assert options.parse([]).lora_parameters["rank"] != 99


def test_yaml_gives_what_the_command_line_does_not(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("iters: 7\nbatch_size: 3\nlearning_rate: 1e-4\ntable_learning_rate: 1e-2\noptimizer: AdamW\n")
    args = options.parse(["--config", str(config), "--batch-size", "5"])
    assert (args.iters, args.batch_size, args.learning_rate, args.table_learning_rate) == (7, 5, 1e-4, 1e-2)
    assert args.optimizer == "adamw"


def test_yaml_keys_that_mlx_lm_drops_work_here(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("clear_cache_threshold: 2GB\ntrust_remote_code: true\n")
    args = options.parse(["--config", str(config)])
    assert args.clear_cache_threshold == 2 * 10**9
    assert args.trust_remote_code is True


def test_yaml_keys_that_only_mlx_lm_knows_are_passed_on(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("prompt_feature: question\nlora_parameters: {rank: 4, scale: 10.0, dropout: 0.1}\n")
    args = options.parse(["--config", str(config)])
    assert args.prompt_feature == "question"
    assert args.lora_parameters == {"rank": 4, "scale": 10.0, "dropout": 0.1}


def test_a_misspelt_yaml_key_is_pointed_out(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("table_learning_rates: 1\nwandb: x\niters: 3\nhf_dataset: {path: x}\n")
    options.parse(["--config", str(config)])
    near, far = capsys.readouterr().out.splitlines()
    assert near.endswith(
        "'table_learning_rates': no effect: it is no option here (did you mean 'table_learning_rate'?)"
    )
    assert far.endswith("'wandb': no effect: it is no option here; mlx-lm has report_to now")
    options.parse_command(plan._parser(), ["--config", str(config)])
    said = capsys.readouterr()
    assert (said.out, said.err.splitlines()) == ("", [near, far])  # `plan --json` is read by programs


IN_ANY_CASE = {"fine_tune_type": "LoRA", "table_optimizer": "Sage", "table_rounding": "Nearest", "on_nonfinite": "SKIP"}
NESTED = {
    "optimizer_config": {"AdamW_8bit": {"weights": "BF16+int8"}, "AdamW": {"betas": [0.9, 0.99]}, "MUON": None},
    "lr_schedule": {"name": "Cosine_Decay", "arguments": [1e-3, 9]},
}


def test_names_in_any_case_are_recorded_in_one_by_flags_yaml_and_keywords(tmp_path):
    (tmp_path / "c.yaml").write_text(json.dumps(IN_ANY_CASE | NESTED | {"optimizer": "AdamW_8BIT"}))
    flags = [word for name, value in IN_ANY_CASE.items() for word in (options.flag(name), value)]
    by_flags = options.parse([*flags, "--optimizer", "SinkGD"])
    by_yaml = options.parse(["--config", str(tmp_path / "c.yaml")])
    by_keywords, _ = options_of({"data": "d", "optimizer": "AdamW"} | IN_ANY_CASE | NESTED)
    for args, optimizer in ((by_flags, "sinkgd"), (by_yaml, "adamw_8bit"), (by_keywords, "adamw")):
        assert args.optimizer == optimizer
        assert [getattr(args, name) for name in IN_ANY_CASE] == [value.lower() for value in IN_ANY_CASE.values()]
    for args in (by_yaml, by_keywords):
        settings = {"adamw_8bit": {"weights": "bf16+int8"}, "adamw": {"betas": [0.9, 0.99]}, "muon": None}
        assert args.optimizer_config == settings
        assert args.lr_schedule == {"name": "cosine_decay", "arguments": [1e-3, 9]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: ADAMWW", "must be one of adam, .*did you mean 'adamw'"),
        ("optimizer: sage", "must be one of adam, .*; sage is for --table-optimizer$"),
        ("table_optimizer: Adam", "must be one of ember, .*did you mean 'adamw'.*; adam is for --optimizer$"),
        ("optimizer_config: {ADAMWW: {}}", "ADAMWW: is the name of no optimizer .did you mean 'adamw'"),
        ("optimizer_config: {AdamW: {}, adamw: {}}", "optimizer_config: adamw: its settings are there twice"),
    ],
)
def test_a_name_that_is_wrong_in_any_case_gets_a_hint(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        options.parse(["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iters: many\n", "iters: 'many' must be a whole number"),
        ("iters: 2.5\n", "iters: 2.5 must be a whole number"),
        ("learning_rate: fast\n", "learning_rate: 'fast' must be a number"),
        ("table_row_floor: off\n", "table_row_floor: False must be a number; 0 turns it off$"),
        ("table_row_floor: none\n", "table_row_floor: 'none' must be a number; 0 turns it off$"),
        ("table_row_floor: [3]\n", "must be a number; 0 turns it off$"),
        ("train_tables: both\n", "must be one of auto, embedding, head, none"),
        ("overwrite: 'no'\n", "overwrite: 'no' must be true or false, without quotes"),
        ("mask_prompt: 2\n", "mask_prompt: 2 must be true or false$"),
        ("batch_size: true\n", "batch_size: True must be a whole number"),
        ("data: 3\n", "data: 3 must be text"),
        ("clear_cache_threshold: abc\n", "clear_cache_threshold: 'abc' must be a size of at least 1MB"),
        ("lora_parameters: 3\n", "lora_parameters 3: must hold"),
        ("optimizer_config: 3\n", "optimizer_config 3: must hold"),
        ("lora_parameters: {rank: 2.5, scale: 1.0}\n", "rank: 2.5 must be a whole number of at least 1"),
        ("lora_parameters: {rank: 0, scale: 1.0}\n", "rank: 0 must be a whole number of at least 1"),
        (f"lora_parameters: {{rank: {10**400}, scale: 1.0}}\n", r"0 must be a whole number .* and below 2\^31"),
        ("lora_parameters: {rank: 2, scale: 1.0, keys: 5}\n", "keys: 5 must be a list of modules"),
        ("lora_parameters: {rank: 2, scale: 1.0, keys: q_proj}\n", "keys: q_proj must be a list of modules"),
        ("lora_parameters: {rank: 2, scale: .nan}\n", "scale: nan must be a number"),
        ("lora_parameters: {rank: 2, scale: 1.0, dropout: 1.5}\n", "dropout: 1.5 must be at least 0 and below 1"),
        ("fine_tune_type: half\n", "must be one of lora, dora, full"),
        ("- a\n- list\n", "must hold `option: value` lines"),
        ("a: [1\n", "is not YAML"),
    ],
)
def test_a_yaml_value_that_cannot_be_is_refused(tmp_path, text, message):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    with pytest.raises(InputError, match=message):
        options.parse(["--config", str(config)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--config /nowhere.yaml", "--config /nowhere.yaml: no such file"),
        ("--learning-rate nan", "--learning-rate nan: must be a number of at least 0"),
        ("--learning-rate -1", "--learning-rate -1.0: must"),
        ("--table-learning-rate inf", "--table-learning-rate inf: must"),
        ("--table-weight-decay nan", "--table-weight-decay nan: must"),
        ("--table-beta2 1", "--table-beta2 1.0: must be at least 0 and, in float32, below 1"),
        ("--table-beta2 0.9 --table-optimizer sgd", "--table-beta2: sgd has no beta2"),
        ("--table-row-clip 0", "--table-row-clip 0.0: must be a number from 1e-30 to 1e30, usually 1 to 10"),
        ("--table-row-clip nan", "--table-row-clip nan: must be a number"),
        ("--table-row-floor -1", "--table-row-floor -1.0: must be a number from 1e-30 to 1e30, usually 1 to 10"),
        ("--table-row-floor off", "argument --table-row-floor: 'off' must be a number; 0 turns it off; "),
        ("--table-row-floor 3 --table-optimizer sgd", "--table-row-floor: is for ember alone, not for sgd"),
        ("--table-beta2-decay -0.8", "--table-beta2-decay -0.8: must be above 0 and at most 1, usually 0.8"),
        ("--table-rounding stochastic --table-optimizer sgd", "--table-rounding: is for ember alone, not for sgd"),
        ("--table-row-clip 3 --table-optimizer adamw", "--table-row-clip: is for ember alone, not for adamw"),
        ("--batch-size 0", "--batch-size 0: must be a whole number of at least 1"),
        ("--iters 0", "--iters 0: must"),
        ("--seed -1", "--seed -1: must be at least 0 and below"),
        ("--clear-cache-threshold -1", "--clear-cache-threshold: -1: must be a size of at least 1MB"),
        ("--grad-accumulation-steps 8 --iters 4", "exceeds --iters 4, so nothing would be learned"),
        ("--val-batches 0", "--val-batches 0: must be at least 1, or -1"),
        ("--train-tables both", "argument --train-tables: invalid choice: 'both'"),
        ("--optimizer Ember", "invalid choice: 'Ember' .*; ember is for --table-optimizer; "),
        ("--table-optimizer sinkgd", "invalid choice: 'sinkgd' .*; sinkgd is for --optimizer; "),
        ("--lr 1e-4", r"unrecognized arguments: --lr 1e-4 \(did you mean '--learning-rate'\?\)"),
        ("data.csv", "unrecognized arguments: data.csv; a value needs its flag, such as --data;"),
        ("lora.yaml", "unrecognized arguments: lora.yaml; a value needs its flag, such as --config;"),
        ("--no-such-flag", "unrecognized arguments: --no-such-flag; ember-mlx train --help lists the options"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name(arguments, message):
    with pytest.raises(InputError, match=message):
        options.parse(arguments.split())


@pytest.mark.parametrize("kind", [[], ["--fine-tune-type", "dora"], ["--fine-tune-type", "full"]])
@pytest.mark.parametrize("name", [*options.CONFIG_DEFAULTS["optimizer_config"], *optimizer_names.BODY])
def test_a_rate_that_is_not_given_is_the_optimizers_own(name, kind, tmp_path):
    """Of SinkGD, which hardly learns at mlx-lm's; what is given, as a flag or in a file, goes before it."""
    of_mlx_lm = lora.CONFIG_DEFAULTS["learning_rate"]
    of_all_weights, of_adapters = (r.get(name, of_mlx_lm) for r in (optimizer_names.RATES, optimizer_names.LORA_RATES))
    usual = of_all_weights if "full" in kind else of_adapters
    file = tmp_path / "c.yaml"
    for text, words, rate in [
        ("", ["--optimizer", name], usual),
        (f"optimizer: {name}", [], usual),
        ("learning_rate: 1e-4", ["--optimizer", name], 1e-4),
        (f"optimizer: {name}", ["--learning-rate", "1e-5"], 1e-5),
        ("", ["--optimizer", name, "--learning-rate", "0"], 0),
    ]:
        file.write_text(text or "{}")
        assert options.parse(["--config", str(file), *words, *kind]).learning_rate == rate
    text = option_help.HELP["what trains"]["learning_rate"][1]
    assert optimizer_names.RATES.keys() == optimizer_names.LORA_RATES.keys() == set(optimizer_names.BODY)
    told = f"{of_adapters:g} with {name} (full: {of_all_weights:g})" in text
    assert told == (name in optimizer_names.BODY)  # mlx-lm's keep mlx-lm's


def test_the_rates_are_those_of_the_page():
    page = (Path(__file__).parents[2] / "ember_mlx/optimizers/README.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| ([\d.e-]+) \| ([\d.e-]+) \|", page, re.MULTILINE)
    assert {name: float(rate) for name, rate, _ in rows} == optimizer_names.LORA_RATES
    assert {name: float(rate) for name, _, rate in rows} == optimizer_names.RATES
