"""The loss without the logits: mlx-lm's own loss and gradients, whatever the head, and refused where it cannot be."""

from contextlib import nullcontext
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from architectures.build import build
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear
from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
from tiny_models import tiny_llama

from ember_mlx import InputError
from ember_mlx.finetune import evaluation, options
from ember_mlx.finetune.chunked_loss import chunked_loss
from ember_mlx.finetune.run import run

BATCH = mx.random.randint(0, 170, (2, 14), key=mx.random.key(3))
LENGTHS = mx.array([[3, 9], [0, 13]])  # a prompt that is masked, and padding
TWO_SLICES = 26 * 128  # of the 260 words: 128, 128 and 4


def loss_and_gradients(model, loss):
    (value, count), gradients = nn.value_and_grad(model, loss)(model, BATCH, LENGTHS)
    return value, count, dict(tree_flatten(gradients))


def untied():
    return tiny_llama()


def tied():
    return tiny_llama(tied=True)


def lora_head():
    model = tiny_llama()
    model.freeze()
    model.lm_head = LoRALinear.from_base(model.lm_head, r=4)
    model.lm_head.lora_b = mx.random.normal(model.lm_head.lora_b.shape, scale=0.1)
    return model


def lora_tied():
    model = tiny_llama(tied=True)
    model.freeze()
    model.model.embed_tokens = LoRAEmbedding.from_base(model.model.embed_tokens, r=4)
    model.model.embed_tokens.lora_b = mx.random.normal(model.model.embed_tokens.lora_b.shape, scale=0.1)
    return model


def quantized_frozen_head(tie=False):
    model = tiny_llama(tied=tie)
    nn.quantize(model, 32, 8, class_predicate=lambda path, _: path.endswith(("lm_head", "embed_tokens")))
    return model


def biased_head():
    model = tiny_llama()
    model.lm_head = nn.Linear(32, 260)
    return model


HEADS = [
    untied,
    tied,
    lora_head,
    lora_tied,
    quantized_frozen_head,
    partial(quantized_frozen_head, tie=True),
    biased_head,
]
CAPPED = [partial(build, name, True) for name in ("gemma2", "cohere", "granite", "nanochat")]


@pytest.mark.parametrize("make", HEADS + CAPPED)
def test_loss_count_and_all_gradients_are_those_of_mlx_lm(make):
    model = make()
    loss = chunked_loss(model, TWO_SLICES)
    value, count, gradients = loss_and_gradients(model, loss)
    expected, its_count, reference = loss_and_gradients(model, default_loss)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert count.item() == its_count.item() == 20
    assert gradients.keys() == reference.keys()
    largest = max(mx.abs(g).max().item() for g in reference.values())
    for name, gradient in reference.items():
        assert mx.allclose(gradients[name], gradient, rtol=1e-4, atol=1e-6 * largest), name


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_in_16_bits_it_is_as_near_to_float32_as_the_plain_loss(dtype):
    model = tiny_llama(tied=True)
    model.set_dtype(dtype)
    plain = loss_and_gradients(model, default_loss)
    ours = loss_and_gradients(model, chunked_loss(model, TWO_SLICES))
    model.set_dtype(mx.float32)
    exact = loss_and_gradients(model, default_loss)
    assert abs(ours[0] - exact[0]).item() <= abs(plain[0] - exact[0]).item() + 1e-4
    assert all(gradient.dtype == dtype for gradient in ours[2].values())

    def error(found):
        return sum(mx.square(found[2][name] - gradient).sum().item() for name, gradient in exact[2].items())

    assert error(ours) <= 1.2 * error(plain)


def test_it_trains_the_same_in_the_compiled_step_with_checkpointed_layers(monkeypatch):
    def trained(loss_of):
        model = tiny_llama(tied=True)
        model.train()
        loss, optimizer = loss_of(model), optim.Adam(1e-2, bias_correction=True)
        optimizer.init(model.trainable_parameters())
        state = [model.state, optimizer.state, mx.random.state]

        @partial(mx.compile, inputs=state, outputs=state)
        def step(batch, lengths):
            (value, _), gradients = nn.value_and_grad(model, loss)(model, batch, lengths)
            optimizer.update(model, gradients)
            return value

        return [step(BATCH, LENGTHS).item() for _ in range(4)]

    plain = trained(lambda _: default_loss)
    layer = type(tiny_llama().layers[0])
    monkeypatch.setattr(layer, "__call__", layer.__call__)  # grad_checkpoint changes the class
    grad_checkpoint(tiny_llama().layers[0])
    assert trained(partial(chunked_loss, logits_at_once=TWO_SLICES)) == pytest.approx(plain, rel=1e-5)


