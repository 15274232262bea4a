"""How a head is cut on a GPU, into few large blocks, and on a CPU. Here a CPU is run ahead, as a GPU is."""

import gc

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten
from streaming_spy import randomized
from tiny_models import tiny_llama

from ember_mlx import Ember, PairedOptimizer
from ember_mlx.shared import sizes_in_memory
from ember_mlx.shared.sizes_in_memory import blocks_of_a_head, bytes_of_kept_logits
from ember_mlx.streaming import StreamedStep, head

SHAPES = {  # vocabulary, features, bytes of all weights in 16 bits
    "SmolLM2-135M": (49152, 576, 270e6),
    "Qwen3-0.6B": (151936, 1024, 1504e6),
    "Llama-3.2-1B": (128256, 2048, 2.47e9),
    "Qwen3-8B": (151936, 4096, 16.4e9),
}
VOCABULARY, HIDDEN = 4000, 64


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("tokens", [16, 512, 1024, 4096])
def test_blocks_on_a_gpu_are_as_large_as_their_share_of_the_weights(shape, tokens):
    vocabulary, features, weights = shape
    few = blocks_of_a_head(vocabulary, features, 2, tokens, weights, True)
    many = blocks_of_a_head(vocabulary, features, 2, tokens, weights, False)
    scratch = min(weights / 8, 2**29)
    in_step = few.stepped * (12 * tokens + 4 * features) + few.waiting
    more = 128 * (12 * tokens + 4 * features)  # rows are a multiple of 128
    assert few.rows == many.rows or few.rows * 12 * tokens <= scratch + more
    assert few.stepped == many.stepped or in_step <= scratch + more
    assert many.stepped <= few.stepped <= few.rows <= vocabulary / 4 + 128
    assert few.rows % 128 == few.stepped % 128 == 0


