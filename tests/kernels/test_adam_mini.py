"""The step of AdamMini: its Metal and its CUDA text emulated, and itself where there is a GPU."""

import mlx.core as mx
import numpy as np
import pytest
from kernels.test_flash import same_bits

from ember_mlx.optimizers import AdamMini, adam_mini_kernel
from ember_mlx.optimizers.adam_mini_kernel import Numbers
from ember_mlx.optimizers.companded import decode_momentum, encode_momentum

ON_GPU = mx.default_device().type == mx.DeviceType.gpu
NUMBERS = Numbers(mx.array(1e-2), mx.array(0.999), 0.1, 0.001, mx.array(0.002), 1e-8)
# Fewer elements than 8, which Metal gets in another address space; rows that no simdgroup fills; more than one walk.
SHAPES = [(1, 1), (5, 33), (3, 1024), (2, 2100)]
SHAPES_OF_CODES = [(1, 32), (5, 96), (2, 2080)]
# The dtypes of weights, gradients and momentum.
KINDS = [
    (mx.bfloat16, mx.bfloat16, mx.float32),
    (mx.bfloat16, mx.float32, mx.int8),
    (mx.float32, mx.float32, mx.int8),
    (mx.bfloat16, mx.bfloat16, mx.int8),
    (mx.float32, mx.float16, mx.float32),
]


def before(shape, w_dtype, g_dtype, m_dtype):
    random = np.random.RandomState(0)
    w, g, m = (mx.array(random.normal(size=shape).astype(np.float32)) for _ in range(3))
    scale = mx.array(np.float32(10.0 ** random.randint(-6, 2, size=(shape[0], 1))))
    stored = encode_momentum(m * scale) if m_dtype == mx.int8 else (m * scale, None)
    return w.astype(w_dtype), (g * scale).astype(g_dtype), *stored, mx.square(scale[:, 0])


def plain(w, g, m, scales, v, own):
    """New weights as they are before they are rounded, momentum likewise, and second moments."""
    x = g.astype(mx.float32)
    old = m if scales is None else decode_momentum(m, scales, w.shape)
    m = old + NUMBERS.forget1 * (x - old)
    v = v + NUMBERS.forget2 * (mx.square(x).mean(axis=1) - v) if own else v
    rates = NUMBERS.learning_rate / (mx.sqrt(v / NUMBERS.correction2) + NUMBERS.eps)
    return NUMBERS.kept * w.astype(mx.float32) - rates[:, None] * m, m, v


def run(monkeypatch, kernel, inputs, own, finite=None):
    monkeypatch.setattr(adam_mini_kernel, "kernel", lambda text: kernel)
    return adam_mini_kernel.step_rows(*inputs, NUMBERS, own, finite)


@pytest.mark.parametrize(
    ("kind", "language", "checks"),
    [
        *((kind, "metal", "memory") for kind in KINDS[:3]),
        (KINDS[0], "cuda", "races"),
        (KINDS[3], "cuda", "races"),
        (KINDS[3], "cuda", "memory"),
        (KINDS[4], "cuda", "memory"),
    ],
    ids=str,
)
def test_the_texts_step_as_plain_operations_do_touch_nothing_else_and_have_no_races(
    emulated, monkeypatch, kind, language, checks
):
    kernel = emulated(language, checks, module=adam_mini_kernel)
    for shape in SHAPES_OF_CODES if kind[2] == mx.int8 else SHAPES:
        inputs = before(shape, *kind)
        for own in (True, False):
            w, m, scales, v = run(monkeypatch, kernel, inputs, own)
            exact, momentum, square = plain(*inputs, own)
            # No sum is in the momentum: every bit is the same.
            expected = encode_momentum(momentum) if scales is not None else (momentum,)
            assert all(mx.array_equal(*pair) for pair in zip((m, scales), expected, strict=False))
            # Positive numbers are added in two orders: at most as many roundings apart as there are additions.
            assert (mx.abs(v - square) <= 2.0**-23 * (60 + shape[1] / 256) * square).all()
            assert mx.array_equal(v, square) or own
            unit = 2.0**-8 if w.dtype == mx.bfloat16 else 2.0**-23
            step = mx.abs(exact - inputs[0].astype(mx.float32)).max()
            assert (mx.abs(w.astype(mx.float32) - exact) <= unit * mx.abs(exact) + 1e-5 * step).all()
            old_w, g, *state = inputs
            old_w = mx.where(old_w < 0, -0.0, old_w)
            assert same_bits(
                run(monkeypatch, kernel, [old_w, g * mx.inf, *state], own, finite=mx.array(False)), [old_w, *state]
            )


def test_a_nan_stays_in_its_row_and_its_group(emulated, monkeypatch):
    inputs = list(before((3, 64), mx.bfloat16, mx.float32, mx.int8))
    inputs[1][1, 40] = mx.nan
    w, _, scales, v = run(monkeypatch, emulated("cuda", "memory", module=adam_mini_kernel), inputs, True)
    assert mx.isnan(w).all(axis=1).tolist() == mx.isnan(w).any(axis=1).tolist() == [False, True, False]
    assert mx.isnan(v).tolist() == [False, True, False]
    assert mx.isnan(scales).tolist() == [False, False, False, True, False, False]


