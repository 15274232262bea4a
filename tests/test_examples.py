"""The examples, each run as it stands. 02 takes minutes: its parts are tested in tests/demo."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from processes import run_here, without_torch

import ember_mlx
from ember_mlx import find_token_tables

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, env=without_torch(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_loop_of_ones_own_learns_with_kilobytes_of_state(monkeypatch, capsys):
    said = run_here(EXAMPLES / "01_swap_ember_into_a_training_loop.py", monkeypatch=monkeypatch, capsys=capsys)
    losses = [float(line.split("loss ")[1].split()[0]) for line in said.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0] - 0.5
    assert "Ember keeps 1," in said


def test_the_streamed_loop_learns(monkeypatch, capsys):
    said = run_here(EXAMPLES / "05_train_every_weight_in_little_memory.py", monkeypatch=monkeypatch, capsys=capsys)
    first, last = said.splitlines()
    assert float(last.split("loss ")[1].split()[0]) < float(first.split("loss ")[1].split()[0]) - 0.5


@pytest.mark.parametrize("method", ["dpo", "orpo", "grpo"])
def test_the_trainers_of_mlx_lm_lora_step_the_tables(method, monkeypatch, tmp_path):
    pytest.importorskip("mlx_lm_lora")
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("06_preferences_and_rewards")
    monkeypatch.setattr(example, "BATCH", 2)
    monkeypatch.setattr(example, "ANSWER", 2)
    # Of answers that earn alike there is no gradient.
    monkeypatch.setattr(example, "one_sentence", lambda prompts, completions, answer, types=None: range(len(prompts)))
    made = []

    def keep(train_tables, make=example.model_and_optimizer):
        model, tokenizer, optimizer = make(train_tables)
        made.extend((model, tables_of(model), optimizer))
        return model, tokenizer, optimizer

    def tables_of(model):
        parameters = dict(tree_flatten(model.parameters()))
        return [parameters[table.path] for table in find_token_tables(model)]

    monkeypatch.setattr(example, "model_and_optimizer", keep)
    monkeypatch.setattr(example, "rewarded", lambda *_: None)
    row = {"prompt": "What does calendar.isleap(year) do?", "completion": "Return True for leap years."}
    rows = [row, row | {"completion": "Return False."}]
    with example.without_metal():
        example.train(method, True, 0, 2, rows, rows, tmp_path / "kept")
    model, before, optimizer = made
    assert optimizer.step == 2
    moved = [not mx.array_equal(*pair) for pair in zip(before, tables_of(model), strict=True)]
    assert moved == [True, True]
    kept, _ = ember_mlx.load(example.MODEL, adapter_path=tmp_path / "kept")
    trained = dict(tree_flatten(model.trainable_parameters()))
    loaded = dict(tree_flatten(kept.parameters()))
    assert all(mx.array_equal(trained[name], loaded[name]) for name in trained)


def test_the_benchmark_of_tables_writes_what_it_ran(folders, tmp_path):
    out = tmp_path / "result.json"
    run("benchmarks/train_tables.py", "--out", out, "--models", folders["tied"], "--data", folders["data"],
        "--types", "lora", "--vary", "--train-tables none", "--train-tables auto",
        "--", "--iters", 2, "--batch-size", 2, "--val-batches", 2)  # fmt: skip
    report = json.loads(out.read_text())
    assert [row["table_state"] > 0 for row in report["rows"]] == [False, True]
    assert {"mlx", "mlx-lm", "ember-mlx"} < report["versions"].keys()
    assert report["common"] == "--iters 2 --batch-size 2 --val-batches 2"


def test_the_benchmark_on_cuda_needs_no_mlx():
    pytest.importorskip("torch")
    without_mlx = "import sys; sys.modules |= dict.fromkeys(('mlx', 'mlx_lm'))"  # None: an import of it raises
    script = f"{without_mlx}; from cuda_table_step import machine; print(machine('cuda')['backend'])"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES / "benchmarks", check=False)
    assert done.stdout == "cuda\n", done.stderr
