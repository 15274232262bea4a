"""StreamedBackward: the same training as ordinary steps; what is not finite goes nowhere; what cannot be is refused."""

from functools import partial

import pytest
import torch
from torch_streaming import D, V, assert_alike, batch_of, everything, model_of, ordinary_step, paired
from torch_tables import bits
from transformers import LlamaForCausalLM

from cuda_ref import InputError, StreamedBackward
from cuda_ref.optimizers import SinkGD
from cuda_ref.streaming import next_token_loss

SHORT, LONG = 6, 30  # at two sequences, below and above half of D


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("length", [SHORT, LONG])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_streamed_steps_are_ordinary_steps(kind, tied, length, keep):
    runs = []
    for streams in (True, False):
        model = model_of(kind, tied)
        optimizer = paired(model, rest=partial(torch.optim.SGD, lr=0.05), weight_decay=0.1, eps=1e-5)
        streamed = StreamedBackward(model, optimizer, keep_logits=keep, block_rows=50)
        assert not streamed.notes
        take = (lambda batch, s=streamed: s(*batch).item()) if streams else partial(ordinary_step, model, optimizer)
        losses = [take(batch_of(length, seed)) for seed in range(3)]
        assert all(p.grad is None for p in model.parameters())
        runs.append((model, optimizer, losses))
    (model, optimizer, losses), (other, other_optimizer, expected) = runs
    assert losses == pytest.approx(expected, rel=1e-5)
    assert_alike(model, other, optimizer, other_optimizer, step=1e-2)


