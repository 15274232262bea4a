"""AdamMini and SinkGD as PyTorch's training loops and tools expect an optimizer to be."""

import copy
import io
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import nn
from torch_tables import bits

from cuda_ref import InputError, PairedOptimizer
from cuda_ref.optimizers import SAGE, AdamMini, Ember, FlashAdamW, FlashLion, SinkGD, SplitWeights

MAKE = {"AdamMini": (AdamMini, {}), "int8": (AdamMini, {"momentum": "int8"}), "SinkGD": (SinkGD, {})}
KEEPING = MAKE | {  # state of vectors, and all but SinkGD of matrices
    "FlashAdamW": (FlashAdamW, {}),
    "FlashLion": (FlashLion, {}),
    "with a rest": (FlashAdamW, {"weights": "bf16+int8"}),
    "SAGE": (SAGE, {}),
}
SHAPES = [(7,), (), (9, 5), (8, 33), (2, 5, 3)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=MAKE)
def make(request):
    made, options = MAKE[request.param]
    return lambda params, **more: made(params, lr=1e-2, weight_decay=0.1, **options | more)


def weights(dtype=torch.float32, device="cpu"):
    random = np.random.RandomState(0)
    return [nn.Parameter(torch.tensor(random.uniform(-1, 1, size=s), dtype=dtype, device=device)) for s in SHAPES]


def train(optimizer, first, last):
    for t in range(first, last):
        for number, w in enumerate(w for group in optimizer.param_groups for w in group["params"]):
            random = np.random.RandomState(100 * t + number)
            w.grad = torch.tensor(random.uniform(-1, 1, size=tuple(w.shape)), dtype=w.dtype, device=w.device)
        optimizer.step()
    return optimizer


def everything(optimizer):
    params = [w for group in optimizer.param_groups for w in group["params"]]
    return bits(*params), [{name: bits(value) for name, value in optimizer.state[w].items()} for w in params]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_implementation_repeats_itself_bit_for_bit_and_state_is_no_16_bits(make, dtype, implementation):
    name, device = implementation
    first, second = (train(make(weights(dtype, device), implementation=name), 0, 3) for _ in range(2))
    assert everything(first) == everything(second)
    dtypes = {value.dtype for state in first.state.values() for value in state.values()}
    assert dtypes <= {torch.float32, torch.int8}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["saved", "copied"])
def test_a_run_taken_up_again_goes_on_bit_for_bit(make, dtype, how):
    straight = train(make(weights(dtype)), 0, 6)
    before = train(make(weights(dtype)), 0, 3)
    if how == "copied":
        after = copy.deepcopy(before)
    else:
        file = io.BytesIO()
        torch.save(before.state_dict(), file)
        file.seek(0)
        after = make([nn.Parameter(w.detach().clone()) for w in before.param_groups[0]["params"]])
        after.load_state_dict(torch.load(file))
    assert everything(train(after, 3, 6)) == everything(straight)


def test_state_of_another_format_is_refused_and_nothing_is_loaded():
    saved = train(AdamMini(weights(), momentum="int8"), 0, 1).state_dict()
    other = train(AdamMini(weights()), 0, 2)
    before = everything(other)
    with pytest.raises(InputError, match=r"AdamMini.load_state_dict: the state has m of shape .*int8.*float32"):
        other.load_state_dict(saved)
    assert everything(other) == before


def made_for(kind, shape):
    made, options = KEEPING[kind]
    return made([nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))], lr=1e-2, **options)


@pytest.mark.parametrize(
    ("kind", "shape", "other"),
    [(kind, (33,), (60,)) for kind in ("AdamMini", "SinkGD", "SAGE", "with a rest")]
    + [(kind, (4, 8), (8, 4)) for kind in ("AdamMini", "SAGE", "with a rest", "int8")]  # int8 by v alone
    + [("SinkGD", (8,), (4, 8))],
)
def test_state_of_another_shape_in_as_many_groups_is_refused_where_the_state_tells_it(kind, shape, other):
    saved = train(made_for(kind, shape), 0, 1).state_dict()
    with pytest.raises(InputError, match=r"the state has .* for a weight of shape \(.*: load the state of this model"):
        made_for(kind, other).load_state_dict(saved)


