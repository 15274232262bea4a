"""A mistake costs a second: it is refused before a model is loaded, in words that name the remedy."""

import argparse
import re
from importlib import import_module
from pathlib import Path

import pytest
from huggingface_hub import errors as of_hub

from ember_mlx import InputError
from ember_mlx.commands import geometry, plan, train
from ember_mlx.finetune import options
from ember_mlx.finetune.adapters import read_config
from ember_mlx.finetune.base_models import check_model, why_not_loaded
from ember_mlx.finetune.run import run
from ember_mlx.shared.command_line import actions_of
from ember_mlx.shared.errors import did_you_mean_path


@pytest.fixture
def nothing_loads(monkeypatch):
    def loads(*_, **__):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("mlx_lm.load", loads)


REFUSED = [
    ("--report-to nowhere", "nowhere is no service of mlx-lm's; the services are wandb, swanlab"),
    ("--report-to WanB", "wanb is no service of mlx-lm's .did you mean 'wandb'"),
    ("--report-to swanlab", "swanlab is not installed; pip install swanlab, or leave it out"),
    ("--add-tokens /no/such", "--add-tokens /no/such: cannot be read"),
    ("--add-tokens /no/such --train-tables none", "the new tokens would learn nothing with --train-tables none"),
    ("--sample-prompts /no/such.txt", "--sample-prompts /no/such.txt: cannot be read"),
    ("--resume-adapter-file /no/such", "--resume-adapter-file /no/such: this file does not exist"),
    ("--resume /no/such", "--resume /no/such: .*this folder does not exist"),
    ("--batch-size 13", "the train set has 12 rows, fewer than --batch-size 13"),
    ("--num-layers 3", "--num-layers 3: the model has 2 layers"),
    ("--stream --keep-inputs 3", "--keep-inputs 3: the model has 2 layers; use at most that"),
    ("--no-stream --keep-inputs 2", "--keep-inputs 2: is for a run that streams"),
    ("--clip-layer-norm 1", "--clip-layer-norm 1.0: is for a run that streams"),
    ("--shard-tables", "start them with mlx.launch"),
    ("--model {quantized} --fine-tune-type full", "is quantized, and quantized weights cannot be trained"),
    ("--model {quantized} --quantize 4", "is quantized already"),
    ("--model {tied} --train-tables head", "the head is the embedding"),
    *(
        (f"--data {{data}}/train.jsonl --valid-fraction 0 {more}", message)
        for more, message in (
            ("--patience 2", "--patience 2: there are no validation rows"),
            ("--keep-best", "--keep-best: there are no validation rows"),
            ("--sample-prompts {data}/valid.jsonl", "no validation rows exist"),
        )
    ),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_train_refuses_before_it_loads(folders, tmp_path, nothing_loads, monkeypatch, words, message):
    monkeypatch.setattr("ember_mlx.finetune.before_loading.find_spec", lambda _: None)
    short = f"--model {folders['untied']} --data {folders['data']} --adapter-path {tmp_path}/a --iters 3 --batch-size 2"
    with pytest.raises(InputError, match=message):
        train.main([*short.split(), *words.format(**folders).split()])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [train, plan])
def test_rates_that_are_not_fit_are_refused_before_a_model_is_loaded(folders, tmp_path, nothing_loads, capsys, command):
    falling = "lr_schedule: {name: linear_schedule, arguments: [1.0, -1.0, 3]}"
    still = "table_lr_schedule: {name: linear_schedule, arguments: [0.0, 0.0, 5]}"
    decay = "optimizer: adamw\nlearning_rate: 30\noptimizer_config: {adamw: {weight_decay: 0.1}}"
    of_tables = "table_learning_rate: 30\ntable_weight_decay: 0.1"
    config = tmp_path / "config.yaml"
    short = f"--model {folders['untied']} --data {folders['data']} --adapter-path {tmp_path}/a --config {config}"
    for lines, says in (
        (falling, f"^--config {config}: lr_schedule .*at least 0"),
        (still, f"^--config {config}: table_lr_schedule .*not all 0"),
        (decay, f"^--config {config}: optimizer AdamW.*at most 2"),
        (of_tables, "^--table-optimizer Ember.*at most 2"),
    ):
        for length in ("iters: 3", "epochs: 0.5"):  # of 6 batches
            config.write_text(f"{lines}\n{length}\nbatch_size: 2\n")
            with pytest.raises(InputError, match=says):
                command.main(short.split())
    if command is plan:
        plan.main([*short.split(), "--train-tables", "none"])  # the tables' rate means nothing


