"""The benchmarks of MLX, with tiny shapes: they run, and what they write is what was asked for."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import run_here, without_torch

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


def run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    done = subprocess.run(command, env=without_torch(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_table_step_counts_state_and_scratch_in_tables(tmp_path):
    out = tmp_path / "step.json"
    run("mlx_table_step.py", "--out", out, "--shapes", "300x40", "--dtypes", "float32", "--repeats", 1,
        "--optimizers", "Ember, plain operations", "Adam")  # fmt: skip
    report = json.loads(out.read_text())
    adam, ember = report["rows"]
    assert (adam["state_bytes"], ember["state_bytes"]) == (2 * 300 * 40 * 4, 340 * 4)
    assert adam["scratch_tables"] >= 3
    assert 1 < ember["scratch_tables"] < adam["scratch_tables"]
    assert report["machine"]["copy_bytes_per_second"] > 0


def test_the_training_step_is_one_and_goes_on_where_it_was_cut_off(tmp_path):
    out, row = tmp_path / "memory.json", "smollm2-135m/tied/lora/4x1024/ember"
    done = "smollm2-135m/tied/lora/4x1024/adamw"
    out.write_text(json.dumps({"machine": {}, "rows": {done: {"peak_memory": 1}}}))
    said = run("mlx_training_memory.py", "--out", out, "--smoke", "--steps", 1, "--rows", done, row, f"{row}/chunked")
    assert [line.split()[0] for line in said.splitlines()] == [row, f"{row}/chunked"]
    kept, plain, chunked = json.loads(out.read_text())["rows"].values()
    assert kept == {"peak_memory": 1}
    assert plain["peak_memory"] > sum(plain["bytes"][part] for part in ("weights", "gradients", "logits"))
    assert abs(chunked["losses"][0] - plain["losses"][0]) < 0.05
    assert plain["losses"][-1] < plain["losses"][0]


def test_the_streamed_step_is_measured_phase_by_phase(tmp_path):
    out = tmp_path / "streaming.json"
    rows = [f"qwen3-0.6b/1x512/stateless/{way}" for way in ("streamed", "checkpointed", "streamed+checkpointed")]
    rows.append("qwen3-0.6b/1x512/adamw-everywhere/mlx-lm")
    run("streaming_memory.py", "--out", out, "--smoke", "--one-process", "--steps", 1, "--rows", *rows)
    found = json.loads(out.read_text())["rows"]
    streamed, checkpointed, in_turn, mlx_lm = (found[row] for row in rows)
    assert in_turn["ratio"] == pytest.approx(in_turn["rounds"][0][0] / in_turn["rounds"][0][1], rel=1e-2)
    assert list(streamed["phases"]) == ["forward", "loss", "head", "layers", "embedding"]
    assert streamed["peak_memory"] < checkpointed["peak_memory"] / 2
    assert abs(streamed["losses"][0] - checkpointed["losses"][0]) < 0.05
    # Between two steps of mlx-lm's there are weights and both moments, and of ours weights alone.
    assert mlx_lm["held"] > 2.9 * mlx_lm["bytes"]["weights"] > 2 * streamed["held"]
    assert mlx_lm["losses"][-1] < mlx_lm["losses"][0]


def test_rows_in_one_process_leave_nothing_to_the_next(monkeypatch):
    """mlx-lm's checkpointing patches the class of the layers: not undone, all later rows would be checkpointed too."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import mlx.core as mx
    from mlx_lm.models.llama import TransformerBlock
    from mlx_training_memory import LEFT_OVER, measure

    row, call = "smollm2-135m/tied/lora/1x512/ember", TransformerBlock.__call__
    gc.collect()
    left = mx.get_active_memory()
    monkeypatch.setattr("mlx_training_memory.LEFT_OVER", left + LEFT_OVER)  # of other tests
    again, unguarded = (measure(name, 0, 1, True) for name in (f"{row}/checkpoint", f"{row}/unguarded"))
    assert TransformerBlock.__call__ is call
    assert again["losses"] == unguarded["losses"]
    held = mx.zeros(2 * LEFT_OVER, mx.uint8)
    mx.eval(held)
    with pytest.raises(RuntimeError, match="of earlier rows are left"):
        measure(row, 0, 1, True)


def test_what_is_no_result_or_of_another_machine_is_refused_and_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import mlx_training_memory
    from training_memory_rows import read_report

    out = tmp_path / "memory.json"
    for text in ("no JSON", "[]", '{"machine": {}, "rows": []}'):
        out.write_text(text)
        with pytest.raises(SystemExit, match=r"memory.json: "):
            read_report(out)
    out.write_text('{"machine": {"device": "a GPU", "smoke": false}, "rows": {}}')
    before = out.read_bytes()
    monkeypatch.setattr(mlx_training_memory, "in_fresh_process", lambda function: {"device": "another GPU"})
    monkeypatch.setattr("sys.argv", ["", "--out", str(out), "--rows", "smollm2-135m/tied/lora/1x512/ember"])
    with pytest.raises(SystemExit, match="has rows of another kind.*device: a GPU and not another GPU"):
        mlx_training_memory.main()
    assert out.read_bytes() == before


def test_the_pictures_are_drawn_from_what_there_is(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "memory.json"
    machine = {"device": "a GPU", "versions": {"mlx": "1.2.3"}}
    rows = {"qwen3-0.6b/untied/lora/1x512/ember": {"peak_memory": 3_100_000_000}, "of another kind": {"error": "none"}}
    out.write_text(json.dumps({"machine": machine, "rows": rows}))
    words = ["--draw", tmp_path / "pictures", out]
    run_here(BENCHMARKS / "mlx_training_memory.py", *words, monkeypatch=monkeypatch, capsys=capsys)
    names = ("peak_by_optimizer", "peak_of_long_sequences")
    drawn = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert drawn == {f"{name}_{mode}.svg" for name in names for mode in ("light", "dark")}


def test_the_guard_is_measured_beside_none_in_one_process(tmp_path):
    out, row = tmp_path / "guard.json", "mini-qwen3/untied/lora/1x512/ember"
    run("guard_cost.py", "--out", out, "--smoke", "--rounds", 1, "--warm-up", 1, "--rows", row)
    measured = json.loads(out.read_text())["rows"][row]
    kinds = {kind: of for kind, of in measured.items() if kind != "loss"}
    assert list(kinds) == ["off", "stop", "skip", "clip", "mlx-lm"]
    assert all(of["seconds"] > 0 and of["peak_memory"] > 0 for of in kinds.values())
    assert kinds["off"]["peak_over_off"] == 1


def test_the_kernels_are_planned_checked_and_timed_without_a_gpu_too(tmp_path):
    out = tmp_path / "kernels.json"
    only = ["SinkGD rounded", "FlashAdamW bf16"]
    run("kernel_times.py", "--smoke", "--out", out, "--samples", 1, "--only-package", "--only", *only)
    rows = json.loads(out.read_text())["rows"]
    assert all(row["check"]["right"] and row["milliseconds"] > 0 for row in rows)
    of = {(row["name"], row["dtype"]): row["milliseconds"] for row in rows}
    rounded = next(row for row in rows if row["name"] == "SinkGD rounded, 96x32, transposed")
    assert rounded["of_adamw"] == round(rounded["milliseconds"] / of["AdamW rounded, 96x32, transposed", "bfloat16"], 3)
    assert {"AdamW", "FlashAdamW bf16+int8", "SinkGD rounded"} <= {name for name, _ in of}
