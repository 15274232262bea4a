"""What both Embers say of rounding and of schedules, here through MLX's; and options of every optimizer."""

import inspect
import re
import subprocess
import sys
import warnings

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from ember_mlx import Ember, InputError, PairedOptimizer, optimizers
from ember_mlx.optimizers.guarded import GuardedOptimizer
from ember_mlx.shared.ember_options import check_beta2_schedule, rounding_warning
from ember_mlx.streaming import StreamedStep


def table(scale=0.02, dtype=mx.bfloat16):
    return {"embed": {"weight": mx.array(np.random.RandomState(0).normal(0, scale, (64, 32))).astype(dtype)}}


def heard(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught]


def test_steps_that_rounding_takes_back_are_warned_about_once_with_numbers_and_remedy():
    optimizer = Ember(1e-5)
    (message,) = heard(lambda: (optimizer.init(table()), optimizer.init(table())))
    for needed in ("embed.weight", "bfloat16", "1e-05", "learning rate of at least", 'rounding="stochastic"'):
        assert needed in message
    share = float(message.split("rounded away in ")[1].split("%")[0])
    w = table()["embed"]["weight"].astype(mx.float32)
    unchanged = mx.mean((w - mx.where(w > 0, 1e-5, -1e-5)).astype(mx.bfloat16) == w.astype(mx.bfloat16)).item()
    assert share == pytest.approx(100 * unchanged, abs=2)  # a power of two has nearer neighbours below it
    remedy = float(message.split("at least ")[1].split(",")[0])
    assert not heard(lambda: Ember(1.1 * remedy).init(table()))


@pytest.mark.parametrize(
    ("optimizer", "of"),
    [
        (Ember(1e-2), table()),
        (Ember(1e-5), table(dtype=mx.float32)),
        (Ember(1e-5), table(dtype=mx.float16, scale=0.005)),
        (Ember(1e-5, rounding="stochastic"), table()),
        (Ember(0.0), table()),
        (Ember(lambda step: mx.minimum(step, 100) * 1e-4), table()),  # a warm-up from 0
    ],
)
def test_nobody_is_warned_without_a_reason(optimizer, of):
    assert not heard(lambda: optimizer.init(of))


def test_a_schedule_that_stays_too_low_is_warned_about_and_so_is_an_optimizer_that_was_never_initialised():
    w = table()
    optimizer = Ember(lambda step: 1e-6)
    (message,) = heard(lambda: optimizer.apply_gradients(w, w))
    assert "1e-06" in message


def test_the_warning_points_at_the_users_own_line_through_all_that_makes_optimizers():
    model = nn.Module()
    model.embed_tokens = nn.Embedding(64, 32)
    model.norm = nn.RMSNorm(32)
    model.set_dtype(mx.bfloat16)
    calls = [
        lambda: Ember(1e-5).init(table()),
        lambda: Ember(1e-5).apply_gradients(table(), table()),
        lambda: Ember(1e-5).update(model, {"embed_tokens": {"weight": model.embed_tokens.weight}}),
        lambda: PairedOptimizer(model, tables=Ember(1e-5), rest=optim.SGD(1e-3)),
    ]
    for call in calls:
        with pytest.warns(UserWarning, match="rounded away") as heard_of:
            call()
        (one,) = heard_of
        assert (one.filename, one.lineno) == (__file__, call.__code__.co_firstlineno)


