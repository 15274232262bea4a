"""What `train` switches on by itself: only where a run would not fit, in order of time, and never against the user."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest

import ember_mlx
from ember_mlx import InputError
from ember_mlx.commands import train
from ember_mlx.finetune import options
from ember_mlx.planner import plan, read_architecture, run_of
from ember_mlx.planner.operations import operations
from ember_mlx.planner.savings import cheapest_savings, savings

QWEN = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 16,
    "vocab_size": 4096,
}
MODEL = read_architecture(QWEN, "config.json")
CHECKPOINT, CHUNKED, STREAM = SAVINGS = ("grad_checkpoint", "chunked_loss", "stream")
ADAMW = ["--fine-tune-type", "full", "--no-stream", "--optimizer", "adamw", "--batch-size", "1"]


def peak_of(run, names=()):
    return plan(MODEL, replace(run, **dict.fromkeys(names, True)), "cpu").peak


def chosen(run, available, allowed=SAVINGS):
    return cheapest_savings(MODEL, run, "cpu", peak_of(run), available, allowed)


@pytest.mark.parametrize("words", [[], ADAMW])
def test_of_the_sets_that_fit_the_one_of_least_time_is_switched_on(words):
    run = run_of(options.parse([*words, "--max-seq-length", "129"]), MODEL)
    first, second = sorted(SAVINGS[:2], key=lambda name: operations(MODEL, replace(run, **{name: True})))
    in_order = [(), (first,), (second,), (first, second), (STREAM,)]
    peaks = {names: peak_of(run, names) for names in in_order}
    assert min(peaks.values()) < peaks[()]
    for available in peaks.values():
        found = chosen(run, available)
        assert tuple(saving.option for saving in found) == next(s for s in in_order if peaks[s] <= available)
        befores, afters = [saving.before for saving in found], [saving.peak for saving in found]
        assert [peaks[()], *afters][: len(found)] == befores
        assert all(saving.time > 1 for saving in found)
    nearest = tuple(saving.option for saving in chosen(run, 0))  # nothing fits
    assert peaks[nearest] == min(peaks.values())
    assert chosen(replace(run, stream=True), 0) == []  # it includes the others


@pytest.fixture
def no_memory(monkeypatch):
    monkeypatch.setattr("ember_mlx.planner.machine.memory", lambda asked, backend: (1, "this machine has"))


@pytest.mark.parametrize(
    ("words", "yaml", "never"),
    [
        ([], "", set()),
        (["--no-stream"], "", {STREAM}),
        (["--no-stream"], "grad_checkpoint: false", {STREAM, CHECKPOINT}),
        ([], "stream: false", {STREAM}),
        (["--no-stream", "--no-chunked-loss"], "", {STREAM, CHUNKED}),
        (["--no-auto-savings"], "", set(SAVINGS)),
        ([], "auto_savings: false", set(SAVINGS)),
        (["--train-tables", "none"], "", set(SAVINGS)),
        (["--no-stream"], "lora_parameters: {rank: 4, scale: 1.0, dropout: 0.1}", {STREAM, CHECKPOINT}),
        (["--optimizer", "sinkgd"], "optimizer_config: {sinkgd: {weights: bf16+int8}}", {STREAM}),
        (["--epochs", "1"], "", set()),
        (["--optimizer", "adamw_8bit"], "optimizer_config: {adamw_8bit: {weights: bf16+int8}}", set()),
    ],
)
def test_what_the_user_has_decided_stays(folders, tmp_path, no_memory, words, yaml, never):
    (tmp_path / "run.yaml").write_text(yaml or "seed: 0")
    paths = ["--model", folders["untied"], "--data", folders["text"], "--config", tmp_path / "run.yaml"]
    args, given = options.parse_given([str(word) for word in [*paths, *words, "--batch-size", 2]])
    switched_on, lines = savings(args, given)
    assert not never & switched_on.keys()
    assert bool(switched_on) == (never != set(SAVINGS))
    assert all(switched_on.values())
    *savings_lines, warning = lines
    assert [line.split()[2].strip(",") for line in savings_lines] == [options.flag(name) for name in switched_on]
    assert warning.startswith("Warning: with batches of 2 x 32 tokens this run is predicted to take ")
    assert (" even so, and " in warning) == bool(switched_on)
    assert ": a step that takes more ends the run; `ember-mlx plan`" in warning


def test_a_run_that_fits_is_left_alone(parse):
    assert savings(parse(data="text"), ()) == ({}, [])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ZeroDivisionError("a fault\nof ours"), ["Not planned, so that nothing is switched on to save memory:"]),
        (InputError("which train refuses too"), []),
    ],
)
def test_a_plan_that_fails_stops_no_run(parse, monkeypatch, error, said):
    def fails(*_):
        raise error

    monkeypatch.setattr("ember_mlx.planner.savings.read_inputs", fails)
    switched_on, lines = savings(parse(), ())
    assert switched_on == {}
    assert [line.partition(" ZeroDiv")[0] for line in lines] == said
    assert not any("\n" in line for line in lines)


def test_a_model_that_cannot_be_planned_is_said_to_be(parse, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    ((line),) = savings(parse() | {"model": str(tmp_path)}, ())[1]
    assert "vocab_size and hidden_size missing" in line


def test_train_takes_what_is_switched_on_and_its_records_say_so(folders, tmp_path, no_memory, capsys):
    paths = {"--model": folders["untied"], "--data": folders["text"], "--adapter-path": tmp_path / "adapters"}
    words = [str(word) for pair in paths.items() for word in pair]
    words += ["--batch-size", "2", "--memory-limit", "none"]
    train.main([*words, "--iters", "1"])
    said = capsys.readouterr().out
    assert "Switched on: --stream, since this run is planned to take " in said
    assert "and this machine has 1 bytes: " in said
    assert "--no-stream turns it off" in said
    assert "Streamed: every weight that trains is stepped inside the backward pass" in said
    saved = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert {name: saved[name] for name in SAVINGS} == {CHECKPOINT: False, CHUNKED: False, STREAM: True}
    train.main([*words, "--iters", "2", "--resume"])
    assert "Resuming after step 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("first", "then", "resumed"),
    [
        ([], ["--memory-limit", "none"], True),
        (["--memory-limit", "none"], [], True),
        ([], ["--memory-limit", "none", "--no-stream"], False),
        ([], ["--memory-limit", "none", "--no-auto-savings"], False),
    ],
    ids=["on a larger machine", "on a smaller one", "without one of them", "without all"],
)
def test_a_resumed_run_takes_the_steps_that_it_took(folders, tmp_path, monkeypatch, capsys, first, then, resumed):
    """Without a limit the machine has enough."""
    monkeypatch.setattr(
        "ember_mlx.planner.machine.limited",
        lambda options, *_: (10**12 if options.memory_limit else 1, "this machine has"),
    )
    paths = {"--model": folders["untied"], "--data": folders["text"], "--adapter-path": tmp_path / "adapters"}
    words = [str(word) for pair in paths.items() for word in pair] + ["--batch-size", "2"]
    train.main([*words, *first, "--iters", "1"])
    switched_on = "Switched on: --stream" in capsys.readouterr().out
    with nullcontext() if resumed else pytest.raises(InputError, match="is of another run: --stream was true"):
        train.main([*words, *then, "--iters", "2", "--resume"])
    said = capsys.readouterr().out
    assert ("Resuming after step 1" in said) == resumed
    assert ("--stream, as in the run that is resumed" in said) == (switched_on and resumed)
    assert "since this run is planned" not in said


def test_the_call_in_python_does_the_same(folders, tmp_path, no_memory, capsys):
    short = {"iters": 1, "batch_size": 2, "val_batches": 1, "memory_limit": "none", "adapter_path": tmp_path / "new"}
    result = ember_mlx.train(folders["untied"], folders["text"], stream=False, **short)
    assert not result.options.stream
    assert result.options.grad_checkpoint or result.options.chunked_loss
    assert "Switched on: --" in capsys.readouterr().out


def test_rows_that_cannot_be_read_are_said_to_be_planned_as_long_as_they_may_be(parse, no_memory):
    first = savings(parse("--data", "owner/name", "--max-seq-length", 33), ())[1][0]
    assert first.startswith("Planned as if every row filled --max-seq-length 33: --data owner/name is no folder here")
