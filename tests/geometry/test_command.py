"""``ember-mlx geometry``: it trains as ``train`` does, it reads what the optimizer gets, and what it writes."""

import json
import re
import sys

import mlx.core as mx
import numpy as np
import pytest

from ember_mlx import InputError, cli
from ember_mlx.commands import geometry as command
from ember_mlx.finetune.run import run
from ember_mlx.geometry.observer import TIMED_UPDATES, Observer, Stopwatch
from ember_mlx.geometry.recorder import NEW, OUTSIDE, TokenHistory, WeightPaths

pytestmark = pytest.mark.usefixtures("eager")

RATE = ["--table-learning-rate", 1e-2, "--steps-per-eval", 100]


def observed(args, tmp_path):
    observer = Observer(args, tmp_path)
    run(args, watchers=[observer])
    return observer


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_that_is_measured_is_the_run_that_is_not(parse, tmp_path, kind):
    options = ["--fine-tune-type", kind, "--no-stream", "--iters", 8, *RATE]
    run(parse(*options, adapter="plain"))
    observer = observed(parse(*options, adapter="measured"), tmp_path)
    observer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["measured", "plain"]
    for file in (tmp_path / "plain").glob("*.safetensors"):
        plain, measured = (mx.load(str(tmp_path / name / file.name)) for name in ("plain", "measured"))
        assert all(mx.array_equal(array, measured[path]) for path, array in plain.items())
    assert all(("lora" in path) == (kind == "lora") for path in observer.hidden)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--grad-accumulation-steps", 2],
        ["--clip-grad-norm", 1e-3],
        ["--fine-tune-type", "full", "--num-layers", 0],
        ["--table-beta2-decay", 0.8],
    ],
)
def test_what_is_read_is_what_the_optimizer_was_given(parse, tmp_path, options):
    observer = observed(parse("--iters", 8, *RATE, *options, model="tied"), tmp_path)
    (record,) = observer.tables.values()
    state = observer.optimizer.tables.state[record.table.path]
    # Ember's r is a mean over the columns of the dense moment, and c one over its rows.
    r = np.array(state["r"])
    assert record.dense_rows.mean(axis=1) == pytest.approx(r[record.sample.rows], rel=1e-4)
    both = np.intersect1d(record.sample.rows, record.sample.block_rows)
    assert both.size
    of_both = [np.searchsorted(rows, both) for rows in (record.sample.rows, record.sample.block_rows)]
    squares = [count.count()[i] for count, i in zip((record.row_squares, record.block_squares), of_both, strict=True)]
    assert squares[0] == pytest.approx(squares[1], rel=1e-2)
    of_rows = record.dense_rows[of_both[0]][:, record.sample.block_columns]
    assert record.dense_block[of_both[1]] == pytest.approx(of_rows)
    assert observer.updates == (4 if "--grad-accumulation-steps" in options else 8)


def test_large_steps_are_possible_from_the_update_on_that_the_second_moment_allows(parse, tmp_path, monkeypatch):
    monkeypatch.setattr("ember_mlx.geometry.observer.COLD", 2.2)  # sqrt(5) is the first above
    for options, cold, largest in (
        ([], 4, 1000**0.5),
        (["--table-row-clip", 2], 0, 2),
        (["--table-beta2-decay", 0.8], 1, np.inf),  # 1 / (1 - beta2) = t^0.8 with a bias correction of about 1
    ):
        observer = observed(parse("--iters", 8, *RATE, *options, adapter=f"{largest}"), tmp_path)
        assert observer.cold_updates == cold
        assert observer.step_limit == pytest.approx(largest)


def test_updates_are_timed_not_the_steps_of_which_they_are_made():
    batches = [(mx.zeros((1, width)), None) for width in range(1, 41)]
    times = iter(range(100))
    watch = Stopwatch(steps_an_update=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: next(times))
        for batch in batches:
            watch.before_step(batch)
    assert len(watch.began) == TIMED_UPDATES + 1
    assert watch.positions[:2] == [1 + 2 + 3, 4 + 5 + 6]
    assert watch.seconds_a_position()[0, 0] == pytest.approx(1 / (4 + 5 + 6))


def test_moves_are_those_of_the_weights(parse, tmp_path):
    observer = observed(parse("--iters", 1, *RATE, model="tied"), tmp_path)
    (record,) = observer.tables.values()
    reading = observer.probe.readings["tables"][record.table.path]
    weight = observer.model.model.embed_tokens.weight
    moved, sizes = record.rows_moved(weight)
    # After one step, what a row moved in all is what it moved in that step.
    tokens = np.array(reading["tokens"])
    assert np.array(reading["moved"]) * 1e-2 == pytest.approx(moved[tokens], rel=1e-4)
    assert sizes == pytest.approx(np.sqrt(np.square(np.array(weight)).mean(axis=1)), rel=0.5)
    path = np.fromfile(record.paths.file, np.float32).reshape(2, len(record.sample.path_rows), -1)
    assert np.array_equal(path[1], np.array(weight)[record.sample.path_rows])
    assert np.sqrt(np.square(path[1] - path[0]).mean(axis=1)) == pytest.approx(moved[record.sample.path_rows], rel=1e-5)
    # The very first step is g / |g|: one learning rate, were the columns alike.
    assert record.steps[NEW].summary()["median"] == pytest.approx(1, abs=0.3)
    assert record.steps[OUTSIDE].counts.sum() > 0
    assert record.steps[OUTSIDE].counts.sum() + record.steps[NEW].counts.sum() == len(set(tokens))


