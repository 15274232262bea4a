"""Every table in a terminal of 80 columns: no word is broken, few lines a row, the first at the top."""

import json

import pytest
from planned_models import QWEN

from ember_mlx.commands import data, demo, parity, plan, recipes
from ember_mlx.finetune import summary
from ember_mlx.finetune.data_report import Counts
from ember_mlx.finetune.summary import Result, Trained
from ember_mlx.parity.processes import Timing
from ember_mlx.parity.suite import ORACLE, Comparison
from ember_mlx.planner import report
from ember_mlx.shared import text_tables

WITH_TABLES = (summary, data, demo, parity, recipes, report)
TRAINED = [
    Trained(
        f"{path}.weight",
        f"{path} ({role}, 151936 x 1024 bfloat16)",
        "Ember, row floor 3, stochastic rounding",
        "up to 0.0003",
        155_582_464,
        311_772_676,
        622_329_856,
    )
    for path, role in (("model.embed_tokens", "embedding"), ("lm_head", "head"))
]
TRAINED.append(Trained(None, "lora in 16 layers of 4 bits, rank 8", "AdamW", "1e-05", 1_442_816, 5_771_264, 5_771_264))
COUNTED = Counts(123_456, 12_345_678, 8_345_678, 12, 340.5, 20_480, 1_234, 123_456, 12)
COMPARED = [
    Comparison(
        implementation="torch compiled cuda",
        against=against,
        stream="row silent then loud",
        shape=(4096, 1024),
        dtype="bfloat16",
        first_step=2,
        steps=110,
        quantity=quantity,
        ulps=3.25,
        relative=2e-7,
        allowed_ulps=20.0,
        of_allowed=1.25,
    )
    for against in (ORACLE, "recorded triton on a GPU")
    for quantity in ("r", "step", "w of the run")
]
TIMED = Timing("torch compiled cuda", "Ember, SinkGD", "bfloat16", "all cases", 12.3, 123.4, 3.2, 123_456)


@pytest.fixture
def columns(monkeypatch):
    """Sets the columns of the terminal that standard output is."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    return lambda number: monkeypatch.setenv("COLUMNS", str(number))


@pytest.fixture
def tables(monkeypatch):
    """All tables that are made: their cells, row by row with the header first, and their text."""
    made = []

    def text_table(header, rows, **how):
        rows = [tuple(row) for row in rows]
        made.append(([tuple(header), *rows], text_tables.text_table(header, rows, **how)))
        return made[-1][1]

    for module in WITH_TABLES:
        monkeypatch.setattr(module, "text_table", text_table)
    return made


def of_plan(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    plan.main(["--backend", "cpu", "--model", str(tmp_path), "--memory", "1MB", "--fine-tune-type", "full"])


def of_demo(tmp_path):
    result = Result("Validation loss", 5.123, 2.234, 1_234_567_890, TRAINED, [])
    demo._format({"Ember": result, "AdamW": result}, [], {})


def of_data(tmp_path):
    rows = [data._cells(name, COUNTED) for name in ("train", "valid", "test")]
    data.text_table(data.HEADER, rows, right=range(1, len(data.HEADER)))


MADE = {  # with the most lines that a row may have
    "train": (lambda _: summary.format_table(TRAINED), 2),
    "plan": (of_plan, 2),
    "recipes": (lambda _: recipes.main([]), 4),
    "data": (of_data, 1),
    "demo": (of_demo, 1),
    "parity": (lambda _: parity.format_summary(COMPARED), 3),
    "parity --verbose": (lambda _: parity.format_table(COMPARED), 4),
    "timings": (lambda _: parity.format_timings([TIMED]), 2),
}


@pytest.mark.parametrize("name", MADE)
def test_no_word_is_broken_and_a_row_has_few_lines(columns, tables, tmp_path, name):
    columns(80)
    make, most = MADE[name]
    make(tmp_path)
    assert tables
    for rows, text in tables:
        lines = text.splitlines()
        assert max(map(len, lines)) <= 80
        words = [word for row in rows for cell in row for word in cell.split()]
        assert not set(words) - set(text.split())
        rules = [line for line in lines if set(line) == {"-"}]
        assert len(lines) - len(rules) <= most * len(rows)


def test_a_row_begins_at_the_top_and_a_header_ends_at_the_line(columns):
    columns(80)
    lines = text_tables.text_table(("name", "time of a token"), [("name " * 30, "1.25")], right=(1,)).splitlines()
    rule = next(i for i, line in enumerate(lines) if set(line) == {"-"})
    assert lines[rule - 1].startswith("name")
    assert lines[rule - 1].endswith("token")
    assert lines[rule + 1].startswith("name")
    assert lines[rule + 1].endswith("1.25")
    assert len(lines) > rule + 2


def test_what_trains_has_six_columns_where_there_is_room(columns):
    columns(120)
    lines = summary.format_table(TRAINED).splitlines()
    assert max(map(len, lines)) <= 120
    assert "155,582,464" in lines[3]
    assert len(lines) <= 2 + 2 * 3 + 3


def test_words_break_only_where_the_longest_have_no_room(columns):
    columns(40)
    lines = text_tables.text_table(("a", "b"), [("x" * 50, "1,234,567")], right=(1,)).splitlines()
    assert max(map(len, lines)) <= 40
    assert "".join(lines).count("x") == 50
    assert lines[2].endswith("1,234,567")
