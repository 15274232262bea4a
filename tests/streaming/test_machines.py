"""Two machines take one step: they end with the same weights, those of one machine with both batches."""

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten
from streaming_spy import randomized
from tiny_models import tiny_llama

from ember_mlx import Ember, PairedOptimizer
from ember_mlx.shared.errors import InputError
from ember_mlx.streaming import StreamedStep
from ember_mlx.streaming.shards import Group

SEQUENCES = mx.random.randint(0, 170, (3, 9), key=mx.random.key(3))
BATCHES = [(SEQUENCES[:2], mx.array([[0, 8], [1, 7]])), (SEQUENCES[2:, :6], mx.array([[0, 5]]))]
pytestmark = pytest.mark.usefixtures("eager")


def trained(
    batches,
    reduce=None,
    tied=False,
    clip=None,
    layer=None,
    spoilt=None,
    shares=None,
    together=None,
    group=None,
    rest=None,
    keep=None,
):
    """A new model after one step, and what the step came to."""
    model = randomized(tiny_llama(tied=tied, hidden=64)).train()
    if spoilt is not None:
        model.model.embed_tokens.weight[spoilt] = mx.nan
    tables = Ember(1e-2, weight_decay=0.1)
    optimizer = PairedOptimizer(model, tables=tables, rest=rest() if rest else optim.SGD(0.1), clip_grad_norm=clip)
    clips = {"clip_norm_pass": clip is not None, "clip_layer_norm": layer}
    step = StreamedStep(model, optimizer, reduce=reduce, run_ahead=together, group=group, **clips)
    if keep is not None:
        keep.append((step, optimizer))
    return dict(tree_flatten(model.parameters())), step.accumulated(batches, shares)


def on_two_machines(batches=([BATCHES[0]], [BATCHES[1]]), shares=(None, None), shards=False, **options):
    """Both machines' weights and results.

    What a machine says may depend on what it has heard. So each is run until it has heard all of what the other says.
    What was said of other rows than the two have together is not heard.
    """
    said, found = [[], []], [None, None]
    for this in (1, 0, 1, 0, 1):
        heard, own = iter(said[1 - this]), []

        def exchanged(array, heard=heard, own=own):
            mx.eval(array)
            own.append(array)
            other = next(heard, array)
            return other if other.shape == array.shape else array

        def total(array, exchanged=exchanged):
            return array + exchanged(array)

        def part(array, this=this, total=total):
            return mx.split(total(array), 2)[this]

        def both(array, this=this, exchanged=exchanged):
            other = exchanged(array)
            return mx.concatenate([array, other] if this == 0 else [other, array])

        group = Group(this, 2, part, both) if shards else None
        found[this] = trained(batches[this], total, shares=shares[this], group=group, **options)
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


@pytest.mark.parametrize("together", [1, 2**14])
def test_micro_batches_of_uneven_rows_count_by_their_tokens(together):
    """Some gradients go together, or each alone; of two machines each sum has one order."""
    lengths = mx.array([[0, 8], [1, 3]]), mx.array([[2, 7], [0, 8]])
    whole = [(SEQUENCES[:2], lengths[0]), (SEQUENCES[1:], lengths[1])]
    own = [[(rows[i : i + 1], some[i : i + 1]) for rows, some in whole] for i in range(2)]
    shares = [[2 * 8 / 11, 2 * 6 / 14], [2 * 3 / 11, 2 * 8 / 14]]
    (weights, result), (others, other) = on_two_machines(own, shares, together=together)
    expected, of_one = trained(whole)
    assert result == other
    assert (result.loss, result.tokens) == (pytest.approx(of_one.loss, rel=1e-6), 25)
    for name, array in expected.items():
        assert mx.array_equal(weights[name], others[name]), name
        assert mx.allclose(weights[name], array, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("options", [{"tied": True, "clip": 0.05}, {"together": 1}], ids=["clipped", "one by one"])
def test_a_state_that_is_shared_out_takes_the_same_step(options):
    """Bit for bit: each element is stepped by itself, and a sum of two has one order."""
    expected, _ = on_two_machines(rest=lambda: optim.AdamW(1e-2), **options)
    for weights, result in on_two_machines(rest=lambda: optim.AdamW(1e-2), shards=True, **options):
        assert result == expected[1]
        for name, array in expected[0].items():
            assert mx.array_equal(weights[name], array), name


def test_of_a_state_that_is_shared_out_a_machine_has_half_and_a_checkpoint_all():
    both = [[], []]
    for rank, keep in enumerate(both):  # two machines with one batch, which say the same
        group = Group(rank, 2, lambda x, rank=rank: mx.split(x + x, 2)[rank], lambda x: mx.concatenate([x, x]))
        trained([BATCHES[0]], lambda x: x + x, rest=lambda: optim.AdamW(1e-2), group=group, keep=keep)
    whole = []
    trained([BATCHES[0]], rest=lambda: optim.AdamW(1e-2), keep=whole)
    state = dict(tree_flatten(whole[0][1].state))
    parts = [dict(tree_flatten(keep[0][1].state)) for keep in both]
    halved = [name for name in state if parts[0][name].shape != state[name].shape]
    assert {name.rpartition(".")[2] for name in halved} == {"m", "v"}
    for name in halved:
        assert mx.allclose(mx.concatenate([part[name] for part in parts]), state[name], rtol=1e-5, atol=1e-9), name
    step, optimizer = both[0][0]
    with step.shards.whole():
        shapes = {name: array.shape for name, array in tree_flatten(optimizer.state)}
    assert shapes == {name: array.shape for name, array in state.items()}
    assert dict(tree_flatten(optimizer.state))[halved[0]].shape == parts[0][halved[0]].shape


@pytest.mark.parametrize("rest", [lambda: optim.Adafactor(), lambda: optim.Muon(1e-3)], ids=["Adafactor", "Muon"])
def test_a_state_of_whole_arrays_cannot_be_shared_out(rest):
    group = Group(0, 2, lambda x: x, lambda x: x)
    with pytest.raises(InputError, match=f"{type(rest()).__name__}, which trains .*, needs whole arrays"):
        trained([BATCHES[0]], lambda x: x + x, rest=rest, group=group)


def test_a_machine_without_a_share_changes_nothing():
    weights, result = trained([BATCHES[0], BATCHES[0]], shares=[2.0, 0.0])
    expected, alone = trained([BATCHES[0]])
    assert (result.loss, result.tokens) == (pytest.approx(alone.loss, rel=1e-6), alone.tokens)
    for name, array in expected.items():
        assert mx.allclose(weights[name], array, rtol=1e-4, atol=1e-6), name


def test_a_loss_that_is_not_finite_on_one_machine_stops_both():
    only_there = set(BATCHES[1][0].reshape(-1).tolist()) - set(BATCHES[0][0].reshape(-1).tolist())
    found = on_two_machines(spoilt=min(only_there))
    untouched = dict(tree_flatten(randomized(tiny_llama(hidden=64)).parameters()))
    for weights, result in found:
        assert result.nonfinite == ("loss",)
        assert mx.array_equal(weights["lm_head.weight"], untouched["lm_head.weight"])
