"""SAGE, FlashAdamW, FlashLion and SplitWeights in PyTorch: against float64, saved and resumed, given bad input."""

import pickle

import numpy as np
import pytest
import torch
from torch_family import AGREEMENT, KINDS, as_float64, contents, gradient, make, start, train

from cuda_ref import SAGE, Ember, FlashAdamW, FlashLion, InputError, SplitWeights, triton_body, triton_kernels
from cuda_ref.optimizers.split_weights import join
from ember_mlx.parity import oracle_flash_float64 as flash_oracle
from ember_mlx.parity.oracle_sage_float64 import SageOracle

pytestmark = pytest.mark.filterwarnings("ignore:.*is rounded away")

MOST_FLIPPED = 0.02  # of the codes


@pytest.mark.parametrize("still_rows", [True, False])
@pytest.mark.parametrize("shape", [(24, 8), (9,)], ids=str)
def test_sage_agrees_with_float64(shape, still_rows, implementation):
    name, device = implementation
    w, oracle = torch.nn.Parameter(torch.zeros(shape, device=device)), SageOracle(shape, still_rows=still_rows)
    optimizer = SAGE([w], lr=1e-3, still_rows=still_rows, decay_vectors=True, implementation=name)
    expected = np.zeros(shape)
    for t in range(20):
        g = gradient(shape, t)
        g[: t % 3] = 0
        w.grad = torch.tensor(g, device=device)
        optimizer.step()
        expected = oracle.step(expected, g, 1e-3, 0.01)
    assert np.abs(as_float64(w) - expected).max() <= AGREEMENT * np.abs(expected).max()


