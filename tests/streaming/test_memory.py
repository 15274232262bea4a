"""What a streamed step needs above the weights. These catch every forgotten reference to a gradient or a table."""

import gc

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3

from ember_mlx import Ember, PairedOptimizer
from ember_mlx.streaming import StreamedStep


class Stateless(optim.Optimizer):
    """Plain SGD; MLX's keeps room for a momentum that it does not have."""

    def __init__(self, learning_rate):
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)

    def init_single(self, parameter, state):
        pass

    def apply_single(self, gradient, parameter, state):
        return parameter - self.learning_rate * gradient


def weights_and_peaks(hidden, layers, vocabulary, tokens, tied=False, **options):
    """Of two steps, in bytes."""
    gc.collect()  # of an earlier model: its step and its hooks hold each other
    mx.clear_cache()  # a cached buffer serves arrays of half its size, too, and counts whole
    config = {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 3 * hidden,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
    }
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config)).train()
    optimizer = PairedOptimizer(model, tables=Ember(1e-4), rest=Stateless(1e-3))
    mx.eval(model.parameters(), optimizer.state)
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    before = mx.get_active_memory() - weights  # of other tests
    step = StreamedStep(model, optimizer, **options)
    batch = mx.random.randint(0, vocabulary, (1, tokens + 1))
    peaks = []
    for _ in range(2):
        mx.reset_peak_memory()
        step(batch)
        peaks.append(mx.get_peak_memory() - before)
    return weights, peaks


@pytest.mark.parametrize(
    ("shape", "tied", "most"),
    [
        ((128, 36, 4736, 16), False, 1.03),  # an 8B model's proportions at 1 x 512
        ((256, 6, 8192, 16), False, 1.05),  # a layer is 0.09, a table 0.23
        ((256, 6, 8192, 16), True, 1.08),
    ],
)
def test_the_peak_is_little_more_than_the_weights(shape, tied, most):
    weights, peaks = weights_and_peaks(*shape, tied)
    assert max(peaks) < most * weights


def test_keeping_fewer_inputs_takes_less_on_long_sequences():
    """Of 40 inputs seven are there, and five more at a time: over half are not, from the first step on."""
    mx.disable_compile()
    try:
        (_, all_kept), (_, some_kept) = (weights_and_peaks(32, 40, 128, 128, keep_inputs=keep) for keep in (1, 6))
    finally:
        mx.enable_compile()
    inputs = 40 * 128 * 32 * 4
    assert all(more - less > 0.5 * inputs for more, less in zip(all_kept, some_kept, strict=True))
