"""New tokens: in the tokenizer, in the tables, in the adapter, in the fused model that stock mlx-lm loads."""

import json
import shutil

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from tiny_models import write_model
from tokenizers import decoders, normalizers

from ember_mlx import InputError, load
from ember_mlx.commands import fuse
from ember_mlx.finetune.added_tokens import add_tokens, read_tokens
from ember_mlx.finetune.base_models import load_base
from ember_mlx.finetune.run import run

pytestmark = pytest.mark.usefixtures("eager")

TOKENS = ["number", "日本語", "is it"]
TEXT = "the number is it 日本語!"


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens.txt"
    path.write_text("\n".join(TOKENS) + "\n")
    return path


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def logits(model, tokenizer):
    return model(mx.array([ids(tokenizer, TEXT)]))


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("untied", []),
        ("tied", []),
        ("untied", ["--fine-tune-type", "full"]),
        ("tied", ["--fine-tune-type", "full"]),
        # no layers: fusing LoRA into a quantized layer rounds it anew
        ("quantized", ["--num-layers", 0]),
    ],
)
def test_adapter_and_fused_model_know_the_new_tokens(parse, folders, tmp_path, tokens, base, words):
    run(parse("--add-tokens", tokens, "--table-learning-rate", 1e-2, *words, model=base))
    adapter, fused = tmp_path / "adapters", tmp_path / "fused"
    model, tokenizer = load(folders[base], adapter)
    assert [ids(tokenizer, token) for token in TOKENS] == [[260], [261], [262]]
    assert [number for number in ids(tokenizer, TEXT) if number >= 260] == [260, 262, 261]
    assert tokenizer.decode(ids(tokenizer, TEXT)) == TEXT
    detokenizer = tokenizer.detokenizer
    detokenizer.add_token(261)
    detokenizer.finalize()
    assert detokenizer.text == "日本語"

    fuse.main(["--model", str(folders[base]), "--adapter-path", str(adapter), "--save-path", str(fused)])
    stock, stock_tokenizer = mlx_lm.load(str(fused))
    assert json.loads((fused / "config.json").read_text())["vocab_size"] == 263
    assert [ids(stock_tokenizer, token) for token in TOKENS] == [[260], [261], [262]]
    expected = logits(model, tokenizer)
    assert expected.shape[-1] == 263
    assert mx.allclose(logits(stock, stock_tokenizer), expected, atol=1e-4)


@pytest.mark.parametrize("base", ["untied", "tied"])
def test_new_rows_start_at_the_mean_of_the_pieces_and_no_other_row_moves(parse, folders, tmp_path, tokens, base):
    run(parse("--add-tokens", tokens, "--table-learning-rate", 0, model=base))
    model, tokenizer, _ = load_base(folders[base])
    old = dict(tree_flatten(model.parameters()))
    saved = mx.load(str(tmp_path / "adapters" / "token_tables.safetensors"))
    assert len(saved) == (2 if base == "untied" else 1)
    for path, table in saved.items():
        assert mx.array_equal(table[:260], old[path])
        for i, token in enumerate(TOKENS):
            mean = old[path][mx.array(ids(tokenizer, token))].mean(axis=0)
            assert mx.allclose(table[260 + i], mean, atol=1e-6)


def test_a_byte_order_mark_is_no_part_of_the_first_token(tokens):
    tokens.write_bytes("\ufeffnumber\r\nis it\r\n".encode())
    assert read_tokens(tokens) == [("number", False), ("is it", False)]


def test_the_bias_of_a_head_grows_too(folders):
    model, tokenizer, config = load_base(folders["untied"])
    model.lm_head.bias = mx.arange(260).astype(mx.float32)
    pieces = mx.array(ids(tokenizer, "number"))
    add_tokens(model, tokenizer, config, [("number", False)], "here")
    assert model.lm_head.bias.tolist() == [*range(260), pieces.mean().item()]


def test_a_token_is_its_text_whatever_the_tokenizer_makes_of_other_text(folders):
    model, tokenizer, config = load_base(folders["untied"])
    tokenizer._tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer, _ = add_tokens(model, tokenizer, config, [("USB", False)], "here")
    assert ids(tokenizer, "USB") == [260]
    assert 260 not in ids(tokenizer, "usb")


def test_a_word_keeps_its_one_space_in_tokenizers_of_the_kind_of_sentencepiece(folders):
    model, tokenizer, config = load_base(folders["untied"])
    backend = tokenizer._tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Replace("▁", " ")
    tokenizer, _ = add_tokens(model, tokenizer, config, [("SELECT", False)], "here")
    encoded = ids(tokenizer, "a SELECT b")
    assert 260 in encoded
    others = tokenizer._tokenizer.convert_ids_to_tokens([number for number in encoded if number != 260])
    assert "".join(others).count("âĸģ") == 2  # the bytes of ▁, before a and before b: the token has its own