def test_sage_is_the_same_however_its_kernels_are_cut(monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not triton_kernels.available(torch.device(device)):
        pytest.skip("Triton is not installed")

    def trained(name):
        optimizer = make("SAGE", [start((13, 7), "float32", device), start((11,), "float32", device)], name)
        optimizer = train(optimizer, 1)
        for w in optimizer.param_groups[0]["params"]:
            w.grad[w.grad.abs() < 0.3] = 0
        w.grad[3] = torch.nan
        optimizer.step()
        return [as_float64(x) for w, state in optimizer.state.items() for x in (w, *state.values())]

    expected = trained("eager")
    monkeypatch.setattr(triton_body, "statistics_tile", lambda *table: {"ROWS": 4, "COLUMNS": 2})
    tile = {"ROWS_PER_PROGRAM": 3, "ROWS": 2, "COLUMNS": 2}
    monkeypatch.setattr(triton_body, "update_tile", lambda *table: tile)
    for result, wanted in zip(trained("triton"), expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("shape", [(16, 40), (7, 9), (33,), (2, 3, 16)], ids=str)
@pytest.mark.parametrize("kind", [FlashAdamW, FlashLion])
def test_flash_agrees_with_float64_and_few_codes_are_flipped(kind, shape, implementation):
    name, device = implementation
    betas = {FlashAdamW: (0.9, 0.999), FlashLion: (0.9, 0.99)}[kind]
    w = start(shape, device=device)
    optimizer = kind([w], lr=1e-3, weight_decay=0.1, decay_vectors=True, implementation=name)
    flipped = []
    for t in range(1, 21):
        before, w.grad = as_float64(w), torch.tensor(gradient(shape, t), device=device)
        zeros = {key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in optimizer.state_of(w, {}).items()}
        state = {key: value.cpu().numpy() for key, value in (optimizer.state[w] or zeros).items()}
        expected, codes = flash_oracle.step(before, gradient(shape, t), state, t, 1e-3, betas, 1e-8, 0.1)
        optimizer.step()
        allowed = AGREEMENT * np.abs(expected - before).max() + 2.0**-23 * np.abs(before)
        assert (np.abs(as_float64(w) - expected) <= allowed).all()
        for moment in {"m", "v"} & optimizer.state[w].keys():
            apart = np.abs(optimizer.state[w][moment].cpu().numpy().astype(int) - codes[moment])
            assert apart.max() <= 1
            flipped.append((apart > 0).mean())
    assert np.mean(flipped) <= MOST_FLIPPED


@pytest.mark.parametrize("make_one", [lambda w, lr: Ember([w], lr=lr), lambda w, lr: torch.optim.AdamW([w], lr=lr)])
def test_small_steps_add_up_with_a_rest(make_one):
    split_w = start((64, 32), "bfloat16")
    near, exact = (torch.nn.Parameter(split_w.detach().clone().to(dtype)) for dtype in (torch.bfloat16, torch.float32))
    before = as_float64(split_w)
    optimizers = [SplitWeights(make_one(split_w, 1e-5)), make_one(near, 1e-5), make_one(exact, 1e-5)]
    for t in range(50):
        g = torch.tensor(np.random.RandomState(t).normal(0.3, 1, size=(64, 32))).bfloat16()
        for optimizer, w in zip(optimizers, (split_w, near, exact), strict=True):
            w.grad = g.to(w.dtype)
            optimizer.step()
    with_rest = join(split_w.detach(), optimizers[0].state[split_w]["rest"])
    way = as_float64(exact) - before
    assert np.corrcoef((as_float64(near) - before).ravel(), way.ravel())[0, 1] < 0.5
    assert np.corrcoef((as_float64(with_rest) - before).ravel(), way.ravel())[0, 1] > 0.999


def test_the_rest_is_in_the_state_dict_and_resumes_bit_for_bit():
    straight, first, second = (SplitWeights(Ember([start((8, 6), "bfloat16"), start((5, 3))], lr=1e-5)) for _ in "123")
    train(straight, 4)
    saved = train(first, 2).state_dict()
    assert [sorted(state) for state in saved["state"].values()] == [["c", "r", "rest", "step"], ["c", "r", "step"]]
    for w, trained in zip(*(x.param_groups[0]["params"] for x in (second, first)), strict=True):
        w.data.copy_(trained.data)
    second.load_state_dict(saved)
    train(second, 2, first=2)
    assert contents(second) == contents(straight)
    assert contents(second.optimizer) == contents(straight.optimizer)
    assert {w.dtype for w in second.param_groups[0]["params"]} == {torch.bfloat16, torch.float32}


def split_adamw():
    return SplitWeights(torch.optim.AdamW([("w", start((8, 6), "bfloat16"))], lr=1e-5))


def test_a_split_optimizer_that_keeps_moments_resumes_them_in_float32_and_so_does_its_copy():
    first, second = train(split_adamw(), 2), split_adamw()
    (w,), (w2,) = first.param_groups[0]["params"], second.param_groups[0]["params"]
    w2.data.copy_(w.data)
    second.register_load_state_dict_pre_hook(lambda _, wrapped: wrapped["inside"])
    second.load_state_dict({"inside": pickle.loads(pickle.dumps(first.state_dict()))})
    copied = pickle.loads(pickle.dumps(first))
    for optimizer in (first, second, copied):
        train(optimizer, 2, first=2)
    assert contents(first.optimizer) == contents(second.optimizer) == contents(copied.optimizer)
    assert contents(first) == contents(second) == contents(copied)


def test_a_group_added_to_a_split_optimizer_has_the_options_of_the_one_inside():
    optimizer = split_adamw()
    optimizer.add_param_group({"params": [("v", start((3, 2), "bfloat16"))], "lr": 1e-4})
    assert [group["betas"] for group in train(optimizer, 1).param_groups] == [(0.9, 0.999)] * 2
    assert len(optimizer.state_dict()["param_groups"]) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_state_loaded_into_a_fresh_optimizer_continues_bit_for_bit(kind):
    straight, first, second = (make(kind, [start((8, 33), "bfloat16"), start((5,))]) for _ in range(3))
    train(straight, 4)
    saved = pickle.loads(pickle.dumps(train(first, 2).state_dict()))
    for w, trained in zip(*(x.param_groups[0]["params"] for x in (second, first)), strict=True):
        w.data.copy_(trained.data)
    second.load_state_dict(saved)
    assert contents(train(second, 2, first=2)) == contents(straight)
    twin = pickle.loads(pickle.dumps(second))
    assert contents(train(twin, 1, first=4)) == contents(train(second, 1, first=4))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_do_not_lie_row_by_row_step_alike(kind, implementation):
    name, device = implementation
    if name == "triton" and "published" in kind:
        name = "auto"
    plain = start((8, 32), "bfloat16", device)
    turned = torch.nn.Parameter(plain.detach().T.contiguous().T)
    one, other = make(kind, [plain], name), make(kind, [turned], name)
    for t in range(3):
        plain.grad = torch.tensor(gradient((8, 32), t)).to(device, torch.bfloat16)
        turned.grad = plain.grad.T.contiguous().T
        one.step()
        other.step()
    assert torch.equal(plain, turned)


@pytest.mark.parametrize("kind", [FlashAdamW, FlashLion])
def test_a_nan_is_seen_in_its_weight_and_its_group(kind, implementation):
    name, device = implementation
    w = start((4, 32), device=device)
    optimizer = kind([w], lr=1e-3, implementation=name)
    w.grad = torch.ones_like(w)
    w.grad[1, 2] = torch.nan
    optimizer.step()
    assert torch.isnan(w).nonzero().tolist() == [[1, 2]]
    assert torch.isnan(optimizer.state[w]["m_scales"]).tolist() == [False, True, False, False]


def test_a_weight_resized_within_its_groups_of_32_or_beside_its_rest_is_refused():
    for make_one in (
        lambda w: FlashAdamW([w], lr=1e-3),
        lambda w: FlashLion([w], lr=1e-3),
        lambda w: SplitWeights(torch.optim.SGD([w], lr=1e-3)),
    ):
        w = start((5, 7), "bfloat16")
        optimizer = train(make_one(w), 1)
        saved = optimizer.state_dict()
        w.data = torch.ones(5, 8, dtype=torch.bfloat16)
        with pytest.raises(InputError, match=r"\.step: parameter 0 .*shape \(5, 8\).* shape \(5, 7\); resize"):
            train(optimizer, 1)
        assert (w == 1).all()
        w.data = start((5, 7), "bfloat16").data
        optimizer.load_state_dict(saved)
        train(optimizer, 1)


@pytest.mark.parametrize("kind", [Ember, SAGE])
def test_a_rate_beside_the_weights_is_taken_though_groups_are_shown_one_at_a_time(kind):
    weights = [torch.nn.Parameter(torch.zeros(4, 8, dtype=torch.bfloat16, device="meta")) for _ in "12"]
    optimizer = SplitWeights(kind([{"params": [w]} for w in weights], lr=torch.tensor(1e-3, device="meta")))
    for w in weights:
        w.grad = torch.zeros_like(w)
    optimizer.step()
    assert all(optimizer.state[w]["rest"].shape == w.shape for w in weights)


BAD = [
    (lambda: SAGE([start((2, 3, 4))], lr=1e-3), r"shape \(2, 3, 4\).*SinkGD or AdamMini"),
    (lambda: SAGE([start((2, 3))], lr=-1.0), r"SAGE\(lr=-1.0\)"),
    (lambda: SAGE([start((2, 3))], lr=1e-3, still_rows=1), "still_rows=1"),
    (lambda: FlashAdamW([start((2, 3))], lr=1e-3, betas=(0.9, 1.0)), r"FlashAdamW\(betas=\(0.9, 1.0\)"),
    (lambda: FlashAdamW([start((2, 3))], lr=1e-3, weights="bf16+int8"), "no parameter is bfloat16.*float32"),
    (lambda: FlashLion([start((2, 3))], lr=1e-3, state_format="float16"), "state_format='float16'"),
    (lambda: FlashLion([start((0, 3))], lr=1e-3), "with elements"),
    (lambda: FlashLion([torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))], lr=1e-3), "float64"),
    (lambda: SplitWeights(Ember([start((2, 3))], lr=1e-3)), "no parameter is bfloat16"),
    (lambda: SplitWeights(FlashLion([start((2, 3), "bfloat16")], lr=1e-3, weights="bf16+int8")), "itself"),
    (lambda: SplitWeights(FlashLion([start((2, 3), "bfloat16")], lr=1e-3)), r"itself: .* weights='bf16\+int8'"),
]


@pytest.mark.parametrize(("call", "says"), BAD)
def test_bad_input_is_refused_in_words(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_a_bad_gradient_and_state_of_another_format_change_nothing():
    optimizer = train(make("FlashAdamW", [start((4, 8), "bfloat16")]), 1)
    before = contents(optimizer)
    with pytest.raises(InputError, match="m_scales"):
        optimizer.load_state_dict(train(make("FlashAdamW, published", [start((4, 8), "bfloat16")]), 1).state_dict())
    with pytest.raises(InputError, match="rest"):
        optimizer.load_state_dict(train(make("FlashAdamW, split", [start((4, 8), "bfloat16")]), 1).state_dict())
    (w,) = optimizer.param_groups[0]["params"]
    w.grad = torch.zeros(4, 8).to_sparse().bfloat16()
    with pytest.raises(InputError, match="dense"):
        optimizer.step()
    assert contents(optimizer) == before
