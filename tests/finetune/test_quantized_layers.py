"""QLoRA from a 16-bit model: what --quantize packs, and that every later command packs the same."""

import json
import re
import shutil

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import quantize_model, save_config, save_model
from tiny_models import llama_config, tiny_llama, write_model

from ember_mlx import InputError, load
from ember_mlx.commands import fuse
from ember_mlx.finetune.base_models import load_base
from ember_mlx.finetune.mlx_lm_internals import dequantized
from ember_mlx.finetune.run import run
from ember_mlx.planner.inputs import read_inputs
from ember_mlx.shared.units import format_bytes

pytestmark = pytest.mark.usefixtures("eager")

TABLES = ("model.embed_tokens", "lm_head")
IDS = mx.array([[4, 60, 70, 80, 90]])


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Models whose rows are whole groups of 64, by name: of 16 bits, tied and not, and wholly of 4 bits."""
    root = tmp_path_factory.mktemp("wide")
    made = {name: write_model(root / name, tied=name == "tied", hidden=64) for name in ("untied", "tied")}
    four = shutil.copytree(made["untied"], root / "four")
    model, config = quantize_model(tiny_llama(hidden=64), llama_config(False, hidden=64), group_size=64, bits=4)
    save_model(four, model)
    save_config(config, four / "config.json")
    return made | {"four": four}


def fused(model, adapter, *words):
    folder = adapter.parent / "fused"
    paths = ["--model", model, "--adapter-path", adapter, "--save-path", folder, "--overwrite"]
    fuse.main([str(word) for word in [*paths, *words]])
    return mlx_lm.load(str(folder), return_config=True)


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("name", ["untied", "tied"])
def test_the_layers_are_packed_as_mlx_packs_them_and_the_tables_are_not(wide, name, bits):
    plain, _, _ = load_base(wide[name])
    model, _, config = load_base(wide[name], quantize=bits)
    assert type(model.model.embed_tokens) is nn.Embedding
    assert name == "tied" or type(model.lm_head) is nn.Linear
    for of_plain, layer in zip(plain.layers, model.layers, strict=True):
        found = layer.self_attn.q_proj
        expected = mx.quantize(of_plain.self_attn.q_proj.weight, group_size=64, bits=bits)
        assert all(
            mx.array_equal(found[part], array)
            for part, array in zip(("weight", "scales", "biases"), expected, strict=True)
        )
        assert type(layer.mlp.down_proj) is nn.Linear  # 96 numbers are no whole groups
    assert config["quantization"] == {"bits": bits, "group_size": 64, "mode": "affine"} | dict.fromkeys(
        ["model.embed_tokens"] + ["lm_head"] * (name == "untied"), False
    )


def test_load_fuse_test_and_resume_quantize_as_the_run_did(parse, folders, wide, tmp_path, capsys):
    rates = ["--table-learning-rate", 1e-2, "--learning-rate", 1e-2]
    data = shutil.copytree(folders["data"], tmp_path / "data")
    shutil.copy(data / "valid.jsonl", data / "test.jsonl")
    every = ["--num-layers", 1, "--model", wide["untied"], "--data", data, "--val-batches", -1, "--test-batches", -1]
    result = run(parse("--quantize", 4, *rates, *every, "--iters", 2))
    said = capsys.readouterr().out
    # In each of 2 layers, 4 weights of 64 x 64 numbers and 2 of 96 x 64: in float32, then half a byte a number, and for
    # every 64 a scale and a bias in float32.
    numbers = 2 * (4 * 64 * 64 + 2 * 96 * 64)
    assert f"Quantized: 12 weights at 4 bits, {format_bytes(4 * numbers)} before, " in said
    assert f"{format_bytes(numbers // 2 + numbers // 8)} now; the token tables stay in float32" in said
    assert "lora in 1 layer of 4 bits, rank 8" in said
    adapter = tmp_path / "adapters"
    assert json.loads((adapter / "adapter_config.json").read_text())["quantize"] == 4
    model, _ = load(wide["untied"], adapter_path=adapter)
    assert type(model.layers[1].self_attn.q_proj.linear) is nn.QuantizedLinear
    assert capsys.readouterr().out == ""  # where generate's answer goes
    stock, _, config = fused(wide["untied"], adapter)
    assert mx.allclose(stock(IDS), model(IDS), atol=1e-4)
    assert type(stock.layers[0].self_attn.q_proj) is nn.QuantizedLinear
    assert config["quantization"]["model.layers.1.self_attn.q_proj"] is False
    run(parse("--test", *every))
    tested = float(re.search(r"Test loss (\d+\.\d+)", capsys.readouterr().out)[1])
    assert tested == pytest.approx(result.loss_after, abs=6e-4)  # three places are printed
    with pytest.raises(InputError, match=r"--quantize 8: adapter .*adapters was trained on layers of 4 bits; leave it"):
        run(parse("--test", "--quantize", 8, *every))
    with pytest.raises(InputError, match="--quantize was 4 and is now 8"):
        run(parse("--quantize", 8, *rates, *every, "--resume", "--iters", 3))
    (adapter / "adapter_config.json").write_text(
        (adapter / "adapter_config.json").read_text().replace('"quantize": 4', '"quantize": 7')
    )
    with pytest.raises(InputError, match="adapter_config.json: quantize 7: must be one of 2, 3, 4, 5, 6, 8"):
        load(wide["untied"], adapter_path=adapter)


@pytest.mark.parametrize(("base", "words", "rate"), [("four", [], 1e-4), ("untied", ["--quantize", 4], 1e-2)])
def test_fuse_puts_tables_back_into_bits_and_says_what_is_left(parse, wide, tmp_path, capsys, base, words, rate):
    run(parse("--model", wide[base], *words, "--table-learning-rate", rate, "--num-layers", 1, "--iters", 1))
    adapter = tmp_path / "adapters"
    before = {path: weight(load_base(wide[base])[0], path) for path in TABLES}
    trained, _ = load(wide[base], adapter_path=adapter)
    stock, _, config = fused(wide[base], adapter, "--quantize-tables")
    dot = square = error = 0
    for path in TABLES:
        assert hasattr(dict(stock.named_modules())[path], "bits")
        assert config["quantization"][path] == {"group_size": 64, "bits": 4, "mode": "affine"}
        change, saved = weight(trained, path) - before[path], weight(stock, path) - before[path]
        dot, square, error = (
            dot + (saved * change).sum(),
            square + (change**2).sum(),
            error + ((saved - change) ** 2).sum(),
        )
    said = capsys.readouterr().out
    share = min(1, max(0, dot / square))
    found = re.search(
        r"lm_head are quantized at 4 bits; (\S+) % of their change is left(?:, with .* of (\S+) times)?", said
    )
    assert float(found[1]) == pytest.approx(100 * share, abs=0.06)
    assert float(found[2]) == pytest.approx((error / square) ** 0.5, abs=0.006)  # two places
    assert ("leave --quantize-tables out" in said) == (share < 0.95)


@pytest.mark.parametrize(
    ("base", "trained", "words", "message"),
    [
        ("untied", ["lm_head.weight"], [], "--quantize-tables: the model is not quantized"),
        ("four", ["lm_head.weight"], ["--dequantize"], "--quantize-tables: --dequantize writes the whole model in"),
        ("four", [], [], "--quantize-tables: adapter .* has no token tables"),
    ],
)
def test_tables_that_cannot_go_back_are_refused(wide, tmp_path, base, trained, words, message):
    (tmp_path / "adapters").mkdir()
    lora = {"rank": 2, "scale": 1.0, "dropout": 0.0}
    config = {"num_layers": 1, "lora_parameters": lora, "token_tables": trained}
    (tmp_path / "adapters" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        fused(wide[base], tmp_path / "adapters", "--quantize-tables", *words)
    assert not (tmp_path / "fused").exists()


def test_train_and_plan_refuse_what_is_quantized_already(parse, wide):
    args = parse("--quantize", 4, "--model", wide["four"])
    for refuse in (run, read_inputs):
        with pytest.raises(InputError, match="--quantize 4: model .*: is quantized already: leave --quantize out"):
            refuse(args)


def weight(model, path):
    return np.array(dequantized(dict(model.named_modules())[path]).weight, np.float64)