def test_a_cpu_has_36_blocks_and_keeps_logits_and_long_batches_are_cut_alike_anywhere():
    for vocabulary, features, weights in SHAPES.values():
        rows, stepped, waiting, _ = blocks_of_a_head(vocabulary, features, 2, 512, weights, False)
        assert rows == stepped
        assert 35 <= -(-vocabulary // rows) <= 36
        assert waiting == 0
        assert bytes_of_kept_logits(weights, False) == weights // 8
        assert bytes_of_kept_logits(weights, True) == 0
    vocabulary, features, weights = SHAPES["Qwen3-0.6B"]
    here, there = (blocks_of_a_head(vocabulary, features, 2, 4 * 1024, weights, on_a_gpu) for on_a_gpu in (False, True))
    assert here[:2] == there[:2] == (4096, 4096)


def test_where_a_layer_holds_more_than_their_share_blocks_that_are_read_take_as_much():
    vocabulary, features, weights = SHAPES["Qwen3-0.6B"]
    shape = vocabulary, features, 2, 4 * 1024, weights, True
    own, beside = blocks_of_a_head(*shape), blocks_of_a_head(*shape, tokens_of_a_layer=4096, outputs_of_a_layer=12288)
    assert (-(-vocabulary // own.rows), -(-vocabulary // beside.rows)) == (38, 15)
    assert (beside.stepped, beside.waiting) == (own.stepped, own.waiting)
    assert beside.rows * (12 * 4096 + 4 * features) <= 5 * (12288 + features) * 4096 * 2


def trained(ahead, tokens=9, tied=False, keep_logits=None, note=None, **options):
    """The weights after a step, and the step."""
    model = randomized(tiny_llama(tied=tied, vocabulary=VOCABULARY, hidden=HIDDEN)).train()
    clips = {"clip_grad_norm": 1.0} if "clip_norm_pass" in options else {}
    optimizer = PairedOptimizer(model, tables=Ember(1e-2, weight_decay=0.1), rest=optim.SGD(0.1), **clips)
    step = StreamedStep(model, optimizer, keep_logits=keep_logits, **options)
    step._pace.ahead = ahead
    step.on_phase = note
    step(mx.random.randint(0, VOCABULARY, (2, tokens), key=mx.random.key(3)))
    return dict(tree_flatten(model.parameters())), step


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tokens", "keep_logits"), [(9, None), (41, None), (9, True)])
def test_large_blocks_take_the_same_step(tokens, tied, keep_logits, monkeypatch):
    monkeypatch.setattr(sizes_in_memory, "SHARE_THAT_WAITS", 2)  # so that rows of several blocks wait
    expected, on_a_cpu = trained(0, tokens, tied)
    weights, on_a_gpu = trained(2**20, tokens, tied, keep_logits)
    assert on_a_cpu._head._read == on_a_cpu._head.blocks
    of_large, of_small = len(on_a_gpu._head._read), len(on_a_gpu._head.blocks)
    assert of_large == of_small if keep_logits else of_large <= of_small / 2
    for name, array in expected.items():
        assert mx.allclose(weights[name], array, rtol=1e-5, atol=1e-6), name


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("keep_logits", [None, True])
@pytest.mark.parametrize("clip", [{}, {"clip_norm_pass": True}])
def test_a_gradient_that_is_kept_takes_the_same_step(tied, keep_logits, clip, monkeypatch):
    def steps(keeps):
        made = []
        cut = blocks_of_a_head
        monkeypatch.setattr(
            head, "blocks_of_a_head", lambda *shape, **of: cut(*shape, **of)._replace(keeps_gradient=keeps)
        )
        by_logits = head.StreamedHead._by_logits
        monkeypatch.setattr(head.StreamedHead, "_by_logits", lambda *of: made.append(1) or by_logits(*of))
        weights, step = trained(2**20, 41, tied, keep_logits, **clip)
        monkeypatch.undo()
        assert step._head._gradients is None
        return weights, len(made), len(step._head._read)

    (once, few, _), (twice, many, read) = steps(True), steps(False)
    assert many - few == read  # those of the pass that only reads
    for name, array in twice.items():
        assert mx.allclose(once[name], array, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize(("shape", "least"), [("SmolLM2-135M", 1536), ("Llama-3.2-1B", 3072), ("Qwen3-8B", 4096)])
def test_a_gradient_is_kept_where_a_batch_is_long(shape, least):
    vocabulary, features, weights = SHAPES[shape]
    of_layers = {"SmolLM2-135M": 5184, "Llama-3.2-1B": 23552, "Qwen3-8B": 38912}[shape]
    for tokens, kept in ((512, False), (least - 512, False), (least, True), (2 * least, True)):
        assert keeps(vocabulary, features, tokens, weights, tokens, of_layers) == kept
    assert not keeps(100, features, features // 2, weights, features // 2, of_layers)  # these have quadratic forms
    assert not keeps(vocabulary, features, least, weights, least // 2, of_layers)  # of two micro-batches
    assert not keeps(vocabulary, features, least, weights, least, of_layers // 2)  # thin layers
    assert not keeps(vocabulary, features, 2 * least, weights, 2 * least, 0)  # none has a backward pass


def keeps(vocabulary, features, tokens, weights, of_a_layer, outputs):
    of_layers = {"tokens_of_a_layer": of_a_layer, "outputs_of_a_layer": outputs}
    return blocks_of_a_head(vocabulary, features, 2, tokens, weights, True, **of_layers).keeps_gradient


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("tied", [False, True])
def test_what_a_head_is_told_of_the_layers_is_what_the_plan_counts(tied, monkeypatch):
    asked = []
    monkeypatch.setattr(
        head, "blocks_of_a_head", lambda *shape, **of: asked.append(of) or blocks_of_a_head(*shape, **of)
    )
    model = tiny_llama(tied=tied, hidden=HIDDEN)
    step = StreamedStep(model, PairedOptimizer(model, tables=Ember(1e-2), rest=optim.SGD(0.1)))
    step.accumulated([(mx.ones((rows, 9), mx.int32), mx.array([[0, 9]] * rows)) for rows in (2, 3, 1)])
    outputs = sum(
        module.weight.shape[0] for _, module in model.layers[0].named_modules() if isinstance(module, nn.Linear)
    )
    assert asked == [{"tokens_of_a_layer": 3 * 8, "outputs_of_a_layer": outputs}]
    model.freeze()
    (model.model.embed_tokens if tied else model.lm_head).unfreeze()
    step = StreamedStep(model, PairedOptimizer(model, tables=Ember(1e-2), rest=optim.SGD(0.1)))
    assert step._head._outputs_of_a_layer == (outputs if tied else 0)  # an embedding's gradient comes through all


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("tied", [False, True])
def test_machines_that_are_run_ahead_agree_with_one(tied):
    """Both have the same batch, so that the mean of two is that of one."""
    expected, _ = trained(0, tied=tied)
    weights, _ = trained(2**20, tied=tied, reduce=lambda array: array + array)
    for name, array in expected.items():
        assert mx.allclose(weights[name], array, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize(("tokens", "tied"), [(9, False), (33, False), (33, True)])
def test_the_scratch_of_a_head_is_what_is_counted(tokens, tied):
    """Also below and above half the features, where other statistics are taken."""
    phases, before = {}, {}

    def note(phase):
        phases[phase] = mx.get_peak_memory() - before.get("active", 0)
        before["active"] = mx.get_active_memory()
        mx.reset_peak_memory()

    gc.collect()
    mx.clear_cache()
    _, step = trained(2**20, tokens, tied, note=note)
    n, rows, stepped = 2 * (tokens - 1), step._head._read[0].stop, step._head.blocks[0].stop
    read = rows * (12 * n + 4 * HIDDEN * (n > HIDDEN // 2))
    counted = max(read, stepped * (12 * n + 8 * HIDDEN) + step._head._waiting)
    assert 0.5 * counted < max(phases[phase] for phase in ("loss", "embedding" if tied else "head")) <= counted


def test_targets_and_looked_up_rows_meet_all_tokens_some_at_a_time(monkeypatch):
    rows, found = head.StreamedHead._rows, []
    for at_once in (512, 16):
        sizes = []
        monkeypatch.setattr(head, "TARGETS_AT_ONCE", at_once)
        monkeypatch.setattr(head.StreamedHead, "_rows", lambda own, ids, to=sizes: to.append(ids) or rows(own, ids))
        found.append((trained(0, 41, tied=True)[0], max(ids.size for ids in sizes if isinstance(ids, mx.array))))
    (whole, most), (in_parts, few) = found
    assert few == 16 < most
    for name, array in whole.items():
        assert mx.allclose(in_parts[name], array, rtol=1e-5, atol=1e-6), name