def test_special_tokens_come_from_a_json_list_and_are_left_out_when_asked_for(parse, folders, tmp_path):
    (tmp_path / "tokens.json").write_text('["<think>", "</think>"]')
    run(parse("--add-tokens", tmp_path / "tokens.json"))
    _, tokenizer = load(folders["untied"], tmp_path / "adapters")
    assert tokenizer.has_thinking
    encoded = ids(tokenizer, "<think>a</think>b")
    assert (encoded[0], encoded[2]) == (260, 261)
    assert tokenizer.decode(encoded, skip_special_tokens=True) == "ab"


def test_rows_to_spare_are_used_first(parse, tmp_path, tokens, capsys):
    padded = write_model(tmp_path / "padded", vocabulary=262)
    words = ["--model", padded, "--table-learning-rate", 0]
    tokens.write_text("number\nagain\n")
    run(parse("--add-tokens", tokens, *words, adapter="two"))
    assert "of 262 rows, which were to spare" in capsys.readouterr().out
    table = mx.load(str(tmp_path / "two" / "token_tables.safetensors"))["lm_head.weight"]
    model, tokenizer, _ = load_base(padded)
    assert table.shape == (262, 32)
    assert mx.allclose(table[260], model.lm_head.weight[mx.array(ids(tokenizer, "number"))].mean(axis=0), atol=1e-6)
    tokens.write_text("number\nagain\nmore\n")
    run(parse("--add-tokens", tokens, *words, adapter="three"))
    assert "the token tables grow from 262 to 263 rows" in capsys.readouterr().out


def test_a_table_that_does_not_train_grows_all_the_same(parse, folders, tmp_path, tokens, capsys):
    run(parse("--add-tokens", tokens, "--train-tables", "head"))
    assert "Warning: --train-tables head: the new rows of model.embed_tokens.weight are not" in capsys.readouterr().out
    model, tokenizer = load(folders["untied"], tmp_path / "adapters")
    assert logits(model, tokenizer).shape[-1] == 263


def test_a_run_with_new_tokens_resumes_bit_for_bit_and_no_other_tokens_do(parse, tmp_path, tokens):
    common = ["--add-tokens", tokens, "--table-learning-rate", 1e-2, "--iters"]
    run(parse(*common, 6, adapter="whole"))
    run(parse(*common, 3, adapter="longer"))
    tokens.rename(tmp_path / "moved.txt")
    moved = ["--add-tokens", tmp_path / "moved.txt", *common[2:], 6]
    run(parse(*moved, "--resume", adapter="longer"))
    for name in ("adapters.safetensors", "token_tables.safetensors"):
        whole, longer = (mx.load(str(tmp_path / adapter / name)) for adapter in ("whole", "longer"))
        assert whole.keys() == longer.keys()
        assert all(mx.array_equal(array, longer[path]) for path, array in whole.items())
    (tmp_path / "moved.txt").write_text("other\n")
    its_file = "give its file, --add-tokens FILE$"
    with pytest.raises(InputError, match=f"of a run that added other tokens: {its_file}"):
        run(parse(*moved, "--resume", adapter="longer"))
    for more in ([], ["--resume-with-changes"]):
        with pytest.raises(InputError, match=f"of a run that added tokens: {its_file}"):
            run(parse(*moved[2:], "--resume", *more, adapter="longer"))
    run(parse("--iters", 1, adapter="none"))
    with pytest.raises(InputError, match="that added no tokens: leave out --add-tokens$"):
        run(parse(*moved, "--resume", adapter="none"))


def test_a_test_alone_reads_the_data_with_the_new_tokens(parse, folders, tmp_path, tokens, capsys):
    run(parse("--add-tokens", tokens))
    data = tmp_path / "data"
    shutil.copytree(folders["data"], data)
    shutil.copy(data / "valid.jsonl", data / "test.jsonl")
    capsys.readouterr()
    run(parse("--test", "--data", data))
    assert "Test loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("number\n<user>\n", "tokens already: '<user>' (id 2); leave them out"),
        ("a\n", "tokens already: 'a' (id "),
        ("number\n\nmore\n", "token 2 is empty; remove that line"),
        ("number \n", "token 1, 'number ', begins or ends with a space"),
        ("number\nmore\nnumber\n", "'number' appears 2 times; keep one"),
        ("", "holds no token; put one a line"),
        (b"\xff\xfe", "cannot be read"),
        ("a\nb\nc\nnumber\n", "and 2 more; leave them out"),
        ("café\n", "would write 'café' as 'caf\ufffd'"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_tokens_that_cannot_be_added_are_refused_before_anything_is_written(parse, tmp_path, tokens, content, message):
    tokens.unlink()
    if content is not None:
        tokens.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as raised:
        run(parse("--add-tokens", tokens))
    assert message in str(raised.value)
    assert str(raised.value).startswith(f"--add-tokens {tokens}")
    assert not (tmp_path / "adapters").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('["<a>", "<a>"]', "'<a>' appears 2 times"),
        ('["<a>", ""]', "token 2 is empty"),
        ('{"<a>": 1}', "must hold a list of special tokens"),
        ('["<a>", 1]', "must hold a list of special tokens"),
        ("[", "cannot be read"),
    ],
)
def test_json_that_is_no_list_of_tokens_is_refused(parse, tmp_path, content, message):
    path = tmp_path / "tokens.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        run(parse("--add-tokens", path))


