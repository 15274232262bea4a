"""A batch without a loss: the run stops at it, or goes on as if it had not been."""

import json
import math
import re

import mlx.core as mx
import pytest
from tiny_models import write_model

from ember_mlx import InputError
from ember_mlx.finetune import checkpoints
from ember_mlx.finetune.run import run

ROWS = 4


@pytest.fixture
def one_bad_row(tmp_path, folders):
    """A data folder; with --mask-prompt and 48 tokens, nothing is left to learn of its longest row."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"prompt": f"{i} and", "completion": f"{i + 1}"} for i in range(ROWS - 1)]
    rows.append({"prompt": "long " * 20, "completion": "lost"})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "valid.jsonl").write_bytes((folders["data"] / "valid.jsonl").read_bytes())
    return [
        "--data", folder, "--mask-prompt", "--max-seq-length", 48, "--batch-size", 1, "--iters", ROWS
    ]  # fmt: skip


def saved(folder):
    return {name: mx.load(str(folder / name)) for name in ("adapters.safetensors", "token_tables.safetensors")}


@pytest.mark.parametrize("tables", ["auto", "none"])
def test_the_run_stops_there_and_says_what_to_do(parse, one_bad_row, tables):
    with pytest.raises(InputError, match=r"step [1-4]: a NaN .*neither the weights .*--on-nonfinite skip"):
        run(parse(*one_bad_row, "--train-tables", tables))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_state_before_it_is_kept_and_gone_on_from(parse, one_bad_row, tmp_path, capsys, accumulate):
    common = [*one_bad_row, "--iters", 8, "--grad-accumulation-steps", accumulate]
    run(parse(*common, "--on-nonfinite", "skip", adapter="whole"))
    with pytest.raises(InputError, match=r"step [1-4]: .*--resume continues before that step"):
        run(parse(*common))
    with pytest.raises(InputError, match="--on-nonfinite skip$"):
        run(parse(*common, "--keep-checkpoints", 0, adapter="none"))
    assert " is saved, and --resume continues from it" in " ".join(capsys.readouterr().out.split())
    run(parse(*common, "--on-nonfinite", "skip", "--resume"))
    whole, resumed = (checkpoints.find(tmp_path / adapter, True) for adapter in ("whole", "adapters"))
    assert resumed.position == whole.position
    for kind in ("weights", "optimizer"):
        expected = getattr(whole, kind)
        assert [
            name for name, array in getattr(resumed, kind).items() if not mx.array_equal(array, expected[name])
        ] == []
    assert whole.optimizer["nonfinite_steps"].item() > 0


@pytest.mark.parametrize(
    ("dtype", "kind", "optimizer", "table_optimizer"),
    [
        (mx.float32, "full", "adamw", "adamw"),
        (mx.bfloat16, "dora", "muon", "ember"),
        (mx.float16, "lora", "adam", "sgd"),
    ],
)
def test_stop_leaves_what_a_run_has_that_ended_before_it(
    parse, one_bad_row, tmp_path, dtype, kind, optimizer, table_optimizer
):
    model = write_model(tmp_path / "model", dtype=dtype)
    common = [*one_bad_row, "--model", model, "--seed", 5, "--fine-tune-type", kind, "--optimizer", optimizer]
    common += ["--table-optimizer", table_optimizer]
    with pytest.raises(InputError) as stopped:
        run(parse(*common, adapter="stopped"))
    bad = int(re.search(r"step (\d)", str(stopped.value))[1])
    assert bad > 1  # with this seed
    run(parse(*common, "--iters", bad - 1, adapter="before"))
    kept, before = (checkpoints.find(tmp_path / adapter, True) for adapter in ("stopped", "before"))
    assert kept.position.mlx_random == before.position.mlx_random
    for kind in ("weights", "optimizer"):
        expected, found = getattr(before, kind), getattr(kept, kind)
        assert found.keys() == expected.keys()
        assert [name for name, array in found.items() if not mx.array_equal(array, expected[name])] == []


def test_a_weight_that_was_nan_from_the_start_is_no_checkpoint_and_the_step_is_named(parse, tmp_path, capsys):
    model = write_model(tmp_path / "model")
    weights = mx.load(str(model / "model.safetensors"))
    weights["lm_head.weight"][0, 0] = mx.nan
    mx.eval(weights)
    mx.save_safetensors(str(model / "model.safetensors"), weights, {"format": "mlx"})
    with pytest.raises(InputError, match="^step 1: a NaN .*--on-nonfinite skip$"):
        run(parse("--model", model))
    said = " ".join(capsys.readouterr().out.split())
    assert "not saved weights.safetensors: lm_head.weight has 1 of 8320 numbers that are not finite" in said
    assert not list((tmp_path / "adapters").rglob("*.safetensors"))


@pytest.mark.parametrize("more", [[], ["--clip-grad-norm", 0.1], ["--chunked-loss"]])
def test_or_leaves_that_step_out_and_says_so(parse, one_bad_row, tmp_path, capsys, more):
    reports = []

    class Callback:
        on_train_loss_report = reports.append
        on_val_loss_report = reports.append

    result = run(parse(*one_bad_row, "--on-nonfinite", "skip", *more), training_callback=Callback)
    said = capsys.readouterr().out
    assert said.count("a NaN or an infinity in the loss, a gradient or a new weight; it was left out, 1 so far") == 1
    assert "1 step was left out" in said
    losses = [report["train_loss"] for report in reports if "train_loss" in report]
    assert sum(loss != loss for loss in losses) == 1
    assert result.loss_after < result.loss_before
    assert all(
        mx.isfinite(array).all() for arrays in saved(tmp_path / "adapters").values() for array in arrays.values()
    )


def test_what_is_accumulated_with_it_is_left_out_too(parse, one_bad_row, tmp_path, capsys):
    with pytest.raises(InputError, match="1 of 1 steps had a NaN"):
        run(parse(*one_bad_row, "--grad-accumulation-steps", ROWS, "--on-nonfinite", "skip"))
    assert "step 4: a NaN" in capsys.readouterr().out
    assert not list((tmp_path / "adapters").glob("*.safetensors"))


def test_a_run_whose_only_report_has_such_a_step_in_it_ends_well(parse, one_bad_row, tmp_path):
    (tmp_path / "data" / "valid.jsonl").unlink()
    result = run(parse(*one_bad_row, "--on-nonfinite", "skip", "--steps-per-report", ROWS))
    assert math.isnan(result.loss_after)
    assert saved(tmp_path / "adapters")


@pytest.mark.parametrize("tables", ["auto", "none"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_with_every_step_left_out_nothing_is_saved_as_if_it_were_trained(parse, folders, tmp_path, tables, accumulate):
    (tmp_path / "bad").mkdir()
    row = json.dumps({"prompt": "long " * 20, "completion": "lost"})
    (tmp_path / "bad" / "train.jsonl").write_text(f"{row}\n{row}\n")
    (tmp_path / "bad" / "valid.jsonl").write_bytes((folders["data"] / "valid.jsonl").read_bytes())
    options = ["--data", tmp_path / "bad", "--mask-prompt", "--max-seq-length", 48, "--train-tables", tables]
    options += ["--grad-accumulation-steps", accumulate, "--iters", 4, "--save-every", 1, "--on-nonfinite", "skip"]
    count = 4 // accumulate
    with pytest.raises(
        InputError, match=rf"--on-nonfinite skip: {count} of {count} steps .* no adapter .*Lower"
    ) as refused:
        run(parse(*options))
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "adapters").glob("adapters*"))
    # An adapter that was there stays, and with one good step there is something to save.
    run(parse("--train-tables", tables, adapter="earlier"))
    before = {path: path.read_bytes() for path in (tmp_path / "earlier").glob("*.safetensors")}
    with pytest.raises(InputError, match="no adapter is saved"):
        run(parse(*options, "--overwrite", adapter="earlier"))
    assert before == {path: path.read_bytes() for path in (tmp_path / "earlier").glob("*.safetensors")}
