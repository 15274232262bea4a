"""The Triton kernels of AdamMini, SinkGD and the Flash optimizers beside plain operations, in every kind of shape."""

import pytest
import torch
from torch_family import AGREEMENT, as_float64, gradient, start

from cuda_ref import AdamMini, FlashAdamW, FlashLion, SinkGD, flash_triton, triton_body, triton_kernels
from cuda_ref.optimizers.split_weights import join

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(not triton_kernels.available(DEVICE), reason="Triton is not installed")

# Rows of whole groups of 32 and of others, of one element, one row, longer than a piece; vectors, numbers, experts.
SHAPES = [(6, 64), (9, 33), (3, 100), (40, 1), (1, 96), (1, 1), (2, 300), (130,), (), (3, 5, 33), (2, 7, 32)]
KINDS = {
    "AdamMini": (AdamMini, {}),
    "AdamMini int8": (AdamMini, {"momentum": "int8"}),
    "SinkGD": (SinkGD, {"passes": 2}),
    "FlashAdamW": (FlashAdamW, {}),
    "FlashLion": (FlashLion, {}),
}
IN_CODES = ("AdamMini int8", "FlashAdamW", "FlashLion")


@pytest.fixture(params=["as they are", "cut small"])
def tiles(request, monkeypatch):
    """The kernels with their own tiles, and with such that every weight takes several programs."""
    if request.param == "cut small":
        of_the_body = {"TILE": 32, "LONGEST_PIECE": 64, "BLOCKS_PER_PROGRAM": 4, "FLAT_GROUPS": 4, "CODED_GROUPS": 2}
        of_the_body |= {"PASS_TILE": 64, "FEWEST_PASS_ROWS": 3, "MULTIPROCESSORS": 1}
        of_the_body |= {"UPDATE_TILE": {"ROWS": 2, "COLUMNS": 16}}
        for name, value in of_the_body.items():
            monkeypatch.setattr(triton_body, name, value)
        monkeypatch.setattr(flash_triton, "GROUPS_PER_PROGRAM", 2)


def stepped(kind, shapes, implementation, rate=1e-2, steps=2, model=None):
    made, options = KINDS[kind]
    options = options | ({"model": model} if model is not None else {})
    weights = [start(shape, device=DEVICE) for shape in shapes] if model is None else list(model.parameters())
    optimizer = made(weights, lr=rate, weight_decay=0.1, implementation=implementation, **options)
    for t in range(steps):
        for w in weights:
            g = gradient(tuple(w.shape) or (2,), t)
            w.grad = torch.tensor(g if w.ndim else g[1], device=DEVICE)
        optimizer.step()
    return weights, optimizer


