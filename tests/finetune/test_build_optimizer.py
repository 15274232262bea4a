"""The optimizers of a run: bias corrected, heard learning rates, schedules in step."""

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from tiny_models import tiny_llama

from ember_mlx import Ember, InputError, PairedOptimizer
from ember_mlx.finetune.build_optimizer import (
    body_learning_rate,
    body_optimizer,
    build_optimizer,
    growing_beta2,
    peak,
    table_learning_rate,
    table_optimizer,
)
from ember_mlx.finetune.choices import choose, rounding
from ember_mlx.finetune.run_length import updates
from ember_mlx.finetune.summary import default_rates, what_trains
from ember_mlx.finetune.trainable import make_trainable, shapes_of
from ember_mlx.optimizers.guarded import GuardedOptimizer

WARMUP_AND_COSINE = {"name": "cosine_decay", "warmup": 2, "warmup_init": 1e-7, "arguments": [1e-5, 10, 1e-7]}


def test_adam_and_adamw_correct_their_bias_where_that_is_asked_for(parse):
    for name in ("adam", "adamw"):
        assert body_optimizer(parse("--optimizer", name)).bias_correction is False  # as mlx-lm has it
        args = parse("--optimizer", name, "--bias-correction")
        assert body_optimizer(args).bias_correction is True
        args |= {"optimizer_config": {name: {"bias_correction": False, "betas": [0.9, 0.98]}}}
        assert body_optimizer(args).bias_correction is False
        assert body_optimizer(args).betas == [0.9, 0.98]


@pytest.mark.parametrize("name", ["adam", "adamw", "muon", "sgd"])  # stock Adafactor has a rate of its own
def test_every_optimizer_of_mlx_lm_hears_the_learning_rate(parse, name):
    def step(rate):
        optimizer = body_optimizer(parse("--optimizer", name, "--learning-rate", rate))
        weight = mx.ones((4, 4))
        return (optimizer.apply_gradients({"w": mx.eye(4) + 0.5}, {"w": weight})["w"] - weight).abs().sum().item()

    assert step(2e-3) == pytest.approx(2 * step(1e-3), rel=0.05)


@pytest.mark.parametrize("name", ["ember", "adamw", "adafactor", "sgd"])
def test_every_table_optimizer_takes_the_tables_settings(parse, name):
    beta2 = ["--table-beta2", 0.99] if name in ("ember", "adamw") else []
    args = parse("--table-optimizer", name, "--table-learning-rate", 0.25, "--table-weight-decay", 0.5, *beta2)
    optimizer = table_optimizer(args, "nearest")
    assert type(optimizer).__name__.lower() == name
    assert optimizer.learning_rate.item() == 0.25
    if name == "ember":
        assert (optimizer.beta2, optimizer.state["weight_decay"].item()) == (0.99, 0.5)
    else:
        assert optimizer.weight_decay == 0.5
    if name == "adamw":
        assert optimizer.betas == [0.9, 0.99]
        assert optimizer.bias_correction


def test_the_options_of_ember_reach_it(parse):
    options = ("--table-row-clip", 3, "--table-row-floor", 2, "--seed", 5)
    options += ("--table-beta2-decay", 0.8)
    ember = table_optimizer(parse(*options), "stochastic")
    assert (ember.row_clip, ember.row_floor, ember.rounding, ember.seed) == (3, 2, "stochastic", 5)
    at = lambda ember, steps_done: ember.beta2(mx.array(steps_done, mx.uint64)).item()  # noqa: E731
    assert [at(ember, t - 1) for t in (1, 2, 1000)] == pytest.approx([1 - t**-0.8 for t in (1, 2, 1000)], abs=1e-6)
    limited = table_optimizer(parse(*options, "--table-beta2", 0.9), "nearest")
    assert [at(limited, t - 1) for t in (1, 2, 1000)] == pytest.approx([0, 1 - 2**-0.8, 0.9], abs=1e-6)
    assert growing_beta2(50, None)(mx.array(100, mx.uint64)).item() < 1
    plain = table_optimizer(parse(), "nearest")
    assert (plain.beta2, plain.row_clip, plain.row_floor) == (0.999, None, 3)
    assert table_optimizer(parse("--table-row-floor", 0), "nearest").row_floor is None


