"""How far steps move the weights, against the weights themselves."""

import gc

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten
from tiny_models import loss, tiny_llama

from ember_mlx import Ember, PairedOptimizer
from ember_mlx.finetune import update_ratio
from ember_mlx.finetune.step import Step
from ember_mlx.finetune.update_ratio import UpdateRatio

TABLES = {"model.embed_tokens.weight", "lm_head.weight"}


def made(dtype=mx.float32, **options):
    model = tiny_llama(**options)
    model.set_dtype(dtype)
    paired = PairedOptimizer(model, tables=Ember(1e-2), rest=optim.AdamW(1e-3), skip_nonfinite=True)
    return model, paired


def taken_step(model, optimizer, measured):
    step = Step(model, optimizer, lambda model, tokens: (loss(model, tokens), mx.array(tokens.size)))
    return lambda tokens, wanted: measured.take(step((tokens,), True, [measured.measurement] if wanted else []))


def weights(model):
    return {path: mx.array(array) for path, array in tree_flatten(model.trainable_parameters())}


def ratio(before, after, paths):
    step = sum(mx.square(after[p].astype(mx.float32) - before[p].astype(mx.float32)).sum().item() for p in paths)
    return (step / sum(mx.square(before[p].astype(mx.float32)).sum().item() for p in paths)) ** 0.5


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_ratios_are_those_of_the_weights_before_and_after(dtype, monkeypatch):
    monkeypatch.setattr(update_ratio, "ELEMENTS_PER_BLOCK", 32 * 100)  # tables of 260 rows: three blocks
    model, paired = made(dtype)
    measured = UpdateRatio(TABLES)
    assert measured.ratios() == {"tables": None, "body": None}
    step = taken_step(model, paired, measured)
    tokens = mx.random.randint(0, 260, (2, 9))
    found = []
    for wanted in (False, True, True, False):
        before = weights(model)
        step(tokens, wanted)
        after = weights(model)
        true = {"tables": ratio(before, after, TABLES), "body": ratio(before, after, before.keys() - TABLES)}
        if wanted:
            assert measured.ratios() == pytest.approx(true, rel=1e-4)
        found.append(measured.ratios())
    assert found[0] == {"tables": None, "body": None}  # was not asked for
    assert found[1] != found[2] == found[3]  # the last one that was


def test_measuring_changes_no_bit_of_the_weights():
    results = []
    for wanted in (False, True):
        model, paired = made()
        measured = UpdateRatio(TABLES)
        step = taken_step(model, paired, measured)
        for seed in range(3):
            step(mx.random.randint(0, 260, (2, 9), key=mx.random.key(seed)), wanted)
        results.append(weights(model))
    assert all(mx.array_equal(array, results[1][path]) for path, array in results[0].items())


def test_measuring_keeps_nothing_of_a_tables_size(monkeypatch):
    """Of this model the tables are nearly all. One that is measured is not updated in place; nothing else is kept."""
    monkeypatch.setattr(update_ratio, "ELEMENTS_PER_BLOCK", 2**14)
    peaks = []
    gc.collect()
    for wanted in (False, True):
        model, paired = made(vocabulary=20_000, hidden=64)
        measured = UpdateRatio(TABLES)
        step = taken_step(model, paired, measured)
        table = model.model.embed_tokens.weight.nbytes
        for _ in range(3):
            mx.clear_cache()  # a cached buffer may serve a smaller array, and counts whole
            mx.reset_peak_memory()
            step(mx.random.randint(0, 20_000, (1, 5)), wanted)
        peaks.append(mx.get_peak_memory())
        del model, paired, measured, step
        gc.collect()  # the step and its compiled functions hold each other
    assert peaks[1] < 1.03 * (peaks[0] + table)
