"""Data folders: what is broken is named by its line."""

import json
from types import SimpleNamespace

import pytest

from ember_mlx import InputError
from ember_mlx.finetune.data import check_data_folder, load_data
from ember_mlx.finetune.options import defaults

GIVEN = ("data", "batch_size")
DEFAULTS = {name: value for name, value in defaults().items() if name not in GIVEN}
DEFAULTS |= {"train": True, "test": False, "mask_prompt": False}
GOOD = json.dumps({"prompt": "a", "completion": "b"})


def check(folder, train="", valid=None, **options):
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text(train)
    if valid is not None:
        (folder / "valid.jsonl").write_text(valid)
    check_data_folder(SimpleNamespace(**DEFAULTS | {"data": str(folder), "batch_size": 1} | options))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "completion": ', "line 2 is not JSON"),
        ("", "line 2 is not JSON"),
        ('{"prompt": "a"}', "line 2 has no completion, which the first line has"),
        ('["prompt", "completion"]', "line 2 has no prompt"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    with pytest.raises(InputError, match=f"train.jsonl {message}"):
        check(tmp_path, f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(InputError, match=f"valid.jsonl {message}"):
        check(tmp_path, GOOD, valid=f"{GOOD}\n{line}\n{GOOD}\n")


def test_the_kind_of_rows_is_that_of_the_first_line(tmp_path):
    check(tmp_path, '{"messages": [{"role": "user", "content": "a"}]}\n')
    check(tmp_path, '{"text": "a"}\n{"text": "b", "source": "c"}\n')
    check(tmp_path, '{"prompt": "", "completion": ["a"]}\n')  # up to the chat template, as in mlx-lm
    for kind, something, nothing in (("text", "a", ""), ("messages", [{"role": "user", "content": "a"}], [])):
        with pytest.raises(InputError, match=f"line 2 has no {kind} that can be trained on"):
            check(tmp_path, "".join(json.dumps({kind: value}) + "\n" for value in (something, nothing)))
    check(tmp_path, '{"question": "a", "completion": "b"}', prompt_feature="question")
    with pytest.raises(InputError, match="--prompt-feature Q: .* line 1 has no such key; it has text; write"):
        check(tmp_path, '{"text": "a"}', prompt_feature="Q")
    with pytest.raises(InputError, match="--prompt-feature Question: .* no such key .did you mean 'question'"):
        check(tmp_path, '{"question": "a", "answer": "b"}', prompt_feature="Question")
    with pytest.raises(InputError, match="line 1 is of no kind that mlx-lm trains on: it needs the keys prompt and"):
        check(tmp_path, '{"question": "a"}')
    with pytest.raises(InputError, match=r"train.jsonl is empty"):
        check(tmp_path, "")


def test_chat_rows_need_roles_and_with_a_masked_prompt_an_answer(tmp_path):
    one, two = ([{"role": role, "content": "a"} for role in roles] for roles in (["user"], ["user", "assistant"]))
    check(tmp_path, json.dumps({"messages": one}))
    check(tmp_path, json.dumps({"messages": two}), mask_prompt=True)
    with pytest.raises(InputError, match="line 1 has one message, of which --mask-prompt leaves nothing"):
        check(tmp_path, json.dumps({"messages": one}), mask_prompt=True)
    with pytest.raises(InputError, match="line 1 has a message without a role"):
        check(tmp_path, json.dumps({"messages": [{"content": "a"}]}))


def test_text_has_no_prompt_to_mask(tmp_path):
    with pytest.raises(InputError, match="--mask-prompt: .*line 1 has text and so no prompt"):
        check(tmp_path, '{"text": "a"}', mask_prompt=True)


def test_bytes_that_are_not_text_are_named(tmp_path):
    tmp_path.joinpath("train.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(InputError, match="line 2 is not JSON .'utf-8' codec"):
        check_data_folder(SimpleNamespace(**DEFAULTS, data=str(tmp_path)))


def test_missing_folders_and_files_are_named(tmp_path):
    for name, message in (("nowhere/at/all", "this folder does not exist"), ("", "it has no train.jsonl")):
        with pytest.raises(InputError, match=message):
            check_data_folder(SimpleNamespace(**DEFAULTS, data=str(tmp_path / name)))


def test_data_sets_of_the_hub_need_the_package_that_loads_them(monkeypatch):
    for name in ("owner/dataset-of-the-hub", "imdb"):
        args = SimpleNamespace(**DEFAULTS, data=name)
        monkeypatch.setattr("ember_mlx.finetune.data.find_spec", lambda package: None)
        with pytest.raises(InputError, match=f"{name}: is no file or folder here, and.*pip install 'mlx-lm.train.'"):
            check_data_folder(args)
        monkeypatch.setattr("ember_mlx.finetune.data.find_spec", lambda package: package)
        check_data_folder(args)
    args.hf_dataset = {"path": "imdb"}
    check_data_folder(args)
    with pytest.raises(InputError, match="this folder does not exist"):
        check_data_folder(SimpleNamespace(**DEFAULTS, data="./imdb"))


class Template:
    """As much of a tokenizer as mlx-lm's data sets ask for."""

    def apply_chat_template(self, messages, **options):
        if messages[0]["content"] == "broken":
            raise ValueError("this tokenizer has no\nchat template")
        return [1, 2, 3]


def test_fewer_rows_than_a_batch_is_refused(tmp_path):
    check(tmp_path, f"{GOOD}\n" * 3, valid=f"{GOOD}\n")
    args = SimpleNamespace(**DEFAULTS, data=str(tmp_path), batch_size=4)
    with pytest.raises(InputError, match="the train set has 3 rows, fewer than --batch-size 4"):
        load_data(args, Template())
    args.batch_size = 2
    with pytest.raises(InputError, match="the valid set has 1 row, fewer than --batch-size 2: lower it to at most 1"):
        load_data(args, Template())


def test_a_row_that_the_tokenizer_refuses_is_an_input_error(tmp_path):
    check(tmp_path, '{"prompt": "broken", "completion": "a"}')
    with pytest.raises(InputError, match="this tokenizer has no chat template"):
        load_data(SimpleNamespace(**DEFAULTS, data=str(tmp_path), batch_size=1), Template())
