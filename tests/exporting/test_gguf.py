"""GGUF: mlx-lm's converter put right, tensor by tensor and token by token; llama.cpp's run as a program."""

import json
import sys
from itertools import pairwise
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.gguf import TokenType
from tiny_models import write_data
from tiny_sentencepiece import SPARE_ROWS, write_model

from ember_mlx import InputError
from ember_mlx.commands import export, fuse
from ember_mlx.exporting import gguf
from ember_mlx.exporting.inputs import load_fused
from ember_mlx.finetune import options
from ember_mlx.finetune.run import run

pytestmark = pytest.mark.usefixtures("eager")

TEXT = "the man and them. 3mand manthem and étude"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "llama", tied=False)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """A run that trained both tables and added a special token."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tokens.json").write_text('["<more>"]')
    words = {"--model": model, "--data": write_data(folder / "data"), "--adapter-path": folder / "adapters"}
    words |= {"--iters": 2, "--batch-size": 2, "--val-batches": 1, "--add-tokens": folder / "tokens.json"}
    words |= {"--learning-rate": 1e-2, "--table-learning-rate": 1e-2}
    run(options.parse([str(word) for pair in words.items() for word in pair]))
    return folder / "adapters"


@pytest.fixture
def converter(tmp_path):
    """A folder of llama.cpp whose converter is a script with this text."""

    def converter(text):
        (tmp_path / "llama.cpp").mkdir(exist_ok=True)
        (tmp_path / "llama.cpp" / gguf.SCRIPT).write_text(text)
        return str(tmp_path / "llama.cpp")

    return converter


def words(model, folder, *more):
    return ["--format", "gguf", "--model", str(model), "--save-path", str(folder), *map(str, more)]


def split_by_scores(text, tokens, scores):
    """As llama.cpp splits a text with SentencePiece's tokenizers: the best pair of neighbours first, then leftmost."""
    score = dict(zip(tokens, scores, strict=True))
    pieces = list("▁" + text.replace(" ", "▁"))
    while pairs := [(-score[a + b], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in score]:
        i = min(pairs)[1]
        pieces[i : i + 2] = ["".join(pieces[i : i + 2])]
    split = ([p] if p in score else [f"<0x{byte:02X}>" for byte in p.encode()] for p in pieces)
    return [token for tokens in split for token in tokens]


def test_mlx_lms_file_holds_what_was_trained_and_splits_text_alike(model, adapter, tmp_path, capsys):
    export.main(words(model, tmp_path / "out", "--adapter-path", adapter))
    assert "Writing GGUF with mlx-lm's converter, as f16\n" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "model-f16.gguf"]
    arrays, metadata = mx.load(str(tmp_path / "out" / "model-f16.gguf"), return_metadata=True)
    fused = load_fused(str(model), adapter)
    weights = {name: np.array(array.astype(mx.float32)) for name, array in fused.weights.items()}
    assert len(arrays) == len(weights)
    for name, weight in weights.items():
        found = np.array(arrays[gguf._ggml_name(name)].astype(mx.float32))
        if "q_proj" in name or "k_proj" in name:
            # ggml turns neighbours, Hugging Face the halves of a head of 8: j and 4 + j come to stand together.
            heads = weight.reshape(-1, 8, 32)
            weight = np.stack([heads[:, j // 2 + 4 * (j % 2)] for j in range(8)], axis=1).reshape(weight.shape)
        assert np.array_equal(found, weight.astype(np.float16).astype(np.float32)), name
    tokens, scores = metadata[gguf.TOKENS], metadata[gguf.SCORES].tolist()
    assert len(tokens) == len(weights["lm_head.weight"])
    assert tokens[-SPARE_ROWS + 1 :] == [f"[PAD{len(tokens) - SPARE_ROWS + 1 + i}]" for i in range(SPARE_ROWS - 1)]
    kinds = metadata[gguf.KINDS]
    assert kinds.dtype == mx.int32  # llama.cpp refuses unsigned ones
    assert kinds.tolist()[tokens.index("<more>")] == TokenType.CONTROL
    assert metadata["tokenizer.chat_template"] == fused.tokenizer.chat_template
    expected = fused.tokenizer.convert_ids_to_tokens(fused.tokenizer.encode(TEXT, add_special_tokens=False))
    assert split_by_scores(TEXT, tokens, scores) == expected
    assert split_by_scores(TEXT, tokens, [-1000.0] * len(tokens)) != expected  # as mlx-lm writes them


def test_llama_cpps_converter_gets_the_fused_model(model, adapter, converter, tmp_path, capsys):
    script = """
import pathlib, shutil, sys
folder, outfile, outtype = sys.argv[1], sys.argv[3], sys.argv[5]
assert sys.argv[2::2] == ["--outfile", "--outtype"]
shutil.copytree(folder, pathlib.Path(__file__).parent / "seen")
pathlib.Path(outfile).write_bytes(b"GGUF" + outtype.encode())
"""
    folder = converter(script)
    more = ["--adapter-path", adapter, "--llama-cpp", folder, "--outtype", "q8_0"]
    export.main(words(model, tmp_path / "out", *more))
    said = capsys.readouterr().out
    assert f"Writing GGUF with llama.cpp's converter {folder}/{gguf.SCRIPT}, as q8_0; the model has no token" in said
    assert (tmp_path / "out" / "model-q8_0.gguf").read_bytes() == b"GGUFq8_0"
    assert "FROM ./model-q8_0.gguf\n" in (tmp_path / "out" / "Modelfile").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "model-q8_0.gguf"]
    seen = load_fused(str(tmp_path / "llama.cpp" / "seen"), None)
    expected = load_fused(str(model), adapter)
    assert seen.weights.keys() == expected.weights.keys()
    assert all(mx.array_equal(array, seen.weights[name]) for name, array in expected.weights.items())
    assert "<more>" in seen.tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "import sys\nprint('Model X is not supported', file=sys.stderr)\nsys.exit(3)",
            "failed with 3: Model X is not",
        ),
        ("import nothing_of_the_kind", "No module named 'nothing_of_the_kind'; pip install -r"),
        ("pass", "wrote no GGUF file; give a newer llama.cpp"),
        (None, "has no convert_hf_to_gguf.py; give the folder of llama.cpp: git clone"),
    ],
    ids=["fails", "lacks", "writes nothing", "is not there"],
)
def test_a_converter_that_fails_is_one_line_and_nothing_is_written(model, converter, tmp_path, script, message):
    folder = converter(script) if script else str(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-f16.gguf").write_text("of before")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message) as error:
        export.main(words(model, tmp_path / "out", "--no-adapter", "--overwrite", "--llama-cpp", folder))
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "out" / "model-f16.gguf").read_text() == "of before"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "qwen3"}, "it is of type qwen3, not llama or mistral"),
        ({"head_dim": 16}, "it does not write head_dim 16"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "it does not write rope_scaling"),
        ({"layer_types": ["sliding_attention"] * 2}, "it does not write sliding windows"),
    ],
    ids=["type", "head_dim", "rope", "windows"],
)
def test_what_mlx_lms_converter_would_write_wrongly_goes_to_llama_cpps(
    model, converter, tmp_path, monkeypatch, changes, reason
):
    fused = load_fused(str(model), None)
    fused.config.update(changes)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match=reason):
        gguf.choose_converter(fused, None, "f16")
    folder = converter(f"#!{sys.executable}")
    (tmp_path / "llama.cpp" / gguf.SCRIPT).chmod(0o755)
    monkeypatch.setenv("PATH", folder)
    assert gguf.choose_converter(fused, None, "f16").words.startswith(f"llama.cpp's converter {folder}")


