"""The step of FlashAdamW and FlashLion: its Metal and its CUDA text emulated, and itself where there is a GPU."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from ember_mlx.optimizers import FlashAdamW, FlashLion, flash_kernel
from ember_mlx.optimizers.companded import GROUP, grouped, groups_of
from ember_mlx.optimizers.flash_arithmetic import Numbers, Stored, flash_block
from ember_mlx.streaming.updates import Updates

ON_GPU = mx.default_device().type == mx.DeviceType.gpu
# Fewer than 8 elements, which Metal gets in another address space; part of a group; whole threadgroups; and some more.
SIZES = [5, 67, 1024, 1024 + 7]
NUMBERS = Numbers(mx.array(1e-2), mx.array(0.999), 0.9, 0.999, mx.array(0.1), mx.array(0.001), 1e-8)
# The dtypes of weights and gradients, AdamW or Lion, with a rest or without.
KINDS = [
    (mx.bfloat16, mx.bfloat16, True, True),
    (mx.bfloat16, mx.float32, True, False),
    (mx.float32, mx.float32, True, False),
    (mx.bfloat16, mx.bfloat16, False, True),
    (mx.float32, mx.float16, False, False),
]


def stored(size, dtype, adamw, split, seed=0):
    """Weights and state as they lie between two steps, and a gradient over eight decades."""
    random = np.random.RandomState(seed)
    groups = groups_of(size)
    padding = np.arange(groups * GROUP).reshape(groups, GROUP) >= size

    def codes(least, kind):
        return mx.array(np.where(padding, 0, random.randint(least, least + 255, size=(groups, GROUP)))).astype(kind)

    scales = [mx.array((10.0 ** random.randint(-6, 2, size=groups)).astype(np.float32)) for _ in range(2)]
    w = mx.array(random.uniform(-0.1, 0.1, size=size)).astype(dtype)
    rest = mx.array(random.randint(-127, 128, size=size)).astype(mx.int8) if split else None
    second = (codes(0, mx.uint8), scales[1]) if adamw else (None, None)
    return Stored(w, rest, codes(-127, mx.int8), scales[0], *second)


def gradient(size, dtype):
    random = np.random.RandomState(9)
    values = random.uniform(-1, 1, size=size) * 10.0 ** random.randint(-7, 2, size=size)
    values[: size // 4] = 0
    return mx.array(values.astype(np.float32)).astype(dtype)


def plain(before, g):
    groups = before._replace(w=grouped(before.w), rest=None if before.rest is None else grouped(before.rest))
    after = flash_block(groups, grouped(g), NUMBERS, False)
    flat = lambda x: None if x is None else x.reshape(-1)[: g.size]  # noqa: E731
    return after._replace(w=flat(after.w), rest=flat(after.rest))


def run(kernel, before, g, finite=None):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_kernel, "kernel", lambda text: kernel)
        return flash_kernel.flash_step(before, g, NUMBERS, finite)


def same(found, expected):
    pairs = zip(found, expected, strict=True)
    return all(mx.array_equal(*pair, equal_nan=True) if pair[1] is not None else pair[0] is None for pair in pairs)


def same_bits(found, expected):
    pairs = [pair for pair in zip(found, expected, strict=True) if pair[1] is not None]
    return all(mx.array_equal(*(mx.view(each.reshape(-1), mx.uint8) for each in pair)) for pair in pairs)


@pytest.mark.parametrize(
    ("kind", "language", "checks"),
    [
        *((kind, "metal", "memory") for kind in KINDS[:3]),
        (KINDS[0], "cuda", "memory"),
        (KINDS[3], "cuda", "races"),
        (KINDS[4], "cuda", "memory"),
    ],
    ids=str,
)
def test_the_texts_step_as_plain_operations_do_touch_nothing_else_and_have_no_races(emulated, kind, language, checks):
    dtype, g_dtype, adamw, split = kind
    kernel = emulated(language, checks, module=flash_kernel)
    for size in SIZES:
        before, g = stored(size, dtype, adamw, split), gradient(size, g_dtype)
        # g++ for plain x86-64 contracts nothing: every bit is the same.
        assert same(run(kernel, before, g), plain(before, g)), size
        before.w[1] = -0.0
        assert same_bits(run(kernel, before, g * mx.inf, finite=mx.array(False)), before), size


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]], ids=["adamw", "lion"])
def test_a_nan_makes_its_weight_and_the_scales_of_its_group_nan(emulated, kind):
    dtype, g_dtype, adamw, split = kind
    before, g = stored(67, dtype, adamw, split), gradient(67, g_dtype)
    g[40] = mx.nan
    for found in (run(emulated("cuda", "memory", module=flash_kernel), before, g), plain(before, g)):
        assert mx.isnan(found.w).tolist() == [i == 40 for i in range(67)]
        for scales in (found.m_scales, found.v_scales) if adamw else (found.m_scales,):
            assert mx.isnan(scales).tolist() == [False, True, False]


FAULTS = {
    "codes begin at another thread": ("m + at", "m + at + VECTOR"),
    "half a group": ("distance = LANES / 2", "distance = LANES / 4"),
    "the old scale": ("steps ? largest_m : m_scale", "m_scale"),
    "a positive second moment at code 0": ("second[i] > 0 && code < 1 ? 1 : code", "code"),
    "truncated weights": ("+ 0x7fffu + ((bits >> 16) & 1u)", ""),
    "the rest left out": ("if (SPLIT) y[i] = joined(y[i], r[i]);", ""),
}

FAULTS_OF_NAN = {
    "the flag is not read": ("steps = !SELECTS || finite[0]", "steps = true"),
    "weights": ("if (!steps) continue;", ""),
    "codes": ("if (!steps) {", "if (false) {"),
    "scales of m": ("steps ? largest_m : m_scale", "largest_m"),
    "scales of v": ("steps ? largest_root : v_scale", "largest_root"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_of_a_machine_sees_a_planted_fault(found_with, fault):
    assert found_with(flash_kernel, *FAULTS[fault])


@pytest.mark.parametrize("fault", FAULTS_OF_NAN)
def test_the_check_of_a_machine_sees_what_a_nan_changes(found_with, fault):
    assert "by a gradient that is not finite" in found_with(flash_kernel, *FAULTS_OF_NAN[fault])


def test_the_check_of_a_machine_finds_nothing_in_the_text_as_it_is(emulated, monkeypatch):
    kernel = emulated("metal", "memory", module=flash_kernel)
    monkeypatch.setattr(flash_kernel, "kernel", lambda text: kernel)
    assert flash_kernel.differences(mx.bfloat16, mx.bfloat16) is None


def test_flash_adamw_with_the_kernel_steps_as_with_plain_operations(emulated, monkeypatch):
    random = np.random.RandomState(1)
    w, g = ({"a": mx.array(random.uniform(-1, 1, size=(7, 33))).astype(mx.bfloat16)} for _ in range(2))
    one, other = (FlashAdamW(1e-3, weights="bf16+int8") for _ in range(2))
    expected = one.apply_gradients(g, w)
    kernel, calls = emulated("metal", "memory", module=flash_kernel), []
    monkeypatch.setattr(flash_kernel, "kernel", lambda text: calls.append(text) or kernel)
    monkeypatch.setattr("ember_mlx.kernels.usable", lambda kernel, *dtypes: kernel is flash_kernel)
    found = other.apply_gradients(g, w)
    assert calls
    assert mx.array_equal(found["a"], expected["a"])
    assert all(mx.array_equal(other.state["a"][name], one.state["a"][name]) for name in one.state["a"])


@pytest.mark.parametrize("has_kernel", [True, False])
@pytest.mark.parametrize("weights", [None, "bf16+int8"])
@pytest.mark.parametrize("make", [FlashAdamW, FlashLion])
def test_nothing_changes_a_bit_where_a_gradient_is_not_finite(emulated, monkeypatch, make, weights, has_kernel):
    random = np.random.RandomState(1)
    w, g = (mx.array(random.uniform(-1, 1, size=(7, 33))).astype(mx.bfloat16) for _ in range(2))
    optimizer = make(1e-3, weights=weights)
    w = optimizer.apply_gradients({"a": g}, {"a": w})["a"]
    if has_kernel:
        kernel = emulated("metal", "memory", module=flash_kernel)
        monkeypatch.setattr(flash_kernel, "kernel", lambda text: kernel)
    monkeypatch.setattr("ember_mlx.kernels.usable", lambda kernel, *dtypes: has_kernel and kernel is flash_kernel)
    for finite, bad in ((False, mx.nan), (False, mx.inf), (True, 1)):
        state, expected = dict(optimizer.state["a"]), dict(optimizer.state["a"])
        new = optimizer.apply_single_if(mx.array(finite), g * bad, w, state)
        stepped = optimizer.apply_single(g, w, expected) if finite else w
        assert same_bits([new, *state.values()], [stepped, *expected.values()])


def test_a_streamed_step_of_a_subclass_is_its_own(emulated, monkeypatch):
    class Doubled(FlashAdamW):
        def apply_single(self, gradient, parameter, state):
            return 2 * super().apply_single(gradient, parameter, state)

    kernel = emulated("metal", "memory", module=flash_kernel)
    monkeypatch.setattr(flash_kernel, "kernel", lambda text: kernel)
    monkeypatch.setattr("ember_mlx.kernels.usable", lambda kernel, *dtypes: kernel is flash_kernel)
    monkeypatch.setattr(mx, "compile", lambda function: function)
    model = nn.Linear(32, 1, bias=False)
    updates, weights = Updates(Doubled(1e-6), model), model.parameters()
    updates.begin()
    (new, _), *_ = updates(weights, {"weight": mx.ones((1, 32))}).values()
    assert mx.allclose(new, 2 * weights["weight"], atol=1e-5)


@pytest.mark.skipif(not ON_GPU, reason="no GPU")
@pytest.mark.parametrize("g_dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_the_check_of_a_machine_finds_nothing_on_this_gpu(dtype, g_dtype):
    assert flash_kernel.differences(dtype, g_dtype) is None
