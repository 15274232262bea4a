"""``ember-mlx watch``: logs that grow, what the page gets of them, and who may ask. In a browser, where one is here."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from ember_mlx.commands.watch import main
from ember_mlx.finetune import run_log
from ember_mlx.shared.errors import InputError
from ember_mlx.watch import following
from ember_mlx.watch.following import ENDED, NO_LOG, RUNNING, STOPPED, WAITING, RunFile
from ember_mlx.watch.server import PageServer
from ember_mlx.watch.view import thinned, view

ROOT = Path(__file__).parents[1]
HOSTILE = "</script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def start(step=0, **options):
    return {"event": "start", "step": step, "format": 1, "options": options, "versions": {"mlx": "1"}}


def train(step, loss=1.0):
    return {"event": "train", "step": step} | dict.fromkeys(run_log.TRAIN) | {"train_loss": loss}


def validation(step, loss=1.0):
    return {"event": "validation", "step": step, "validation_loss": loss}


def end(step):
    return {"event": "end", "step": step, "validation_loss": 1.0}


def text(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def shown(*runs):
    """What the page gets, after JSON."""
    return json.loads(json.dumps(view(list(runs)), allow_nan=False))["runs"]


@pytest.fixture
def log(tmp_path):
    return tmp_path / "run.jsonl"


@pytest.fixture
def serve():
    servers = []

    def serve(*paths):
        servers.append(PageServer([RunFile(path) for path in paths], 0))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return servers[-1]

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def get(server, path="", host=None):
    request = urllib.request.Request(server.url + path, headers={"Host": host} if host is not None else {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.status, answer.headers, answer.read()


def test_a_log_that_grows_byte_by_byte_ends_as_one_that_is_read_at_once(log):
    rows = [start(iters=40), validation(0), train(10), train(20), validation(20), {"event": "other", "step": 20}]
    rows += [start(20, iters=40), train(20, 0.5), train(30), train(40), end(40)]
    whole, run = text(*rows).encode(), RunFile(log)
    sizes = sorted({0, len(whole), *random.Random(0).sample(range(len(whole)), 60)})
    for size in sizes:
        log.write_bytes(whole[:size])
        run.read_more()
        once = RunFile(log)
        once.read_more()
        assert (run.rows, run.options, run.state, run.skipped) == (once.rows, once.options, once.state, [])
    log.write_text(text(*(row for row in rows if row["event"] != "other")))
    counts = run_log.read(log)
    for event, key in (("train", "train_loss"), ("validation", "validation_loss"), ("end", "validation_loss")):
        followed = sorted((row["step"], row[key]) for row in run.rows.values() if row["event"] == event)
        assert followed == [(row["step"], row[key]) for row in getattr(counts, event)]


def test_a_run_is_waited_for_runs_ends_and_goes_on(log):
    run = RunFile(log)
    run.check()
    assert run.state == WAITING
    assert str(log) in shown(run)[0]["says"]
    states = []
    for rows in ([start(iters=10)], [train(5), end(10)], [start(10, iters=20)]):
        with open(log, "a") as file:
            file.write(text(*rows))
        run.read_more()
        states.append(run.state)
    assert states == [RUNNING, ENDED, RUNNING]
    log.unlink()
    run.read_more()
    assert run.state == WAITING


def test_a_run_that_is_gone_is_told_from_one_that_is_quiet(log, monkeypatch):
    import fcntl

    monkeypatch.setattr(following, "QUIET", -1.0)
    log.write_text(text(start(), train(10)))
    run = RunFile(log)
    with open(log) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        run.read_more()
        assert run.state == RUNNING
    run.read_more()
    assert run.state == STOPPED
    with open(log) as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # asking has left no lock
    log.write_text(text(start(), train(10), train(20)))
    with open(log) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        run.read_more()
        assert run.state == RUNNING


def test_a_log_that_was_replaced_is_read_anew(log):
    run = RunFile(log)
    for rows in (
        [start(seed=1), train(10), train(20)],
        [start(seed=2), train(10, 0.1), train(20), train(30)],
        [start()],
    ):
        log.write_text(text(*rows))
        run.read_more()
        assert len(run.rows) == len(rows) - 1
        assert run.options == rows[0]["options"]


@pytest.mark.parametrize(
    "line",
    [
        *("", "{", "[1]", "null", '{"event": []}', '{"step": 1}', '{"event": "train"}'),
        *('{"event": "train", "step": -1}', '{"event": "train", "step": true}'),
        *("\0" * 9, "[" * 100_000, '{"event": "train", "step": 1e999}', '"\ud800"'),
        '{"event": "train", "step": ' + "9" * 5000,
    ],
    ids=range(14),
)
def test_a_line_that_cannot_be_read_is_named_and_left_out(log, line):
    log.write_bytes(text(start()).encode() + line.encode(errors="surrogatepass") + b"\n" + text(train(10)).encode())
    run = RunFile(log)
    run.check()
    assert shown(run)[0]["skipped"] == [2]
    assert shown(run)[0]["curves"]["train_loss"] == [[10, 1.0]]


@pytest.mark.parametrize("value", [None, "low", True, float("nan"), float("inf"), 10**400, [1], {}], ids=range(8))
def test_a_value_that_is_no_number_is_no_point(log, value):
    rows = [train(10), train(20) | {"train_loss": value, "peak_memory": value}, validation(20, value), end(20)]
    log.write_text(text(start(iters=value), *rows))
    run = RunFile(log)
    run.check()
    assert shown(run)[0]["curves"]["train_loss"] == [[10, 1.0]]
    assert shown(run)[0]["iters"] is None


def test_answers_are_shown_in_whatever_record_they_are(log):
    one = {"event": "sample", "step": 10, "prompt": "a", "completion": "first"}
    several = {"event": "samples", "step": 20, "samples": [{"prompt": p, "answer": "later"} for p in ("a", "b")]}
    log.write_text(text(start(), one, several, {"event": "note", "step": 20, "prompt": 3, "x": [1, {"prompt": "c"}]}))
    run = RunFile(log)
    run.check()
    samples = shown(run)[0]["samples"]
    assert samples == [
        {"prompt": "a", "answers": [[20, "later"], [10, "first"]]},
        {"prompt": "b", "answers": [[20, "later"]]},
    ]


def test_runs_are_told_apart_by_their_options_when_all_have_begun(tmp_path):
    paths = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    paths[0].write_text(text(start(seed=1)))
    runs = [RunFile(path) for path in paths]
    for expected in (list(map(str, paths)), ["seed 1", "seed 2"]):
        for run in runs:
            run.check()
        assert [run["name"] for run in shown(*runs)] == expected
        paths[1].write_text(text(start(seed=2)))


def test_long_curves_keep_their_peaks_and_their_end():
    draw = random.Random(0)
    for count in (1, 99, 100, 101, 1000, 4321):
        points = [(step, draw.random()) for step in range(count)]
        kept = thinned(points, 100)
        assert len(kept) <= 100
        assert set(kept) <= set(points)
        assert kept == sorted(kept)
        assert kept[-1] == points[-1]
        values = [value for _, value in points]
        assert {min(values), max(values)} <= {value for _, value in kept}


def test_the_page_escapes_and_nothing_is_asked_of_others(tmp_path, serve):
    server = serve(tmp_path / HOSTILE.replace("/", "|"))
    status, headers, page = get(server)
    assert status == 200
    assert b"<img" not in page
    assert page.count(b"<script") == 1
    assert "script-src 'self'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    files = [page.decode(), *(get(server, name)[2].decode() for name in ("page.js", "page.css"))]
    for file in files:
        assert not re.search(
            r"https?://(?!www\.w3\.org/2000/svg)|innerHTML|outerHTML|insertAdjacent|document\.write", file
        )


def test_what_has_not_changed_is_not_sent_again(log, serve):
    log.write_text(text(start(model="\ud800")))
    server = serve(log)
    _, headers, body = get(server, "runs")
    assert json.loads(body)["runs"][0]["state"] == RUNNING
    assert get(server, f"runs?have={headers['ETag']}")[0] == 204
    log.write_text(text(start(), train(10)))
    assert get(server, f"runs?have={headers['ETag']}")[0] == 200


def test_a_log_that_can_no_longer_be_read_is_told_and_what_it_held_stays(log, serve):
    log.write_text(text(start(), train(10)))
    server = serve(log)
    get(server, "runs")
    log.rename(log.with_name("old"))
    log.mkdir()
    run = json.loads(get(server, "runs")[2])["runs"][0]
    assert "cannot be read (Is a directory)" in run["trouble"]
    assert run["curves"]["train_loss"] == [[10, 1.0]]


def test_options_of_any_depth_are_shown_or_refused(log):
    refused = []
    for depth in (10, 300, *range(900, 1000, 5), 3000):  # Python gives up somewhere below 1000
        log.write_text(json.dumps(start(deep="HERE")).replace('"HERE"', "[" * depth + "]" * depth) + "\n")
        run = RunFile(log)
        try:
            run.check()
            assert shown(run)[0]["options"]["deep"]
        except InputError:
            refused.append(depth)
    assert 300 not in refused
    assert 3000 in refused


@pytest.mark.parametrize(
    ("path", "host", "status"),
    [
        *(("runs", host, 403) for host in ("elsewhere.example:80", "127.0.0.1.elsewhere.example", "[::1", "")),
        *(("etc/passwd", None, 404), ("page.html.jinja", "localhost", 404)),
    ],
)
def test_others_get_nothing(log, serve, path, host, status):
    server = serve(log)
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(server, path, host)
    assert refused.value.code == status


def test_the_next_port_is_taken_unless_one_was_asked_for(log):
    first = PageServer([RunFile(log)])
    try:
        second = PageServer([RunFile(log)])
        assert second.server_port > first.server_port
        second.server_close()
        with pytest.raises(InputError, match=f"--port {first.server_port}: cannot be served"):
            PageServer([RunFile(log)], first.server_port)
    finally:
        first.server_close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: FILE"),
        (["."], "is not a file; give the FILE of"),
        (["nul\0l"], "cannot be read"),
        (["rows.jsonl"], "is no log of format 1; give the FILE of"),
        (["newer.jsonl"], "is no log of format 1"),
        (["a.jsonl", "./a.jsonl"], "is given twice"),
        ([f"{i}.jsonl" for i in range(8)], "8 runs: at most 7"),
        (["a.jsonl", "--port", "70000"], "--port 70000: must be from 0 to 65535"),
        (["a.jsonl", "--port", "no"], "invalid int value: 'no'"),
    ],
)
def test_bad_input_is_refused(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "newer.jsonl").write_text(text(start() | {"format": 2}))
    with pytest.raises(InputError) as refused:
        main(arguments)
    assert message in str(refused.value)


def test_a_file_that_turns_out_to_be_no_log_is_told_on_the_page(log):
    run = RunFile(log)
    run.check()
    log.write_text("{}\n")
    run.read_more()
    changes = run.changes
    run.read_more()
    assert (run.state, run.changes) == (NO_LOG, changes)
    assert "is no log" in shown(run)[0]["says"]
    log.write_text(text(start(), train(10)))
    run.read_more()
    assert run.state == RUNNING


def test_ctrl_c_ends_it_and_is_no_error(log):
    command = [sys.executable, "-m", "ember_mlx", "watch", str(log), "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as watch:
        assert watch.stdout.readline() == f"{log} does not exist yet; the page waits for it\n"
        assert re.fullmatch(r"The page is at http://127\.0\.0\.1:\d+/; Ctrl-C ends it\n", watch.stdout.readline())
        watch.send_signal(signal.SIGINT)
        said, errors = watch.communicate(timeout=20)
    assert (watch.returncode, said.strip(), errors) == (0, "", "")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_the_runs_and_runs_nothing_of_theirs(tmp_path, serve):
    answer = {"event": "samples", "step": 20, "samples": [{"prompt": HOSTILE, "answer": HOSTILE}]}
    logs = [tmp_path / name for name in ("one.jsonl", "two.jsonl")]
    for seed, log in enumerate(logs):
        log.write_text(
            text(start(model=HOSTILE, seed=seed), train(10, 2.5), train(20), validation(20), answer, end(20))
        )
    server = serve(*logs)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=3000", "--dump-dom", server.url]
    page = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    assert "<title>hacked" not in page
    assert page.count("&lt;img src=x") == 1 + 2 + 2  # the prompt, the answers to it, the models
    assert 'aria-label="Training loss: seed 0: 1 at step 20; seed 1: 1 at step 20.' in page
    assert page.count("<figure") == 2