def test_its_peak_is_not_the_logits():
    model = tiny_llama(vocabulary=32768)
    batch, lengths = mx.random.randint(0, 32768, (2, 129)), mx.array([[0, 128]] * 2)
    logits = 256 * 32768

    def peak(loss):
        mx.synchronize()
        mx.clear_cache()  # a cached buffer may serve a smaller array, and counts whole
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(nn.value_and_grad(model, loss)(model, batch, lengths))
        return (mx.get_peak_memory() - before) / (4 * logits)

    mx.eval(batch, lengths)
    assert peak(default_loss) > 2
    assert peak(chunked_loss(model, logits_at_once=logits // 32)) < 1


class AddsToItsLogits(nn.Module):
    """A tiny Llama and, after its head, whatever ``change`` does to the logits."""

    def __init__(self, change):
        super().__init__()
        self.inner = tiny_llama()
        self.scale = mx.array([2.0])
        self.change = change

    def __call__(self, inputs):
        return self.change(self, self.inner(inputs))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (AddsToItsLogits(lambda self, z: z * self.scale), "trains scale on the logits"),
        (AddsToItsLogits(lambda self, z: z + mx.arange(z.shape[-1])), "all words alike"),
        (AddsToItsLogits(lambda self, z: mx.softmax(z, axis=-1)), "slice by slice"),
        (AddsToItsLogits(lambda self, z: z + self.inner(mx.array([[0]]))), "calls once"),
        (build("phi3small", True), "all words alike"),
        (build("talkie", False), "is no module"),
    ],
)
def test_what_cannot_be_sliced_is_refused_and_left_as_it_was(model, why):
    before = model(BATCH)
    with pytest.raises(InputError, match=why):
        chunked_loss(model)
    assert mx.array_equal(model(BATCH), before)


def test_it_is_the_loss_of_one_model():
    loss = chunked_loss(tiny_llama())
    with pytest.raises(InputError, match="another model"):
        loss(tiny_llama(), BATCH, LENGTHS)


def test_dropout_in_the_head_is_refused():
    model = tiny_llama()
    model.lm_head = LoRALinear.from_base(model.lm_head, r=4, dropout=0.1)
    with pytest.raises(InputError, match="dropout in its head"):
        chunked_loss(model)


def test_it_is_a_yaml_key_too(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("chunked_loss: true\n")
    assert options.parse(["--config", str(config)]).chunked_loss is True
    assert options.parse([]).chunked_loss is False


def test_a_run_with_it_gives_the_run_without(parse):
    words = ["--fine-tune-type", "full", "--mask-prompt", "--grad-accumulation-steps", 2, "--iters", 4]
    plain, chunked = run(parse(*words, adapter="plain")), run(parse(*words, "--chunked-loss", adapter="chunked"))
    assert chunked.loss_before == pytest.approx(plain.loss_before, rel=1e-6)
    assert chunked.loss_after == pytest.approx(plain.loss_after, rel=1e-4)


def test_validation_of_a_streamed_run_takes_less_and_finds_the_same():
    """Its layers and slices are evaluated one after another: a device is not handed all of them at once."""
    model = tiny_llama(layers=8, hidden=64, vocabulary=4096)
    mx.eval(model.parameters())
    batch, learned = mx.random.randint(0, 4096, (2, 257), key=mx.random.key(4)), mx.array([[0, 256], [0, 200]])
    found, peaks = [], []
    for paced in (False, True):
        loss = chunked_loss(model, 2**18, for_validation=paced)
        mx.clear_cache()
        mx.reset_peak_memory()
        with evaluation._paced(model.layers) if paced else nullcontext():
            found.append([each.item() for each in loss(model, batch, learned)])
        peaks.append(mx.get_peak_memory() - mx.get_active_memory())
    assert found[0] == found[1]
    assert peaks[1] < 0.8 * peaks[0]
