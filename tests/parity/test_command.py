"""``ember-mlx parity`` by running it, and on machines that lack a framework."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from ember_mlx import cli
from ember_mlx.commands import parity as command
from ember_mlx.parity import processes, recorded, suite

SHORT = ("--optimizer", "Ember", "--stream", "random", "--steps", "1", "--dtype", "float32", "bfloat16")
TORCH = ("torch eager cpu", "torch eager cuda", "torch compiled cpu", "torch compiled cuda", "triton")


def one_of(quantity="r", **changed):
    numbers = {"ulps": 3.0, "relative": 2e-7, "allowed_ulps": 20.0, "of_allowed": 0.25}
    about = {"implementation": "mlx cpu", "against": suite.ORACLE, "stream": "random", "shape": (24, 8)}
    where = {"dtype": "float32", "first_step": 2, "steps": 10}
    return suite.Comparison(**(about | where | numbers | {"quantity": quantity} | changed))


def cells_of(line):
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def run(tmp_path, *arguments, without=()):
    """The command in a process of its own, where importing any of ``without`` fails."""
    for name in without:
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise ImportError('No module named {name}')")
    return subprocess.run(
        [sys.executable, "-m", "ember_mlx", "parity", *arguments],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


INTERRUPTED = "ember-mlx parity: error: interrupted; {path} holds {rows} comparisons, of {done} of N jobs\n"
POOL = """
import signal
import sys
from ember_mlx import cli
from ember_mlx.parity import processes

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in what a script starts with &
    processes.workers = lambda parts, steps: {count}
    sys.argv = ["ember-mlx", "parity", *{arguments!r}]
    cli.main()
