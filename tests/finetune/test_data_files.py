"""Every file of rows, in every layout of keys: what is trained on is the same, and what is broken is named."""

import csv
import json
import sys
from itertools import product

import pytest
from mlx_lm.utils import load_tokenizer

from ember_mlx import InputError
from ember_mlx.finetune.data import check_data_folder, load_data
from ember_mlx.finetune.data_files import FORMATS

QUESTIONS = [f"What is {i}, or é?\n\nSay it" for i in range(24)]
TURNS = [[("human", question), ("gpt", f"It's {i}")] for i, question in enumerate(QUESTIONS)]
ROLES = {"human": "user", "gpt": "assistant"}
CHATS = [[{"role": ROLES[speaker], "content": text} for speaker, text in turns] for turns in TURNS]
LAYOUTS = {
    "prompt": [{"prompt": question, "completion": answer} for (_, question), (_, answer) in TURNS],
    "named": [{"q": question, "a": answer} for (_, question), (_, answer) in TURNS],
    "questions": [{"question": question, "answer": answer} for (_, question), (_, answer) in TURNS],
    "alpaca": [
        {"instruction": question.split("\n\n")[0], "input": question.split("\n\n")[1], "output": answer}
        for (_, question), (_, answer) in TURNS
    ],
    "messages": [{"messages": chat} for chat in CHATS],
    "sharegpt": [{"conversations": [{"from": who, "value": text} for who, text in turns]} for turns in TURNS],
    "text": [{"text": question} for question in QUESTIONS],
    "named text": [{"body": question} for question in QUESTIONS],
}
FLAGS = {
    "named": ["--prompt-feature", "q", "--completion-feature", "a"],
    "named text": ["--text-feature", "body"],
    "sharegpt": ["--chat-feature", "conversations"],  # which it need not
}
ENDS = ["\n", "\r\n", "\r"]


def write(path, rows, end="\n", mark=b"", last=""):
    """The rows in the format that the name of the file says."""
    if path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), path)
        return path
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
                for row in rows
            )
        text = path.read_text(encoding="utf-8")
    elif path.suffix == ".json":
        text = json.dumps(rows, indent=1)
    else:
        text = "\n".join(json.dumps(row) for row in rows) + "\n"
    path.write_bytes(mark + (text + last).replace("\n", end).encode())
    return path


@pytest.fixture
def tokenizer(folders):
    return load_tokenizer(folders["untied"])


@pytest.fixture
def load(parse, tokenizer):
    def load(data, *arguments):
        args = parse("--data", data, "--batch-size", 1, "--valid-fraction", 0, *arguments)
        rows = check_data_folder(args)
        found = load_data(args, tokenizer)
        assert rows in (len(found[0]), None)  # known before there is a tokenizer, but of the hub
        return found

    return load


@pytest.mark.parametrize(("end", "layout"), list(product(FORMATS, LAYOUTS)))
def test_every_format_and_layout_is_trained_on_as_mlx_lms_own(tmp_path, load, end, layout):
    found = load(write(tmp_path / f"rows{end}", LAYOUTS[layout]), *FLAGS.get(layout, []))
    (tmp_path / "own").mkdir()
    write(tmp_path / "own" / "train.jsonl", LAYOUTS["text" if "text" in layout else "prompt"])
    assert found[0].token_checksum == load(tmp_path / "own")[0].token_checksum
    assert list(map(len, found)) == [24, 0, 0]


@pytest.mark.parametrize(("end", "ending"), list(product([".jsonl", ".json", ".csv"], ENDS)))
def test_marks_and_ends_of_lines_are_no_part_of_rows(tmp_path, load, end, ending):
    rows = [{"text": "a b"}, {"text": "c d"}]
    path = write(
        tmp_path / f"rows{end}", rows, ending, mark=b"\xef\xbb\xbf", last="\n \n\n" if end != ".csv" else "\n\n"
    )
    assert [dict(load(path)[0][i]) for i in range(2)] == rows


@pytest.mark.parametrize("end", [end for end in FORMATS if end != ".parquet"])
def test_a_folder_may_hold_any_of_them(tmp_path, load, end):
    write(tmp_path / f"train{end}", LAYOUTS["prompt"])
    write(tmp_path / f"valid{end}", LAYOUTS["alpaca"][:3])  # of another layout than the training set
    assert list(map(len, load(tmp_path))) == [24, 3, 0]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters_of_csv_are_seen(tmp_path, load, delimiter):
    (tmp_path / "rows.csv").write_text(f'prompt{delimiter}completion\n"a, b"{delimiter}c\n')
    assert load(tmp_path / "rows.csv")[0][0] == {"prompt": "a, b", "completion": "c"}


