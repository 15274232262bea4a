"""Data folders: what is broken is named by its line."""

import json
from types import SimpleNamespace

import pytest

from ember_mlx import InputError
from ember_mlx.finetune.data import check_data_folder, load_data

GOOD = json.dumps({"prompt": "a", "completion": "b"})


def check(folder, train="", valid=None, **options):
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text(train)
    if valid is not None:
        (folder / "valid.jsonl").write_text(valid)
    check_data_folder(SimpleNamespace(**{"data": str(folder), "train": True, "test": False} | options))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "completion": ', "line 2 is not JSON"),
        ("", "line 2 is not JSON"),
        ('{"prompt": "a"}', "line 2 has no completion, which the first line has"),
        ('{"prompt": 7, "completion": "b"}', "line 2 has no prompt"),
        ('["prompt", "completion"]', "line 2 has no prompt"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    with pytest.raises(InputError, match=f"train.jsonl {message}"):
        check(tmp_path, f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(InputError, match=f"valid.jsonl {message}"):
        check(tmp_path, GOOD, valid=f"{GOOD}\n{line}\n")


def test_the_kind_of_rows_is_that_of_the_first_line(tmp_path):
    check(tmp_path, '{"messages": [{"role": "user", "content": "a"}]}\n')
    check(tmp_path, '{"text": "a"}\n{"text": "b", "source": "c"}\n')
    check(tmp_path, '{"prompt": "", "completion": "a"}\n')
    for kind, nothing in (("text", ""), ("messages", [])):
        with pytest.raises(InputError, match=f"line 2 has an empty {kind}"):
            check(tmp_path, "".join(json.dumps({kind: value}) + "\n" for value in ("a", nothing)))
    check(tmp_path, '{"question": "a", "completion": "b"}', prompt_feature="question")
    with pytest.raises(InputError, match="line 1 is of no kind that mlx-lm trains on: it needs the keys prompt and"):
        check(tmp_path, '{"question": "a"}')
    with pytest.raises(InputError, match=r"train.jsonl is empty"):
        check(tmp_path, "")


def test_bytes_that_are_not_text_are_named(tmp_path):
    tmp_path.joinpath("train.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(InputError, match="line 2 is not JSON"):
        check_data_folder(SimpleNamespace(data=str(tmp_path), train=True, test=False))


def test_missing_folders_and_files_are_named(tmp_path):
    for name, message in (("nowhere/at/all", "there is no such folder"), ("", "there is no train.jsonl in it")):
        with pytest.raises(InputError, match=message):
            check_data_folder(SimpleNamespace(data=str(tmp_path / name), train=True, test=False))
    check_data_folder(SimpleNamespace(data="owner/dataset-of-the-hub", train=True, test=False))


def test_fewer_rows_than_a_batch_is_refused(tmp_path):
    check(tmp_path, f"{GOOD}\n" * 3, valid=f"{GOOD}\n")
    args = SimpleNamespace(data=str(tmp_path), train=True, test=False, batch_size=4)
    with pytest.raises(InputError, match="the train set has 3 rows, fewer than --batch-size 4"):
        load_data(args, tokenizer=None)
    args.batch_size = 2
    with pytest.raises(InputError, match="the valid set has 1 rows, fewer than --batch-size 2: use --batch-size 1"):
        load_data(args, tokenizer=None)
    args.mask_prompt = True
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match="Prompt masking not supported for text dataset"):
        load_data(args, tokenizer=None)
