"""StreamedBackward.accumulate: the step of one large batch, with the gradients of one layer at a time."""

from functools import partial

import pytest
import torch
from torch import nn
from torch_streaming import ADAMW, D, V, assert_alike, everything, model_of, paired
from torch_tables import bits

from cuda_ref import InputError, StreamedBackward
from cuda_ref.streaming import next_token_loss

SGD = partial(torch.optim.SGD, lr=0.05)


def micro_batches(seed=1):
    """Of three lengths, with different numbers of tokens that count."""
    made = []
    for number, length in enumerate((5, 9, 7)):
        ids = torch.randint(0, V, (2, length), generator=torch.Generator().manual_seed(10 * seed + number))
        labels = ids.clone()
        labels[0, : 2 + number] = -100
        made.append((ids, labels))
    return made


def step_of_all(model, optimizer, batches):
    """An ordinary step by the mean over all tokens that count."""
    counts = [int((labels[:, 1:] != -100).sum()) for _, labels in batches]
    shares = [count / sum(counts) for count in counts]
    loss = sum(share * next_token_loss(model, *batch) for share, batch in zip(shares, batches, strict=True))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("checkpoints", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_it_is_the_step_of_all_tokens_in_one_batch(kind, tied, checkpoints):
    model, other = model_of(kind, tied), model_of(kind, tied)
    if checkpoints:
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer, plain = (paired(m, rest=SGD, weight_decay=0.1, eps=1e-5) for m in (model, other))
    streamed = StreamedBackward(model, optimizer, block_rows=50)
    layers = list(model.model.layers)
    for seed in range(3):
        expected = step_of_all(other, plain, micro_batches(seed))
        assert streamed.accumulate(micro_batches(seed)).item() == pytest.approx(expected, rel=1e-5)
    assert_alike(model, other, optimizer, plain, step=1e-2)
    assert all(p.grad is None for p in model.parameters())
    assert list(model.model.layers) == layers


@pytest.mark.parametrize("frozen", ["lm_head", "embed_tokens", "layers.0", "layers"])
def test_only_what_is_trainable_trains(frozen):
    model, other = model_of(), model_of()
    for m in (model, other):
        for name, p in m.named_parameters():
            p.requires_grad_(frozen not in name)
    before = {name: bits(p) for name, p in model.named_parameters()}
    optimizer, plain = (paired(m, rest=SGD, eps=1e-5) for m in (model, other))
    expected = step_of_all(other, plain, micro_batches())
    assert StreamedBackward(model, optimizer).accumulate(micro_batches()).item() == pytest.approx(expected, rel=1e-5)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5)
        assert (bits(p) == before[name]) == (frozen in name)


def test_with_whole_logits_and_a_loss_of_ones_own():
    def squares(model, ids):
        return model(ids).logits.square().mean()

    for loss, batches in ((None, micro_batches()), (squares, [(ids,) for ids, _ in micro_batches()])):
        model, other = model_of(), model_of()
        optimizer, plain = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other))
        streamed = StreamedBackward(model, optimizer, loss)
        found = streamed.accumulate(batches).item()
        if loss is None:
            expected = step_of_all(other, plain, batches)
        else:
            mean = sum(squares(other, *batch) for batch in batches) / len(batches)
            mean.backward()
            plain.step()
            expected = mean.item()
        assert found == pytest.approx(expected, rel=1e-5)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_no_more_gradients_are_there_than_those_of_one_layer_and_of_what_is_in_none(monkeypatch):
    model = model_of()
    streamed = StreamedBackward(model, paired(model))
    there, step_parameter = [], StreamedBackward._step_parameter
    named = dict(model.named_parameters())

    def watched(self, p, refused):
        there.append({name for name, q in named.items() if q.grad is not None})
        step_parameter(self, p, refused)

    monkeypatch.setattr(StreamedBackward, "_step_parameter", watched)
    streamed.accumulate(micro_batches())
    trained = set()
    for names in there:
        trained |= names
        assert len({name.split(".")[2] for name in names if ".layers." in name}) <= 1
        assert {name for name in names if ".layers." not in name} <= {"model.norm.weight"}
    assert trained == named.keys() - {"lm_head.weight", "model.embed_tokens.weight"}


@pytest.mark.parametrize("whole", [True, False])
def test_one_loss_that_is_not_finite_changes_nothing(whole):
    model = model_of()
    optimizer = paired(model)
    streamed = StreamedBackward(model, optimizer, next_token_loss if whole else None)
    streamed.accumulate(micro_batches())
    before = everything(model, optimizer)
    calls = []

    def spoil(module, inputs, output):
        calls.append(output)
        return output * torch.nan if len(calls) == 2 else output

    handle = model.model.norm.register_forward_hook(spoil)
    assert streamed.accumulate(micro_batches()).isnan()
    handle.remove()
    assert (streamed.refused, streamed.nonfinite_steps) == (("loss",), 1)
    assert everything(model, optimizer) == before
    streamed.accumulate(micro_batches())
    assert streamed.refused == ()


class Twice(nn.Module):
    """A model that is not one layer after another."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.embed = nn.Embedding(V, D)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(2)) if how != "no list" else nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, ids):
        h = self.embed(ids)
        if self.how == "no list":
            return self.head(self.layers(h))
        for layer in [*self.layers, *self.layers] if self.how == "twice" else self.layers:
            h = layer(h) if self.how == "twice" else h + layer(h.tanh())
        return self.head(h)


@pytest.mark.parametrize("whole", [True, False])
def test_what_cannot_be_accumulated_is_refused_and_nothing_changes(whole):
    for how, says in (("twice", "not called once"), ("no list", "no nn.ModuleList"), ("beside", "used again beside")):
        model = Twice(how)
        streamed = StreamedBackward(model, paired(model, ADAMW), next_token_loss if whole else None)
        before = bits(*model.parameters())
        with pytest.raises(InputError, match=f"{says}.*Give all sequences in one call"):
            streamed.accumulate([(ids, labels) for ids, labels in micro_batches()])
        with pytest.raises(InputError, match="no micro-batch"):
            streamed.accumulate([])
        assert bits(*model.parameters()) == before
        assert all(p.grad is None for p in model.parameters())
        assert streamed(*micro_batches()[0]).isfinite()
