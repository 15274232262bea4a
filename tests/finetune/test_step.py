"""The ordinary step: judged first, then updated in place; 16-bit weights in float32 arithmetic."""

import math
from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten
from tiny_models import alone, loss, tiny_llama

from ember_mlx import Ember, InputError, PairedOptimizer
from ember_mlx.finetune import step
from ember_mlx.finetune.safe_writing import write_arrays
from ember_mlx.finetune.step import Step
from ember_mlx.finetune.workers import Workers
from ember_mlx.optimizers.in_float32 import in_float32, in_place

TOKENS = (mx.random.randint(0, 260, (2, 9), key=mx.random.key(0)),)
TABLES = {
    "adafactor": lambda: optim.Adafactor(1e-2, relative_step=False),
    "ember": partial(Ember, 1e-2),
    "adamw": lambda: in_float32(in_place(optim.AdamW(1e-2))),
}


def counted(model, tokens):
    return loss(model, tokens), mx.array(tokens.size)


def made(dtype=mx.float32, tables="ember", rest=lambda: optim.Adam(1e-3), **options):
    mx.random.seed(1)
    model = tiny_llama()
    model.set_dtype(dtype)
    return model, PairedOptimizer(model, TABLES[tables](), in_float32(in_place(rest())), skip_nonfinite=True, **options)


def everything(model, optimizer):
    return {
        name: mx.array(array)
        for name, array in tree_flatten({"weights": model.trainable_parameters(), "state": optimizer.state})
    }


def differing(a, b):
    return [name for name in a if not mx.array_equal(a[name], b[name])]


@pytest.mark.parametrize(
    ("dtype", "tables", "bad"),
    [
        (mx.float32, "ember", math.inf),
        (mx.bfloat16, "adamw", 1e25),
        (mx.float16, "adamw", math.nan),
        (mx.float32, "adafactor", 1e15),  # tokens that do not occur: 1e-30 over the mean of the rows is 0
    ],
)
def test_a_bad_step_changes_nothing_and_a_good_one_all(dtype, tables, bad):
    model, optimizer = made(dtype, tables)
    # 1e25 is a finite loss, whose gradients have squares that overflow.
    step = Step(model, optimizer, lambda model, tokens, scale: (loss(model, tokens).astype(mx.float32) * scale, scale))
    before = everything(model, optimizer)
    assert step((*TOKENS, mx.array(bad))).nonfinite
    after = everything(model, optimizer)
    assert differing(before, after) == ["state.nonfinite_steps"]
    assert step((*TOKENS, mx.array(1.0))).updated
    assert len(differing(after, everything(model, optimizer))) > len(after) // 2
    assert optimizer.nonfinite_steps.item() == 1


def test_float16_weights_that_overflow_are_a_bad_step():
    model, optimizer = made(mx.float16, rest=lambda: optim.SGD(1e9))
    before = everything(model, optimizer)
    result = Step(model, optimizer, counted)(TOKENS)
    assert result.nonfinite
    assert not result.updated
    assert differing(before, everything(model, optimizer)) == ["state.nonfinite_steps"]


def test_float16_trains_as_float32_does():
    """Each of three steps rounds a weight by half a unit in the last place of what it then is."""
    ends = []
    for dtype in (mx.float16, mx.float32):
        model, optimizer = made(rest=partial(optim.AdamW, 1e-3))
        model.set_dtype(mx.float16)  # the same numbers in both
        model.set_dtype(dtype)
        optimizer = PairedOptimizer(model, TABLES["ember"](), in_float32(optim.AdamW(1e-3)), skip_nonfinite=True)
        gradients = {path: 1e-3 * mx.random.normal(w.shape, key=mx.random.key(len(path)))
                     for path, w in tree_flatten(model.trainable_parameters())}  # fmt: skip
        gradients = {path: g.astype(mx.float16).astype(dtype) for path, g in gradients.items()}
        for _ in range(3):
            weights = dict(tree_flatten(model.trainable_parameters()))
            model.load_weights(list(optimizer.apply_gradients(gradients, weights).items()), strict=False)
        ends.append(dict(tree_flatten(model.trainable_parameters())))
    for path, half in ends[0].items():
        error = mx.abs(half.astype(mx.float32) - ends[1][path])
        largest = mx.abs(ends[1][path]) + 3 * 5 * 1e-2  # on the way there, by steps of 5 learning rates
        assert mx.all(error <= 3 * 2.0**-11 * largest).item(), path


