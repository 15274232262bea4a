"""What `ember-mlx plan` reads beside the options: the rows of the data, new tokens, and why it could not."""

import json
import shutil
from pathlib import Path

import pytest
from mlx_lm.utils import load_tokenizer
from tiny_models import write_data, write_model

from ember_mlx.commands.plan import main
from ember_mlx.finetune.added_tokens import add_asked_tokens
from ember_mlx.finetune.base_models import load_base
from ember_mlx.finetune.data import load_data
from ember_mlx.finetune.options import defaults
from ember_mlx.planner import advice, alternatives, plan
from ember_mlx.planner.inputs import read_inputs, with_rows_of_data
from ember_mlx.planner.savings import savings
from ember_mlx.shared.errors import InputError
from ember_mlx.token_tables import find_token_tables


@pytest.fixture
def tokens(tmp_path):
    path = tmp_path / "tokens.txt"
    path.write_text("foo\nbar\nbaz\n")
    return path


@pytest.fixture
def long_validation(tmp_path):
    """A data folder whose validation rows are far longer than those that train."""
    folder = write_data(tmp_path / "long", kind="text")
    (folder / "valid.jsonl").write_text("".join(json.dumps({"text": "y" * 900}) + "\n" for _ in range(4)))
    return folder


def test_rows_are_as_long_as_those_of_the_data(parse, folders):
    args = parse("--iters", 6, data="text")
    inputs = with_rows_of_data(args, read_inputs(args))
    assert inputs.run.length == 32  # 22 bytes and the end, padded
    assert not inputs.run.evaluation_length
    train = folders["text"] / "train.jsonl"
    assert inputs.assumptions == [f"32 tokens: batches of {train} have rows of up to 23, and mlx-lm pads them"]


def test_rows_that_are_cut_are_said_to_be(parse, long_validation):
    args = parse("--data", long_validation, "--max-seq-length", 300)
    inputs = with_rows_of_data(args, read_inputs(args))
    assert (inputs.run.length, inputs.run.evaluation_length) == (32, 299)
    assert inputs.assumptions[1].startswith(
        "validation takes 2 x 299 tokens: --max-seq-length 300 cuts the longest rows of"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("no tokenizer", "no tokenizer exists beside config.json"),
        ("broken tokenizer", "the tokenizer cannot be loaded ("),
        ("hub data", "--data owner/name is no folder here"),
        ("no data", "no --data is given"),
        ("test alone", "a test alone is planned as if it trained"),
    ],
)
def test_where_rows_cannot_be_known_they_fill_the_limit(parse, folders, tmp_path, change, words):
    model = shutil.copytree(folders["untied"], tmp_path / "model")
    if change == "no tokenizer":
        (model / "tokenizer.json").unlink()
    if change == "broken tokenizer":
        (model / "tokenizer.json").write_text("{")
    more = {
        "hub data": ["--data", "owner/name"],
        "no data": ["--data", defaults()["data"]],
        "test alone": ["--test"],
    }.get(change, [])
    args = parse("--model", model, "--max-seq-length", 200, *more)
    inputs = with_rows_of_data(args, read_inputs(args))
    assert inputs.run.length == 199
    assert inputs.assumptions[0].startswith(f"as if every row filled --max-seq-length 200: {words}")


def test_data_that_train_would_refuse_is_refused(parse, tmp_path):
    for folder, words in (
        (tmp_path / "nowhere", "this folder does not exist"),
        (tmp_path, "it has no train.jsonl"),
    ):
        args = parse("--data", folder)
        with pytest.raises(InputError, match=words):
            with_rows_of_data(args, read_inputs(args))


def test_what_epochs_make_comes_before_the_length_of_rows(parse):
    args = parse("--max-seq-length", 20, data="text") | {"epochs": 1.0}
    of_epochs, *_, of_rows = with_rows_of_data(args, read_inputs(args)).assumptions
    assert of_epochs.startswith("--epochs 1 is ")
    assert "--max-seq-length 20 cuts" in of_rows  # which train tells alone


