"""Whatever a run was asked for and however it ended: all that lies in its folder is finite and loads."""

import itertools
import random
import sys
from unittest import mock

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from tiny_models import write_data, write_model

from ember_mlx import cli
from ember_mlx.finetune import adapters, checkpoints

pytestmark = pytest.mark.usefixtures("eager")

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
KINDS = ("lora", "dora", "full")
OPTIMIZERS = ("adam", "adamw", "adafactor", "sgd", "muon")
TABLE_OPTIMIZERS = ("ember", "adamw", "adafactor", "sgd")
FAULTS = {
    "none": [],
    "rate": ["--learning-rate", "1e10"],
    "table rate": ["--table-learning-rate", "1e10"],
    "both rates": ["--learning-rate", "3e38", "--table-learning-rate", "3e38"],
    "clipped": ["--learning-rate", "1e10", "--clip-grad-norm", "1e-30"],
    "decay": ["--table-weight-decay", "1e38"],
    "rate beyond float32": ["--table-learning-rate", "1e39"],
    "NaN in a weight": [],
    "loss overflows": [],
}


def cases():
    """Every dtype with every kind, optimizer, table optimizer and fault at least once, in random company."""
    rng = random.Random(0)
    for dtype in DTYPES:
        columns = [KINDS, OPTIMIZERS, TABLE_OPTIMIZERS, tuple(FAULTS), ("stop", "skip")]
        length = max(map(len, columns))
        columns = [list(itertools.islice(itertools.cycle(column), length)) for column in columns]
        for column in columns:
            rng.shuffle(column)
        yield from ((dtype, *row) for row in zip(*columns, strict=True))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Model folders by dtype and fault, and the data."""
    root = tmp_path_factory.mktemp("finite")
    found = {"data": write_data(root / "data", rows=4)}
    for dtype, mlx_dtype in DTYPES.items():
        for fault in ("none", "NaN in a weight", "loss overflows"):
            folder = write_model(root / f"{dtype}-{fault.replace(' ', '-')}", dtype=mlx_dtype, hidden=16)
            weights = mx.load(str(folder / "model.safetensors"))
            if fault == "NaN in a weight":
                weights["model.layers.1.mlp.up_proj.weight"][0, 0] = mx.nan
            elif fault == "loss overflows":
                weights["lm_head.weight"] *= mx.finfo(mlx_dtype).max / 4
            mx.eval(weights)
            mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
            found[dtype, fault] = folder
    return found


def command(capsys, *words):
    """Its exit code, and what it said; an error of bad input is one line."""
    with mock.patch.object(sys, "argv", ["ember-mlx", *map(str, words)]):
        try:
            code = cli.main() or 0
        except SystemExit as ended:
            code = ended.code or 0
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    return code, said.out + said.err


def assert_finite(folder):
    """Every array of every file, read by MLX itself."""
    found = sorted(folder.rglob("*.safetensors"))
    for file in found:
        for name, array in mx.load(str(file)).items():
            assert not mx.issubdtype(array.dtype, mx.floating) or mx.isfinite(array).all(), (file, name)
    return found


@pytest.mark.parametrize(("dtype", "kind", "optimizer", "table_optimizer", "fault", "on_nonfinite"), list(cases()))
def test_after_any_run_all_that_is_saved_is_finite_and_loads(
    made, tmp_path, capsys, dtype, kind, optimizer, table_optimizer, fault, on_nonfinite
):
    model = made.get((dtype, fault), made[dtype, "none"])
    folder, fused = tmp_path / "adapter", tmp_path / "fused"
    options = ["--model", model, "--data", made["data"], "--adapter-path", folder, "--fine-tune-type", kind]
    options += ["--optimizer", optimizer, "--table-optimizer", table_optimizer, "--on-nonfinite", on_nonfinite]
    options += ["--iters", 3, "--batch-size", 2, "--val-batches", 1, "--save-every", 1, *FAULTS[fault]]
    code, said = command(capsys, "train", *options)
    saved = assert_finite(folder)
    if fault == "none":
        assert code == 0, said
    if code == 0:
        assert saved
    for checkpoint in checkpoints.in_folder(folder):
        checkpoints.read(checkpoint)
    if not (folder / adapters.ADAPTERS).exists():
        return
    adapters.load(model, adapter_path=folder)  # it refuses what is not whole
    code, said = command(capsys, "fuse", "--model", model, "--adapter-path", folder, "--save-path", fused)
    assert code in (0, 2), said
    assert bool(assert_finite(tmp_path / "fused")) == (code == 0)
    if code == 0:
        assert all(mx.isfinite(array).all() for _, array in tree_flatten(load_model(fused)[0].parameters()))


@pytest.mark.parametrize("fault", ["none", "rate", "NaN in a weight"])
def test_geometry_leaves_only_what_is_finite(made, tmp_path, capsys, fault):
    model = made.get(("float16", fault), made["float16", "none"])
    options = ["--model", model, "--data", made["data"], "--adapter-path", tmp_path / "adapter", "--out", tmp_path]
    command(capsys, "geometry", *options, "--iters", 20, "--batch-size", 2, "--save-every", 1, *FAULTS[fault])
    assert bool(assert_finite(tmp_path)) == (fault == "none")


def test_a_planted_infinity_is_seen(tmp_path):
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"w": mx.array([1, mx.inf], mx.float16)})
    with pytest.raises(AssertionError):
        assert_finite(tmp_path)