def test_other_types_biases_and_tokenizers_are_not_mlx_lms(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    biased = load_fused(str(write_model(tmp_path / "biased", attention_bias=True)), None)
    bytewise = load_fused(str(folders["quantized"]), None)
    assert not any("scales" in name for name in bytewise.weights)
    for fused, outtype, reason in (
        (biased, "f16", r"it has no name for model\.layers\.0\.self_attn\.q_proj\.bias"),
        (bytewise, "f16", "its tokenizer is not of SentencePiece's kind"),
        (bytewise, "bf16", "it writes f16 alone, not bf16"),
    ):
        with pytest.raises(InputError, match=reason):
            gguf.choose_converter(fused, None, outtype)


def test_a_tokenizer_that_llama_cpp_splits_otherwise_is_said_to_be_so(model, monkeypatch):
    fused = load_fused(str(model), None)
    merges = gguf._merges(fused)
    monkeypatch.setattr(gguf, "_merges", lambda _: merges[1:])
    assert "some words will be split in other places" in gguf.choose_converter(fused, None, "f16").words


def test_added_words_are_said_to_lose_their_spaces(model):
    fused = load_fused(str(model), None)
    fused.tokenizer._tokenizer.add_tokens(["zebra"])
    assert "around added words, such as 'zebra'" in gguf.choose_converter(fused, None, "f16").words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required: --format: one of peft, gguf, ollama; ember-mlx export --help"),
        (["--format", "peft", "--no-adapter"], "--no-adapter: peft holds adapters"),
        (["--format", "peft", "--llama-cpp", "x"], "--llama-cpp x: is of --format gguf, not peft"),
        (["--format", "ollama", "--base-model", "x"], "--base-model x: is of --format peft, not ollama"),
        (["--format", "ollama", "--outtype", "f32"], "--outtype f32: is of --format gguf, not ollama"),
        (["--format", "gguf", "--adapter-path", "nowhere"], "--adapter-path nowhere: there is no such folder"),
        (
            ["--format", "gguf", "--no-adapter", "--model", "m", "--save-path", "m"],
            "--save-path m: is the model itself",
        ),
    ],
    ids=json.dumps,
)
def test_options_that_do_not_fit_are_refused_before_anything_is_loaded(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        export.main(arguments)
    assert not list(tmp_path.iterdir())


def test_fuse_writes_the_same_file(model, adapter, tmp_path, capsys):
    paths = ["--adapter-path", str(adapter), "--export-gguf", "--save-path"]
    fuse.main(["--model", str(model), *paths, str(tmp_path / "fused")])
    assert "Warning" not in capsys.readouterr().out
    export.main(words(model, tmp_path / "out", "--adapter-path", adapter))
    files = (tmp_path / "fused" / "ggml-model-f16.gguf", tmp_path / "out" / "model-f16.gguf")
    (ours, kinds), (theirs, others) = (mx.load(str(file), return_metadata=True) for file in files)
    assert all(mx.array_equal(array, theirs[name]) for name, array in ours.items())
    assert mx.array_equal(kinds[gguf.KINDS], others[gguf.KINDS])


def test_a_full_disk_is_said_before_anything_is_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    for form in ("gguf", "ollama"):
        with pytest.raises(InputError, match="are to be written, and 1.00 kB are free there"):
            export.main(["--format", form, *words(model, tmp_path / "out", "--no-adapter")[2:]])
    assert not list(tmp_path.iterdir())