def test_rows_are_counted_as_train_counts_them(parse, tmp_path, capsys):
    """Those that are split off for validation, and the longest, which fills no batch."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": "y" * (20 + i)}) + "\n" for i in range(11)))
    args = parse("--data", tmp_path, "--batch-size", 2) | {"epochs": 2.0}
    split, of_epochs, _ = with_rows_of_data(args, read_inputs(args)).assumptions
    load_data(args, load_tokenizer(Path(args.model)))
    assert split in capsys.readouterr().out
    assert "2 of 11 rows are split off" in split
    assert of_epochs.endswith("2 passes over 9 rows (4 batches; the longest row fills no batch)")


def test_a_short_run_is_told_that_it_may_draw_shorter_rows(parse):
    for steps, told in ((5, True), (6, False)):  # of 12 rows, 2 at a time
        for limit in (2048, 20):
            args = parse("--iters", steps, "--max-seq-length", limit, data="text")
            (said,) = with_rows_of_data(args, read_inputs(args)).assumptions
            assert said.endswith("; 5 steps may draw only shorter ones of the 6 batches") is told


def test_validation_counts_where_it_is_the_peak(parse, long_validation):
    args = parse("--data", long_validation)
    whole = with_rows_of_data(args, read_inputs(args))
    training = plan(whole.model, read_inputs(parse("--max-seq-length", 33)).run, "cpu")
    both = plan(whole.model, whole.run, "cpu")
    assert (whole.run.length, whole.run.evaluation_length) == (32, 928)
    assert not training.is_evaluation
    assert both.is_evaluation
    assert both.peak == sum(both.at_peak.values()) > training.peak
    assert both.at_peak["weights"] == both.weights  # which the model keeps, read or not
    assert both.most >= both.at_peak
    assert both.most >= training.most
    (split, _), (flags, after) = advice(args, whole.model, whole.run, "cpu", both.peak // 3)
    assert (split, flags) == ("--batch-size 1 --grad-accumulation-steps 2 --iters 6", "--max-seq-length 464")
    assert after.peak < both.peak // 3
    # A step of such rows keeps what its backward needs; validation does not.
    step = plan(whole.model, read_inputs(parse("--max-seq-length", 929)).run, "cpu")
    assert both.peak < 0.8 * step.peak


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"vocabulary": 262}, {"vocabulary": 300}, {"quantized": True}])
def test_new_tokens_make_the_tables_as_large_as_train_does(parse, tmp_path, tokens, options):
    model = write_model(tmp_path / "model", **options)
    args = parse("--model", model, "--add-tokens", tokens)
    planned = read_inputs(args).model
    loaded, tokenizer, config = load_base(model)
    add_asked_tokens(args, loaded, tokenizer, config)
    tables = find_token_tables(loaded)
    assert [(t.name, t.rows, t.columns, t.nbytes) for t in planned.tables()] == [
        (table.module_path, *table.shape, None) for table in tables
    ]
    (model / "tokenizer.json").unlink()
    assert read_inputs(args).model.vocabulary == options.get("vocabulary", 260) + 3


def test_rows_are_split_into_new_tokens_too(parse, tokens):
    tokens.write_text("number\n")
    args = parse("--add-tokens", tokens, data="text")
    inputs = with_rows_of_data(args, read_inputs(args))
    assert (
        "train.jsonl have rows of up to 18," in inputs.assumptions[1]
    )  # 23, and five fewer for the letters of one word


def test_new_tokens_must_train(parse, tokens):
    args = parse("--add-tokens", tokens)
    inputs = read_inputs(args)
    assert "--train-tables none" not in alternatives(args, inputs.model, inputs.run)
    assert "--train-tables none" not in [flags for flags, _ in advice(args, inputs.model, inputs.run, "cpu", 1)]
    with pytest.raises(InputError, match="the new tokens would learn nothing"):
        read_inputs(parse("--add-tokens", tokens, "--train-tables", "none"))
    tokens.write_text("</s>\n")
    with pytest.raises(InputError, match=r"tokens already: '</s>'"):
        read_inputs(parse("--add-tokens", tokens))


def test_batches_that_could_never_be_are_refused_unless_the_data_says_better(parse, folders):
    huge = ["--max-seq-length", 10**18]
    unknown = parse("--data", "owner/name", *huge)
    with pytest.raises(InputError, match="batches of more than 1,000,000,000 tokens are not planned"):
        with_rows_of_data(unknown, read_inputs(unknown))
    known = parse(*huge, data="text")
    assert with_rows_of_data(known, read_inputs(known)).run.length == 32


def test_the_command_tells_of_the_rows(folders, long_validation, capsys):
    words = ["--model", str(folders["untied"]), "--data", str(long_validation), "--batch-size", "2"]
    main(words)
    said = capsys.readouterr().out
    assert "batches of 2 x 32 tokens" in said
    assert "validation takes 2 x 928 tokens" in said
    assert "which is in validation" in said
    main([*words, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["length"], report["evaluation_length"]) == (32, 928)
    assert report["planned"]["peak_in"] == "validation"


def test_train_warns_of_the_rows_that_it_will_have(parse, monkeypatch):
    args = parse("--no-auto-savings", data="text")
    inputs = read_inputs(args)
    monkeypatch.setattr("ember_mlx.planner.machine.backend", lambda: "cpu")
    real = plan(inputs.model, with_rows_of_data(args, inputs).run, "cpu").peak
    assert real < plan(inputs.model, inputs.run, "cpu").peak
    monkeypatch.setattr("ember_mlx.planner.machine.memory", lambda asked, backend: (real, "this machine has"))
    assert savings(args, ()) == ({}, [])
    monkeypatch.setattr("ember_mlx.planner.machine.memory", lambda asked, backend: (real - 1, "this machine has"))
    switched_on, (line,) = savings(args, ())
    assert switched_on == {}
    assert line.startswith("Warning: with batches of 2 x 32 tokens")


@pytest.mark.parametrize("words", [[], ["--valid-fraction", "0"], ["--train-tables", "none"]])
@pytest.mark.parametrize("data", ["data", "train alone", None])
def test_plan_refuses_keep_best_where_train_would_for_want_of_rows(folders, tmp_path, capsys, data, words):
    where = []
    if data == "train alone":
        where = ["--data", str(shutil.copy(folders["data"] / "train.jsonl", tmp_path / "rows.jsonl"))]
    elif data:
        where = ["--data", str(folders[data])]
    given = ["--model", str(folders["untied"]), *where, "--batch-size", "2", "--keep-best", *words]
    if data == "train alone" and words:
        with pytest.raises(InputError, match="--keep-best: there are no validation rows"):
            main(given)
    else:
        main(given)
        assert "best/" in capsys.readouterr().out