def test_options_under_which_new_rows_cannot_train_are_refused(parse, tokens):
    with pytest.raises(InputError, match="the new tokens would learn nothing with --train-tables none"):
        run(parse("--add-tokens", tokens, "--train-tables", "none"))


def test_a_tokenizer_that_cannot_grow_is_refused(folders, monkeypatch):
    model, tokenizer, config = load_base(folders["untied"])

    def refuses(*arguments, **keywords):
        raise NotImplementedError("adding tokens is not supported")

    for add, message in ((refuses, "adding tokens is not supported"), (lambda *a, **k: 0, "'number' is 6 tokens even")):
        monkeypatch.setattr(tokenizer._tokenizer, "add_tokens", add)
        with pytest.raises(InputError, match=f"here: this model's tokenizer cannot grow: {message}"):
            add_tokens(model, tokenizer, config, [("number", False)], "here")


def test_a_model_that_cannot_grow_is_refused(folders, monkeypatch):
    model, tokenizer, config = load_base(folders["untied"])
    model.lm_head.weight = mx.zeros((270, 32))
    with pytest.raises(
        InputError, match="weight of 260 rows, lm_head.weight of 270 rows: new tokens need tables of one"
    ):
        add_tokens(model, tokenizer, config, [("number", False)], "here")
    model, tokenizer, config = load_base(folders["untied"])
    monkeypatch.setattr(type(model), "__init__", lambda self, args: 1 / 0)
    with pytest.raises(InputError, match="here: this model cannot have more tokens: ZeroDivisionError"):
        add_tokens(model, tokenizer, config, [("number", False)], "here")


def test_a_new_run_from_an_old_adapter_needs_its_tokens(parse, tmp_path, tokens):
    run(parse("--add-tokens", tokens, adapter="old"))
    old = ["--resume-adapter-file", tmp_path / "old" / "adapters.safetensors"]
    run(parse("--add-tokens", tokens, *old, adapter="new"))
    tokens.write_text("\n".join(reversed(TOKENS)))
    for words in ([], ["--add-tokens", tokens]):
        with pytest.raises(InputError, match="its run added other tokens"):
            run(parse(*words, *old, adapter="other"))


def test_an_adapter_whose_tokens_are_not_of_this_model_is_refused(parse, folders, tmp_path, tokens):
    run(parse("--add-tokens", tokens))
    path = tmp_path / "adapters" / "adapter_config.json"
    config = json.loads(path.read_text())
    for added, message in (
        ([{"content": "number", "special": False, "id": 999}], "'number' has id 999 there, but 260 here"),
        ([{"content": "<s>", "special": False, "id": 0}], "tokens already: '<s>'"),
        ([{"content": "number"}], "added_tokens must hold content, special, id"),
        ("number", "added_tokens is of type str, not list"),
    ):
        path.write_text(json.dumps(config | {"added_tokens": added}))
        with pytest.raises(InputError, match=message):
            load(folders["untied"], tmp_path / "adapters")


@pytest.mark.parametrize("content", ["a\ud800b", "\udfff"])
def test_half_of_a_surrogate_pair_is_refused_in_files_and_adapters(parse, folders, tmp_path, content):
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps(["<new>", content]))
    with pytest.raises(InputError, match=r"--add-tokens .*: '.*ud.*' holds half of a surrogate pair; leave it out"):
        run(parse("--add-tokens", path))
    assert not (tmp_path / "adapters").exists()
    run(parse("--iters", 1))
    config = tmp_path / "adapters" / "adapter_config.json"
    added = [{"content": content, "special": True, "id": 260}]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"added_tokens": added}))
    with pytest.raises(InputError, match=r"adapter .*: added_tokens: '.*ud.*' holds half of a surrogate pair"):
        load(folders["untied"], adapter_path=tmp_path / "adapters")
