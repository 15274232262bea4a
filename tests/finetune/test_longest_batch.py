"""The longest batch, against those that mlx-lm itself makes."""

import json

import pytest
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import iterate_batches
from mlx_lm.utils import load_tokenizer

from ember_mlx.finetune import longest_batch as module
from ember_mlx.finetune.data import load_data
from ember_mlx.finetune.longest_batch import longest_batches
from ember_mlx.shared.errors import InputError


@pytest.fixture
def tokenizer(folders):
    return load_tokenizer(folders["untied"])


@pytest.fixture
def data(tmp_path):
    """12 training rows of 10 to 21 bytes. Two with a key more, which mlx-lm's order puts last: of 200 and of 100."""
    rows = [{"text": "x" * (10 + i)} for i in range(12)]
    rows[3] = {"text": "x" * 100, "source": "a book"}
    rows[4] = {"text": "x" * 200, "source": "a book"}
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "valid.jsonl").write_text("".join(json.dumps({"text": "y" * 500}) + "\n" for _ in range(6)))
    return folder


@pytest.mark.parametrize("batch_size", [1, 5, 11])  # 5 and 11 leave out rows, of which one is the longest
@pytest.mark.parametrize("max_seq_length", [2048, 129, 128, 101, 100, 33])
def test_it_is_the_longest_that_mlx_lm_makes(parse, tokenizer, data, batch_size, max_seq_length):
    if batch_size > 6:
        (data / "valid.jsonl").unlink()
    args = parse("--data", data, "--batch-size", batch_size, "--max-seq-length", max_seq_length)
    found = longest_batches(args, tokenizer)
    assert list(found) == ["train", "valid"][: 1 + (batch_size <= 6)]
    for name, rows in zip(found, load_data(args, tokenizer), strict=False):
        batches = iterate_batches(CacheDataset(rows), batch_size, max_seq_length)
        assert found[name].width == max(batch.shape[1] for batch, _ in batches)
        assert found[name].is_cut == (found[name].longest > max_seq_length)


def test_no_more_is_tokenized_than_is_needed_or_allowed(parse, tokenizer, data, monkeypatch):
    short = parse("--data", data, "--max-seq-length", 50)
    assert longest_batches(short, tokenizer)["train"].tokenized == 1  # the others cannot make it longer
    whole = parse("--data", data)
    assert longest_batches(whole, tokenizer)["train"].tokenized == 12
    monkeypatch.setattr(module, "CHARACTERS", 380)
    few = longest_batches(whole, tokenizer)["train"]
    assert (few.tokenized, few.rows, few.longest) == (2, 12, 201)
    monkeypatch.setattr(module, "CHARACTERS", 1)
    assert longest_batches(whole, tokenizer)["train"].tokenized == 1


def test_what_train_would_refuse_is_refused_and_nothing_is_printed(parse, tokenizer, data, capsys):
    with pytest.raises(InputError, match="the valid set has 6 rows, fewer than --batch-size 7"):
        longest_batches(parse("--data", data, "--batch-size", 7), tokenizer)
    (data / "valid.jsonl").unlink()
    longest_batches(parse("--data", data), tokenizer)
    assert capsys.readouterr().out == ""
    row = {"messages": [{"role": "user", "content": "x"}]}
    (data / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (row, row | {"tools": [5]})))
    with pytest.raises(InputError, match=r"train.jsonl line 2 cannot be tokenized \(.*: fix or remove that line"):
        longest_batches(parse("--data", data, "--batch-size", 1), tokenizer)
    tokenizer._tokenizer.chat_template = "{# nothing #}"
    with pytest.raises(InputError, match=r"train.jsonl line 1: the chat template makes nothing of it"):
        longest_batches(parse(), tokenizer)
