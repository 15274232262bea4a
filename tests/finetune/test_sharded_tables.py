"""Workers that share the rows of the tables train what one does with whole tables, and save whole ones.

Two workers over MLX's ring; over NCCL, one a GPU: ``EMBER_TEST_BACKEND=nccl EMBER_TEST_WORKERS=2 pytest THIS_FILE``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from finetune.test_workers import finish, free_ports, start
from mlx_lm import load
from tiny_models import write_data, write_model

from ember_mlx.finetune import checkpoints, options
from ember_mlx.finetune.run import run
from ember_mlx.kernels.stochastic_rounding import bit_keys
from ember_mlx.optimizers.row_shards import RowShards, places_among
from ember_mlx.shared.errors import InputError

ROOT = Path(__file__).parents[2]
NCCL = os.environ.get("EMBER_TEST_BACKEND") == "nccl"
if NCCL:
    os.environ["MLX_ENABLE_TF32"] = "0"  # products of 10 bits would be other numbers
WORKERS = int(os.environ.get("EMBER_TEST_WORKERS", "2"))
CHECKS = ROOT / "tests/finetune/sharded_checks.py"


def start_on_gpus(command):
    """A worker on each GPU."""
    environment = os.environ | {"NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": str(free_ports(1)[0])}
    # Multicast over NVLink may put GPUs that others share out of service.
    environment |= {"MLX_WORLD_SIZE": str(WORKERS), "NCCL_NVLS_ENABLE": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=environment | {"MLX_RANK": str(rank), "CUDA_VISIBLE_DEVICES": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORKERS)
    ]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    model, data = write_model(folder / "model", vocabulary=263), write_data(folder / "data", rows=6 * WORKERS)
    (folder / "prompts.txt").write_text("ppp\n")
    lengths = {"--iters": 6, "--batch-size": 2 * WORKERS, "--max-seq-length": 32, "--save-every": 2, "--val-batches": 1}
    lengths |= {"--keep-checkpoints": 3, "--clip-grad-norm": 1, "--sample-tokens": 2, "--steps-per-report": 2}
    paths = {"--model": model, "--data": data, "--sample-prompts": folder / "prompts.txt"}
    return [str(word) for pair in (lengths | paths).items() for word in pair]


@pytest.fixture(scope="module")
def folder(words, tmp_path_factory):
    """Where one worker trained, and then several: what tests/finetune/sharded_checks.py found, and their adapters."""
    folder = tmp_path_factory.mktemp("workers")
    run(options.parse([*words, "--adapter-path", str(folder / "alone")]))
    command = [CHECKS, folder, *words]
    ended = finish(start_on_gpus(command) if NCCL else start(folder, [command] * WORKERS))
    assert [process.returncode for process, *_ in ended] == [0] * WORKERS, ended
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(WORKERS)]


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_loss_norm_and_all_gradients_are_those_of_whole_tables(found, kind):
    for each in found:
        assert max(each[kind]["errors"]) < 1e-5


def test_all_workers_see_an_infinity_in_the_rows_of_one(found):
    assert not any(each[kind]["infinity_passes"] for each in found for kind in ("tied", "untied"))


def test_rows_are_rounded_as_in_the_whole_table(found):
    """To the bit where the workers' means add up exactly; else the last bit of a mean moves a few over an edge."""
    for each in found:
        exact, other = each["rounding"]
        assert exact == 1.0 if WORKERS & (WORKERS - 1) == 0 else exact > 0.999
        assert other > 0.999


def same_steps(words, ours, theirs):
    """Two checkpoints whose weights have taken the same steps, but for sums in another order."""
    begun = mx.load(str(Path(words[words.index("--model") + 1]) / "model.safetensors"))
    assert ours.weights.keys() == theirs.weights.keys()
    assert ours.optimizer.keys() == theirs.optimizer.keys()
    for name, weight in ours.weights.items():
        assert weight.shape == theirs.weights[name].shape
        if not name.endswith("lora_a"):  # which begins at random
            step = weight - begun.get(name, mx.zeros_like(weight))
            error = mx.linalg.norm((theirs.weights[name] - weight).reshape(-1)) / mx.linalg.norm(step.reshape(-1))
            assert error.item() < 1e-4, name
    for name, array in ours.optimizer.items():  # by its size: single momenta are differences of larger numbers
        error = mx.abs(theirs.optimizer[name].astype(mx.float32) - array.astype(mx.float32)).max()
        assert error.item() <= 1e-5 * mx.abs(array).max().item(), name


