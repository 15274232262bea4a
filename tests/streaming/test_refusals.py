"""Optimizers, options, models and traces that cannot be streamed: each is refused in a line."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from streaming.small_steps import SHORT, arrays_of, batch_of, bits, llama, paired

from ember_mlx import InputError
from ember_mlx.optimizers.guarded import GuardedOptimizer
from ember_mlx.optimizers.rounded import StochasticRounding
from ember_mlx.streaming import StreamedStep
from ember_mlx.streaming.shards import Group

pytestmark = pytest.mark.usefixtures("eager")


class NeedsAll(optim.SGD):
    def apply_gradients(self, gradients, parameters):
        return super().apply_gradients(gradients, parameters)


def clipping(model):
    return guarded(model, optim.SGD(0.1), clip_grad_norm=2.0)


def guarded(model, optimizer, **options):
    return GuardedOptimizer(model.trainable_parameters(), optimizer, **options)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda m: StreamedStep(m, NeedsAll(0.1)), "NeedsAll, which trains .* needs all gradients at once"),
        (lambda m: StreamedStep(m, paired(m, NeedsAll(0.1))), "NeedsAll, which trains .*ordinary step"),
        (lambda m: StreamedStep(m, StochasticRounding(NeedsAll(0.1))), "needs all gradients at once"),
        (lambda m: StreamedStep(m, "sgd"), "must be an mlx.optimizers.Optimizer"),
        (lambda m: StreamedStep(m, paired(m, clip_grad_norm=1.0)), "clip_norm_pass=True, or clip_layer_norm"),
        (lambda m: StreamedStep(m, paired(m), clip_norm_pass=True), "clip_norm_pass=True.*no clip_grad_norm"),
        (lambda m: StreamedStep(m, optim.SGD(1), clip_norm_pass=True), "clip_norm_pass=True.*no clip_grad_norm"),
        (lambda m: StreamedStep(m, paired(m), lambda *_: mx.array(0.0), block_rows=9), "block_rows=9.*caller's own"),
        (lambda m: StreamedStep(m, paired(m), lambda *_: mx.array(0.0), keep_logits=False), "keep_logits=False.*own"),
        (lambda m: StreamedStep(m, paired(m), group=Group(0, 2, None, None)), "group=.*reduce"),
        (lambda m: StreamedStep(m, paired(m, clipping(m))), "GuardedOptimizer.clip_grad_norm=2.0. stands inside"),
        (lambda m: StreamedStep(m, guarded(m, clipping(m)), clip_norm_pass=True), "stands inside another"),
        (lambda m: StreamedStep(m, guarded(m, paired(m, clip_grad_norm=3))), "clip_grad_norm=3. stands inside"),
        (lambda m: StreamedStep(m, optim.MultiOptimizer([clipping(m)])), "stands inside another optimizer"),
        (lambda m: StreamedStep(m, paired(m), keep_inputs=0), "keep_inputs=0.*1 or more"),
        (lambda m: StreamedStep(m, paired(m), clip_layer_norm=-1), "clip_layer_norm=-1.*above 0"),
        (lambda m: StreamedStep(paired(m), m), "type PairedOptimizer.*the model comes first"),
        (lambda m: StreamedStep(m.freeze(), optim.SGD(1)), "nothing in the model is trainable"),
        (lambda m: StreamedStep(m, optim.SGD(1)).accumulated([]), "no batch is given"),
        (lambda m: StreamedStep(m, optim.SGD(1)).accumulated([(mx.ones((1, 3), mx.int32),)]), "a batch of 1 arrays"),
        (lambda m: StreamedStep(m, optim.SGD(1))(np.ones((1, 3), int)), "type ndarray"),
        (lambda m: StreamedStep(m, optim.SGD(1))(mx.ones((1, 3))), "float32: must be whole numbers"),
        (lambda m: StreamedStep(m, optim.SGD(1))(mx.ones((1, 1), mx.int32)), "shape .1, 1.*2 or more"),
        (lambda m: StochasticRounding(optim.MultiOptimizer([optim.SGD(1)])), "parts of a MultiOptimizer"),
        (lambda m: StochasticRounding(optim.SGD(1), seed=-1), "seed=-1"),
    ],
)
def test_what_cannot_be_streamed_is_refused(make, why):
    with pytest.raises(InputError, match=why) as refused:
        make(llama())
    assert "\n" not in str(refused.value)


def test_a_trace_around_it_is_refused_and_nothing_changes():
    model = llama()
    optimizer = GuardedOptimizer(model.trainable_parameters(), optim.SGD(0.1))
    step = StreamedStep(model, optimizer)
    before = bits(arrays_of(model, optimizer))
    with pytest.raises(InputError, match="called inside nn.value_and_grad"):
        nn.value_and_grad(model, lambda model: mx.array(step(*batch_of(SHORT))[0]))(model)
    assert bits(arrays_of(model, optimizer)) == before
    mx.enable_compile()
    with pytest.raises(InputError, match="or mx.compile"):
        mx.compile(lambda *batch: mx.array(step(*batch)[0]), inputs=[model.state])(*batch_of(SHORT))
    with pytest.raises(InputError, match="or mx.compile"):  # the batch alone is traced
        mx.compile(lambda *batch: mx.array(step(*batch)[0]))(*batch_of(SHORT))


def test_a_model_with_nothing_to_train_is_refused():
    model = llama()
    step = StreamedStep(model, optim.SGD(0.1))
    model.freeze()
    with pytest.raises(InputError, match="unfreeze something"):
        step(*batch_of(SHORT))
