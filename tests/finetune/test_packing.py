"""`--packing`: the same loss as of rows one by one, by a model that keeps them apart, or one line that says why not."""

import json
from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures.build import build
from finetune.breaking import BreakAt, Breaks
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import grad_checkpoint
from streaming_spy import Spy, randomized, worst_difference

from ember_mlx import InputError
from ember_mlx.commands import data as data_command
from ember_mlx.commands import plan as plan_command
from ember_mlx.finetune.batches import Rows, batches_of
from ember_mlx.finetune.chunked_loss import chunked_loss
from ember_mlx.finetune.data import load_data
from ember_mlx.finetune.packing import PackedRows, first_fit, packs_of
from ember_mlx.finetune.run import run
from ember_mlx.streaming import StreamedStep
from ember_mlx.streaming import rows_apart as module
from ember_mlx.streaming.marks import marks_of, marks_of_pack
from ember_mlx.streaming.mean_loss import mean_loss
from ember_mlx.streaming.rows_apart import check_rows_stay_apart

pytestmark = pytest.mark.usefixtures("eager")

LENGTHS = [(9, 4), (5, 1), (2, 1), (7, 3), (12, 6)]  # tokens, and the first that is learned


@pytest.mark.parametrize("capacity", [7, 20, 64])
def test_first_fit_packs_every_row_once_and_leaves_no_room_that_a_later_row_would_fill(capacity):
    lengths = np.random.default_rng(capacity).integers(1, capacity + 1, 200).tolist()
    packs = first_fit(lengths, capacity, 3)
    assert sorted(i for pack in packs for i in pack) == list(range(200))
    assert all(sum(lengths[i] for i in pack) <= capacity for pack in packs)
    order = np.random.RandomState(3).permutation(200).tolist()
    for number, pack in enumerate(packs):
        for i in pack:
            for earlier in packs[:number]:
                before = sum(lengths[j] for j in earlier if order.index(j) < order.index(i))
                assert before + lengths[i] > capacity
    assert packs == first_fit(lengths, capacity, 3) != first_fit(lengths, capacity, 4)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 7, 12])
@pytest.mark.parametrize("capacity", [10, 40, 1000])
def test_every_row_is_in_a_batch_as_far_as_rows_can_be_apart(capacity, batch_size):
    lengths = [3, 9, 4, 10, 1, 7, 7, 2, 2, 5, 6, 8]
    packs = packs_of(lengths, capacity, batch_size, 0)
    assert sorted(i for pack in packs for i in pack) == list(range(12))
    assert all(pack and sum(lengths[i] for i in pack) <= capacity for pack in packs)
    assert len(packs) % batch_size == 0 or len(packs) == 12
    assert 0 <= len(packs) - len(first_fit(lengths, capacity, 0)) < batch_size


def rows_of(seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.integers(1, 150, length).tolist(), [(start, length)]) for length, start in LENGTHS]


def batch_of(rows, packs, width):
    """One batch of packs, padded; or with a row a pack, of rows."""
    tokens, marks = np.zeros((len(packs), width), np.int32), np.zeros((len(packs), width), np.uint32)
    for i, pack in enumerate(packs):
        row = [token for j in pack for token in rows[j][0]]
        tokens[i, : len(row)] = row
        marks[i, : len(row)] = marks_of_pack([(len(rows[j][0]), rows[j][1]) for j in pack])
    return mx.array(tokens), mx.array(marks)


def one_by_one(model, rows):
    """The sum of the losses of rows, and its gradient, and the number of tokens, without marks that are packed."""

    def total(model):
        losses, counts = 0, 0
        for tokens, spans in rows:
            value, count = mean_loss(model, mx.array([tokens]), mx.array(marks_of(len(tokens), spans))[None])
            losses, counts = losses + value * count, counts + count
        return losses / counts, counts

    (value, count), gradients = nn.value_and_grad(model, total)(model)
    return value.item(), count.item(), dict(tree_flatten(gradients))


PACKS = [(0, 1, 2), (3, 4)]