def newest(folder):
    return checkpoints.read(checkpoints.in_folder(folder)[-1])


def test_from_a_checkpoint_of_one_they_train_what_one_does(folder, words):
    same_steps(words, newest(folder / "alone"), newest(folder / "host0"))
    assert not (folder / "host1").exists()


def test_one_worker_goes_on_from_theirs(folder, words, tmp_path):
    checkpoint = folder / "host0" / "checkpoints" / "step-0000004"
    with pytest.raises(InputError, match=f"1 workers, but {WORKERS} before"):
        run(options.parse([*words, "--resume", str(checkpoint), "--adapter-path", str(tmp_path)]))
    run(options.parse([*words, "--resume", str(checkpoint), "--resume-with-changes", "--adapter-path", str(tmp_path)]))
    same_steps(words, newest(folder / "alone"), newest(tmp_path))


def test_the_tables_that_are_saved_are_whole_and_mlx_lm_takes_them(folder, words):
    model, _ = load(words[words.index("--model") + 1])
    tables = mx.load(str(folder / "host0" / "token_tables.safetensors"))
    model.load_weights(list(tables.items()), strict=False)  # which checks their shapes
    assert {name: array.shape for name, array in tables.items()} == {
        "lm_head.weight": (263, 32),
        "model.embed_tokens.weight": (263, 32),
    }
    assert mx.array_equal(model.lm_head.weight, tables["lm_head.weight"])


@pytest.mark.parametrize(("size", "rows"), [(1, 5), (2, 5), (3, 263), (8, 151_937)])
def test_the_rows_of_all_workers_are_the_table_and_their_keys_its_keys(size, rows):
    shards = [RowShards(rank, size, rows) for rank in range(size)]
    assert [each.first_row for each in shards] == [rank * rows // size for rank in range(size)]
    assert sum(each.rows for each in shards) == rows
    assert max(each.rows for each in shards) == shards[0].most_rows
    seed, t = mx.array(7, mx.uint32), mx.array(3)
    parts = mx.concatenate([bit_keys(seed, t, each.rows, 4, each.first_row)[0] for each in shards])
    assert mx.array_equal(parts, bit_keys(seed, t, rows, 4)[0])


def test_ids_of_other_workers_are_spread_over_the_rows_here():
    """On a GPU additions to one row wait for each other, those of zeros too."""
    ids = mx.arange(400)
    place, inside = places_among(ids, 100, 50)
    assert inside.tolist() == [100 <= i < 150 for i in range(400)]
    assert place[100:150].tolist() == list(range(50))
    assert mx.zeros(50, mx.int32).at[place].add(1).tolist() == [8] * 50


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "is for several workers; start them with mlx.launch"),
        (["--train-tables", "none"], "no table trains with --train-tables none"),
        (["--stream"], "--stream steps whole tables"),
        (["--table-optimizer", "adafactor"], "--table-optimizer adafactor needs whole tables"),
    ],
)
def test_where_it_cannot_be_it_is_refused_in_one_line(words, tmp_path, monkeypatch, more, message):
    if more:  # of two workers it would be the next thing that is checked
        from ember_mlx.finetune.choices import choose
        from ember_mlx.finetune.trainable import shapes_of

        args = options.parse([*words, "--shard-tables", *more])
        with pytest.raises(InputError, match=message) as refused:
            choose(args, shapes_of(load(args.model)[0]))
    else:
        with pytest.raises(InputError, match=message) as refused:
            run(options.parse([*words, "--shard-tables", "--adapter-path", str(tmp_path / "new")]))
        assert not (tmp_path / "new").exists()
    assert "\n" not in str(refused.value)