def test_losses_of_a_hundred_steps_with_a_schedule():
    losses, rates = [], []
    for streams in (True, False):
        model = model_of()
        optimizer = paired(model, lr=1e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        streamed = StreamedBackward(model, optimizer)
        losses.append([])
        for seed in range(100):
            batch = batch_of(8, seed % 4)
            losses[-1].append(streamed(*batch).item() if streams else ordinary_step(model, optimizer, batch))
            scheduler.step()
        rates.append(scheduler.get_last_lr())
        steps = {float(optimizer.state[p]["step"]) for p in model.parameters()}
        assert steps == {100}
    assert rates[0] == rates[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_sgd_is_bit_for_bit_where_the_order_of_sums_is_the_same():
    model, other = model_of(), model_of()
    optimizer, plain = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(other.parameters(), lr=0.1)
    streamed = StreamedBackward(model, optimizer)
    assert "not trained by Ember" in streamed.notes[0]
    for seed in range(5):
        assert streamed(*batch_of(9, seed)).item() == ordinary_step(other, plain, batch_of(9, seed))
    assert bits(*model.parameters()) == bits(*other.parameters())


@pytest.mark.parametrize(
    "rest", [partial(torch.optim.Adafactor, lr=1e-3), SinkGD, partial(torch.optim.RMSprop, lr=1e-4)]
)
def test_optimizers_of_the_body(rest):
    model, other = model_of(), model_of()
    streamed, plain = StreamedBackward(model, paired(model, rest)), paired(other, rest)
    for seed in range(3):
        assert streamed(*batch_of(9, seed)).item() == pytest.approx(
            ordinary_step(other, plain, batch_of(9, seed)), rel=1e-5
        )


@pytest.mark.parametrize("tied", [True, False])
def test_stochastic_rounding_keeps_its_bits_apart_and_the_steps_right(tied):
    model, other = (model_of(tied=tied, dtype=torch.bfloat16) for _ in range(2))
    optimizer, plain = (paired(m, rounding="stochastic", lr=1e-3) for m in (model, other))
    streamed = StreamedBackward(model, optimizer)
    for seed in range(3):
        assert streamed(*batch_of(9, seed)).item() == pytest.approx(
            ordinary_step(other, plain, batch_of(9, seed)), rel=2e-2
        )
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert ("seed" in plain.state[q]) == ("seed" in optimizer.state[p])
        if "seed" in plain.state[q]:
            assert plain.state[q]["seed"] == optimizer.state[p]["seed"]


def test_only_what_is_trainable_trains():
    for frozen in ("lm_head", "embed_tokens", "layers"):
        model, other = model_of(), model_of()
        for m in (model, other):
            for name, p in m.named_parameters():
                p.requires_grad_(frozen not in name)
        before = {name: bits(p) for name, p in model.named_parameters()}
        streamed, plain = StreamedBackward(model, paired(model)), paired(other)
        for seed in range(2):
            expected = ordinary_step(other, plain, batch_of(9, seed))
            assert streamed(*batch_of(9, seed)).item() == pytest.approx(expected, rel=1e-5)
        for name, p in model.named_parameters():
            assert (bits(p) == before[name]) == (frozen in name)


def test_a_bias_of_the_head_trains():
    models = [model_of(), model_of()]
    for m in models:
        m.lm_head.bias = torch.nn.Parameter(torch.zeros(V))
    streamed, plain = StreamedBackward(models[0], paired(models[0])), paired(models[1])
    for seed in range(3):
        streamed(*batch_of(9, seed))
        ordinary_step(models[1], plain, batch_of(9, seed))
    torch.testing.assert_close(models[0].lm_head.bias, models[1].lm_head.bias, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_loss_that_is_not_finite_changes_nothing(tied):
    model = model_of(tied=tied)
    optimizer = paired(model)
    streamed = StreamedBackward(model, optimizer)
    streamed(*batch_of(9))
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    before = everything(model, optimizer)
    assert streamed(*batch_of(9)).isnan()
    assert (streamed.refused, streamed.nonfinite_steps) == (("loss",), 1)
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("tied", [True, False])
def test_a_later_nan_reaches_no_weight_and_no_state(tied):
    model = model_of(tied=tied)
    optimizer = paired(model)
    streamed = StreamedBackward(model, optimizer)
    streamed(*batch_of(9))
    spoil = lambda module, inputs, output: output.register_hook(lambda g: g * torch.nan) and None  # noqa: E731
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(spoil)
    streamed(*batch_of(9))
    handle.remove()
    assert "model.layers.0.mlp.down_proj.weight" in streamed.refused
    assert "model.embed_tokens.weight" in streamed.refused
    assert not any(".layers.1." in f".{name}" for name in streamed.refused)
    assert streamed.nonfinite_steps == 1
    for p in model.parameters():
        assert p.isfinite().all()
        assert all(value.isfinite().all() for value in optimizer.state[p].values())
    streamed(*batch_of(9))
    assert (streamed.refused, streamed.nonfinite_steps) == ((), 1)


def test_what_cannot_be_streamed_is_refused_in_one_line():
    def refused(match, call):
        with pytest.raises(InputError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)

    class GlobalRule(torch.optim.AdamW):
        pass

    model = model_of()
    refused("LBFGS is not known", lambda: StreamedBackward(model, torch.optim.LBFGS(model.parameters())))
    refused("GlobalRule is not known", lambda: StreamedBackward(model, paired(model, GlobalRule)))
    refused("GradScaler", lambda: StreamedBackward(model, torch.amp.GradScaler("cpu")))
    refused("not in the optimizer", lambda: StreamedBackward(model, torch.optim.SGD(model.lm_head.parameters())))
    streamed = StreamedBackward(model, paired(model))
    before = bits(*model.parameters())
    refused("labels", lambda: streamed(torch.zeros(1, 4, dtype=int), torch.full((1, 4), V)))
    with torch.no_grad():
        refused("no_grad", lambda: streamed(*batch_of(9)))
    with torch.autocast("cpu"):
        refused("autocast", lambda: streamed(*batch_of(9)))
    model.model.norm.weight.grad = torch.zeros(D)
    refused("has a gradient already", lambda: streamed(*batch_of(9)))
    assert bits(*model.parameters()) == before

    class Capped(LlamaForCausalLM):
        def forward(self, ids):
            return torch.tanh(super().forward(ids).logits)

    capped = Capped(model.config)
    refused("cannot be cut: the model does something", lambda: StreamedBackward(capped, paired(capped)))
    own = StreamedBackward(capped, paired(capped), next_token_loss)
    for nothing in ({"block_rows": 50}, {"keep_logits": True}):
        refused("no effect", lambda given=nothing: StreamedBackward(capped, paired(capped), next_token_loss, **given))
    assert own(*batch_of(9)).isfinite()