def test_a_token_is_seen_where_it_is_trained_on_and_padding_is_not():
    history = TokenHistory(10)
    batch = mx.array([[1, 2, 3, 0, 0], [4, 4, 4, 4, 0]]), mx.array([[0, 3], [2, 4]])
    history.add_batch(batch)
    assert history.pending.tolist() == [1, 2, 3, 4]
    history.end_update(7)
    assert history.last_seen.tolist() == [0, 7, 7, 7, 7, 0, 0, 0, 0, 0]
    assert not history.pending.size


def test_paths_are_seen_from_their_start_and_short_ones_are_left_out(tmp_path):
    start, rng = 5 + mx.random.normal((3, 16)), np.random.default_rng(0)
    paths = WeightPaths(tmp_path / "paths", np.array([0, 2], np.int32), start)
    directions = mx.random.normal((3, 16))
    for step in range(1, 9):
        # Row 2 moves twice only.
        paths.add(start + mx.array([[step], [step], [min(step, 2)]]) * directions)
    line, short = paths.shares(rng)
    assert line["share"] == pytest.approx(1, abs=1e-5)
    assert line["straightness"] == pytest.approx(1, abs=1e-5)
    assert 0.7 < line["walk_share"] < 0.95
    assert (line["moves"], short["moves"]) == (8, 2)
    assert np.isnan(short["share"])


def words(folders, out, *more):
    paths = {"--model": folders["untied"], "--data": folders["data"], "--out": out, "--iters": 16, "--batch-size": 2}
    return [str(word) for pair in (paths | {"--val-batches": 1}).items() for word in pair] + [*map(str, more)]


def test_the_report_is_whole_and_loads_nothing(folders, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("a <b> prompt\n")
    sampled = ["--sample-prompts", tmp_path / "prompts.txt", "--sample-tokens", 3, "--warmup", 10]
    command.main(words(folders, out, *RATE, *sampled))
    assert sorted(path.name for path in out.iterdir()) == [
        "adapters",
        "geometry.json",
        "index.html",
        *(f"{name}-{theme}.png" for name in ("paths", "second-moment", "steps", "successive-gradients")
          for theme in ("dark", "light")),
    ]  # fmt: skip
    found = json.loads((out / "geometry.json").read_text())
    assert [table["role"] for table in found["tables"]] == ["embedding", "head"]
    assert found["tables"][0]["steps"][OUTSIDE] == {"count": 0}
    assert found["verdict"]["words"] in " ".join(capsys.readouterr().out.split())
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 8
    assert not re.search(r"https?://|<script|<link|@import", page)
    assert "<code>&#39;" in page  # text of tokens, as Python writes it
    assert "<th>after 0 steps</th><th>after 15 steps</th>" in page
    assert "<td>a &lt;b&gt; prompt</td>" in page
    with pytest.raises(InputError, match="holds another report; give another folder, or --overwrite"):
        command.main(words(folders, out))


def test_a_rate_on_a_schedule_that_begins_at_0_and_a_beta2_on_one_are_reported(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(command.pictures, "draw_all", lambda found, folder: {})
    schedule = {"name": "cosine_decay", "arguments": [4e-3, 16], "warmup": 4, "warmup_init": 0.0}
    (tmp_path / "options.yaml").write_text(json.dumps({"table_lr_schedule": schedule}))
    options = ["--table-learning-rate", 0, "--table-beta2-decay", 0.8, "--config", tmp_path / "options.yaml"]
    command.main(words(folders, tmp_path / "out", *options))
    found = json.loads((tmp_path / "out" / "geometry.json").read_text())
    assert found["run"]["table_learning_rate"] == pytest.approx(4e-3, rel=0.1)
    assert found["run"]["beta2"] == pytest.approx(1 - 16**-0.8)
    assert found["run"]["row_floor"] == 3
    for table in found["tables"]:
        assert all(row["learning_rates"] < 32 for row in table["largest_steps"] + table["rows_moved_most"])
    page = (tmp_path / "out" / "index.html").read_text()
    assert "None" not in page
    assert "row floor 3;" in page
    assert "What it answers" not in page


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--iters", "15"], "15 updates are too few to measure; it takes 4 for successive gradients, 8 for second"),
        (["--grad-accumulation-steps", "2"], "8 updates are too few to measure.*use --iters 32"),
        (["--train-tables", "none"], "--train-tables none: nothing to measure"),
        (["--table-optimizer", "adamw"], "--table-optimizer adamw: geometry measures whether Ember suits"),
        (["--stream"], "--stream: geometry measures whole gradients"),
        (["--table-learning-rate", "0"], "--table-learning-rate 0: no row would move"),
        (["--resume"], "--resume: geometry measures a run from its first step"),
        (["--patience", "3"], "--patience 3: geometry measures all steps of --iters; leave it out"),
        (["--test"], "--test: geometry measures a run that trains"),
        (["--out", "{file}"], "is a file; give a folder"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_nothing_written(folders, tmp_path, monkeypatch, capsys, more, message):
    (tmp_path / "file").write_text("mine")
    more = [word.format(file=tmp_path / "file", **folders) for word in more]
    monkeypatch.setattr(sys, "argv", ["ember-mlx", "geometry", *words(folders, tmp_path / "out", *more)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    *warnings, said = capsys.readouterr().err.splitlines()
    assert all(line.startswith("Warning: ") for line in warnings)  # of what has no effect
    assert said.startswith("ember-mlx geometry: error: ")
    assert re.search(message, said)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_epochs_whose_steps_are_not_known_yet_are_refused(parse, tmp_path):
    with pytest.raises(InputError, match="--epochs 2: geometry must know its steps before its rows; give --iters"):
        command.check(parse() | {"epochs": 2.0}, tmp_path / "out")


def test_without_matplotlib_it_says_what_to_install_before_it_trains(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        command.main(words(folders, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