def test_tables_of_16_bits_are_rounded_stochastically_unless_asked_otherwise(parse):
    for dtypes in ([mx.bfloat16], [mx.float16], [mx.float32, mx.bfloat16]):
        assert rounding(parse(), dtypes) == "stochastic"
        assert rounding(parse("--table-rounding", "nearest"), dtypes) == "nearest"
        assert rounding(parse("--table-optimizer", "adamw"), dtypes) == "nearest"
    assert rounding(parse(), [mx.float32, mx.float32]) == "nearest"
    assert rounding(parse("--table-rounding", "stochastic"), [mx.float32]) == "stochastic"


@pytest.mark.parametrize(("dtype", "rounding"), [(mx.bfloat16, "stochastic"), (mx.float32, "nearest")])
def test_the_rounding_of_a_run_is_that_of_its_records(parse, dtype, rounding):
    args, model = parse(), tiny_llama()
    model.set_dtype(dtype)
    choices = choose(args, shapes_of(model))
    optimizer = build_optimizer(model, args, choices)
    assert optimizer.tables.rounding == choices.as_options()["table_rounding"] == rounding


def test_tables_none_leaves_the_bodys_optimizer_alone_and_both_are_guarded(parse):
    for choice, kind in (("auto", PairedOptimizer), ("none", GuardedOptimizer)):
        args, model = parse("--train-tables", choice, "--clip-grad-norm", 0.5), tiny_llama()
        choices = choose(args, shapes_of(model))
        make_trainable(model, args, choices)
        optimizer = build_optimizer(model, args, choices)
        assert type(optimizer) is kind
        assert type(optimizer.rest if choice == "auto" else optimizer.optimizer) is optim.Adam
        assert (optimizer.nonfinite_steps.item(), optimizer.clip_grad_norm) == (0, 0.5)
        if kind is PairedOptimizer:
            assert type(optimizer.tables) is Ember


def test_adamw_on_the_body_is_pytorchs(parse):
    torch = pytest.importorskip("torch")
    optimizer = body_optimizer(parse("--optimizer", "adamw", "--learning-rate", 0.1, "--bias-correction"))
    ours = mx.random.normal((5, 3), key=mx.random.key(0))
    theirs = torch.nn.Parameter(torch.from_numpy(np.array(ours)))
    reference = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.01)
    for i in range(5):
        gradient = mx.random.normal((5, 3), key=mx.random.key(i + 1))
        ours = optimizer.apply_gradients({"w": gradient}, {"w": ours})["w"]
        theirs.grad = torch.from_numpy(np.array(gradient))
        reference.step()
    # MLX takes 1 - 0.999^t in float32: off by 6e-8 of 1e-3 t, half that after the root, times a step of 0.1, summed.
    assert np.abs(np.array(ours) - theirs.detach().numpy()).max() < 7e-6


def test_the_tables_follow_the_bodys_schedule_at_their_own_scale(parse):
    rising = {"name": "linear_schedule", "arguments": [0.0, 1e-5, 8]}
    for schedule in (WARMUP_AND_COSINE, rising):
        args = parse("--table-learning-rate", 1e-2, "--iters", 12)
        args |= {"lr_schedule": schedule}
        body, tables = body_optimizer(args)._schedulers["learning_rate"], table_learning_rate(args)
        assert peak(body, args.iters) == pytest.approx(1e-5)
        for step in range(12):
            assert tables(mx.array(step)).item() == pytest.approx(1000 * body(mx.array(step)).item())


@pytest.mark.parametrize("flag", [True, False])
def test_tables_of_a_run_that_ends_within_its_warmup_keep_their_share_of_the_bodys_rate(parse, flag):
    schedule = {"name": "cosine_decay", "arguments": [1e-4, 360, 1e-5]}
    args = parse("--table-learning-rate", 3.2e-5, "--iters", 5)
    # Of a flag, train refuses so long a warm-up.
    args |= {"lr_schedule": schedule, "warmup": 40} if flag else {"lr_schedule": schedule | {"warmup": 40}}
    body, tables = body_learning_rate(args), table_learning_rate(args)
    for step in range(1, 5):
        assert body(mx.array(step)).item() == pytest.approx(1e-4 * step / 40)
        assert tables(mx.array(step)).item() == pytest.approx(3.2e-5 * step / 40)