"""


@pytest.mark.parametrize("how", ["SIGINT", "SIGINT in one process", "SIGTERM", "SIGKILL"])
def test_a_stopped_run_leaves_what_it_has_in_its_report_and_no_process(tmp_path, how):
    number, path, script = getattr(signal, how.split()[0]), tmp_path / "report.json", tmp_path / "script.py"
    arguments = ["--implementation", "mlx cpu", "--verbose", "--json", str(path)]
    arguments += ["--dtype", "float32", "--optimizer", "SinkGD", "SAGE", "FlashLion"]
    alone = "one process" in how
    arguments += [] if alone else ["Ember"]  # a job that would take another process long
    script.write_text(POOL.format(count=1 if alone else 2, arguments=arguments))
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}", "TMPDIR": str(tmp_path)}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    started = subprocess.Popen([sys.executable, script], env=env, start_new_session=True, **pipes)
    for line in started.stderr:
        if "took" in line and path.exists():
            break
    # Ctrl-C goes to the whole group, and what `kill` sends to one process.
    os.killpg(started.pid, number) if number == signal.SIGINT else started.send_signal(number)
    _, errors = started.communicate(timeout=10)  # at its end nobody is left who could write more
    report = json.loads(path.read_text())
    assert report["unfinished"]
    assert report["comparisons"]
    if number == signal.SIGKILL:
        assert started.returncode == -number
        return
    assert started.returncode == 128 + number, errors
    about = {"path": path, "rows": len(report["comparisons"]), "done": len(report["jobs"])}
    told = re.sub(r"of \d+ jobs", "of N jobs", re.sub(".* took .*\n", "", errors))
    assert told == INTERRUPTED.format(**about)
    for job in report["jobs"]:
        with pytest.raises(ProcessLookupError):
            os.kill(job["process"], 0)
    assert not [*tmp_path.glob("ember*"), *tmp_path.glob("*.part")]


def test_without_torch_the_rest_is_compared_and_torch_is_not_here(tmp_path):
    path = tmp_path / "report.json"
    done = run(tmp_path, *SHORT, "--json", path, "--verbose", without=["torch"])
    assert done.returncode == 0, done.stderr
    assert "not here: " in done.stdout
    assert "torch eager cpu and" in done.stdout
    assert "(PyTorch: No module named torch)" in done.stdout
    assert done.stdout.count(" pass ") >= 4
    report = json.loads(path.read_text())
    assert "mlx cpu" in report["run_here"]
    assert {name: report["not_here"][name] for name in TORCH} == dict.fromkeys(TORCH, "PyTorch: No module named torch")


def test_without_mlx_pytorch_is_compared(tmp_path):
    pytest.importorskip("torch")
    done = run(tmp_path, *SHORT, "--implementation", "torch eager cpu", "--verbose", without=["mlx.core"])
    assert done.returncode == 0, done.stderr
    recorded_on_gpus = len(recorded.read_results())
    assert done.stdout.count(" pass ") == 5 + 4 * recorded_on_gpus  # against the oracle, also the whole run


def test_without_both_nothing_can_be_compared(tmp_path):
    refused = run(tmp_path, *SHORT, without=["torch", "mlx.core"])
    assert refused.returncode == 2
    assert refused.stderr.startswith("ember-mlx parity: error: nothing can be compared here: mlx cpu and mlx metal and")
    assert refused.stderr.count("\n") == 1
    assert not refused.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--implementation", "jax"], "--implementation 'jax': unknown name; the names are mlx cpu, mlx"),
        (
            ["--implementation", "triton interpreted"],
            "--implementation 'triton interpreted': cannot run here (needs TRITON",
        ),
        (["--stream", "noise"], "--stream 'noise': unknown name; the names are 'zero', 'ones'"),
        (["--steps", "0"], "--steps 0: must be from 1 to 1010"),
        (["--steps", "65", "--stream", "real head"], "--steps 65: must be from 1 to 64"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (
            ["--json", "/no/such/folder/report.json"],
            "--json /no/such/folder/report.json: folder /no/such/folder does not exist",
        ),
        (["--json", "/"], "--json /: is a folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, capsys, arguments, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "argv", ["ember-mlx", "parity", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    errors = capsys.readouterr().err
    assert exit_.value.code == 2
    assert errors.startswith(f"ember-mlx parity: error: {message}")
    assert errors.count("\n") == 1


def test_a_fail_is_shown_written_and_exit_code_1(monkeypatch, capsys, tmp_path):
    comparisons = [one_of(), one_of(dtype="float16", ulps=2.0, of_allowed=1.5), one_of("w")]
    comparisons.append(one_of("all", ulps=float("inf"), of_allowed=float("inf"), error="RuntimeError: no kernel"))
    monkeypatch.setattr(processes, "run", lambda *arguments, **options: iter(comparisons))
    monkeypatch.setattr(
        sys, "argv", ["ember-mlx", "parity", "--optimizer", "Ember", "--json", str(tmp_path / "report.json")]
    )
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    printed = capsys.readouterr().out
    assert "4 comparisons, 2 failed" in printed
    summary, *fails = [cells_of(line) for line in printed.splitlines() if line.startswith("mlx cpu  ")]
    assert summary == ["mlx cpu", "4", "2", "1.50", "0.25", "inf"]
    assert [fail[-2:] for fail in fails] == [
        ["FAIL", "float16, steps 2-10, 24 x 8"],
        ["FAIL", "RuntimeError: no kernel"],
    ]
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"machine", "versions", "date", "seed", "not_here", "recordings"} <= set(report)
    assert report["failed"] == 2
    assert [row["passed"] for row in report["comparisons"]] == [True, False, True, False]
    assert report["comparisons"][1]["dtype"] == "float16"
    assert report["comparisons"][3]["ulps"] is None
    assert report["comparisons"][3]["error"] == "RuntimeError: no kernel"


TIMING = processes.Timing("mlx cpu", "SAGE", "float32", "", start=1.0, seconds=2.5, first_steps=0.5, process=7)


def jobs_end(monkeypatch, *jobs, after=lambda: None):
    """The command finds the comparisons of these jobs; ``after`` is called as each has ended."""

    def run(here, cases, dtypes, recordings, progress, *, timed, ended, **options):
        for number, comparisons in enumerate(jobs, start=1):
            progress(f"random, 24 x 8 float32: {'mlx cpu ' * number}")
            timed(TIMING)
            ended(comparisons, len(jobs))
            progress(f"{number} of {len(jobs)} jobs done")
            after()
        yield from (one for comparisons in jobs for one in comparisons)

    monkeypatch.setattr(processes, "run", run)


def test_the_report_is_whole_after_each_job_and_unfinished_until_the_last(monkeypatch, tmp_path):
    path, reports = tmp_path / "report.json", []
    jobs = [one_of()], [one_of("w", of_allowed=1.5), one_of("c")], [one_of("step")]
    jobs_end(monkeypatch, *jobs, after=lambda: reports.append(json.loads(path.read_text())))
    assert command.main(["--optimizer", "Ember", "--json", str(path)]) == 1
    done = json.loads(path.read_text())
    assert [len(report["comparisons"]) for report in reports] == [1, 3, 4]
    assert [len(report["jobs"]) for report in reports] == [1, 2, 3]
    assert [report["failed"] for report in reports] == [0, 1, 1]
    assert all(report.pop("unfinished") for report in reports)
    assert done == reports[-1] | {"seconds": done["seconds"]}


@pytest.mark.parametrize("stopped", [False, True])
def test_an_earlier_report_stays_until_the_new_one_is_complete(monkeypatch, tmp_path, stopped):
    path, beside, seen = tmp_path / "report.json", tmp_path / "report.unfinished.json", []
    path.write_text("before")

    def after():
        seen.append((path.read_text(), len(json.loads(beside.read_text())["comparisons"])))
        if stopped:
            raise KeyboardInterrupt

    jobs_end(monkeypatch, [one_of()], [one_of("w"), one_of("c")], after=after)
    with pytest.raises(KeyboardInterrupt) if stopped else nullcontext() as interrupt:
        command.main(["--optimizer", "Ember", "--json", str(path)])
    assert seen == [("before", 1), ("before", 3)][: 1 if stopped else 2]
    assert beside.exists() == stopped
    assert (path.read_text() == "before") == stopped
    if stopped:
        assert interrupt.value.left == f"{beside} holds 1 comparisons, of 1 of 2 jobs; {path} is as it was"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_report_that_is_not_written_whole_leaves_the_one_before(monkeypatch, tmp_path, error):
    path = tmp_path / "report.json"
    path.write_text("before")

    def half(self, text):
        self.write_bytes(text.encode()[:3])
        raise error

    monkeypatch.setattr(Path, "write_text", half)
    jobs_end(monkeypatch, [one_of()])
    with pytest.raises(error):
        command.main(["--optimizer", "Ember", "--json", str(path)])
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("report.json", b"before")]


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_progress_overwrites_itself_and_leaves_the_lines_of_jobs_alone(monkeypatch, watched, error):
    told = io.StringIO()
    told.isatty = lambda: watched
    monkeypatch.setattr(sys, "stderr", told)

    def after():
        assert ("jobs done" in told.getvalue()) == watched
        if error:
            raise error

    jobs_end(monkeypatch, [one_of()], [one_of("w")], after=after)
    with pytest.raises(error) if error else nullcontext():
        command.main(["--optimizer", "Ember", "--verbose"])
    assert ("\x1b" in told.getvalue()) == watched
    seen = [line.rpartition("\x1b[K")[2].strip("\r") for line in told.getvalue().split("\n")]
    line = "3.5 s: mlx cpu SAGE float32 took 2.5 s, first steps 0.5 s"
    assert seen == [line] * (1 if error else 2) + [""]


def test_no_comparison_is_not_a_pass(monkeypatch, capsys):
    monkeypatch.setattr(processes, "run", lambda *arguments, **options: iter(()))
    monkeypatch.setattr(sys, "argv", ["ember-mlx", "parity", "--optimizer", "Ember"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert "nothing is left to compare" in capsys.readouterr().err


def test_the_summary_has_a_line_for_each_pair_with_the_largest_error_of_each_quantity():
    on_a_gpu = {"against": "recorded triton on a GPU", "of_allowed": 0.125}
    lines = command.format_summary(
        [
            one_of(),
            one_of(of_allowed=0.5, stream="tiny"),
            one_of(of_allowed=0.375),
            one_of("w", **on_a_gpu),
            one_of("w", implementation="triton", of_allowed=1.2),
        ]
    ).splitlines()
    assert [cells_of(line) for line in (lines[0], *lines[2:])] == [
        ["implementation", "comparisons", "failed", "r", "w"],
        ["mlx cpu", "3", "0", "0.50"],
        ["triton", "1", "1", "1.20"],
        ["mlx cpu / recorded triton on a GPU", "1", "0", "0.12"],
    ]
    under = [lines[0][len(line) - 1] for line in lines[2:]]
    assert under == ["r", "w", "w"]


def test_the_table_shows_the_worst_of_each_group_and_a_fail_before_anything():
    lines = command.format_table(
        [
            one_of(ulps=3.0),
            one_of(ulps=5.0, of_allowed=0.4, dtype="bfloat16", first_step=1, steps=1),
            one_of("w", ulps=9.0),
            one_of("w", ulps=0.6, allowed_ulps=0.5, of_allowed=1.2, dtype="float16"),
            one_of(against="recorded triton on a GPU", ulps=1.0, stream="tiny"),
            one_of(against="recorded triton on a GPU", ulps=2.0, stream="huge"),
        ]
    ).splitlines()
    cells = [cells_of(line) for line in lines[2:]]
    where = "bfloat16, step 1, 24 x 8"
    assert cells[0] == ["mlx cpu", "random", "r", "5", "20", "2.0e-07", "0.40", "pass", where]
    assert cells[1][2:8] == ["w", "0.6", "0.5", "2.0e-07", "1.20", "FAIL"]
    assert cells[2][:4] == ["mlx cpu / recorded triton on a GPU", "all streams", "r", "2"]
    assert cells[2][-1] == "huge, float32, steps 2-10, 24 x 8"
    assert len(cells) == 3
