"""Two machines take one step: they end with the same weights, those of one machine with both batches."""

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten
from streaming_spy import randomized
from tiny_models import tiny_llama

from ember_mlx import Ember, PairedOptimizer
from ember_mlx.streaming import StreamedStep

SEQUENCES = mx.random.randint(0, 170, (3, 9), key=mx.random.key(3))
BATCHES = [(SEQUENCES[:2], mx.array([[0, 8], [1, 7]])), (SEQUENCES[2:, :6], mx.array([[0, 5]]))]


@pytest.fixture(autouse=True)
def _eager():
    mx.disable_compile()
    yield
    mx.enable_compile()


def trained(batches, reduce=None, tied=False, clip=None, layer=None, spoilt=None):
    """A new model after one step, and what the step came to."""
    model = randomized(tiny_llama(tied=tied, hidden=64)).train()
    if spoilt is not None:
        model.model.embed_tokens.weight[spoilt] = mx.nan
    tables = Ember(1e-2, weight_decay=0.1)
    optimizer = PairedOptimizer(model, tables=tables, rest=optim.SGD(0.1), clip_grad_norm=clip)
    step = StreamedStep(model, optimizer, reduce=reduce, clip_norm_pass=clip is not None, clip_layer_norm=layer)
    return dict(tree_flatten(model.parameters())), step.accumulated(batches)


def on_two_machines(**options):
    """Both machines' weights and results.

    What a machine says may depend on what it has heard. So each is run until it has heard all of what the other says.
    What was said of other rows than the two have together is not heard.
    """
    said, found = [[], []], [None, None]
    for this in (1, 0, 1, 0, 1):
        heard, own = iter(said[1 - this]), []

        def total(array, heard=heard, own=own):
            mx.eval(array)
            own.append(array)
            other = next(heard, array)
            return array + (other if other.shape == array.shape else array)

        found[this] = trained([BATCHES[this]], total, **options)
        said[this] = own
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [{}, {"clip": 0.05}, {"layer": 0.01}])
def test_two_machines_are_one_with_both_batches(tied, options):
    (weights, result), (others, other) = on_two_machines(tied=tied, **options)
    expected, whole = trained(BATCHES, tied=tied, **options)
    assert result == other
    assert (result.loss, result.tokens) == (pytest.approx(whole.loss, rel=1e-6), whole.tokens)
    for name, array in expected.items():
        assert mx.array_equal(weights[name], others[name]), name
        assert mx.allclose(weights[name], array, rtol=1e-4, atol=1e-6), name


def test_a_loss_that_is_not_finite_on_one_machine_stops_both():
    only_there = set(BATCHES[1][0].reshape(-1).tolist()) - set(BATCHES[0][0].reshape(-1).tolist())
    found = on_two_machines(spoilt=min(only_there))
    untouched = dict(tree_flatten(randomized(tiny_llama(hidden=64)).parameters()))
    for weights, result in found:
        assert result.nonfinite == ("loss",)
        assert mx.array_equal(weights["lm_head.weight"], untouched["lm_head.weight"])
