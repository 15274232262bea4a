"""The model card of a fused model: what the run recorded, as the hub reads it, and nothing else."""

import json
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard
from mlx_lm import lora

from ember_mlx import InputError
from ember_mlx.commands import fuse
from ember_mlx.finetune.model_card import RESULT, model_card
from ember_mlx.finetune.run import run

pytestmark = pytest.mark.usefixtures("eager")

BASE_CARD = """---
license: mit
language: [de, eo]
base_model: some/origin
model-index: [{name: measured before}]
tags: [old]
---
# The base

Words of the base.
"""


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def fused(model, adapter, folder):
    fuse.main(["--model", str(model), "--adapter-path", str(adapter), "--save-path", str(folder)])
    return ModelCard.load(folder / "README.md")


def test_a_fused_model_has_a_card_of_what_the_run_recorded(parse, folders, tmp_path, capsys):
    base = shutil.copytree(folders["untied"], tmp_path / "base")
    (base / "README.md").write_text(BASE_CARD)
    result = run(parse("--table-learning-rate", 0.01, "--mask-prompt"))
    card = fused(base, tmp_path / "adapters", tmp_path / "mine")
    said = "the adapters of 14 weights are merged; 100.0 % of their change is left; model.embed_tokens and lm_head are"
    assert f"; {said} as trained\n" in capsys.readouterr().out
    assert card.data.to_dict() == {
        "license": "mit",
        "language": ["de", "eo"],
        "base_model": "some/origin",
        "base_model_relation": "finetune",
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "ember-mlx", "lora"],
    }
    loss = f"{result.loss_before:.3f} before, {result.loss_after:.3f} after"
    assert f"| validation loss | {loss}, in nats a token |" in card.text
    assert "| rows | 12 to train, 12 to validate |" in card.text
    assert "lora of rank 8 in all layers; token tables model.embed_tokens.weight, lm_head.weight" in card.text
    assert f"ember-mlx {config_of(tmp_path / 'adapters')[RESULT]['versions']['ember-mlx']}" in card.text
    flags = yaml.safe_load(card.text.partition("```yaml\n")[2].partition("```")[0])
    assert flags["mask_prompt"] is True
    assert flags["table_learning_rate"] == 0.01
    assert not flags.keys() & {"model", "data", "adapter_path", "seed", RESULT}
    assert card.text.endswith("## The card of the base model\n\n# The base\n\nWords of the base.\n")
    assert str(tmp_path) not in (tmp_path / "mine" / "README.md").read_text()  # the hub need not know the disk


def test_the_card_of_the_best_adapter_says_as_much_as_the_last_ones(folders, parse, tmp_path):
    """And that of an older version's, whose config has a loss and a step alone, says these."""
    result = run(parse("--table-learning-rate", 0.01))
    best, last = (config_of(tmp_path / "adapters" / name) for name in ("best", "."))
    text = model_card(str(folders["untied"]), "mine", best)
    loss = f"{result.loss_before:.3f} before, {result.best.validation_loss:.3f} after"
    assert f"| validation loss | {loss}, in nats a token, the lowest of the run |" in text
    assert f"| steps | {result.best.step} |" in text
    for fact in ("rows", "with"):
        row = next(line for line in text.splitlines() if line.startswith(f"| {fact} |"))
        assert row in model_card(str(folders["untied"]), "mine", last)
    text = model_card(str(folders["untied"]), "mine", {name: best[name] for name in best if name != RESULT})
    assert f"| validation loss | {result.best.validation_loss:.3f} nats a token, the lowest of the run |" in text


@pytest.mark.parametrize(
    ("layers", "tables", "words"),
    [
        (4, ["lm_head.weight"], "full in all layers and outside them; token tables lm_head.weight"),
        (2, ["lm_head.weight"], "full in the last 2 layers and outside them; token tables lm_head.weight"),
        (0, ["lm_head.weight"], "full outside the layers; token tables lm_head.weight"),
        (2, [], "full in the last 2 layers"),
        (-1, None, "full in all layers"),
    ],
)
def test_the_card_of_a_full_run_names_all_that_trained(folders, layers, tables, words):
    config = {"fine_tune_type": "full", "num_layers": layers, "token_tables": tables}
    assert f"| trained | {words} |" in model_card(str(folders["untied"]), "mine", config, layers=4)


def test_fuse_tells_that_a_full_run_has_no_adapter_to_merge(parse, folders, tmp_path, capsys):
    run(parse("--fine-tune-type", "full", "--iters", 1))
    card = fused(folders["untied"], tmp_path / "adapters", tmp_path / "mine")
    assert capsys.readouterr().out.endswith("; all weights that trained are as trained\n")
    assert "| trained | full in all layers and outside them;" in card.text


def test_what_was_not_recorded_is_not_on_the_card(parse, folders, tmp_path):
    lora.run(parse("--num-layers", 1, adapter="stock"))
    text = model_card(str(folders["untied"]), "mine", config_of(tmp_path / "stock"))
    assert "lora of rank 8 in the last layer" in text
    assert not any(word in text for word in ("loss", "| rows |", "base_model", "token tables", "license", "None"))


def test_a_card_of_the_base_that_is_no_card_is_left_out(folders, tmp_path):
    base = shutil.copytree(folders["untied"], tmp_path / "base")
    (base / "README.md").write_bytes(b"---\n[: \xff\n---\nwords")
    assert "words" not in model_card(str(base), "mine", {"fine_tune_type": "full"})


def test_a_result_that_no_run_writes_is_refused(folders):
    config = {"fine_tune_type": "full", RESULT: {"loss_after": "much lower"}}
    with pytest.raises(InputError, match="adapter_config.json: result must hold loss_name"):
        model_card(str(folders["untied"]), "mine", config)
