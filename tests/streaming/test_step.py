"""What a streamed step does with optimizers, token tables, heads, micro-batches and clipping."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from architectures.build import build
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.trainer import default_loss
from streaming.small_steps import LONG, SHORT, batch_of, bits, llama, ordinary_steps, paired
from streaming_spy import Spy, ordinary, worst_difference

from ember_mlx import Ember, PairedOptimizer
from ember_mlx.optimizers.rounded import StochasticRounding
from ember_mlx.optimizers.sinkgd import SinkGD
from ember_mlx.parity.oracle_float64 import EmberOracle
from ember_mlx.streaming import StreamedStep

pytestmark = pytest.mark.usefixtures("eager")


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("length", [SHORT, LONG])
@pytest.mark.parametrize("make", [llama, partial(llama, tied=True), partial(build, "gemma2", True)])
def test_streamed_tables_are_those_of_the_float64_oracle(make, length, keep):
    if make is llama:
        mx.enable_compile()
    model = make()
    batch, lengths = batch_of(length)
    optimizer = paired(model)
    paths = [path for path in optimizer.state["tables"] if "." in path]
    oracles = {path: EmberOracle(dict(tree_flatten(model.parameters()))[path].shape) for path in paths}
    step = StreamedStep(model, optimizer, keep_logits=keep, block_rows=50)
    assert not step.notes
    for _ in range(3):
        _, gradients = ordinary(model, batch, lengths)
        before = {path: np.array(dict(tree_flatten(model.parameters()))[path], np.float64) for path in paths}
        step(batch, lengths)
        after = dict(tree_flatten(model.parameters()))
        for path, oracle in oracles.items():
            expected = oracle.step(before[path], np.array(gradients[path]), learning_rate=1e-2)
            largest = np.abs(expected - before[path]).max()
            np.testing.assert_allclose(np.array(after[path]), expected, rtol=0, atol=3e-5 * largest + 3e-7)
            state = optimizer.state["tables"][path]
            np.testing.assert_allclose(np.array(state["r"]), oracle.row_mean_square, rtol=3e-5, atol=1e-12)
            np.testing.assert_allclose(np.array(state["c"]), oracle.column_mean_square, rtol=3e-5)


def test_an_embedding_decays_in_all_rows():
    def trained(stepped):
        model = llama()
        optimizer = PairedOptimizer(model, tables=Ember(1e-2, weight_decay=0.5), rest=optim.SGD(0.0))
        stepped(model, optimizer)
        return model.model.embed_tokens.weight

    plain = trained(lambda model, optimizer: ordinary_steps(model, optimizer, batch_of(SHORT), 1))
    assert mx.allclose(trained(lambda m, o: StreamedStep(m, o)(*batch_of(SHORT))), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "rest",
    [
        partial(optim.SGD, 0.1),
        partial(optim.SGD, optim.cosine_decay(0.1, 10), momentum=0.9),
        partial(optim.Adafactor, 1e-3, relative_step=False),
        partial(optim.Muon, 1e-3),
        partial(SinkGD, 1e-3, passes=2),
        lambda: StochasticRounding(SinkGD(1e-3, passes=2)),
        lambda: optim.MultiOptimizer([optim.Lion(1e-4), optim.SGD(0.1)], [lambda path, _: "mlp" in path]),
    ],
)
def test_losses_are_those_of_ordinary_steps(rest):
    plain_model, model = llama(), llama()
    plain = ordinary_steps(plain_model, paired(plain_model, rest()), batch_of(LONG), 4)
    step = StreamedStep(model, paired(model, rest()))
    assert [step(*batch_of(LONG))[0] for _ in plain] == pytest.approx(plain, rel=1e-5)


def test_sgd_is_bit_for_bit_where_the_order_of_sums_is_the_same():
    """The tail is then differentiated as a whole, as an ordinary step does it."""
    plain_model, model = llama(), llama()
    plain = ordinary_steps(plain_model, optim.SGD(0.1), batch_of(SHORT), 5)
    step = StreamedStep(model, optim.SGD(0.1), lambda *arguments: default_loss(*arguments))
    losses = [step(*batch_of(SHORT))[0] for _ in plain]
    assert losses == plain
    assert bits(dict(tree_flatten(model.parameters()))) == bits(dict(tree_flatten(plain_model.parameters())))


def test_a_head_with_an_adapter_a_bias_or_packed_weights():
    def adapter(model):
        model.lm_head = LoRALinear.from_base(model.lm_head, r=4)
        model.lm_head.lora_b = mx.random.normal(model.lm_head.lora_b.shape, scale=0.1)

    def bias(model):
        model.lm_head = nn.Linear(64, 260)

    def packed(model):
        nn.quantize(model, 32, 8, class_predicate=lambda path, _: path.endswith(("lm_head", "embed_tokens")))

    def frozen(model):
        model.lm_head.freeze()
        model.model.embed_tokens.freeze()

    for change in (adapter, bias, packed, frozen):
        model = llama()
        change(model)
        spy = Spy()
        step = StreamedStep(model, spy, block_rows=100)
        loss, expected = ordinary(model, *batch_of(SHORT))
        assert step(*batch_of(SHORT))[0] == pytest.approx(loss, rel=1e-5)
        assert worst_difference(spy.gradients(expected), expected)[0] < 1e-4, change


def test_micro_batches_are_one_batch_and_unequal_ones_count_alike():
    model, (batch, _) = llama(), batch_of(SHORT, 4)
    whole = mx.array([[0, SHORT - 1]] * 4)
    spy = Spy()
    step = StreamedStep(model, spy)
    loss, expected = ordinary(model, batch, whole)
    result = step.accumulated([(batch[i : i + 1], whole[:1]) for i in range(4)])
    assert (result.loss, result.tokens) == (pytest.approx(loss, rel=1e-6), 4 * (SHORT - 1))
    assert worst_difference(spy.gradients(expected), expected)[0] < 1e-5

    parts = [(batch[:2], whole[:2]), (batch[2:, :5], mx.array([[2, 4], [1, 2]]))]
    means = [ordinary(model, *part) for part in parts]
    expected = {name: (means[0][1][name] + means[1][1][name]) / 2 for name in expected}
    result = step.accumulated(parts)
    assert (result.loss, result.tokens) == (pytest.approx((means[0][0] + means[1][0]) / 2, rel=1e-6), 17)
    assert worst_difference(spy.gradients(expected), expected)[0] < 1e-5


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("most", [0.05, 100.0])
def test_the_pass_for_the_norm_clips_as_an_ordinary_step_does(tied, most):
    plain_model, model = llama(tied), llama(tied)
    options = {"rest": optim.SGD(0.1), "clip_grad_norm": most}
    plain = ordinary_steps(plain_model, paired(plain_model, **options), batch_of(SHORT), 3)
    step = StreamedStep(model, paired(model, **options), clip_norm_pass=True, keep_inputs=2)
    assert [step(*batch_of(SHORT))[0] for _ in plain] == pytest.approx(plain, rel=1e-5)
    for name, array in tree_flatten(plain_model.parameters()):
        assert mx.allclose(dict(tree_flatten(model.parameters()))[name], array, rtol=1e-4, atol=1e-5), name


def test_clipping_by_layer_limits_each_layer_alone():
    model, before = llama(), llama()
    StreamedStep(model, paired(model, rest=optim.SGD(1.0)), clip_layer_norm=1e-3)(*batch_of(SHORT))
    for new, old in zip(model.layers, before.layers, strict=True):
        changes = [new_w - old_w for (_, new_w), (_, old_w) in
                   zip(tree_flatten(new.parameters()), tree_flatten(old.parameters()), strict=True)]  # fmt: skip
        norm = mx.sqrt(sum(mx.square(change).sum() for change in changes)).item()
        assert norm == pytest.approx(1e-3, rel=1e-3)


def test_clipping_by_layer_limits_tables_whose_gradients_are_whole():
    model, before = llama().freeze(), llama()
    model.lm_head.unfreeze()
    optimizer = PairedOptimizer(model, tables=optim.SGD(1.0), rest=optim.SGD(1.0))
    StreamedStep(model, optimizer, clip_layer_norm=1e-3)(*batch_of(SHORT))
    assert mx.linalg.norm(model.lm_head.weight - before.lm_head.weight).item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("rest", [optim.AdamW, SinkGD])
def test_a_resumed_run_is_the_same_bit_for_bit(rest):
    def run(steps, weights=None, state=None):
        model = llama()
        model.set_dtype(mx.bfloat16)
        optimizer = PairedOptimizer(
            model, tables=Ember(1e-2, rounding="stochastic"), rest=StochasticRounding(rest(1e-3), seed=1)
        )
        if weights:
            model.load_weights(list(weights.items()))
            optimizer.state = state
        step = StreamedStep(model, optimizer)
        for _ in range(steps):
            step(*batch_of(SHORT))
        return dict(tree_flatten(model.parameters())), dict(tree_flatten(optimizer.state))

    first = run(2)
    assert [bits(part) for part in run(2, *first)] == [bits(part) for part in run(4)]


def test_rounding_of_the_body_is_the_same_in_streamed_and_ordinary_steps():
    def rest():
        return StochasticRounding(optim.SGD(1e-4))

    gradients = {
        "w": mx.ones((40, 8), mx.bfloat16),
        "b": mx.ones((8,), mx.bfloat16),
        "e": mx.ones((2, 3, 8), mx.bfloat16),
    }
    model = nn.Module()
    for name, array in gradients.items():
        model[name] = array
    plain = rest()
    plain.init(model.trainable_parameters())
    expected = plain.apply_gradients(gradients, model)

    from ember_mlx.streaming.updates import Updates

    updates = Updates(rest(), model)
    updates.begin()
    for path, (found, _) in updates(dict(model.parameters()), gradients).items():
        assert mx.array_equal(found, expected[path])
        moved = (found != model[path]).astype(mx.float32).mean().item()
        assert 0 < moved < 0.2  # a step of 1/39 of the distance to the number below 1


def test_a_gpu_is_waited_for_behind():
    """On a CPU nothing runs ahead; the same steps with a pace that does are the same, compiled too."""
    mx.enable_compile()
    model, plain = llama(), llama()
    step = StreamedStep(model, paired(model))
    step._pace.ahead = 10_000
    other = StreamedStep(plain, paired(plain))
    for _ in range(2):
        assert step(*batch_of(LONG)) == other(*batch_of(LONG))


def test_an_optimizer_may_keep_a_number_in_its_state():
    model, optimizer = llama(), optim.SGD(0.1)
    optimizer.state["warmup"] = 2.0
    assert StreamedStep(model, optimizer)(*batch_of(SHORT))[0] > 0