@pytest.mark.parametrize("words", ["--report-to nowhere", "--sample-prompts /no/such.txt", "--num-layers 3"])
def test_geometry_refuses_before_the_steps_that_it_times(folders, tmp_path, nothing_loads, words):
    short = f"--model {folders['untied']} --data {folders['data']} --out {tmp_path}/out --iters 16 --batch-size 2"
    with pytest.raises(InputError, match=f"{words}: "):
        geometry.main([*short.split(), *words.split()])


def test_what_a_reporting_service_raises_is_one_line(parse, monkeypatch):
    class NoAccount(Exception):
        pass

    def fails(**_):
        raise NoAccount("api_key not configured\n(no-tty)")

    callbacks = import_module("mlx_lm.tuner.callbacks")
    monkeypatch.setitem(callbacks.SUPPORT_CALLBACK, "wandb", fails)
    monkeypatch.setattr("ember_mlx.finetune.before_loading.find_spec", lambda _: True)
    with pytest.raises(InputError, match=r"--report-to wandb: api_key not configured \(no-tty\); log in there"):
        run(parse("--report-to", "wandb"))


def test_what_can_be_no_model_is_named_for_what_it_is(folders, tmp_path):
    model = tmp_path / "qwen3"
    model.mkdir()
    (model / "config.json").write_text("{}")
    adapter = tmp_path / "adapters"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for given, message in (
        ("", "model '': is empty; give a model's folder"),
        (model / "config.json", "is a file; give a model's folder"),
        (tmp_path, f"has no config.json; did you mean '{model}'"),
        (adapter, "has no config.json: it is an adapter; give it as --adapter-path"),
        (tmp_path / "qwen", f"no such folder here .did you mean '{model}'"),
        ("a b/c", "no such folder here, and no name that the hub can have"),
        ("a/b/c", "no name that the hub can have"),
    ):
        with pytest.raises(InputError, match=message):
            check_model(given)
    for given in (folders["untied"], "Qwen/Qwen3-0.6B", "gpt2"):
        check_model(given)
    near = why_not_loaded(tmp_path / "qwen", of_hub.LocalEntryNotFoundError("offline"))
    assert f"did you mean '{model}'" in near
    assert "hf download" not in near


def test_the_hint_at_a_path_takes_only_what_is_missing_for_misspelt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("adapters/best/adapter_config.json", "adapters/other/x", "run.yaml"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    with pytest.raises(InputError, match="adapter adapter/best: no such folder .did you mean 'adapters/best'"):
        read_config(Path("adapter/best"))
    for path in ("adapters/best", "adapters/zzz", "run.yaml", "nothing/like/it"):
        assert not did_you_mean_path(path)
    with pytest.raises(InputError, match="--config runs.yaml: no such file .did you mean 'run.yaml'"):
        options.parse(["--config", "runs.yaml"])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (of_hub.GatedRepoError, "its terms must be accepted"),
        (of_hub.RepositoryNotFoundError, "no public model of this name"),
        (
            of_hub.LocalEntryNotFoundError,
            "cannot be reached.* connect and run `hf download a/b`$",
        ),
        (of_hub.OfflineModeIsEnabled, "cannot be reached"),
        (RuntimeError, "none: a long story$"),
    ],
)
def test_what_the_hub_says_ends_in_a_remedy(kind, message):
    error = kind.__new__(kind)  # some ask for a response of the client's own kind
    error.args = ("a long story",)
    assert re.search(message, why_not_loaded("a/b", error))


def test_a_switch_that_is_turned_on_and_off_is_refused():
    actions = [each for each in actions_of(options.build_parser()) if isinstance(each, argparse.BooleanOptionalAction)]
    assert "stream" in [action.dest for action in actions]
    for action in actions:
        on, off = action.option_strings
        for words in ([on, off], [off, on]):
            with pytest.raises(InputError, match=f"{on} {off}: contradict each other; leave one of the two out"):
                options.parse(words)
        assert getattr(options.parse([off, off]), action.dest) is False


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        ("--learning-rate 0", ["--learning-rate 0: the token tables would train alone, as with --num-layers 0"]),
        ("--learning-rate 1e-40", ["--learning-rate 1e-40: the token tables would train alone"]),
        ("--learning-rate 0 --train-tables none", ["--learning-rate 0: no weight would change"]),
        ("--table-learning-rate 0", ["--table-learning-rate 0: no token table would change; --train-tables none"]),
        ("--learning-rate 0 --table-learning-rate 0", ["--learning-rate 0: ", "--table-learning-rate 0: "]),
        ("--learning-rate 1e-30", []),
    ],
)
def test_a_rate_that_moves_nothing_is_told(capsys, words, messages):
    options.parse(words.split())
    lines = capsys.readouterr().out.replace("\n", " ").split("Warning: ")[1:]
    assert len(lines) == len(messages)
    assert all(line.startswith(message) for line, message in zip(lines, messages, strict=True))
