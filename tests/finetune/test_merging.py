"""Merging: what is left of a change is measured, and kept by default; stock mlx-lm loads what fuse writes."""

import copy
import shutil

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.utils import quantize_model, save_config, save_model
from tiny_models import llama_config, tiny_llama

from ember_mlx import InputError, load
from ember_mlx.commands import fuse
from ember_mlx.finetune.merging import merge_adapters
from ember_mlx.finetune.run import run
from ember_mlx.shared.units import format_bytes

pytestmark = pytest.mark.usefixtures("eager")

IDS = mx.array([[4, 60, 70, 80, 90]])
LAYERS = {
    "lora": (LoRALinear, lambda: nn.Linear(64, 32)),
    "dora": (DoRALinear, lambda: nn.Linear(64, 32, bias=False)),
    "experts": (LoRASwitchLinear, lambda: SwitchLinear(64, 32, 3, bias=False)),
    "embedding": (LoRAEmbedding, lambda: nn.Embedding(32, 64)),
}


def adapted(kind, bits, size, dtype=mx.float32):
    """A model of one layer with an adapter of a given size, and the weight without and with it, in float64."""
    mx.random.seed(3)
    wrap, make = LAYERS[kind]
    base = make()
    base.set_dtype(dtype)
    base = base.to_quantized(group_size=32, bits=bits) if bits else base
    model = nn.Module()
    model.layer = wrap.from_base(base, r=2, scale=1.0)
    model.layer.lora_a = mx.random.normal(model.layer.lora_a.shape)
    model.layer.lora_b = mx.random.normal(model.layer.lora_b.shape) * size
    before = weight(base)
    a, b = (np.array(model.layer[name], np.float64) for name in ("lora_a", "lora_b"))
    change = {"embedding": lambda: a @ b, "experts": lambda: b @ a.reshape(3, -1, 64)}.get(kind, lambda: (a @ b).T)()
    after = before + change
    if kind == "dora":
        after *= np.array(model.layer.m, np.float64)[:, None] / np.linalg.norm(after, axis=1, keepdims=True)
    return model, before, after


def weight(layer):
    if not hasattr(layer, "bits"):
        return np.array(layer.weight.astype(mx.float32), np.float64)
    scales, biases = layer.scales.astype(mx.float32), layer.biases.astype(mx.float32)
    return np.array(mx.dequantize(layer.weight, scales, biases, layer.group_size, layer.bits), np.float64)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("bits", "requantize"), [(None, None), (4, None), (4, 4), (4, 5), (4, 8), (8, 8)])
@pytest.mark.parametrize("size", [1e-3, 3e-2])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_share_that_is_left_is_that_of_float64(kind, bits, requantize, size, dtype):
    model, before, after = adapted(kind, bits, size, dtype)
    merged = merge_adapters(model, {}, requantize=requantize)
    change, saved = after - before, weight(model.layer)
    share = (change * (saved - before)).sum() / (change**2).sum()
    assert merged.kept.share == pytest.approx(min(1, max(0, share)), abs=1e-3)
    assert merged.kept.noise == pytest.approx(
        np.linalg.norm(saved - after) / np.linalg.norm(change), rel=1e-2, abs=1e-3
    )
    assert hasattr(model.layer, "bits") == (requantize is not None)
    if dtype == mx.float32 and not requantize:
        assert merged.kept.share == pytest.approx(1, abs=1e-3)
    if requantize == bits == 4 and size == 1e-3 and kind != "dora":
        assert merged.kept.share < 0.7  # what the field saw: most of a small change is rounded away


@pytest.fixture(scope="module")
def four_bits(folders, tmp_path_factory):
    """A model folder of 4 bits."""
    folder = shutil.copytree(folders["untied"], tmp_path_factory.mktemp("bits") / "four")
    model, config = quantize_model(tiny_llama(), llama_config(False), group_size=32, bits=4)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return folder


def fused(folder, adapter, *words):
    path = adapter.parent / "fused"
    paths = {"--model": folder, "--adapter-path": adapter, "--save-path": path}
    fuse.main([*(str(word) for pair in paths.items() for word in pair), "--overwrite", *words])
    return mlx_lm.load(str(path), return_config=True)


def test_by_default_a_fused_4_bit_model_is_the_model_with_its_adapter(parse, four_bits, tmp_path, capsys):
    words = ["--model", four_bits, "--train-tables", "none", "--learning-rate", 1e-3, "--iters", 5]
    run(parse(*words))
    adapter = tmp_path / "adapters"
    model, _ = load(four_bits, adapter_path=adapter)
    logits, base = model(IDS), load(four_bits)[0](IDS)
    distance = mx.linalg.norm(logits - base).item()
    shares = {}
    size_before = format_bytes(sum(x.nbytes for _, x in tree_flatten(load(four_bits)[0].parameters())))
    for again in ((), ("--requantize", "8"), ("--requantize", "4"), ("--dequantize",)):
        stock, _, config = fused(four_bits, adapter, *again)
        shares[again] = 1 - mx.linalg.norm(stock(IDS) - logits).item() / distance
        said = capsys.readouterr().out.splitlines()[-1]
        size = sum(array.nbytes for _, array in tree_flatten(stock.parameters()))
        assert f": {format_bytes(size)}, of {size_before} before; " in said
        assert ("quantization" in config) == ("--dequantize" not in again)
    assert shares[()] > 0.99
    assert shares["--dequantize",] > 0.99
    assert shares["--requantize", "8"] > shares["--requantize", "4"]
    with pytest.raises(InputError, match="--requantize 3: .* has 4 bits; use at least that"):
        fused(four_bits, adapter, "--requantize", "3")