@pytest.mark.parametrize(("made", "other"), list(permutations(KEEPING, 2)))
def test_state_of_another_optimizer_is_refused(made, other):
    shape = (40,) if made == "SinkGD" else (64, 32)
    with pytest.raises(InputError, match="the state has .* for a weight"):
        made_for(other, shape).load_state_dict(train(made_for(made, shape), 0, 1).state_dict())


def test_a_rest_is_not_left_out_of_the_state_in_silence():
    saved = train(SplitWeights(made_for("AdamMini", (4, 8))), 0, 1).state_dict()
    with pytest.raises(InputError, match="the state has rest for a weight"):
        made_for("AdamMini", (4, 8)).load_state_dict(saved)


@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", -1.0), ("betas", (0.9, 1.0)), ("betas", 0.9), ("eps", 0.0), ("weight_decay", float("nan"))],
)
def test_values_out_of_range_are_refused_by_name_and_value(option, value):
    for made in (AdamMini, SinkGD):
        with pytest.raises(InputError, match=rf"{made.__name__}\({option}="):
            made(weights(), **{option: value})


def test_hooks_of_loading_decide_what_is_loaded_and_see_it_as_it_is_kept(make):
    saved = train(make(weights(torch.bfloat16)), 0, 2).state_dict()
    optimizer, seen = make(weights(torch.bfloat16)), []
    optimizer.register_load_state_dict_pre_hook(lambda _, wrapped: wrapped["inside"])
    optimizer.register_load_state_dict_post_hook(lambda loaded: seen.append(everything(loaded)))
    optimizer.load_state_dict({"inside": saved})
    assert seen == [everything(optimizer)]
    assert seen[0][1] == [{name: bits(x) for name, x in state.items()} for state in saved["state"].values()]


def test_a_learning_rate_in_a_tensor_is_looked_at_as_a_number_is(make):
    for value in (torch.tensor(-1.0), torch.tensor(float("nan")), torch.ones(1), torch.tensor(0.1, device="meta")):
        with pytest.raises(InputError, match=r"\(lr="):
            make(weights()).add_param_group({"params": [nn.Parameter(torch.ones(2, 3))], "lr": value})


def test_a_weight_that_was_resized_after_a_step_is_refused_before_another_moves():
    optimizer = train(AdamMini(weights()), 0, 1)
    optimizer.param_groups[0]["params"][-1].data = torch.ones(3, 5, 3)
    before = everything(optimizer)
    with pytest.raises(InputError, match=r"parameter 4 .*shape \(3, 5, 3\) on cpu, and its m shape \(2, 5, 3\)"):
        train(optimizer, 1, 2)
    assert everything(optimizer) == before


def test_weights_and_gradients_that_it_does_not_take_are_refused(make):
    for wrong in (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(0, 3)):
        with pytest.raises(InputError, match="parameter 0 has shape"):
            make([nn.Parameter(wrong)])
    w = nn.Parameter(torch.zeros(4, 3))
    w.grad = torch.zeros(4, 3).to_sparse()
    with pytest.raises(InputError, match="gradient of parameter 0"):
        make([w]).step()
    with pytest.raises(InputError, match="passes=0"):
        SinkGD([w], passes=0)
    for made in (AdamMini, SinkGD):
        with pytest.raises(InputError, match="model=list: must be the torch.nn.Module"):
            made([w], model=[w])
    with pytest.raises(InputError, match="momentum='int4'"):
        AdamMini([w], momentum="int4")


def test_a_weight_that_is_not_contiguous_steps_as_one_that_is(make, implementation):
    name, device = implementation
    plain = nn.Parameter(torch.rand(2, 6, 4, device=device))
    turned = nn.Parameter(plain.detach().transpose(1, 2).contiguous().transpose(1, 2))
    optimizers = [make([w], implementation=name) for w in (plain, turned)]
    for w, optimizer in zip((plain, turned), optimizers, strict=True):
        w.grad = torch.linspace(-1, 1, w.numel(), device=device).reshape(w.shape)
        optimizer.step()
    torch.testing.assert_close(turned, plain, rtol=1e-6, atol=1e-7)


def test_beside_ember_in_a_paired_optimizer(make):
    model = nn.ModuleDict({"embed": nn.Embedding(20, 8), "body": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
    optimizer = PairedOptimizer(model, tables=lambda named: Ember(named, lr=1e-3), rest=make)
    before = bits(*model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(old != new for old, new in zip(before, bits(*model.parameters()), strict=True))
    optimizer.load_state_dict(optimizer.state_dict())
