"""``ember-mlx plot``: what is drawn of which runs, and what is refused."""

import json
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ember_mlx import cli
from ember_mlx.commands.plot import END, PANELS, main, plot_runs
from ember_mlx.finetune import run_log
from ember_mlx.finetune.run_names import name_runs
from ember_mlx.shared.errors import InputError

pytest.importorskip("matplotlib")

NAMES = st.text(st.sampled_from("a$_\\{}^%[]/ü*\n "), min_size=1, max_size=12)


def write(path, loss=1.0, end="", **options):
    rows = [{"event": "start", "step": 0, "format": 1, "options": options, "versions": {}}]
    rows += [{"event": "validation", "step": 0, "validation_loss": 3.0}]
    for step in range(10, 50, 10):
        values = dict.fromkeys(run_log.TRAIN) | {"train_loss": loss / step, "peak_memory": 10**9}
        rows.append({"event": "train", "step": step} | values | {"update_ratio_body": 0.0 if step == 20 else 1e-3})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return path


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the last picture."""
    axes = []
    from matplotlib.figure import Figure

    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (axes.extend(self.axes), saved(self, *a, **k))[1])
    return axes


def test_two_runs_are_drawn_with_what_there_is_of_them(tmp_path, capsys, drawn):
    one = write(tmp_path / "one.jsonl", table_optimizer="ember", adapter_path="a")
    two = write(tmp_path / "two.jsonl", loss=2.0, end='{"event"', table_optimizer="adamw", adapter_path="b")
    main([str(one), str(two), "--out", str(tmp_path / "runs.png"), "--theme", "both"])
    assert {path.name for path in tmp_path.glob("*.png")} == {"runs-light.png", "runs-dark.png"}
    said = capsys.readouterr().out
    assert f"{two}: the last line is cut off, and was left out" in said
    assert f"{one}: " not in said
    titles = [axes.get_title("left") for axes in drawn]
    there = [PANELS[i][0] for i in (0, 1, 3, 4)]  # no tables, and no speed
    assert titles == there * 2
    training, _, ratio, _ = drawn[:4]
    assert [line.get_label() for line in training.lines] == ["table-optimizer ember", "table-optimizer adamw"]
    assert list(training.lines[1].get_ydata()) == [2 / step for step in (10, 20, 30, 40)]
    assert list(ratio.lines[0].get_xdata()) == [10, 30, 40]  # 0 has no logarithm


def test_the_loss_after_the_last_step_is_a_star_in_the_colour_of_its_run(tmp_path, drawn):
    one = write(tmp_path / "one.jsonl", table_optimizer="ember")
    last = '{"event": "end", "step": 40, "validation_loss": 0.5}\n'
    two = write(tmp_path / "two.jsonl", end=last, table_optimizer="adamw")
    main([str(one), str(two), "--out", str(tmp_path / "runs.png")])
    validation = drawn[1]
    adamw = validation.lines[1]
    stars = [line for line in validation.lines if line.get_marker() == "*" and len(line.get_xdata())]
    assert [(list(star.get_xdata()), list(star.get_ydata())) for star in stars] == [([40], [0.5])]
    assert stars[0].get_color() == adamw.get_color() != validation.lines[0].get_color()
    assert stars[0].get_markevery() == 1  # that of the style leaves a single point out
    (legend,) = validation.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["table-optimizer ember", "table-optimizer adamw", END]
    drawn.clear()
    main([str(one), "--out", str(tmp_path / "runs.png")])
    (legend,) = drawn[1].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [str(one)]


def test_runs_are_named_by_their_files_where_options_do_not_tell_them_apart(tmp_path):
    paths = [write(tmp_path / f"{i}.jsonl", seed=i // 2, adapter_path=str(i)) for i in range(3)]
    logs = [run_log.read(path) for path in paths]
    assert name_runs(logs) == [str(path) for path in paths]
    assert name_runs(logs[:1]) == [str(paths[0])]
    assert name_runs([logs[0], logs[2]]) == ["seed 0", "seed 1"]


def test_more_runs_than_can_be_told_apart_are_refused(tmp_path):
    log = run_log.read(write(tmp_path / "log.jsonl"))
    with pytest.raises(InputError, match="8 runs: at most 7"):
        plot_runs([log] * 8, tmp_path / "runs.png")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{log} --out {log}", "must be the name of a PNG file"),
        ("{log}", "the following arguments are required: --out"),
        ("{broken} {log} --out {picture}", "broken.jsonl line 3: is not JSON"),
        ("{log} {new} --out {picture}", "new.jsonl: nothing to draw yet"),
        ("{nulls} --out {picture}", "nulls.jsonl: nothing to draw yet"),
        ("{log} /no/such/file --out {picture}", "log /no/such/file: cannot be read (No such file or directory)"),
    ],
)
def test_bad_input_is_one_line_and_no_picture(tmp_path, monkeypatch, capsys, words, message):
    log = write(tmp_path / "log.jsonl")
    lines = log.read_text().splitlines(keepends=True)
    (tmp_path / "broken.jsonl").write_text("".join([*lines[:2], '{"event": \n', *lines[2:]]))
    (tmp_path / "new.jsonl").write_text(lines[0])
    nulls = {"event": "train", "step": 1} | dict.fromkeys(run_log.TRAIN)
    (tmp_path / "nulls.jsonl").write_text(lines[0] + json.dumps(nulls) + "\n")
    names = {name: tmp_path / f"{name}.jsonl" for name in ("log", "broken", "new", "nulls")}
    words = words.format(picture=tmp_path / "runs.png", **names).split()
    monkeypatch.setattr(sys, "argv", ["ember-mlx", "plot", *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("ember-mlx plot: error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("name", ["run$\\frac$.jsonl", "_hidden.jsonl", "[red].jsonl", "$a$ $b.jsonl", "x\udc80.jsonl"])
def test_any_name_of_a_log_is_drawn_as_it_is(tmp_path, monkeypatch, capsys, name):
    from matplotlib.figure import Figure

    labels = []
    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (labels.extend(self.legends), saved(self, *a, **k))[1])
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    main([name, "--out", "runs.png"])
    (text,) = labels[0].get_texts()
    shown = text.get_text().replace("\\$", "$")
    assert shown.removeprefix("./") == name.encode(errors="replace").decode()


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(NAMES, min_size=1, max_size=3, unique=True))
def test_option_values_of_any_text_are_drawn(tmp_path, names):
    files = [write(tmp_path / f"{i}.jsonl", model=name) for i, name in enumerate(names)]
    main([*map(str, files), "--out", str(tmp_path / "runs.png")])


@pytest.mark.parametrize(("theme", "out"), [("light", "runs.png"), ("both", "runs.png")])
def test_a_picture_does_not_replace_a_log_that_it_draws(tmp_path, theme, out):
    log = write(tmp_path / ("runs.png" if theme == "light" else "runs-dark.png"))
    before = log.read_bytes()
    with pytest.raises(InputError, match="would replace the log"):
        main([str(log), "--theme", theme, "--out", str(tmp_path / out)])
    assert log.read_bytes() == before
