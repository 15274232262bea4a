"""Streamed gradients are those of an ordinary step: every architecture, adapters, loops, awkward layers."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures.build import build, model_files
from architectures.configs import NOT_BUILT, NOT_TIED
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from streaming_spy import Spy, ordinary, randomized, worst_difference

from ember_mlx import InputError
from ember_mlx.streaming import StreamedStep

BATCH = mx.random.randint(0, 150, (2, 7), key=mx.random.key(3))
LENGTHS = mx.array([[0, 6], [1, 5]])
CANNOT = {
    "deepseek_v41": "Cannot calculate VJP with respect to indices",
    "recurrent_gemma": "no attribute '_no_grad'",
    "olmo": "Cannot perform inplace addition",  # it runs sequences of one token only
}
WHOLE_HEAD = {"phi3small", "talkie"}  # and, tied, those that choose between two heads otherwise than by a flag
# One of each kind, and all that do something to the logits after the head, in both tyings. The others take turns.
BOTH = {
    *("llama", "gpt2", "mixtral", "mamba2", "rwkv7", "afm7", "hunyuan", "kimi_k3", "iquestloopcoder", "nanbeige"),
    *("longcat_flash_ngram", "prism_hadamard_qwen35", "qwen3_next", "jamba", "cohere", "cohere2", "gemma2", "gemma3n"),
    *("gemma4", "gemma4_text", "granite", "granitemoe", "granitemoehybrid", "muse_glimmer", "nanochat", "talkie"),
}
NAMES = [name for name in model_files() if name not in {*NOT_BUILT, *CANNOT}]
CASES = [
    (name, tied)
    for number, name in enumerate(NAMES)
    for tied in (False, True)
    if (name in BOTH or tied == bool(number % 2) or name in NOT_TIED) and not (tied and name in NOT_TIED)
]


@pytest.fixture(autouse=True)
def _eager_on_the_cpu():
    """Hundreds of tiny graphs: compiling them takes minutes."""
    mx.disable_compile()
    with mx.stream(mx.cpu):
        yield
    mx.enable_compile()


def check(model, batch=BATCH, lengths=LENGTHS, steps=2, **options):
    spy = Spy()
    step = StreamedStep(model, spy, **options)
    for number in range(steps):
        mx.random.seed(number)
        loss, expected = ordinary(model, batch, lengths)
        after = mx.random.state[0].tolist()
        mx.random.seed(number)
        result = step.accumulated([(batch, lengths)])
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert result.nonfinite == ()
        assert mx.random.state[0].tolist() == after
        error, name = worst_difference(spy.gradients(expected), expected)
        assert error < 1e-4, name
    return step


@pytest.mark.parametrize(("name", "tied"), CASES)
def test_every_architecture_has_the_gradients_of_an_ordinary_step(name, tied):
    step = check(randomized(build(name, tied)).train(), steps=2 if name in BOTH else 1)
    if name in WHOLE_HEAD:
        assert "whole" in step.notes[0]


@pytest.mark.parametrize("name", CANNOT)
def test_what_mlx_cannot_differentiate_is_refused_in_one_line(name):
    with pytest.raises(InputError, match=f"{name} .*{CANNOT[name]}.*another model") as refused:
        StreamedStep(build(name, False), Spy())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "mamba2", "afm7", "nanbeige", "iquestloopcoder", "gpt2"])
def test_adapters_with_dropout_draw_again_what_they_drew(name):
    model = build(name, False)
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.3})
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.unfreeze()
    check(randomized(model).train())


@pytest.mark.parametrize("norm", [False, True])
def test_layers_that_are_called_twice_get_both_gradients(norm, monkeypatch):
    from architectures import configs

    monkeypatch.setitem(configs.OVERRIDES, "nanbeige", {"num_loops": 2, "skip_loop_final_norm": norm})
    check(randomized(build("nanbeige", False)).train())


@pytest.mark.parametrize("name", ["llama", "mamba2", "gemma3n", "hunyuan", "afm7"])
@pytest.mark.parametrize("keep", [2, 3])
def test_inputs_that_are_not_kept_are_made_again(name, keep):
    check(randomized(build(name, False)).train(), keep_inputs=keep)


class TwoWays(nn.Module):
    """A layer that takes the same array twice, and gives an array twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def __call__(self, x, again):
        y = self.a(x) * mx.sigmoid(self.b(again))
        return y, y


class Awkward(nn.Module):
    """Changes arrays that layers have given, in place, between the layers."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(170, 8), nn.Linear(8, 170)
        self.layers = [TwoWays() for _ in range(3)]

    def __call__(self, tokens):
        h = self.embed(tokens)
        for layer in self.layers:
            one, two = layer(h, h)
            h = one + two
            h += one
            h[:, 1:] = h[:, :-1] * two[:, 1:]
        return self.head(h)


def test_arrays_that_are_passed_twice_or_changed_in_place():
    check(randomized(Awkward()).train())


def test_a_loss_of_ones_own_has_whole_gradients_of_the_head():
    def loss(model, batch, lengths):
        return mx.square(model(batch)).mean(), mx.array(batch.size)

    model, spy = randomized(build("llama", False)).train(), Spy()
    step = StreamedStep(model, spy, loss)
    value, expected = ordinary(model, BATCH, LENGTHS, loss)
    assert step(BATCH, LENGTHS) == (pytest.approx(value, rel=1e-6), BATCH.size)
    assert worst_difference(spy.gradients(expected), expected)[0] < 1e-4
    assert "whole" in step.notes[0]


def test_a_frozen_body_stops_the_backward_pass():
    model = randomized(build("llama", False)).train()
    model.freeze()
    model.layers[-1].unfreeze()
    step = check(model)
    wanted = [plan for plan, _ in step._forward.plans.values()]
    assert not any(wanted)
    assert {path.split(".")[2] for path, _ in tree_flatten(model.trainable_parameters())} == {"3"}