@pytest.mark.parametrize("how", ["whole", "chunked", "checkpointed"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])  # the last has windows of 8
def test_loss_and_gradients_of_packs_are_those_of_their_rows(name, how):
    model, rows = randomized(build(name, tied=True)), rows_of()
    expected, count, reference = one_by_one(model, rows)
    loss = chunked_loss(model, logits_at_once=4000) if how == "chunked" else mean_loss
    own = type(model.layers[0]).__call__
    if how == "checkpointed":
        grad_checkpoint(model.layers[0])
    try:
        (value, found), gradients = nn.value_and_grad(model, loss)(model, *batch_of(rows, PACKS, 21))
        gradients = dict(tree_flatten(gradients))
    finally:
        type(model.layers[0]).__call__ = own
    assert found.item() == count == sum(length - start for length, start in LENGTHS)
    assert value.item() == pytest.approx(expected, abs=1e-5)
    error, where = worst_difference(gradients, reference)
    assert error < 1e-4, where


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_streamed_step_takes_packs(name):
    model, rows = randomized(build(name, tied=False)), rows_of()
    expected, count, reference = one_by_one(model, rows)
    spy = Spy()
    step = StreamedStep(model, spy)
    for _ in range(2):
        result = step.accumulated([batch_of(rows, PACKS, 21)])
        assert result.tokens == count
        assert result.loss == pytest.approx(expected, abs=1e-5)
        error, where = worst_difference(spy.gradients(reference), reference)
        assert error < 1e-4, where


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", mx.bfloat16), ("gemma2", mx.float16), ("mixtral", mx.float32), ("deepseek_v3", mx.float32)],
    ids=str,
)
def test_models_that_keep_rows_apart_are_taken(name, dtype):
    model = randomized(build(name, tied=False))
    model.set_dtype(dtype)
    for length in (4, 21):
        check_rows_stay_apart(model, length)


def test_a_row_may_be_rounded_otherwise_beside_another(monkeypatch):
    """As some libraries' products do."""
    apart = []
    monkeypatch.setattr(module, "_distance", lambda *_: apart[0])
    model = randomized(build("llama", tied=False))
    for distance, refused in ((2e-6, False), (2e-3, True)):
        apart[:] = [distance]
        with pytest.raises(InputError, match="does not keep") if refused else nullcontext():
            check_rows_stay_apart(model, 8)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mamba2", "does not keep the rows of a pack apart: one changes the next"),
        ("rwkv7", "does not keep the rows of a pack apart"),
        ("lfm2", "does not keep the rows of a pack apart"),
        ("gpt2", "reads where in a pack a row stands"),
    ],
)
def test_models_that_do_not_are_refused_by_name(name, why):
    with pytest.raises(InputError, match=rf"--packing: mlx_lm.models.{name} {why}.*; train without --packing") as error:
        check_rows_stay_apart(randomized(build(name, tied=False)), 21)
    assert "\n" not in str(error.value)


PACKING = ["--packing", "--max-seq-length", 64, "--batch-size", 2]


def test_the_batches_of_a_run_have_all_rows_cut_to_the_length(parse, folders):
    from mlx_lm.utils import load_tokenizer

    args = parse("--packing", "--max-seq-length", 24, "--batch-size", 1, "--mask-prompt")
    rows = load_data(args, load_tokenizer(folders["untied"]))[0]
    packs = PackedRows(rows, args)
    found = []
    for tokens, marks in batches_of(args, Rows(packs)):
        tokens, marks = np.array(tokens)[0], np.array(marks)[0]
        assert marks.dtype == np.uint32
        for number in range(1, (marks >> 1).max() + 1):
            assert not marks[marks >> 1 == number][0] & 1  # the first of a row is never predicted
            found.append(tokens[marks >> 1 == number].tolist())
    assert sorted(found) == sorted(rows.process(rows[i])[0][:24] for i in range(len(rows)))


@pytest.mark.parametrize(
    "how", [["--stream", "--fine-tune-type", "full"], ["--chunked-loss", "--mask-prompt"]], ids=str
)
def test_a_run_learns_from_packs_and_resumes_bit_for_bit(parse, tmp_path, how):
    common = [*PACKING, *how, "--iters", 5]
    whole = run(parse(*common, adapter="whole"))
    broken = [*common, "--save-every", 2]
    with pytest.raises(Breaks):
        run(parse(*broken, adapter="broken"), BreakAt(3))
    resumed = run(parse(*broken, "--resume", adapter="broken"))
    assert (resumed.loss_before, resumed.loss_after) == (whole.loss_before, whole.loss_after)
    for name in ("adapters.safetensors", "token_tables.safetensors"):
        if (tmp_path / "whole" / name).exists():
            one, two = (mx.load(str(tmp_path / folder / name)) for folder in ("whole", "broken"))
            assert all(mx.array_equal(one[key], two[key]) for key in one)


def test_data_and_plan_say_how_many_packs_there_are(folders, capsys):
    words = [*PACKING, "--model", folders["untied"], "--data", folders["data"]]
    data_command.main(list(map(str, [*words, "--show", 0])))
    said = capsys.readouterr().out
    assert "Packed: 12 train rows make 6 packs of 64 tokens, 97.4% full" in said
    plan_command.main(list(map(str, [*words, "--json"])))
    planned = json.loads(capsys.readouterr().out)
    assert "--packing makes" in json.dumps(planned)
