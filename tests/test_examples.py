"""The examples, each run as it stands. 02 takes minutes: its parts are tested in tests/demo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_loop_of_ones_own_learns_with_kilobytes_of_state():
    said = run("01_swap_ember_into_a_training_loop.py")
    losses = [float(line.split("loss ")[1].split()[0]) for line in said.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0] - 0.5
    assert "Ember keeps 1," in said


def test_the_streamed_loop_learns():
    first, last = run("05_train_every_weight_in_little_memory.py").splitlines()
    assert float(last.split("loss ")[1].split()[0]) < float(first.split("loss ")[1].split()[0]) - 0.5


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
