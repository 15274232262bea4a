"""AdamMini and SinkGD: blocks from modules, awkward gradients, vectors, and their place beside Ember."""

from itertools import permutations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from ember_mlx import Ember, InputError, PairedOptimizer
from ember_mlx.optimizers import SAGE, AdamMini, FlashAdamW, FlashLion, SinkGD
from ember_mlx.optimizers.sinkgd import sinkhorn_factors
from ember_mlx.parity.body_oracles import AdamMiniOracle, SinkGDOracle

MAKE = {
    "AdamMini": AdamMini,
    "int8": lambda *a, **k: AdamMini(*a, momentum="int8", **k),
    "SinkGD": SinkGD,
}
KEEPING = MAKE | {  # state of vectors, and all but SinkGD of matrices
    "FlashAdamW": FlashAdamW,
    "FlashLion": FlashLion,
    "with a rest": lambda *a: FlashAdamW(*a, weights="bf16+int8"),
    "SAGE": SAGE,
}
# Vectors, matrices, experts; none of them whole groups of 32, and one of rank 8.
SHAPES = {"norm": (7,), "scale": (), "matrix": (9, 5), "lora": (8, 33), "experts": (2, 5, 3)}


@pytest.fixture(params=MAKE)
def make(request):
    return MAKE[request.param]


def random_tree(seed, scale=1.0):
    random = np.random.RandomState(seed)
    return {name: mx.array(np.float32(random.uniform(-scale, scale, size=shape))) for name, shape in SHAPES.items()}


class Attention(nn.Module):
    """32 wide, with 4 heads of 16 and 2 of keys: head_dim is not the width over the heads."""

    def __init__(self):
        super().__init__()
        self.n_heads, self.n_kv_heads = 4, 2
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, n * 16, bias=False) for n in (4, 2, 2))
        self.o_proj = nn.Linear(64, 32, bias=False)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(50, 32)
        self.attention = Attention()
        self.conv = nn.Conv1d(32, 6, 3)
        self.norm = nn.RMSNorm(32)


def test_blocks_are_heads_with_their_true_size_channels_and_rows():
    model = Model()
    optimizer = AdamMini(1e-3, model=model)
    optimizer.init(model.trainable_parameters())
    state = optimizer.state
    blocks = {name: array.shape for name, array in tree_flatten(state) if name.endswith(".v")}
    assert blocks == {
        "embed_tokens.weight.v": (50, 1),
        "attention.q_proj.weight.v": (4, 1),
        "attention.k_proj.weight.v": (2, 1),
        "attention.v_proj.weight.v": (32, 1),
        "attention.o_proj.weight.v": (32, 1),
        "conv.weight.v": (6, 1, 1),
        "conv.bias.v": (1,),
        "norm.weight.v": (1,),
    }


@pytest.mark.parametrize("momentum", ["float32", "int8"])
def test_a_head_and_a_column_of_lora_are_blocks_as_the_oracle_has_them(momentum):
    from mlx_lm.tuner.lora import LoRALinear

    model = Model()
    model.attention.o_proj = LoRALinear.from_base(model.attention.o_proj, r=8)
    gradients = {"attention.q_proj.weight": (16, 32), "attention.o_proj.lora_a": (64, 1), "conv.weight": (1, 3, 32)}
    optimizer = AdamMini(0.5, model=model, momentum=momentum)
    parameters = dict(tree_flatten(model.trainable_parameters()))
    for name, block in gradients.items():
        w = parameters[name]
        g = np.random.RandomState(1).normal(size=w.shape).astype(np.float32)
        change = AdamMiniOracle(w.shape, block_shape=block).change(g, 0.5)
        new = optimizer.apply_gradients({name: mx.array(g)}, {name: mx.zeros(w.shape)})[name]
        np.testing.assert_allclose(np.array(new), -change, rtol=0, atol=2e-6 * np.abs(change).max())
        optimizer = AdamMini(0.5, model=model, momentum=momentum)


@pytest.mark.parametrize("scale", [1e-8, 1e4])
@pytest.mark.parametrize("passes", [2, 5])
def test_steps_are_right_for_small_and_large_gradients(scale, passes):
    w = np.zeros((33, 20), np.float32)
    for optimizer, oracle in (
        (AdamMini(1e-3), AdamMiniOracle(w.shape)),
        (SinkGD(1e-3, passes), SinkGDOracle(w.shape, passes)),
    ):
        now, exact = {"w": mx.array(w)}, w.astype(np.float64)
        for seed in range(20):
            g = (np.random.RandomState(seed).normal(size=w.shape) * scale).astype(np.float32)
            now, exact = optimizer.apply_gradients({"w": mx.array(g)}, now), oracle.step(exact, g, 1e-3)
        assert np.abs(np.array(now["w"]) - exact).max() <= 2e-6 * np.abs(exact).max()


def test_gradients_of_zero_let_weights_and_their_shape_alone(make):
    weights = random_tree(0)
    zeros = {name: mx.zeros(shape) for name, shape in SHAPES.items()}
    after = make(1e-3).apply_gradients(zeros, weights)
    assert all(mx.array_equal(after[name], weights[name]) for name in SHAPES)