BAD = {
    ("jsonl", '{"text": "a"}\n\n{"text": "b"}'): "rows.jsonl: line 2 is not JSON",
    ("jsonl", ""): "rows.jsonl: is empty",
    ("jsonl", '{"text": "a"}\n{"text": 3}'): "rows.jsonl: line 2 has no text that can be trained on",
    ("json", "[{"): "rows.json: is not JSON",
    ("json", "3"): "rows.json: holds a int; it must hold a list of rows",
    ("json", "[]"): "rows.json: is empty",
    ("json", '[{"text": "a"}, 3]'): "rows.json: row 2 has no text, which the first line has",
    ("json", '{"text": "a"}\n{"text": '): "rows.json: line 2 is not JSON",
    ("csv", "text\n"): "rows.csv: is empty",
    ("csv", "prompt,completion\na\n"): "rows.csv: line 2 has 1 cells, line 1 has 2",
    ("csv", 'prompt,completion\n"a\nb",c\nd,e,f\n'): "rows.csv: line 4 has 3 cells",
    ("csv", 'text\na\n"b\nc\n'): "rows.csv: line 3 is not CSV",
    ("csv", "text,text\na,b\n"): "rows.csv: line 1 names a column twice",
    (
        "csv",
        "to ask,reply\na,b\n",
    ): "line 2 is of no kind .* it has to ask, reply; .* such as --prompt-feature 'to ask' --completion-feature reply",
    ("csv", "messages\n[{\n"): "rows.csv: line 2 has messages that are not JSON",
    ("txt", "a"): "rows.txt: is no file of rows; use .jsonl, .json, .csv, .parquet, or a folder",
    ("parquet", "a"): "rows.parquet: .*(pip install|is no .parquet file)",
    ("json", '[{"instruction": "a", "output": null}]'): "row 1 has a output of null",
    ("json", '[{"instruction": "a", "input": 3, "output": "b"}]'): "row 1 has an input of type int",
    (
        "json",
        '[{"conversations": [{"from": "bird", "value": "a"}]}]',
    ): "row 1 has a turn from 'bird', which must be one",
    ("json", '[{"conversations": [{"from": "human"}]}]'): "row 1 has a turn from human without a value",
    ("json", '[{"conversations": []}]'): "row 1 has no conversations that can be trained on",
}


@pytest.mark.parametrize(("kind", "text"), BAD)
def test_what_is_broken_is_named(tmp_path, load, kind, text):
    path = tmp_path / f"rows.{kind}"
    path.write_text(text)
    with pytest.raises(InputError, match=BAD[kind, text]) as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mark", [b"\xff\xfe", b"\xfe\xff"])
@pytest.mark.parametrize("end", ["jsonl", "json", "csv"])
def test_text_that_is_not_utf_8_is_named(tmp_path, load, end, mark):
    path = tmp_path / f"rows.{end}"
    path.write_bytes(mark + b"a\0")
    with pytest.raises(InputError, match="is text in UTF-16: save it as UTF-8"):
        load(path)


def test_a_missing_file_is_no_data_set_of_the_hub(load, tmp_path):
    for name in ("rows.csv", str(tmp_path / "rows.parquet")):
        with pytest.raises(InputError, match=f"--data {name}: this file does not exist"):
            load(name)
    (tmp_path / "questions.csv").touch()
    with pytest.raises(InputError, match="does not exist .did you mean '.*/questions.csv'"):
        load(tmp_path / "question.csv")
    with pytest.raises(InputError, match="--test: .* is one file; give a folder with test.csv"):
        load(write(tmp_path / "rows.csv", LAYOUTS["text"]), "--test")


def test_validation_rows_are_split_off_by_the_seed(tmp_path, load, capsys):
    path = write(tmp_path / "rows.csv", LAYOUTS["prompt"])

    def split(*arguments):
        train, valid, _ = load(path, *arguments)
        parts = [[rows[i]["prompt"] for i in range(len(rows))] for rows in (train, valid)]
        assert sorted(parts[0] + parts[1]) == sorted(QUESTIONS)
        return parts, (train.checksum, valid.checksum)

    quarter, again = split("--valid-fraction", 0.25), split("--valid-fraction", 0.25)
    assert quarter == again
    assert len(quarter[0][1]) == 6
    assert "6 of 24 rows are split off for validation, by --seed 0 (--valid-fraction 0.25)" in capsys.readouterr().out
    # What resume compares tells another seed, and another fraction.
    for other in (["0.25", "--seed", 1], ["0.5"]):
        assert split("--valid-fraction", *other)[1] != quarter[1]


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ([], 1),
        (["--batch-size", 4], 4),  # the least that makes a batch
        (["--batch-size", 5], 0),  # too many of so few
        (["--train-tables", "none"], 0),  # as mlx-lm
        (["--train-tables", "none", "--valid-fraction", 0.5], 12),
    ],
)
def test_how_many_are_split_off(tmp_path, parse, tokenizer, arguments, size, capsys):
    path = write(tmp_path / "rows.jsonl", LAYOUTS["prompt"])
    _, valid, _ = load_data(parse("--data", path, "--batch-size", 1, *arguments), tokenizer)
    assert len(valid) == size
    said = capsys.readouterr().out
    assert ("training without validation" in said) == (not size)
    assert ("a batch of 5; --batch-size 4 does)" in said) == (arguments == ["--batch-size", 5])


def test_a_row_that_is_split_off_keeps_its_line(tmp_path, load, tokenizer):
    rows = [dict(row) for row in LAYOUTS["prompt"]]
    for i in (3, 17):
        rows[i]["prompt"] = "a\ud800"
        path = write(tmp_path / "rows.jsonl", rows)
        with pytest.raises(InputError, match=f"rows.jsonl: line {i + 1} cannot be tokenized"):
            load(path, "--valid-fraction", 0.5)
        rows[i]["prompt"] = "a"


def test_masked_prompts_prefer_alpaca_to_its_text(tmp_path, load):
    rows = [row | {"text": "all of it"} for row in LAYOUTS["alpaca"]]
    path = write(tmp_path / "rows.json", rows)
    assert load(path)[0][0].keys() == rows[0].keys()  # mlx-lm's order
    assert load(path, "--mask-prompt")[0][0].keys() == {"prompt", "completion"}


def test_data_of_the_hub_is_read_in_every_layout(monkeypatch, load):
    class Hub:
        @staticmethod
        def load_dataset(name):
            assert name == "owner/name"
            return {"train": LAYOUTS["alpaca"], "validation": LAYOUTS["alpaca"][:2]}

    monkeypatch.setattr("ember_mlx.finetune.data.find_spec", lambda package: package)
    monkeypatch.setitem(sys.modules, "datasets", Hub)
    train, valid, _ = load("owner/name")
    assert (len(train), len(valid)) == (24, 2)