FAULTS = {
    "another row's second moment": ("float square = v[row]", "float square = v[0]"),
    "half a group": ("distance = LANES / 2", "distance = LANES / 4"),
    "the old scale": ("steps ? largest : scale", "scale"),
    "the first simdgroup's sum": ("k < threads / SIMDGROUP", "k < 1"),
    "truncated weights": ("+ 0x7fffu + ((bits >> 16) & 1u)", ""),
    "no decay": ("decay * y[i]", "y[i]"),
}

FAULTS_OF_NAN = {
    "the flag is not read": ("steps = !SELECTS || finite[0]", "steps = true"),
    "second moments": ("if (steps) square", "square"),
    "weights": ("if (!steps) continue;", ""),
    "scales": ("steps ? largest : scale", "largest"),
    "codes": ("codes[i] = steps ?", "codes[i] = true ?"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_of_a_machine_sees_a_planted_fault(found_with, fault):
    assert found_with(adam_mini_kernel, *FAULTS[fault])


@pytest.mark.parametrize("fault", FAULTS_OF_NAN)
def test_the_check_of_a_machine_sees_what_a_nan_changes(found_with, fault):
    assert "by a gradient that is not finite" in found_with(adam_mini_kernel, *FAULTS_OF_NAN[fault])


@pytest.mark.parametrize(("language", "dtype"), [("metal", mx.bfloat16), ("cuda", mx.float32)], ids=str)
def test_the_check_of_a_machine_finds_nothing_in_the_text_as_it_is(emulated, monkeypatch, language, dtype):
    kernel = emulated(language, "memory", module=adam_mini_kernel)
    monkeypatch.setattr(adam_mini_kernel, "kernel", lambda text: kernel)
    assert adam_mini_kernel.differences(dtype, dtype) is None


# Rows, experts, vectors and heads by the kernel; what no kernel takes, and LoRA's columns, beside them.
OF_A_MODEL = {"rows": (7, 64), "heads": (8, 64), "experts": (2, 3, 32), "norm": (64,), "scale": (),
              "odd": (5, 33), "columns": (32, 32)}  # fmt: skip


def of_a_model():
    random = np.random.RandomState(1)
    return [{name: mx.array(np.float32(random.normal(size=s))) for name, s in OF_A_MODEL.items()} for _ in "123"]


def adam_mini(momentum):
    optimizer = AdamMini(1e-2, momentum=momentum, weight_decay=0.1)
    optimizer._heads, optimizer._by_column = {"heads": 2}, {"columns"}
    return optimizer


@pytest.fixture
def calls(emulated, monkeypatch):
    """calls(): from here on AdamMini has the kernel; the texts that it calls go into what that returns."""

    def have_it():
        kernel, texts = emulated("metal", "memory", module=adam_mini_kernel), []
        monkeypatch.setattr(adam_mini_kernel, "kernel", lambda text: texts.append(text) or kernel)
        monkeypatch.setattr("ember_mlx.kernels.usable", lambda kernel, *dtypes: kernel is adam_mini_kernel)
        return texts

    return have_it


@pytest.mark.parametrize("momentum", ["float32", "int8"])
def test_adam_mini_with_the_kernel_steps_as_with_plain_operations(calls, momentum):
    w, *gradients = of_a_model()

    def steps(optimizer):
        after = w
        for gradient in gradients:
            after = optimizer.apply_gradients(gradient, after)
        return after

    one, other = adam_mini(momentum), adam_mini(momentum)
    expected = steps(one)
    texts = calls()
    found = steps(other)
    assert len(texts) == 2 * (4 if momentum == "int8" else 6)
    for name in w:
        np.testing.assert_allclose(np.array(found[name]), np.array(expected[name]), rtol=0, atol=1e-6)
        assert all(other.state[name][key].shape == array.shape for key, array in one.state[name].items())
        np.testing.assert_allclose(np.array(other.state[name]["v"]), np.array(one.state[name]["v"]), rtol=1e-5)


@pytest.mark.parametrize("momentum", ["float32", "int8"])
def test_adam_mini_changes_no_bit_where_a_gradient_is_not_finite(calls, momentum):
    optimizer, (w, gradients, _) = adam_mini(momentum), of_a_model()
    w = optimizer.apply_gradients(gradients, w)
    texts = calls()
    for name, g in gradients.items():
        before = optimizer.state[name]
        for finite, bad in ((False, mx.nan), (False, mx.inf), (True, 1)):
            state = dict(before)
            new = optimizer.apply_single_if(mx.array(finite), g * bad, w[name], state)
            expected = dict(before)
            stepped = optimizer.apply_single(g, w[name], expected) if finite else w[name]
            assert same_bits([new, *state.values()], [stepped, *expected.values()]), name
    assert len(texts) == 4 * (4 if momentum == "int8" else 6)


@pytest.mark.skipif(not ON_GPU, reason="no GPU")
@pytest.mark.parametrize("g_dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_the_check_of_a_machine_finds_nothing_on_this_gpu(dtype, g_dtype):
    assert adam_mini_kernel.differences(dtype, g_dtype) is None
