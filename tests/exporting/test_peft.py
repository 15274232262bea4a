"""The export for peft: Hugging Face's model with it gives our logits, and peft itself writes the same file."""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.tuner.utils import linear_to_lora_layers
from tiny_sentencepiece import write_model

from ember_mlx import InputError, load
from ember_mlx.commands import export
from ember_mlx.exporting import peft as exporting
from ember_mlx.finetune.options import parse
from ember_mlx.finetune.run import run

pytestmark = pytest.mark.usefixtures("eager")

IDS = [[4, 60, 70, 80, 90]]


@pytest.fixture(scope="module")
def dora(folders, tmp_path_factory):
    """An adapter folder, of DoRA on the untied model."""
    return train(tmp_path_factory.mktemp("dora"), folders, folders["untied"], "--fine-tune-type", "dora")


def train(folder, folders, model, *options):
    """An adapter at rates that show."""
    words = {"--model": model, "--data": folders["data"], "--adapter-path": folder / "adapters", "--iters": 2}
    words |= {"--batch-size": 2, "--val-batches": 1, "--learning-rate": 1e-2, "--table-learning-rate": 1e-2}
    run(parse([str(word) for pair in words.items() for word in pair] + [*map(str, options)]))
    return folder / "adapters"


def words(model, adapter, folder, *more):
    paths = {"--model": model, "--adapter-path": adapter, "--save-path": folder}
    return ["--format", "peft", *(str(word) for pair in paths.items() for word in pair), *more]


def check_logits(base, adapter, tmp_path, ids=IDS):
    """Ours in float32 are as near to those of float64 as Hugging Face's in float32, but for eight times.

    Both round at each of some hundred additions in a row, in other orders: the largest of so many errors varies by a
    few times. What was trained is a thousand times larger.
    """
    peft = pytest.importorskip("peft")
    ours = np.array(load(base, adapter)[0](mx.array(ids)), np.float64)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "peft"), dtype=torch.float32)
    with torch.no_grad():
        single = model(torch.tensor(ids)).logits.double().numpy()
        double = model.double()(torch.tensor(ids)).logits.numpy()
    rounding = np.abs(single - double).max()
    assert np.abs(ours - double).max() <= 8 * rounding
    untrained = np.array(load(base)[0](mx.array(IDS)), np.float64)
    assert np.abs(untrained - double[:, : len(IDS[0]), : untrained.shape[-1]]).max() > 8000 * rounding
    return model.float()


@pytest.mark.parametrize(("base", "kind"), [("tied", "lora"), ("untied", "dora")])
def test_peft_gives_the_same_logits_and_writes_the_same_file(folders, dora, tmp_path, capsys, base, kind):
    adapter = dora if kind == "dora" else train(tmp_path, folders, folders[base])
    export.main(words(folders[base], adapter, tmp_path / "peft"))
    assert f"In {tmp_path / 'peft'}: the adapters of 14 weights, model.embed_tokens, lm_head" in capsys.readouterr().out
    model = check_logits(folders[base], adapter, tmp_path)
    model.save_pretrained(tmp_path / "again")
    ours, theirs = (mx.load(str(tmp_path / name / exporting.ADAPTER)) for name in ("peft", "again"))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(array, theirs[name]) for name, array in ours.items())
    config = json.loads((tmp_path / "peft" / exporting.CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(folders[base])
    assert config["use_dora"] == (kind == "dora")
    assert config.get("ensure_weight_tying", False) == (base == "tied")
    assert config["lora_alpha"] == 160  # mlx-lm's scale of 20 at its rank of 8


def test_added_tokens_go_with_the_tokenizer_and_all_tables(folders, tmp_path):
    (tmp_path / "tokens.txt").write_text("number\n")
    options = ["--add-tokens", tmp_path / "tokens.txt", "--train-tables", "head", "--num-layers", 1]
    adapter = train(tmp_path, folders, folders["untied"], *options)
    export.main(words(folders["untied"], adapter, tmp_path / "peft"))
    model = check_logits(folders["untied"], adapter, tmp_path, [[*IDS[0], 260]])
    assert model.get_input_embeddings().weight.shape[0] == 261
    names = mx.load(str(tmp_path / "peft" / exporting.ADAPTER)).keys()
    assert {name for name in names if "lora" not in name} == {
        f"base_model.model.{name}.weight" for name in ("lm_head", "model.embed_tokens")
    }
    assert not any("layers.0" in name for name in names)


def test_a_model_with_norms_of_queries_and_keys(folders, tmp_path):
    base = write_model(tmp_path / "qwen3", "qwen3")
    adapter = train(tmp_path, folders, base)
    export.main(words(base, adapter, tmp_path / "peft"))
    check_logits(base, adapter, tmp_path)


def test_of_a_quantized_model_the_base_must_be_named(folders, tmp_path, capsys):
    adapter = train(tmp_path, folders, folders["quantized"], "--num-layers", 1)
    given = words(folders["quantized"], adapter, tmp_path / "peft")
    with pytest.raises(InputError, match="name the model that it was made from as --base-model"):
        export.main(given)
    assert not (tmp_path / "peft").exists()
    export.main([*given, "--base-model", "Qwen/Qwen3-0.6B"])
    assert "they were trained on quantized layers" in capsys.readouterr().out
    config = json.loads((tmp_path / "peft" / exporting.CONFIG).read_text())
    assert config["base_model_name_or_path"] == "Qwen/Qwen3-0.6B"


def test_what_peft_cannot_hold_is_refused(folders, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "adapter_config.json").write_text('{"fine_tune_type": "full"}')
    with pytest.raises(InputError, match="every weight was trained, and peft holds adapters; export a model instead"):
        exporting.write_peft(tmp_path / "peft", str(folders["untied"]), tmp_path / "full")
    assert not (tmp_path / "peft").exists()
    model, _ = load(folders["untied"])
    lora = {"rank": 2, "scale": 2.0, "dropout": 0.0}
    with pytest.raises(InputError, match="token tables alone were trained, and peft needs adapters in layers"):
        exporting.as_peft(model, lora, ["lm_head.weight"], "base", "here")
    linear_to_lora_layers(model, 1, lora | {"keys": {"model.embed_tokens"}})
    with pytest.raises(InputError, match="embed_tokens is a LoRAEmbedding, which peft has in another form"):
        exporting.as_peft(model, lora, [], "base", "here")


def test_nothing_is_overwritten_unasked_and_other_names_are_refused(folders, dora, tmp_path, monkeypatch):
    given = words(folders["untied"], dora, tmp_path / "peft")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="already exists; give another path, or --overwrite"):
        export.main(given)
    export.main([*given, "--overwrite"])
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {"mine.txt", exporting.CONFIG, exporting.ADAPTER}
    (tmp_path / "other").mkdir()
    mx.save_safetensors(str(tmp_path / "other" / "model.safetensors"), {"h.0.attn.weight": mx.zeros(1)})
    monkeypatch.setattr(exporting, "source_folder", lambda _: tmp_path / "other")
    with pytest.raises(InputError, match=r"Hugging Face has another name for model\.layers"):
        export.main([*given, "--overwrite"])
    assert (tmp_path / "peft" / exporting.CONFIG).exists()
