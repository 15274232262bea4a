"""Ranges are those of float32, in which the numbers are used, wherever one enters: Python, PyTorch, flags and YAML."""

import mlx.core as mx
import pytest
import torch
from tiny_models import tiny_llama

from cuda_ref import optimizers as torch_optimizers
from ember_mlx import InputError
from ember_mlx import optimizers as mlx_optimizers
from ember_mlx.finetune.build_optimizer import body_optimizer, build_optimizer, table_learning_rate
from ember_mlx.finetune.choices import choose
from ember_mlx.finetune.trainable import make_trainable, shapes_of

BODY = ("AdamMini", "SAGE", "FlashAdamW", "FlashLion")  # that have betas; SinkGD has none
HIGHEST_BELOW_1, ONE = 1 - 2.0**-24, 1 - 2.0**-25
HIGHEST, INFINITE = 2.0**128 - 2.0**104, 2.0**128 - 2.0**103


def weight():
    return torch.nn.Parameter(torch.ones(4, 32))


def in_mlx(name):
    return lambda **how: getattr(mlx_optimizers, name)(**({"learning_rate": 1e-3} | how))


def in_torch(name):
    return lambda **how: getattr(torch_optimizers, name)([weight()], **({"lr": 1e-3} | how))


EMBERS = {"MLX Ember": in_mlx("Ember"), "PyTorch Ember": in_torch("Ember")}
BODIES = {f"MLX {name}": in_mlx(name) for name in BODY} | {f"PyTorch {name}": in_torch(name) for name in BODY}


@pytest.mark.parametrize("name", [*EMBERS, *BODIES])
def test_what_float32_takes_for_infinity_is_refused_in_python(name):
    make = (EMBERS | BODIES)[name]
    options = ["lr" if name.startswith("PyTorch") else "learning_rate", "weight_decay"]
    for option in options if name.endswith("Lion") else [*options, "eps"]:
        make(**{option: HIGHEST})
        with pytest.raises(InputError, match=option):
            make(**{option: INFINITE})


@pytest.mark.parametrize("name", EMBERS)
def test_what_float32_takes_for_1_is_refused_as_beta2(name):
    EMBERS[name](beta2=HIGHEST_BELOW_1)
    with pytest.raises(InputError, match="beta2.*in float32, below 1"):
        EMBERS[name](beta2=ONE)


@pytest.mark.parametrize("name", BODIES)
def test_what_float32_takes_for_1_is_refused_as_a_beta(name):
    for place in range(2):
        betas = [0.9, 0.99]
        betas[place] = HIGHEST_BELOW_1
        BODIES[name](betas=tuple(betas))
        betas[place] = ONE
        with pytest.raises(InputError, match="betas=.*below 1, in float32 too"):
            BODIES[name](betas=tuple(betas))


@pytest.mark.parametrize("written", ["flag", "YAML"])
@pytest.mark.parametrize(
    ("option", "good", "bad"),
    [
        ("table_beta2", HIGHEST_BELOW_1, ONE),
        ("learning_rate", 1e10, 1.1e10),
        ("table_learning_rate", 1e10, 1e38),
        ("table_weight_decay", HIGHEST, 1e39),
        ("clip_grad_norm", HIGHEST, INFINITE),
        ("clip_grad_norm", 2.0**-126, 1e-60),
        ("table_beta2_decay", 1.0, 1.001),
    ],
)
def test_flags_and_yaml_have_the_same_ranges(parse, tmp_path, written, option, good, bad):
    def given(value):
        if written == "flag":
            return parse("--" + option.replace("_", "-"), repr(value))
        (tmp_path / "config.yaml").write_text(f"{option}: !!float {value!r}\n")
        return parse("--config", tmp_path / "config.yaml")

    assert getattr(given(good), option) == good
    named = "^--" + option.replace("_", "-") if written == "flag" else f"^--config .*config.yaml: {option} "
    with pytest.raises(InputError, match=named):
        given(bad)


@pytest.mark.parametrize(
    ("optimizer", "config"),
    [
        ("adamw", {"betas": [0.9, ONE]}),
        ("adam", {"betas": [1.5, 0.999]}),
        ("sgd", {"momentum": 1.0}),
        ("muon", {"momentum": 7}),
        ("adafactor", {"beta_1": -0.5}),
        ("adam-mini", {"betas": [0.9, ONE]}),
    ],
)
def test_a_moment_that_would_never_forget_is_refused_in_optimizer_config(parse, optimizer, config):
    with pytest.raises(InputError, match=f"optimizer_config: {optimizer}: .*below 1"):
        body_optimizer(parse("--optimizer", optimizer) | {"optimizer_config": {optimizer: config}})


@pytest.mark.parametrize("key", ["lr_schedule", "table_lr_schedule"])
@pytest.mark.parametrize("highest", [1e11, 1e38, 1e39])
def test_a_schedule_that_goes_beyond_is_refused(parse, key, highest):
    args = parse("--iters", 10) | {key: {"name": "linear_schedule", "arguments": [1e-5, highest, 5]}}
    with pytest.raises(InputError, match=f"^{key}:? .*(at most 1e.10|finite in float32)"):
        table_learning_rate(args), body_optimizer(args)


def test_a_table_rate_that_follows_a_tiny_schedule_does_not_overflow(parse):
    args = parse("--iters", 5, "--table-learning-rate", 1e10)
    args |= {"lr_schedule": {"name": "cosine_decay", "arguments": [1e-36, 100]}}
    rates = table_learning_rate(args)(mx.arange(5))
    assert mx.all((rates > 0.9e10) & (rates <= 1e10)).item()


@pytest.mark.parametrize(
    "options",
    [
        ["--table-weight-decay", 1e38],
        ["--table-weight-decay", 0.5, "--table-learning-rate", 5],
        ["--table-optimizer", "sage", "--table-weight-decay", 1e38],
        ["--optimizer", "adamw", "--learning-rate", 201],  # its weight decay is 0.01 by default
        ["--optimizer", "adam-mini", "--learning-rate", 1e3],
    ],
)
def test_a_decay_that_makes_weights_larger_is_refused(parse, options):
    args = parse(*options) | {"optimizer_config": {"adam-mini": {"weight_decay": 0.1}}}
    model = tiny_llama()
    choices = choose(args, shapes_of(model))
    make_trainable(model, args, choices)
    with pytest.raises(InputError, match="optimizer .*must be at most 2, or each step makes the weights larger"):
        build_optimizer(model, args, choices)