def test_there_must_be_a_layer_to_requantize(parse, four_bits, tmp_path):
    run(parse("--model", four_bits, "--num-layers", 0, "--iters", 1))
    with pytest.raises(InputError, match="--requantize 8: no layer has an adapter"):
        fused(four_bits, tmp_path / "adapters", "--requantize", "8")


def test_what_is_replaced_is_replaced_whole(parse, four_bits, folders, tmp_path):
    run(parse("--train-tables", "none"))
    fused(folders["untied"], tmp_path / "adapters")
    folder = tmp_path / "fused"
    for name in ("chat_template.jinja", "model-00002-of-00002.safetensors", "added_tokens.json", "f.gguf"):
        (folder / name).write_text("of before")
    for name in ("notes.txt", "adapters/a.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    fused(folders["untied"], tmp_path / "adapters")
    assert [path.name for path in folder.rglob("*") if path.is_file() and path.read_bytes() == b"of before"] == []
    assert (folder / "notes.txt").read_text() == (folder / "adapters" / "a.safetensors").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters", "fused"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--export-gguf"], "--export-gguf: the model is quantized, .*; add --dequantize"),
        (["--export-gguf", "--gguf-path", "../f.gguf"], "--gguf-path ../f.gguf: must be a name that ends in .gguf"),
        (["--export-gguf", "--gguf-path", "config.json"], "--gguf-path config.json: must be a name that ends in .gguf"),
        (["--requantize", "7"], "argument --requantize: invalid choice: 7"),
        (["--requantize", "8", "--dequantize"], "not allowed with argument"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate; ember-mlx fuse --help lists the options"),
        (["--save-path", "{model}"], "is the model itself"),
        (["--save-path", "{adapter}"], "is the adapter itself"),
        (["--save-path", "{adapter}/best", "--overwrite"], "best: is of the run in"),
        (["--save-path", "{adapter}/checkpoints"], "checkpoints: is of the run in"),
        (["--save-path", "{adapter}/adapters.safetensors/new"], "adapters.safetensors is a file; give a folder"),
        (["--adapter-path", "/no/such"], "adapter /no/such: no such folder"),
    ],
)
def test_what_cannot_be_fused_is_refused_before_anything_is_written(parse, four_bits, tmp_path, words, message):
    run(parse("--model", four_bits, "--train-tables", "none"))
    adapter = tmp_path / "adapters"
    before = sorted(tmp_path.rglob("*"))
    paths = ["--model", four_bits, "--adapter-path", adapter, "--save-path", tmp_path / "new" / "fused"]
    with pytest.raises(InputError, match=message):
        fuse.main([*map(str, paths), *(word.format(model=four_bits, adapter=adapter) for word in words)])
    assert sorted(tmp_path.rglob("*")) == before


def test_gguf_of_other_architectures_is_refused_and_of_llama_written(parse, folders, tmp_path, monkeypatch):
    run(parse("--train-tables", "none"))
    adapter = tmp_path / "adapters"
    fused(folders["untied"], adapter, "--export-gguf", "--gguf-path", "f.gguf")
    written = tmp_path / "fused" / "f.gguf"
    assert mx.load(str(written))["output.weight"].shape == (260, 32)
    monkeypatch.setitem(fuse.load_base.__globals__, "mlx_lm", Renamed(mlx_lm))
    with pytest.raises(InputError, match="mlx-lm converts llama, mixtral, mistral, and this model is of type qwen3"):
        fused(folders["untied"], adapter, "--export-gguf")
    assert written.exists()


class Renamed:
    """mlx-lm, where every model is of another type."""

    def __init__(self, module):
        self.module = module

    def load(self, *arguments, **options):
        model, tokenizer, config = self.module.load(*arguments, **options)
        return model, tokenizer, copy.deepcopy(config) | {"model_type": "qwen3"}


def test_an_adapter_that_is_not_finite_is_refused_by_name(parse, folders, tmp_path):
    run(parse())
    for name in ("adapters.safetensors", "token_tables.safetensors"):
        folder = shutil.copytree(tmp_path / "adapters", tmp_path / name)
        arrays, metadata = mx.load(str(folder / name), return_metadata=True)
        key = sorted(arrays)[-1]
        arrays[key][0, 0] = float("nan")
        mx.save_safetensors(str(folder / name), arrays, metadata)
        with pytest.raises(InputError, match=f"{name}: {key} has 1 of .* numbers that are not finite"):
            load(folders["untied"], adapter_path=folder)