def assert_alike(kind, shapes, found, expected):
    (weights, optimizer), (twins, twin) = found, expected
    for shape, w, other in zip(shapes, weights, twins, strict=True):
        way = (as_float64(other) - as_float64(start(shape))).__abs__().max()
        # A code that is flipped moves the next step by 1/127 of it.
        allowed = (1 / 127 if kind in IN_CODES else AGREEMENT) * way + 2.0**-23 * 0.02
        assert abs(as_float64(w) - as_float64(other)).max() <= allowed, shape
        for name, value in optimizer.state[w].items():
            wanted = twin.state[other][name]
            if value.dtype in (torch.int8, torch.uint8):
                apart = (value.int() - wanted.int()).abs()
                assert apart.max() <= 1, (shape, name)
                assert apart.count_nonzero() <= max(1, 0.02 * apart.numel()), (shape, name)
            else:
                within = {"rtol": 1 / 127, "atol": 1e-9} if kind in IN_CODES else {"rtol": 2e-6, "atol": 1e-9}
                torch.testing.assert_close(value, wanted, **within, msg=lambda text, shape=shape: f"{shape}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_any_shape_steps_as_by_plain_operations(kind, tiles):
    assert_alike(kind, SHAPES, *(stepped(kind, SHAPES, name) for name in ("triton", "eager")))


@pytest.mark.parametrize("kind", KINDS)
def test_a_learning_rate_in_a_tensor_is_the_number_in_it(kind):
    number, tensor = (stepped(kind, [(9, 33)], "triton", rate, steps=1)[0] for rate in (0.25, torch.tensor(0.25)))
    assert torch.equal(*number, *tensor)


@pytest.mark.parametrize("kind", ["AdamMini", "AdamMini int8"])
def test_blocks_of_several_rows_step_as_by_plain_operations(kind, tiles):
    class Attention(torch.nn.Module):
        head_dim = 4

        def __init__(self):
            super().__init__()
            self.q_proj = torch.nn.Linear(40, 12, bias=False, device=DEVICE)
            self.conv = torch.nn.Conv1d(3, 5, 3, bias=False, device=DEVICE)
            for w in self.parameters():
                w.data.copy_(start(tuple(w.shape)))

    found, expected = (stepped(kind, (), name, model=Attention()) for name in ("triton", "eager"))
    assert [tuple(found[1].state[w]["v"].shape) for w in found[0]] == [(3, 1), (5, 1, 1)]
    assert_alike(kind, [(12, 40), (5, 3, 3)], found, expected)


@pytest.mark.parametrize("kind", ["AdamMini", "SinkGD"])
def test_a_nan_stays_in_its_row_or_matrix(kind):
    w = start((6, 64), device=DEVICE)
    made, options = KINDS[kind]
    w.grad = torch.ones_like(w)
    w.grad[2, 3] = torch.nan
    made([w], lr=1e-2, implementation="triton", **options).step()
    spoiled = torch.isnan(w).any(dim=1).tolist()
    assert spoiled == ([row == 2 for row in range(6)] if kind == "AdamMini" else [True] * 6)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e15])
def test_moments_of_very_small_and_large_gradients_keep_their_codes(scale):
    """Their squares are below and above what a float32 holds, or near it."""
    states = []
    for name in ("triton", "eager"):
        w = start((4, 32), device=DEVICE)
        optimizer = FlashAdamW([w], lr=1e-3, implementation=name)
        w.grad = torch.linspace(0.1, 1, 128, device=DEVICE).reshape(4, 32) * scale
        optimizer.step()
        states.append(optimizer.state[w])
    for name in ("m", "v"):
        assert (states[0][name].int() - states[1][name].int()).abs().max() <= 1, name
    torch.testing.assert_close(states[0]["v_scales"], states[1]["v_scales"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [FlashAdamW, FlashLion])
@pytest.mark.parametrize("shape", [(6, 64), (9, 33)], ids=str)
def test_a_weight_with_its_rest_steps_as_by_plain_operations(kind, shape, tiles):
    found = []
    for name in ("triton", "eager"):
        w = start(shape, "bfloat16", DEVICE)
        optimizer = kind([w], lr=1e-3, weight_decay=0.1, weights="bf16+int8", implementation=name)
        for t in range(2):
            w.grad = torch.tensor(gradient(shape, t), device=DEVICE).bfloat16()
            optimizer.step()
        found.append(join(w.detach(), optimizer.state[w]["rest"]))
    # A rest that is rounded the other way is 1/127 of half a bfloat16's unit; a flipped code is 1/127 of a step.
    allowed = (1e-3 if kind is FlashAdamW else 0) / 127 + 2.0**-14 * found[1].abs() + 1e-9
    assert ((found[0] - found[1]).abs() <= allowed).all()


def test_what_is_not_finite_or_beyond_bfloat16_has_no_rest():
    w = torch.nn.Parameter(torch.ones(1, 32, dtype=torch.bfloat16, device=DEVICE))
    w.data[0, :3] = torch.tensor([torch.inf, torch.nan, torch.finfo(torch.bfloat16).max], dtype=torch.bfloat16)
    optimizer = FlashLion([w], lr=1e-3, weights="bf16+int8", implementation="triton")
    w.grad = torch.zeros_like(w)
    optimizer.step()
    optimizer.state[w]["rest"][0, 2] = 127  # with it the weight is half a unit beyond the largest
    optimizer.step()
    assert w[0, :3].tolist()[::2] == [torch.inf, torch.inf]
    assert torch.isnan(w[0, 1])
    assert optimizer.state[w]["rest"][0, :3].tolist() == [0, 0, 0]
