"""SAGE, FlashAdamW, FlashLion and SplitWeights in PyTorch: against float64, and beside their MLX twins."""

import pickle

import mlx.core as mx
import numpy as np
import pytest
import torch

import cuda_ref.optimizers as torch_optimizers
import ember_mlx.optimizers as mlx_optimizers
from cuda_ref import SAGE, Ember, FlashAdamW, FlashLion, InputError, SplitWeights, triton_body, triton_kernels
from cuda_ref.optimizers.split_weights import join, split
from ember_mlx.optimizers import split_weights as of_mlx
from ember_mlx.parity import oracle_flash_float64 as flash_oracle
from ember_mlx.parity.oracle_sage_float64 import SageOracle

pytestmark = pytest.mark.filterwarnings("ignore:.*is rounded away")

AGREEMENT, MOST_FLIPPED = 2e-6, 0.02
KINDS = {
    "SAGE": {},
    "FlashAdamW": {},
    "FlashAdamW, split": {"weights": "bf16+int8"},
    "FlashAdamW, published": {"state_format": "published"},
    "FlashLion, split": {"weights": "bf16+int8"},
}


def as_float64(tensor):
    return tensor.detach().to("cpu", torch.float64).numpy()


def start(shape, dtype="float32", device="cpu", seed=0):
    values = torch.tensor(np.random.RandomState(seed).uniform(-0.02, 0.02, size=shape))
    return torch.nn.Parameter(values.to(device, getattr(torch, dtype)))


def gradient(shape, t):
    random = np.random.RandomState(t)
    values = (random.uniform(-1, 1, size=shape) * 10.0 ** random.randint(-3, 1, size=shape)).astype(np.float32)
    values[..., :1] = 0
    return values


def make(kind, parameters, implementation="eager", **options):
    name = kind.split(",")[0]
    options = KINDS[kind] | options | {"implementation": implementation}
    return getattr(torch_optimizers, name)(parameters, lr=1e-3, **options)


def train(optimizer, steps, first=0):
    for t in range(first, first + steps):
        for w in optimizer.param_groups[0]["params"]:
            w.grad = torch.tensor(gradient(tuple(w.shape), t)).to(w.device, w.dtype)
        optimizer.step()
    return optimizer


def contents(optimizer):
    """The bits of weights and state."""
    tensors = []
    for w in optimizer.param_groups[0]["params"]:
        tensors += [w, *(value for _, value in sorted(optimizer.state[w].items()))]
    return [tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() for tensor in tensors]


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
        zeros = {key: torch.zeros(shape, dtype=dtype) for key, (shape, dtype) in optimizer.state_of(w).items()}
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


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "FlashAdamW, published"])
def test_they_go_as_their_mlx_twins(kind, implementation):
    name, device = implementation
    dtype = "bfloat16" if "split" in kind else "float32"
    w = start((6, 33), dtype, device)
    twin = getattr(mlx_optimizers, kind.split(",")[0])(1e-3, **KINDS[kind])
    of_twin = {"w": mx.array(as_float64(w)).astype(getattr(mx, dtype))}
    before = as_float64(w)
    optimizer = make(kind, [w], name)
    for t in range(20):
        train(optimizer, 1, t)
        of_twin = twin.apply_gradients({"w": mx.array(gradient((6, 33), t)).astype(getattr(mx, dtype))}, of_twin)
    found, expected = as_float64(w), np.array(of_twin["w"].astype(mx.float32)).astype(np.float64)
    # A float32 weight rounds 20 times, and a flipped code moves a step by 1/127 of itself at most.
    unit = np.maximum(np.abs(before), 0.02) * (2.0**-7 if dtype == "bfloat16" else 2.0**-23)
    flip = 0 if kind == "SAGE" else 1 / 127
    assert (np.abs(found - expected) <= (AGREEMENT + flip) * np.abs(found - before).max() + 10 * unit).all()


def test_weights_are_split_and_joined_as_in_mlx():
    random = np.random.RandomState(0)
    w = (random.uniform(-1, 1, size=4096) * 10.0 ** random.randint(-20, 20, size=4096)).astype(np.float32)
    w[:3] = 0, np.inf, np.nan
    (low, rest), (low_mlx, rest_mlx) = split(torch.tensor(w)), of_mlx.split(mx.array(w))
    assert np.array_equal(low.float().numpy(), np.array(low_mlx.astype(mx.float32)), equal_nan=True)
    assert np.array_equal(rest.numpy(), np.array(rest_mlx))
    assert np.array_equal(join(low, rest).numpy(), np.array(of_mlx.join(low_mlx, rest_mlx)), equal_nan=True)


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
    (lambda: SplitWeights(FlashLion([start((2, 3), "bfloat16")], lr=1e-3, weights="bf16+int8")), "already"),
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
