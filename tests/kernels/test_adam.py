"""Adam on weights rounded stochastically: the texts of its kernel emulated, and itself where there is a GPU."""

import mlx.core as mx
import mlx.optimizers as optim
import pytest

from ember_mlx import kernels
from ember_mlx.optimizers import SinkGD, adam_kernel
from ember_mlx.optimizers.rounded import StochasticRounding

ON_GPU = mx.default_device().type == mx.DeviceType.gpu
SHAPES = [
    (),
    (3,),
    (9, 5),
    (2, 3, 8),
    (1, 1100),
]  # one without axes, fewer than a thread's, rows that end within it, more than a threadgroup's


def drawn(dtype, number):
    """One of them lies in columns."""
    arrays = {shape: mx.random.normal(shape, key=mx.random.key(number + sum(shape))).astype(dtype) for shape in SHAPES}
    return {str(shape): mx.contiguous(x.T).T if shape == (9, 5) else x for shape, x in arrays.items()}


def steps_of(make, dtype):
    optimizer, w = StochasticRounding(make()), drawn(dtype, 0)
    for number in (1, 2):
        w = optimizer.apply_gradients(drawn(dtype, number), w)
    return {name: (w[name], optimizer.state[name]["m"], optimizer.state[name]["v"]) for name in w}


@pytest.mark.parametrize(
    ("dtype", "language", "make"),
    [
        (mx.bfloat16, "metal", lambda: optim.AdamW(1e-2, betas=[0.8, 0.95], weight_decay=0.1)),
        (mx.float16, "cuda", lambda: optim.Adam(1e-2, bias_correction=True)),
    ],
    ids=["AdamW", "Adam, corrected"],
)
def test_the_texts_step_as_plain_operations_do(make_emulated, monkeypatch, dtype, language, make):
    with mx.stream(mx.cpu):
        plain = steps_of(make, dtype)
        kernel = make_emulated(language, "memory", module=adam_kernel)
        monkeypatch.setattr(adam_kernel, "kernel", lambda text: kernel)
        monkeypatch.setattr(kernels, "usable", lambda module, *dtypes: module is adam_kernel)
        for name, arrays in steps_of(make, dtype).items():
            for found, expected in zip(arrays, plain[name], strict=True):
                assert found.dtype == expected.dtype
                assert mx.array_equal(found, expected), name


@pytest.mark.parametrize("finite", [True, False])
def test_vectors_under_sinkgd_step_as_plain_operations_do(emulated, monkeypatch, finite):
    w, g = (mx.random.normal((300,), key=mx.random.key(number)).astype(mx.bfloat16) for number in range(2))
    optimizer = StochasticRounding(SinkGD(1e-2, betas=(0.8, 0.95), weight_decay=0.1, decay_vectors=True))
    optimizer.init({"w": w})
    optimizer.state["step"] = mx.array(3, mx.uint64)
    before = {"m": mx.ones((300,)), "v": mx.ones((300,)), "seed": optimizer.state["w"]["seed"]}

    def stepped():
        state = dict(before)
        new = optimizer.apply_single_if(mx.array(finite), g if finite else g * mx.nan, w, state)
        return new.astype(mx.float32), state["m"], state["v"]

    plain, kernel = stepped(), emulated("metal", "memory", module=adam_kernel)
    monkeypatch.setattr(adam_kernel, "kernel", lambda text: kernel)
    monkeypatch.setattr(kernels, "usable", lambda module, *dtypes: module is adam_kernel)
    for ours, expected in zip(stepped(), plain, strict=True):
        assert mx.allclose(ours, expected, rtol=1e-6, atol=0)
    if not finite:
        assert all(mx.array_equal(x, y) for x, y in zip(plain, (w, before["m"], before["v"]), strict=True))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("i < left; i++", "i < VECTOR; i++", "heap-buffer-overflow"),
        ("static_cast<uint32_t>(++row)", "static_cast<uint32_t>(row)", "values of weight"),
        ("if (!steps) continue;", "", "by one that is not"),
    ],
)
def test_a_planted_fault_is_found_by_the_check_of_a_machine(found_with, old, new, says):
    assert says in found_with(adam_kernel, old, new, (mx.bfloat16,) * 3)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "moments"), [(mx.bfloat16, mx.bfloat16), (mx.float16, mx.float32)], ids=str)
def test_on_a_gpu_it_steps_as_plain_operations_do(dtype, moments):
    assert adam_kernel.differences(dtype, dtype, moments) is None