def test_a_nan_stays_in_its_own_weight(make):
    gradients = random_tree(1)
    gradients["matrix"][2, 3] = mx.nan
    after = make(1e-3).apply_gradients(gradients, random_tree(0))
    assert {name for name in SHAPES if mx.isnan(after[name]).any()} == {"matrix"}


def test_vectors_do_not_decay_unless_they_are_to(make):
    weights, zeros = random_tree(0), {name: mx.zeros(shape) for name, shape in SHAPES.items()}
    for decay_vectors in (False, True):
        after = make(0.5, weight_decay=0.5, decay_vectors=decay_vectors).apply_gradients(zeros, weights)
        for name in SHAPES:
            factor = 0.75 if decay_vectors or len(SHAPES[name]) > 1 else 1.0
            np.testing.assert_allclose(np.array(after[name]), factor * np.array(weights[name]), rtol=1e-6)


def test_bytes_of_state_are_as_promised():
    w = {"w": mx.zeros((256, 128))}
    for options, promised in (({}, 4.04), ({"momentum": "int8"}, 1.16)):
        optimizer = AdamMini(1e-3, **options)
        optimizer.init(w)
        assert sum(array.nbytes for array in optimizer.state["w"].values()) / w["w"].size <= promised
    optimizer = SinkGD(1e-3)
    optimizer.init(w)
    assert optimizer.state["w"] == {}


def test_two_passes_bring_rows_within_a_few_percent_and_five_to_one_size():
    random = np.random.RandomState(0)
    g = mx.array(np.exp(random.normal(size=(96, 1)) + random.normal(size=64)) * random.normal(size=(96, 64)))
    for passes, within in ((2, 0.05), (5, 1e-4)):
        a, b = sinkhorn_factors(g, passes, 1e-8)
        rows = mx.sqrt(mx.square(a[:, None] * g * b).mean(axis=1))
        assert mx.abs(rows - 1).max() < within


def test_state_of_another_format_is_refused_by_name():
    saved, other = AdamMini(1e-3, momentum="int8"), AdamMini(1e-3)
    saved.init(random_tree(0))
    other.state = saved.state
    with pytest.raises(InputError, match=r"AdamMini: the state has m of shape .*int8 for .*needs m of shape .*float32"):
        other.apply_gradients(random_tree(1), random_tree(0))


def state_for(other, made, shape, other_shape):
    """Give ``other`` the state that ``made`` has for one shape, and weights of another."""
    made.init({"w": mx.zeros(shape, mx.bfloat16)})
    other.state = made.state
    other.init({"w": mx.zeros(other_shape, mx.bfloat16)})


@pytest.mark.parametrize(
    ("kind", "shape", "other"),
    [(kind, (33,), (60,)) for kind in ("AdamMini", "SinkGD", "SAGE", "with a rest")]
    + [(kind, (4, 8), (8, 4)) for kind in ("AdamMini", "SAGE", "with a rest", "int8")]  # int8 by v alone
    + [("SinkGD", (8,), (4, 8))],  # it stepped the matrix as if it were a vector
)
def test_state_of_another_shape_in_as_many_groups_is_refused_where_the_state_tells_it(kind, shape, other):
    with pytest.raises(InputError, match="the state has .*of shape .* for w of shape .*; load the state of this model"):
        state_for(KEEPING[kind](1e-3), KEEPING[kind](1e-3), shape, other)


@pytest.mark.parametrize(("made", "other"), list(permutations(KEEPING, 2)))
def test_state_of_another_optimizer_is_refused(made, other):
    shape = (40,) if made == "SinkGD" else (64, 32)
    with pytest.raises(InputError, match=r"the state has .* for w"):
        state_for(KEEPING[other](1e-3), KEEPING[made](1e-3), shape, shape)


def test_beside_ember_in_a_paired_optimizer_guarded_clipped_and_resumed(make):
    model = Model()
    parameters = model.trainable_parameters()
    gradients = tree_map(lambda w: mx.ones_like(w) * 0.1, parameters)

    def pair():
        return PairedOptimizer(model, Ember(1e-3), make(1e-3), skip_nonfinite=True, clip_grad_norm=1.0)

    straight, before, after = pair(), pair(), pair()
    weights = straight.apply_gradients(gradients, straight.apply_gradients(gradients, parameters))
    half_way = before.apply_gradients(gradients, parameters)
    after.state = dict(tree_flatten(before.state))
    resumed = after.apply_gradients(gradients, half_way)
    pairs = zip(tree_flatten(weights), tree_flatten(resumed), strict=True)
    assert all(mx.array_equal(one, other) for (_, one), (_, other) in pairs)
    bad = tree_map(lambda g: g * mx.nan, gradients)
    same = after.apply_gradients(bad, resumed)
    assert after.nonfinite_steps.item() == 1
    pairs = zip(tree_flatten(same), tree_flatten(resumed), strict=True)
    assert all(mx.array_equal(one, other) for (_, one), (_, other) in pairs)