@pytest.mark.parametrize("accumulation", [2, 5])
def test_schedules_count_updates_and_the_summary_reports_what_is_reached(parse, accumulation):
    rising = {"name": "linear_schedule", "arguments": [0.0, 1e-3, 10]}
    args = parse("--iters", 10, "--grad-accumulation-steps", accumulation, "--table-learning-rate", 1e-2)
    args |= {"lr_schedule": rising}
    reached = 1e-4 * (10 // accumulation - 1)  # the first update is at 0
    assert peak(body_learning_rate(args), updates(args)) == pytest.approx(reached)
    assert peak(table_learning_rate(args), updates(args)) == pytest.approx(1e-2)
    model = tiny_llama()
    choices = choose(args, shapes_of(model))
    make_trainable(model, args, choices)
    lines = what_trains(model, build_optimizer(model, args, choices), args, choices)
    assert {line.learning_rate for line in lines} == {"up to 0.01", f"up to {reached:.3g}"}


def test_the_summary_names_no_rate_that_adafactor_does_not_take(parse):
    model, args = tiny_llama(), parse("--optimizer", "adafactor")
    choices = choose(args, shapes_of(model))
    make_trainable(model, args, choices)
    lines = what_trains(model, build_optimizer(model, args, choices), args, choices)
    assert [line.learning_rate for line in lines][-1] == "its own"
    fixed = args | {"optimizer_config": {"adafactor": {"relative_step": False}}}
    assert what_trains(model, build_optimizer(model, fixed, choices), fixed, choices)[-1].learning_rate == "1e-05"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--optimizer flash-adamw", "By default: --table-learning-rate 0.0003 and --learning-rate 0.0003"),
        ("--optimizer flash-adamw --learning-rate 3e-4 --warmup 2", "By default: --table-learning-rate 0.0003"),
        ("--table-learning-rate 3e-4", "By default: --learning-rate 1e-05"),
        ("--train-tables none", "By default: --learning-rate 1e-05"),
        ("--num-layers 0", "By default: --table-learning-rate 0.0003"),
        ("--optimizer adafactor --table-learning-rate 3e-4", ""),
        ("--resume", ""),  # they may be the checkpoint's
    ],
)
def test_rates_that_nobody_has_given_are_told(parse, words, told):
    model, args = tiny_llama(), parse(*words.split())
    choices = choose(args, shapes_of(model))
    make_trainable(model, args, choices)
    lines = what_trains(model, build_optimizer(model, args, choices), args, choices)
    assert default_rates(lines, args) == told
    assert len(told) <= 80


def test_the_tables_can_have_a_schedule_of_their_own(parse):
    schedule = {"name": "linear_schedule", "arguments": [0.5, 0.0, 10]}
    args = parse() | {"lr_schedule": WARMUP_AND_COSINE, "table_lr_schedule": schedule}
    assert table_learning_rate(args)(mx.array(5)).item() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"name": "linear_schedule", "arguments": [0.0, 0.0, 5]}, "lr_schedule .*not all 0"),
        ({"name": "linear_schedule", "arguments": [1.0, -1.0, 3]}, "lr_schedule .*at least 0"),
    ],
)
def test_a_schedule_of_rates_that_cannot_be_is_refused(parse, schedule, message):
    args = parse() | {"lr_schedule": schedule}
    with pytest.raises(InputError, match=message):
        body_optimizer(args)
    args |= {"lr_schedule": None, "table_lr_schedule": schedule}
    with pytest.raises(InputError, match=f"table_{message}"):
        table_learning_rate(args)


def test_an_optimizer_config_that_does_not_fit_is_refused(parse):
    args = parse() | {"optimizer_config": {"adam": {"momentum": 0.9}}}
    with pytest.raises(
        InputError, match="^optimizer_config: adam: momentum: .*; it takes betas, eps, bias_correction$"
    ):
        body_optimizer(args)
