"""What trains is decided once: `train` and `plan` make the same choices and refuse the same."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_model
from tiny_models import tiny_llama

from ember_mlx import InputError
from ember_mlx.commands import plan
from ember_mlx.finetune import options
from ember_mlx.finetune.choices import DEFAULT_LAYERS, choose
from ember_mlx.finetune.mlx_lm_internals import CONFIG_DEFAULTS
from ember_mlx.finetune.run import run
from ember_mlx.finetune.trainable import shapes_of
from ember_mlx.planner.architecture import read_architecture
from ember_mlx.planner.inputs import find_config

DEFAULTS = options.parse([])
KEYS = [None, ["self_attn.q_proj"], ["mlp.up_proj", "lm_head"], ["lm_head"], ["model.embed_tokens"], ["nowhere"], []]
ASKED = st.fixed_dictionaries(
    {
        "fine_tune_type": st.sampled_from(["lora", "dora", "full"]),
        "train_tables": st.sampled_from(["auto", "embedding", "head", "none"]),
        "num_layers": st.sampled_from([None, -1, 0, 1, 2, 3]),
        "table_rounding": st.sampled_from([None, "nearest", "stochastic"]),
        "body_rounding": st.sampled_from([None, "nearest", "stochastic"]),
        "stream": st.sampled_from([None, True, False]),
        "keep_inputs": st.sampled_from([None, 2]),
        "lora_parameters": st.sampled_from(KEYS).map(
            lambda keys: {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": keys}
        )
        | st.just({"rank": 4, "alpha": 2}),
    }
)


def outcome(asked, shapes):
    try:
        made = choose(DEFAULTS | asked, shapes)
    except InputError as error:
        return str(error)
    return made.as_options(), set(made.dequantize)


@pytest.fixture(scope="module")
def models(folders):
    """The shapes of each model, as it is loaded and as its config.json describes it."""
    return {
        name: (shapes_of(load_model(folders[name])[0]), read_architecture(*find_config(str(folders[name]))).shapes())
        for name in ("untied", "tied", "quantized")
    }


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(["untied", "tied", "quantized"]), asked=ASKED)
def test_plan_and_train_choose_and_refuse_the_same(models, name, asked):
    loaded, described = models[name]
    assert outcome(asked, loaded) == outcome(asked, described)


def test_the_property_sees_choices_and_each_refusal(models):
    """That is: the test above compares more than one kind of outcome."""
    lora = {"rank": 4, "scale": 1.0, "dropout": 0.0}
    for asked, message in (
        ({"num_layers": 3}, "the model has 2 layers"),
        ({"num_layers": 0, "train_tables": "none"}, "nothing is left to train"),
        ({"lora_parameters": lora | {"keys": ["lm_head"]}}, "keys names lm_head"),
        ({"lora_parameters": lora | {"keys": ["nowhere"]}}, "no layer has such a module"),
        ({"lora_parameters": {"rank": 4, "alpha": 2}}, "missing required key 'scale'"),
    ):
        assert message in outcome(asked, models["untied"][1])
    assert "the head is the embedding" in outcome({"train_tables": "head"}, models["tied"][1])
    assert outcome({}, models["quantized"][1])[1] == {"model.embed_tokens", "lm_head"}
    assert outcome({"train_tables": "none"}, models["quantized"][1])[1] == set()
    assert "full: lm_head is quantized" in outcome({"fine_tune_type": "full"}, models["quantized"][1])
    assert outcome({"num_layers": 1}, models["untied"][1])[0]["num_layers"] == 1


@pytest.mark.usefixtures("eager")
def test_a_module_that_is_named_in_vain_is_warned_of(parse, tmp_path, capsys):
    config = tmp_path / "keys.yaml"
    config.write_text("lora_parameters: {rank: 4, scale: 1.0, dropout: 0.0, keys: [self_attn.q_proj, self_attn.k_prj]}")
    args = parse("--config", config, "--iters", 1)
    run(args)
    where = f"Warning: --config {config}: lora_parameters: keys: self_attn.k_prj"
    line = f"{where}: no effect: no layer that trains has it (did you mean 'self"
    assert line in capsys.readouterr().out
    plan.main(["--config", str(config), "--model", args.model, "--json"])
    assert line in capsys.readouterr().err


def test_the_default_number_of_layers_is_mlx_lms():
    assert CONFIG_DEFAULTS["num_layers"] == DEFAULT_LAYERS


@pytest.mark.usefixtures("eager")
def test_options_are_never_written_to(parse, tmp_path):
    args = parse("--fine-tune-type", "full")
    before = copy.deepcopy(vars(args))
    run(args)
    assert vars(args) == before
    with pytest.raises(AttributeError, match="never written to"):
        args.iters = 5
    with pytest.raises(AttributeError, match="never written to"):
        del args.iters
    assert (args | {"iters": 5}).iters == 5
    assert args.iters == 3
    saved = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    chosen = choose(args, shapes_of(tiny_llama())).as_options()
    assert {name: saved[name] for name in chosen} == chosen
    rest = {name: value for name, value in before.items() if name not in chosen}
    assert {name: saved[name] for name in rest} == json.loads(json.dumps(rest, default=str))


def test_full_streams_unless_told_otherwise():
    shapes = shapes_of(tiny_llama())

    def streams(workers=1, **asked):
        return choose(DEFAULTS | {"fine_tune_type": "full"} | asked, shapes, workers=workers).stream

    assert streams()
    assert not streams(stream=False)
    assert not streams(train_tables="none")  # mlx-lm's own run, to the bit
    assert not streams(fine_tune_type="lora")
    assert (streams(clip_grad_norm=1.0), streams(clip_grad_norm=1.0, stream=True)) == (False, True)
    assert not streams(workers=2)
