"""Every optimizer of ours in ``train``: resumed bit for bit, counted by ``plan``, refused in one line."""

import mlx.core as mx
import pytest
from finetune.breaking import BreakAt, Breaks
from finetune.test_resume import assert_same

from ember_mlx import InputError
from ember_mlx.finetune import optimizer_names
from ember_mlx.finetune.build_optimizer import body_optimizer, table_optimizer
from ember_mlx.finetune.option_checks import check
from ember_mlx.finetune.run import run

CASES = {
    "adam-mini": ("adam-mini", {}),
    "adam-mini int8": ("adam-mini", {"momentum": "int8"}),
    "sinkgd": ("sinkgd", {"passes": 2}),
    "flash-adamw": ("flash-adamw", {}),
    "adamw_8bit": ("adamw_8bit", {}),
    "flash-lion": ("flash-lion", {}),
}


def test_no_name_is_left_out():
    assert {name for name, _ in CASES.values()} == {*optimizer_names.BODY, *optimizer_names.ALIASES}


@pytest.mark.parametrize(("case", "table_optimizer"), [*((case, "ember") for case in CASES), ("sinkgd", "sage")])
def test_a_resumed_run_goes_on_bit_for_bit(parse, tmp_path, case, table_optimizer):
    name, config = CASES[case]
    common = ["--optimizer", name, "--table-optimizer", table_optimizer, "--iters", 5, "--clip-grad-norm", 1]
    common += ["--grad-accumulation-steps", 2, "--save-every", 2]
    told = {"optimizer_config": {name: config}}
    whole = run(parse(*common, adapter="whole") | told)
    with pytest.raises(Breaks):
        run(parse(*common, adapter="broken") | told, BreakAt(3))
    run(parse(*common, "--resume", adapter="broken") | told)
    assert_same(tmp_path / "whole", tmp_path / "broken")
    assert [line.optimizer for line in whole.trained][-1] == optimizer_names.CLASSES[optimizer_names.canonical(name)]


@pytest.mark.parametrize("name", optimizer_names.BODY)
def test_its_learning_rate_schedule_and_settings_reach_it(parse, name):
    schedule = {"name": "linear_schedule", "arguments": [1e-3, 1e-4, 10]}
    args = parse("--optimizer", name) | {"lr_schedule": schedule}
    made = body_optimizer(args | {"optimizer_config": {name: {"weight_decay": 0.5}}})
    made.init({"w": mx.zeros((4, 32))})
    assert made.state["weight_decay"].item() == 0.5
    made.apply_gradients({"w": mx.ones((4, 32))}, {"w": mx.zeros((4, 32))})
    assert made.learning_rate.item() == pytest.approx(1e-3)


def test_each_takes_split_weights(parse):
    for name in optimizer_names.BODY:
        args = parse("--optimizer", name) | {"optimizer_config": {name: {"weights": "bf16+int8"}}}
        made = body_optimizer(args)
        w = {"w": mx.zeros((4, 32), mx.bfloat16)}
        made.init(w)
        assert made.apply_gradients({"w": mx.ones((4, 32), mx.bfloat16)}, w)["w"].dtype == mx.bfloat16
        assert made.state["w"]["rest"].dtype == mx.int8


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("adam-mini", {"momentum": "int4"}, "optimizer_config: adam-mini: .*must be 'float32' or 'int8'"),
        ("sinkgd", {"passes": 0}, "optimizer_config: sinkgd: .*whole number from 1 to 100"),
        ("flash-adamw", {"weights": "int8"}, "optimizer_config: flash-adamw: .*'bf16.int8' or None"),
        ("sinkgd", {"weights": "int8"}, "optimizer_config: sinkgd: .*must be 'bf16.int8'"),
        (
            "flash-lion",
            {"momentum": "int8"},
            "flash-lion: momentum: is no setting here.*; it takes betas, ",
        ),
        ("adam-mini", {"eps": 0}, "optimizer_config: adam-mini: .*eps"),
    ],
)
def test_settings_that_cannot_be_are_refused(parse, name, config, message):
    with pytest.raises(InputError, match=message):
        body_optimizer(parse("--optimizer", name) | {"optimizer_config": {name: config}})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"adamini": {"momentum": "int8"}}, "adamini: is the name of no optimizer .did you mean 'adam-mini'"),
        ({"AdamMini": {}}, "AdamMini: is the name of no optimizer .did you mean"),
        ({7: {}}, "7: is the name of no optimizer; it takes adam, "),
        ({"sinkgd": 2}, "sinkgd: 2: must hold settings"),
    ],
)
def test_settings_of_no_optimizer_are_not_left_out_in_silence(parse, config, message):
    with pytest.raises(InputError, match=f"^optimizer_config: {message}"):
        check(parse() | {"optimizer_config": config})
    check(parse() | {"optimizer_config": {"adamw_8bit": {"eps": 1e-7}, "sage": {}, "muon": None}})


def test_a_plan_knows_only_the_settings_that_change_the_state(parse):
    for config in ({"weights": "int8"}, {"momentum": "bf16+int8"}, {"eps": 1e-7}):
        args = parse("--optimizer", "sinkgd") | {"optimizer_config": {"sinkgd": config}}
        assert optimizer_names.planned(args) == "sinkgd"


@pytest.mark.parametrize("name", [*optimizer_names.BODY, "adamw_8bit", "muon"])
def test_ours_correct_their_bias_unasked(parse, name):
    says = {"muon": "muon corrects no bias", "flash-lion": "flash-lion has no bias to correct"}
    with pytest.raises(InputError, match=f"^--bias-correction: no effect: {says.get(name, '.* always .*correct')}"):
        parse("--optimizer", name, "--bias-correction")
    if name in says:
        return
    made = body_optimizer(parse("--optimizer", name, "--learning-rate", 1e-3))
    vector, gradient = {"w": mx.zeros(32)}, {"w": mx.full(32, 0.01)}
    made.init(vector)  # without a correction the first step of (0.9, 0.999) has 3.2 times the rate
    step = mx.abs(made.apply_gradients(gradient, vector)["w"])
    assert step.tolist() == pytest.approx([1e-3] * 32, rel=1e-2)


def test_sage_has_no_options_of_ember(parse):
    with pytest.raises(InputError, match="--table-row-clip: is for ember alone, not for sage"):
        parse("--table-optimizer", "sage", "--table-row-clip", 1)
    made = table_optimizer(parse("--table-optimizer", "sage", "--table-weight-decay", 0.5), "nearest")
    assert (type(made).__name__, made.state["weight_decay"].item()) == ("SAGE", 0.5)
