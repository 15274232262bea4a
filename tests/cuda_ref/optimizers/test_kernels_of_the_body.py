"""The Triton kernels of AdamMini, SinkGD and the Flash optimizers beside plain operations, in every kind of shape."""

import copy

import numpy as np
import pytest
import torch
from torch_family import AGREEMENT, as_float64, gradient, start

from cuda_ref import SAGE, AdamMini, Ember, FlashAdamW, FlashLion, SinkGD, flash_triton, triton_body, triton_kernels
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
@pytest.mark.parametrize("shape", [(24, 64), (9, 33), (70,)], ids=str)
def test_one_step_from_equal_state_agrees_to_the_last_digits(kind, shape, tiles):
    """No flipped code has moved anything yet, so what is 1/127 of a step is a fault."""
    made, options = KINDS[kind]
    (w,), (twin,) = ([start(shape, device=DEVICE)] for _ in range(2))
    optimizer, eager = (
        made([x], lr=1e-3, weight_decay=0.5, decay_vectors=True, implementation=name, **options)
        for x, name in ((w, "triton"), (twin, "eager"))
    )
    for t in range(3):
        before = as_float64(w)
        w.grad = torch.tensor(gradient(shape, t), device=DEVICE)
        twin.grad = w.grad.clone()
        optimizer.step()
        eager.step()
        way = abs(as_float64(twin) - before).max()
        assert abs(as_float64(w) - as_float64(twin)).max() <= AGREEMENT * way + 2.0**-23 * abs(before).max()
        for name, value in optimizer.state[w].items():
            wanted = eager.state[twin][name]
            if value.dtype in (torch.int8, torch.uint8):
                apart = (value.int() - wanted.int()).abs()
                assert apart.max() <= 1, name
                assert apart.count_nonzero() <= max(1, 0.02 * apart.numel()), name
            else:
                torch.testing.assert_close(value, wanted, rtol=2e-6, atol=1e-9, msg=name)
        eager.load_state_dict(optimizer.state_dict())
        twin.data.copy_(w)


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
            self.k_proj = torch.nn.Linear(40, 4, bias=False, device=DEVICE)  # one head, so one block
            self.conv = torch.nn.Conv1d(3, 5, 3, bias=False, device=DEVICE)
            self.to_mono = torch.nn.Conv1d(3, 1, 3, bias=False, device=DEVICE)
            for w in self.parameters():
                w.data.copy_(start(tuple(w.shape)))

    found, expected = (stepped(kind, (), name, model=Attention()) for name in ("triton", "eager"))
    assert [tuple(found[1].state[w]["v"].shape) for w in found[0]] == [(3, 1), (1, 1), (5, 1, 1), (1, 1, 1)]
    assert_alike(kind, [(12, 40), (4, 40), (5, 3, 3), (1, 3, 3)], found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e20, 0.0])
def test_what_a_bad_gradient_spoils_is_what_plain_operations_spoil(kind, value):
    found = []
    for name in ("triton", "eager"):
        w = start((4, 64), device=DEVICE)
        optimizer = KINDS[kind][0]([w], lr=1e-2, implementation=name, **KINDS[kind][1])
        for t in range(2):  # the second finds it in the state
            w.grad = torch.tensor(gradient((4, 64), t), device=DEVICE)
            w.grad[2, 3] = value if t == 0 else 1
            optimizer.step()
        scales = [x for key, x in sorted(optimizer.state[w].items()) if x.is_floating_point() and key != "step"]
        found.append([torch.isnan(x).tolist() for x in (w, *scales)])
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_gradients_lie_in_memory_as_they_like(kind):
    last = {"memory_format": torch.channels_last}
    of_weights = [lambda x: x.clone().to(**last), lambda x: x.clone().transpose(0, 3).contiguous().transpose(0, 3)]
    of_gradients = [lambda x: x.to(**last), lambda x: x[:1].expand(x.shape), lambda x: x[..., 1:].expand(x.shape)]
    made, options = KINDS[kind]
    values, g = start((4, 5, 3, 2), device=DEVICE).detach(), torch.tensor(gradient((4, 5, 3, 2), 0), device=DEVICE)
    for laid in of_weights:
        for given in of_gradients:
            weights = [torch.nn.Parameter(laid(values)) for _ in range(2)]
            for w, name in zip(weights, ("triton", "eager"), strict=True):
                w.grad = given(g)
                made([w], lr=1e-2, implementation=name, **options).step()
                assert not torch.equal(w, values)
            torch.testing.assert_close(*weights, rtol=0, atol=1e-7)


@pytest.mark.parametrize("implementation", ["triton", "eager"])
@pytest.mark.parametrize("kind", ["AdamMini", "AdamMini int8", "FlashAdamW", "FlashLion"])
def test_a_loaded_state_may_lie_in_memory_as_it_likes(kind, implementation):
    found = []
    for turned in (False, True):
        (w,), optimizer = stepped(kind, [(6, 64)], implementation, steps=1)
        saved = copy.deepcopy(optimizer.state_dict())
        state = saved["state"][0]
        if turned:
            state |= {name: x.t().contiguous().t() for name, x in state.items() if x.ndim == 2}
        optimizer.load_state_dict(saved)
        optimizer.step()
        found.append([w.detach(), *optimizer.state[w].values()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


class Recorder:
    """In the place of a kernel: it keeps the grid and the arguments of each launch, and launches nothing."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.launches.append((grid, arguments))


def test_a_grid_ends_at_65535_but_for_its_first_axis(monkeypatch):
    recorder = Recorder()
    for name in ("_scale_and_subtract", "_sinkhorn_pass", "_rescaled", "_mean_squares_of_rows", "_update_groups"):
        monkeypatch.setattr(triton_body, name, recorder)
    for made in (AdamMini, SinkGD):
        w = torch.nn.Parameter(torch.zeros(600_000, 1, device=DEVICE))
        w.grad = torch.zeros_like(w)
        made([w], lr=1e-2, implementation="triton").step()
    assert all(axis <= 65535 for grid, _ in recorder.launches for axis in grid[1:])


@pytest.mark.parametrize("made", [AdamMini, FlashAdamW, FlashLion, SAGE, Ember])
def test_kernels_get_no_numpy_number(made, monkeypatch):
    """Triton on a GPU takes none of 32 bits."""
    recorder = Recorder()
    for module in (triton_body, flash_triton, triton_kernels):
        for name, kernel in vars(module).copy().items():
            if hasattr(kernel, "__getitem__") and hasattr(kernel, "run"):
                monkeypatch.setattr(module, name, recorder)
    w = start((6, 64), device=DEVICE)
    w.grad = torch.ones_like(w)
    half = np.float32(0.5)
    betas = {"beta2": half} if made is Ember else {"betas": (half, half)}
    made([w], lr=half, weight_decay=half, implementation="triton", **betas).step()
    kinds = {type(x) for _, arguments in recorder.launches for x in arguments if not isinstance(x, torch.Tensor)}
    assert recorder.launches
    assert kinds <= {float, int, type(None)}


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
