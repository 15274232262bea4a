"""A model on the hub is planned from kilobytes: config.json, and the tokenizer where rows are to be read."""

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ember_mlx import InputError
from ember_mlx.commands import plan

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "model.safetensors"


@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    """A hub with one model, org/name; the names of the files that were asked for."""
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            name = self.path.rpartition("/")[2]
            path = folders["untied"] / name
            if self.path.startswith("/api/models/org/name/"):
                files = [(each.name, each.stat().st_size) for each in folders["untied"].iterdir()]
                tree = [{"type": "file", "path": name, "size": size, "oid": COMMIT} for name, size in files]
                info = {"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name, _ in files]}
                content = json.dumps(tree if "/tree/" in self.path else info).encode()
            elif self.path.startswith("/org/name/resolve/") and path.is_file():
                content = path.read_bytes()
                asked.append(name)
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", hashlib.sha1(content).hexdigest())
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    at = f"http://127.0.0.1:{server.server_port}"
    for name, value in {"ENDPOINT": at, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", at + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield asked
    server.shutdown()
    server.server_close()


def planned(capsys, *words):
    plan.main(["--json", "--backend", "cpu", *map(str, words)])
    return json.loads(capsys.readouterr().out)


def test_config_alone_is_fetched_then_the_tokenizer_for_data_and_never_weights(hub, folders, tmp_path, capsys):
    found = planned(capsys, "--model", "org/name")
    assert set(hub) == {"config.json"}
    assert found["length"] == 512
    alone = shutil.copy(folders["untied"] / "config.json", tmp_path / "config.json")
    assert found == planned(capsys, "--model", alone)
    with_data = planned(capsys, "--model", "org/name", "--data", folders["text"], "--batch-size", 2)
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(hub), with_data["supposed"]
    assert WEIGHTS not in hub
    assert (folders["untied"] / WEIGHTS).is_file()
    here = planned(capsys, "--model", folders["untied"], "--data", folders["text"], "--batch-size", 2)
    assert with_data["length"] == here["length"] < 512
    hub.clear()
    assert planned(capsys, "--model", "org/name", "--data", folders["text"], "--batch-size", 2) == with_data
    assert hub == []  # all of it is in the cache


def test_without_the_hub_one_line_says_what_is_missing(hub, folders, capsys, monkeypatch):
    planned(capsys, "--model", "org/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = planned(capsys, "--model", "org/name", "--data", folders["text"])
    assert found["length"] == 2047
    (line,) = found["supposed"]
    assert "no tokenizer exists beside config.json, and the Hugging Face hub gave none (" in line
    assert "\n" not in line
    with pytest.raises(InputError, match="--model org/other: no such folder here, and the .* hub gave no config.json"):
        planned(capsys, "--model", "org/other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(InputError) as raised:
        planned(capsys, "--model", "org/missing")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "length", "said"),
    [
        ([], 512, "rows of 512 tokens: no --data is given; --data or --max-seq-length plans for other rows"),
        (["--config"], 2047, "as if every row filled --max-seq-length 2048: no --data is given"),
        (["--max-seq-length", 65], 64, "as if every row filled --max-seq-length 65"),
    ],
)
def test_rows_have_512_tokens_unless_told(folders, capsys, tmp_path, words, length, said):
    if "--config" in words:
        words = ["--config", tmp_path / "run.yaml"]
        words[1].write_text("max_seq_length: 2048\n")
    found = planned(capsys, "--model", folders["untied"], *words)
    assert found["length"] == length
    assert found["supposed"][0].startswith(said)