@pytest.mark.parametrize(
    ("kind", "correct", "dtype"), [(optim.Adam, False, mx.bfloat16), (optim.AdamW, True, mx.float32)]
)
def test_in_place_adam_has_the_bits_of_mlxs(kind, correct, dtype):
    ends = []
    for change in (lambda optimizer: optimizer, in_place):
        optimizer = change(kind(1e-2, bias_correction=correct))
        weights = {"w": mx.random.normal((7, 5), key=mx.random.key(0)).astype(dtype), "b": mx.ones(3, dtype)}
        optimizer.init(weights)
        held = [optimizer.state]
        update = mx.compile(optimizer.apply_gradients, inputs=held, outputs=held)
        for seed in range(3):
            key = mx.random.key(seed)
            gradients = {name: mx.random.normal(w.shape, key=key).astype(dtype) for name, w in weights.items()}
            weights = update(gradients, weights)
        ends.append(dict(tree_flatten([weights, optimizer.state])))
    assert differing(*ends) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_what_is_not_finite_is_never_written(tmp_path, value, dtype):
    arrays = {"good": mx.ones(3, dtype), "bad": mx.array([1.0, value]).astype(dtype)}
    with pytest.raises(
        InputError, match="adapters.safetensors: bad has 1 of .* numbers that are not finite; it is not saved"
    ):
        write_arrays(tmp_path / "adapters.safetensors", arrays)
    assert not list(tmp_path.iterdir())


def test_a_row_at_a_time_is_the_step_of_all_rows():
    rows, models = mx.random.randint(0, 260, (4, 9), key=mx.random.key(2)), []
    for accumulation in (1, 4):
        model, optimizer = made(rest=lambda: optim.SGD(0.1))
        step = Step(model, optimizer, counted, accumulation)
        for i, batch in enumerate(mx.split(rows, accumulation)):
            result = step((batch,), last_of_accumulation=i == accumulation - 1)
        assert result.updated
        models.append(everything(model, optimizer))
    assert all(mx.allclose(models[0][name], models[1][name], rtol=1e-4, atol=1e-6) for name in models[0])


def test_a_step_of_several_workers_takes_the_memory_of_one(monkeypatch):
    """Beside what the mean itself takes, which is none here: logits are what is largest."""
    tokens, peaks = (mx.random.randint(0, 8192, (2, 65), key=mx.random.key(0)),), []
    for size in (1, 2):
        monkeypatch.setattr(Workers, "join", lambda size=size: Workers(0, size))
        model = tiny_llama(vocabulary=8192)
        model.set_dtype(mx.bfloat16)
        step = Step(model, PairedOptimizer(model, Ember(1e-3), optim.SGD(1e-3)), counted, 1, alone)
        found = []
        for _ in range(5):  # how far MLX runs ahead depends on what else the machine does
            mx.reset_peak_memory()
            step(tokens)
            found.append(mx.get_peak_memory())
        peaks.append(min(found))
    assert peaks[1] <= 1.2 * peaks[0]


@pytest.mark.parametrize("size", [1, 2])
def test_the_update_is_laid_out_before_the_host_waits_for_gradients(monkeypatch, size):
    monkeypatch.setattr(Workers, "join", lambda: Workers(0, size))
    model, done = tiny_llama(), []
    taken = Step(model, PairedOptimizer(model, Ember(1e-3), optim.SGD(1e-3)), counted, 1, alone)
    lay_out, evaluate = taken._compiled_update, step.OneBehind.__call__
    monkeypatch.setattr(taken, "_compiled_update", lambda *names: done.append("laid out") or lay_out(*names))
    monkeypatch.setattr(step.OneBehind, "__call__", lambda *of: done.append("waited") or evaluate(*of))
    taken((mx.random.randint(0, 64, (2, 9), key=mx.random.key(0)),))
    assert done == ["laid out", *["waited"] * (len(done) - 1)]
    assert len(done) > 4


def test_a_large_sum_is_begun_while_other_gradients_are_made_and_all_before_the_means(monkeypatch):
    monkeypatch.setattr(Workers, "join", lambda: Workers(0, 2))
    model, done, sent = tiny_llama(tied=False), [], []

    def averages(gradients, _):
        sums = {("lm_head.weight",): gradients["lm_head.weight"] * 1}
        sums[tuple(gradients.keys() - {"lm_head.weight"})] = mx.concatenate([g.reshape(-1) for g in gradients.values()])
        sent.extend(sums.values())
        return SimpleNamespace(sums=sums, means={name: gradient * 1 for name, gradient in gradients.items()})

    def noted(name, evaluate):
        def note(*arrays):
            flat = [array for _, array in tree_flatten(list(arrays))]
            done.append((name, [number for number, each in enumerate(sent) if any(each is array for array in flat)]))
            return evaluate(*arrays)

        return note

    taken = Step(model, PairedOptimizer(model, Ember(1e-3), optim.SGD(1e-3)), counted, 1, averages)
    for name in ("eval", "async_eval"):
        monkeypatch.setattr(mx, name, noted(name, getattr(mx, name)))
    taken((mx.random.randint(0, 64, (2, 33), key=mx.random.key(0)),))
    of_sums = [number for number, (_, some) in enumerate(done) if some]
    assert [done[number] for number in of_sums] == [("async_eval", [0]), ("eval", [0, 1])]
    assert of_sums[1] - of_sums[0] > 4
