"""Model folders and adapters that are damaged: loaded, or refused in one InputError that names them."""

import json
import sys

import mlx.core as mx
import pytest
from finetune.test_reading_fuzz import FUZZ, JSON, NUMBERS, a_copy_of, damaged
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from ember_mlx import InputError, cli, load
from ember_mlx.finetune.base_models import load_base
from ember_mlx.finetune.run import run

FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
KEYS = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
KEYS += ["model_type", "quantization", "rope_theta"]
ADAPTER_FILES = ["adapter_config.json", "adapters.safetensors", "token_tables.safetensors"]
# Sizes that a machine would really allocate are no test of an error.
SMALL = (NUMBERS | JSON).filter(lambda value: not (isinstance(value, int) and abs(value) > 1000))


def names(error, folder):
    assert str(folder) in str(error)
    assert "\n" not in str(error)


@FUZZ
@given(data=st.data(), file=st.sampled_from(FILES))
def test_a_damaged_model_folder_is_loaded_or_refused(data, file, folders):
    changed = data.draw(damaged((folders["untied"] / file).read_bytes()))
    with a_copy_of(folders["untied"]) as copy:
        (copy / file).write_bytes(changed)
        try:
            mx.eval(load_base(copy)[0].parameters())
        except InputError as error:
            names(error, copy)


@FUZZ
@given(key=st.sampled_from(KEYS), value=SMALL)
def test_a_config_that_says_something_else_is_loaded_or_refused(key, value, folders):
    config = json.loads((folders["untied"] / "config.json").read_text()) | {key: value}
    with a_copy_of(folders["untied"]) as copy:
        (copy / "config.json").write_text(json.dumps(config))
        try:
            mx.eval(load_base(copy)[0].parameters())
        except InputError as error:
            names(error, copy)


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    from ember_mlx.finetune import options

    folder = tmp_path_factory.mktemp("trained") / "adapters"
    words = ["--model", folders["untied"], "--data", folders["data"], "--adapter-path", folder, "--iters", 1]
    run(options.parse([str(word) for word in [*words, "--batch-size", 2, "--val-batches", 1]]))
    return folder


@FUZZ
@given(data=st.data(), file=st.sampled_from(ADAPTER_FILES))
def test_a_damaged_adapter_is_loaded_with_finite_numbers_or_refused(data, file, folders, trained):
    changed = data.draw(damaged((trained / file).read_bytes()))
    with a_copy_of(trained) as copy:
        (copy / file).write_bytes(changed)
        try:
            model, _ = load(folders["untied"], adapter_path=copy)
        except InputError as error:
            names(error, copy)
        else:
            assert all(mx.isfinite(array).all().item() for _, array in tree_flatten(model.parameters()))


@pytest.mark.parametrize(
    "words",
    [
        ["--prompt", "a", "--chat-template-config", "no json"],
        ["--prompt", "a", "--prompt-cache-file", "/no/such/file.safetensors"],
        ["--prompt", "a", "--extra-eos-token", "\ud800"],
        ["--prompt", "a", "--adapter-path", "/no/such"],
        ["--prompt", "a\ud800"],
    ],
)
def test_what_mlx_lm_raises_is_one_line(folders, monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["ember-mlx", "generate", "--model", str(folders["untied"]), *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    errors = capsys.readouterr().err.splitlines()
    assert (stopped.value.code, len(errors)) == (2, 1)
    assert errors[0].startswith("ember-mlx generate: error: ")