def test_on_the_command_line_a_warning_is_one_line():
    program = """
import warnings
from ember_mlx import cli
from ember_mlx.commands import plot
plot.main = lambda arguments: warnings.warn("mind this")
cli._run("plot", [])"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stderr == "ember-mlx plot: warning: mind this\n"


def test_inside_a_compiled_step_nothing_is_said_and_nothing_fails():
    w, optimizer = table(), Ember(1e-5)
    step = mx.compile(lambda g, w: optimizer.apply_gradients(g, w))
    assert not heard(lambda: mx.eval(step(w, w)))


def test_stochastic_rounding_of_float32_says_once_that_it_does_nothing():
    optimizer = Ember(1e-5, rounding="stochastic")
    w = table(dtype=mx.float32)
    (message,) = heard(lambda: (optimizer.init(w), optimizer.apply_gradients(w, w)))
    assert "does nothing to embed.weight" in message
    new, nearest = optimizer.apply_gradients(w, w), Ember(1e-5)
    nearest.apply_gradients(w, w)
    assert mx.array_equal(new["embed"]["weight"], nearest.apply_gradients(w, w)["embed"]["weight"])


def test_a_sample_is_read_of_16_bit_tables_to_nearest_alone():
    def read():
        raise AssertionError

    assert rounding_warning("nearest", "w", "float32", read, read) is None
    assert rounding_warning("stochastic", "w", "bfloat16", read, read) is None


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        (lambda step: 1.0, "gives 1 after 0 steps"),
        (lambda step: float("nan"), "gives nan after 0 steps"),
        (lambda step: 0.99 - 0.01 * step, "gives -0.29 after 128 steps"),
        (lambda step: 1 - 1e-9 / (1 + step), "gives 1 after"),  # in float32
    ],
)
def test_a_schedule_of_beta2_out_of_range_is_refused(schedule, says):
    with pytest.raises(InputError, match=says):
        check_beta2_schedule(lambda step: float(np.float32(schedule(step))))
    with pytest.raises(InputError, match=says):
        Ember(1e-3, beta2=lambda step: schedule(step.item()))


@pytest.mark.parametrize(
    ("value", "says"),
    [("0.9", "'0.9'"), (None, "None"), ([0.9, 0.99], r"\[0.9, 0.99\]"), (mx.zeros((2,)), r"an array of shape \(2,\)")],
    ids=["text", "nothing", "a list", "two numbers"],
)
def test_a_schedule_that_gives_anything_but_one_number_is_refused(value, says):
    for option in ("learning_rate", "weight_decay", "beta2"):
        with pytest.raises(InputError, match=rf"Ember\({option}=.*gives {says}.*: must be one number"):
            Ember(**{"learning_rate": 1e-3, option: lambda step: value})
    with pytest.raises(InputError, match=f"gives {says} after 128 steps: must be one number"):
        Ember(1e-3, beta2=lambda step: 0.9 if step.item() < 100 else value)
    optimizer = Ember(1e-3, beta2=lambda step: value if step.item() == 3 else [0.9])
    w = table(dtype=mx.float32)
    for _ in range(3):
        optimizer.apply_gradients(w, w)
    with pytest.raises(InputError, match=f"gives {says}: must be one number"):
        optimizer.apply_gradients(w, w)
    assert optimizer.step.item() == 3


@pytest.mark.parametrize("end", ["\n", "\r\n", "\x0b", "\x1b[2J", "\x85", "\u2028", "\udc80"])
def test_what_was_given_never_breaks_the_one_line_of_an_error(end):
    message = str(InputError(f"--data: a{end}b is not a folder"))
    assert len(message.splitlines()) == 1
    assert message.encode().isascii()


WORDS = {"rounding": "Nearest", "momentum": "INT8", "weights": "BF16+int8", "state_format": "Published"}
WORDS["implementation"] = "Triton"


def of_both_frameworks():
    """Each class that takes such options, with what else it needs."""
    torch, cuda_ref = pytest.importorskip("torch"), pytest.importorskip("cuda_ref")
    model, of_torch = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2)), torch.nn.Embedding(4, 2)
    arguments = {
        optimizers.SplitWeights: [optim.SGD(1e-3)],
        PairedOptimizer: [model, optim.SGD(1e-3), optim.SGD(1e-3)],
        GuardedOptimizer: [{}, optim.SGD(1e-3)],
        StreamedStep: [model, optim.SGD(1e-3)],
        cuda_ref.SplitWeights: [torch.optim.SGD(of_torch.bfloat16().parameters(), 1e-3)],
        cuda_ref.StreamedBackward: [of_torch, torch.optim.SGD(of_torch.parameters(), 1e-3)],
    }
    usual = {getattr(optimizers, name): [1e-3] for name in optimizers.__all__}
    usual |= {getattr(cuda_ref.optimizers, name): [of_torch.parameters(), 1e-3] for name in cuda_ref.optimizers.__all__}
    for kind, given in (usual | arguments).items():
        yield kind, [list(of_torch.parameters()) if inspect.isgenerator(one) else one for one in given]


def test_a_switch_is_true_or_false_and_a_word_is_one_of_those_allowed():
    found = []
    for kind, given in of_both_frameworks():
        for name, parameter in inspect.signature(kind).parameters.items():
            if name in WORDS:
                value, says = WORDS[name], f"must be '.* .did you mean '{re.escape(WORDS[name].lower())}'"
            elif parameter.annotation in (bool, bool | None):
                value, says = "no", "must be True or False"
            else:
                continue
            found.append(name)
            with pytest.raises(InputError, match=rf"^{kind.__name__}\({name}='{re.escape(value)}'\): {says}"):
                kind(*given, **{name: value})
    assert len(found) >= 36
