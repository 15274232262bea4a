"""`ember-mlx data` says what is learned: as mlx-lm's own loss masks it, and as the tokenizer writes it."""

import json
import logging
import re

import mlx.core as mx
import pytest
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import default_loss, iterate_batches
from mlx_lm.utils import load_tokenizer

from ember_mlx import InputError
from ember_mlx.commands import data
from ember_mlx.finetune.data import load_data
from ember_mlx.finetune.data_report import count
from ember_mlx.finetune.rows import spans_of

ROWS = [{"prompt": "q" * n, "completion": "a" * (n % 5 + 1)} for n in (1, 9, 30, 70)]


@pytest.fixture
def path(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "rows.jsonl"


@pytest.fixture
def show(folders, path, capsys):
    def show(*arguments):
        data.main([str(word) for word in (path, "--model", folders["untied"], "--batch-size", 1, *arguments)])
        return capsys.readouterr().out

    return show


@pytest.mark.parametrize("mask", [[], ["--mask-prompt"]])
@pytest.mark.parametrize("max_seq_length", [8, 32, 65, 512])
def test_the_learned_tokens_are_those_of_mlx_lms_loss(parse, folders, path, mask, max_seq_length):
    args = parse("--data", path, "--batch-size", 1, "--max-seq-length", max_seq_length, "--valid-fraction", 0, *mask)
    rows, _, _ = load_data(args, load_tokenizer(folders["untied"]))
    counted = 0
    theirs, _, _ = load_data(args | {"train_tables": "none"}, load_tokenizer(folders["untied"]))
    for batch, lengths in iterate_batches(CacheDataset(theirs), 1, max_seq_length):
        _, tokens = default_loss(lambda inputs: mx.zeros((*inputs.shape, 2**18)), batch, lengths)
        length = int(lengths[0, 1])
        padding = batch.shape[1] > length and int(lengths[0, 0]) <= length  # which mlx-lm's loss counts
        counted += int(tokens.item()) - padding
    found = count(rows, max_seq_length)
    processed = [rows.process(row) for row in ROWS]
    sizes = [len(tokens) for tokens, _ in processed]
    assert found.learned == counted
    assert found.tokens == sum(sizes)
    assert (found.shortest, found.longest) == (min(sizes), max(sizes))
    assert found.truncated == sum(length > max_seq_length for length in sizes)
    assert found.masked == len(ROWS) * bool(mask)
    assert found.empty == sum(not spans_of(*each, max_seq_length) for each in processed)
    assert (found.empty > 0) == bool(mask and max_seq_length < 512)


def test_the_tokenizers_own_limit_warns_of_no_errors(parse, folders, path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers.tokenization_utils_base"), "handlers", [caplog.handler])
    load_data(parse("--data", path, "--batch-size", 1), load_tokenizer(folders["untied"], {"model_max_length": 8}))
    assert not caplog.messages


def test_what_is_learned_is_marked(show):
    shown = re.findall("⟦(.*?)⟧", show("--mask-prompt", "--show", 9).partition("stands in ⟦ ⟧")[2], re.S)
    assert len(shown) == 4
    for row, text in zip(ROWS, shown, strict=True):
        assert text.startswith(row["completion"])
        assert "q" not in text
    assert "(nothing is learned)" in show("--mask-prompt", "--max-seq-length", 16, "--show", 4)
    assert "Warning: in 2 of 4 train rows nothing is learned" in show("--mask-prompt", "--max-seq-length", 30)
    assert "---" in show()
    assert "⟦" not in show("--show", 0)


ASKED = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("row", "is_empty"),
    [
        ({"prompt": "q", "completion": "a"}, False),
        ({"prompt": "q", "completion": ""}, True),
        ({"prompt": "q", "completion": " \n"}, True),
        ({"prompt": "", "completion": "a"}, False),
        *(
            (
                {"messages": [ASKED, {"role": "assistant"} | turn, ASKED, {"role": "assistant", "content": "a"}]},
                is_empty,
            )
            for turn, is_empty in (
                ({"content": ""}, True),
                ({"content": "a"}, False),
                ({"content": "", "reasoning_content": "a"}, False),
                ({"content": "", "tool_calls": [{"name": "f"}]}, False),
                ({"content": "", "tool_calls": []}, True),
            )
        ),
    ],
)
@pytest.mark.parametrize("mask", [[], ["--mask-prompt"]])
def test_empty_answers_are_warned_of_by_the_name_of_the_first(show, path, row, is_empty, mask):
    full = {"messages": [ASKED, {"role": "assistant", "content": "a"}]} if "messages" in row else ROWS[0]
    path.write_text("".join(json.dumps(each) + "\n" for each in (full, row, row)))
    shown = show("--valid-fraction", 0, *mask)
    warning = f"Warning: --data {path}: line 2 has an empty answer, 2 of 3 rows in all"
    assert (warning in shown) == is_empty
    assert ("empty answer" in shown) == is_empty


def test_what_cannot_be_is_refused(show, folders, tmp_path):
    with pytest.raises(InputError, match="--show -1: must be at least 0"):
        show("--show", -1)
    with pytest.raises(InputError, match="DATA is required"):
        data.main(["--model", str(folders["untied"])])
    with pytest.raises(InputError, match=r"--model .*: this folder has no config.json; give a model's folder"):
        show("--model", tmp_path)


def test_a_model_that_nobody_named_is_said_to_be_the_default(monkeypatch, path):
    def offline(*arguments):
        raise OSError("no network")

    monkeypatch.setattr(data, "load_tokenizer", offline)
    with pytest.raises(InputError, match=r"--model \S+ \(the default\): its tokenizer cannot be loaded: .*no network"):
        data.main([str(path)])


def test_rows_that_are_cut_are_told_once_with_the_longest_and_the_remedy(show, path):
    assert (
        "Warning: --max-seq-length 32 cuts 2 of 4 train rows; the longest has 75 tokens, and what is cut is left out"
        in (short := show("--max-seq-length", 32))
    )
    assert short.count("--max-seq-length") == 1
    assert "Warning: --max-seq-length" not in show("--max-seq-length", 75)
