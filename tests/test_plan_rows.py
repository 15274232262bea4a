"""The rows of a plan, with the tables by other optimizers or frozen, and steps beside what the demo's model took."""

import json

import pytest
from planned_models import QWEN

from ember_mlx.commands.plan import main
from ember_mlx.finetune import options
from ember_mlx.planner import alternatives, plan, read_architecture, run_of
from ember_mlx.planner.step import build_step


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        (["--train-tables", "none"], 4),
        (["--table-optimizer", "adamw"], 4),  # whose tables are rounded to nearest, and Ember's are not
        (["--fine-tune-type", "full"], 4),
        (["--fine-tune-type", "full", "--no-stream"], 4),
        (["--fine-tune-type", "full", "--stream"], 4),
        (["--fine-tune-type", "full", "--keep-inputs", "2"], 3),  # without tables nothing streams: train refuses it
    ],
    ids=str,
)
def test_tables_by_other_optimizers_are_planned_as_train_runs_them(words, rows):
    model = read_architecture(QWEN | {"num_hidden_layers": 20}, "config.json")
    args = options.parse(words)
    found = alternatives(args, model, run_of(args, model))
    assert len(found) == rows
    for flags, run in found.items():
        assert run == run_of(options.parse([*words, *flags.split()]), model)


def test_frozen_tables_are_compared_with_tables_that_train():
    model = read_architecture(QWEN, "config.json")
    args = options.parse(["--train-tables", "none"])
    runs = alternatives(args, model, run_of(args, model)).values()
    ember, adamw, adafactor, frozen = (plan(model, run, "cpu").optimizer_state for run in runs)
    assert frozen < min(ember, adafactor)
    assert max(ember, adafactor) < adamw


@pytest.mark.parametrize(
    ("words", "label"),
    [
        ([], "no training (frozen), not streamed, 16 layers "),
        (["--no-stream"], "no training (frozen), 16 layers "),
        (["--stream", "--num-layers", "3"], "no training (frozen) "),
        (["--train-tables", "none", "--num-layers", "3"], "Ember, streamed "),
    ],
    ids=["streamed", "not streamed", "as asked", "thawed"],
)
def test_each_row_says_how_its_run_differs(tmp_path, capsys, words, label):
    (tmp_path / "config.json").write_text(json.dumps(QWEN | {"num_hidden_layers": 17}))
    main(["--model", str(tmp_path), "--fine-tune-type", "full", "--batch-size", "1", "--max-seq-length", "65", *words])
    assert f"\n{label}" in capsys.readouterr().out


DEMO = QWEN | {"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
DEMO |= {"num_key_value_heads": 2, "vocab_size": 4096, "torch_dtype": "float32"}
FULL = ["--fine-tune-type", "full", "--no-stream"]


@pytest.mark.parametrize(
    ("words", "measured"),
    [
        ([*FULL, "--optimizer", "sinkgd"], 15.31),  # the scratch of one norm at a time
        ([], 13.98),
        (["--table-optimizer", "adafactor"], 20.80),  # the old tables stay until the new are judged
        ([*FULL, "--optimizer", "adafactor"], 17.49),
    ],
    ids=str,
)
def test_steps_of_few_tokens_are_planned_within_a_fiftieth_of_what_the_demo_took(words, measured):
    model = read_architecture(DEMO, "config.json")
    run = run_of(options.parse(["--batch-size", "1", "--max-seq-length", "65", *words]), model)
    assert plan(model, run, "cpu").peak == pytest.approx(measured * 1e6, rel=0.02)


def test_with_fewer_tokens_than_features_the_layers_come_before_the_head():
    """A step of Qwen3-0.6B, 1 x 512, took 3.018 GB of an H200 (examples/benchmarks); head first it would take 3.22."""
    model = read_architecture(DEMO | {"vocab_size": 30_000}, "config.json")
    for length, place in ((64, 6), (128, 2), (129, 1)):  # of the last, as many tokens as features: what leaves the head
        run = run_of(options.parse(["--batch-size", "1", "--max-seq-length", str(length)]), model)
        step = build_step(model, run, "cpu")
        assert [step.gradients["lm_head"] in group for group in step.evaluations].index(True) == place


def test_frozen_tables_peak_no_higher():
    """A CPU took 49.7 MB with the demo's tables frozen, and 50.0 MB with Ember on them."""
    model = read_architecture(DEMO, "config.json")
    args = options.parse(["--max-seq-length", "129"])
    ember, frozen = (
        plan(model, run_of(args | {"train_tables": tables}, model), "cpu").peak for tables in ("auto", "none")
    )
    assert frozen == pytest.approx(49.72e6, rel=0.02)
    assert frozen < ember
