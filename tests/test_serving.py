"""`chat` and `server`: mlx-lm's own, with token tables; what they write is what `generate` writes."""

import argparse
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import mlx_lm
import pytest
from mlx_lm import chat as mlx_lm_chat
from mlx_lm import server as mlx_lm_server

from ember_mlx import cli, load
from ember_mlx.commands import server
from ember_mlx.finetune.run import run

QUESTION = "train 3"
TOKENS = 8
WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture
def adapter(parse, tmp_path):
    # With a row floor its first answer is empty, which the server gives as null.
    run(parse("--learning-rate", 1e-2, "--table-learning-rate", 1e-2, "--table-row-floor", 0))
    return tmp_path / "adapters"


def answer_of(model, adapter=None):
    model, tokenizer = load(model, adapter_path=adapter)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return mlx_lm.generate(model, tokenizer, prompt, max_tokens=TOKENS)


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["ember-mlx", *map(str, words)])
    cli.main()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def ask(port, **more):
    """The answer to the question; of a refusal its code and what it says."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": TOKENS, **more}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode())
    try:
        return json.loads(WITHOUT_PROXY.open(request, timeout=30).read())["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]


def test_the_server_answers_as_generate_does_with_its_adapter_and_with_one_that_a_request_names(
    folders, adapter, tmp_path
):
    port, model = free_port(), folders["untied"]
    words = [sys.executable, "-m", "ember_mlx", "server", "--model", model, "--port", port]
    log = (tmp_path / "log").open("w")
    # In a session of its own, which takes SIGINT whatever the one of the tests does with it.
    with subprocess.Popen(list(map(str, words)), stderr=log, start_new_session=True) as process:
        try:
            base, trained = answer_of(model), answer_of(model, adapter)
            assert base != trained
            end = time.monotonic() + 60
            while True:
                try:
                    assert ask(port) == base
                    break
                except urllib.error.URLError:
                    assert process.poll() is None, (tmp_path / "log").read_text()
                    assert time.monotonic() < end
                    time.sleep(0.1)
            assert ask(port, adapters=str(adapter)) == ask(port, adapters=str(adapter), model=str(model)) == trained
            code, error = ask(port, adapters=str(tmp_path))
            assert code == 404
            assert "it has no adapter_config.json; give the --adapter-path of a finished run" in error
            code, error = ask(port, adapters=str(adapter), model=str(folders["tied"]))
            assert code == 404
            assert "lm_head.weight is not among the parameters to load" in error
            assert ask(port) == base  # after all that
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_the_model_that_is_served_has_its_adapter_also_where_a_request_names_it(tmp_path, monkeypatch):
    """As clients do that take a name from /v1/models, where its folder stands."""
    asked = []

    def stock_load(self, *names):
        asked.append(names)

    def run_command(*_):
        for model in ("default_model", "folder", str(folder), str(folder / ".." / "folder"), "another"):
            for named in (None, "other"):
                provider = mlx_lm_server.ModelProvider(argparse.Namespace(**options))
                provider.load(model, named, "default_model")

    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    options = {"model": "folder", "adapter_path": "own", "draft_model": None, "pipeline": False}
    options |= {"trust_remote_code": False, "chat_template": ""}
    monkeypatch.setattr(mlx_lm_server.ModelProvider, "load", stock_load)
    monkeypatch.setattr(server, "run_command", run_command)
    monkeypatch.setattr(os, "_exit", lambda code: None)
    server.main([])
    own, other = ("default_model", None, "default_model"), ("folder", "other", "default_model")
    assert asked == [own, other] * 4 + [("another", None, "default_model"), ("another", "other", "default_model")]


def test_a_chat_answers_as_generate_does_and_ends_with_its_input(folders, adapter, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n"))
    call(monkeypatch, "chat", "--model", folders["untied"], "--adapter-path", adapter, "--max-tokens", TOKENS)
    assert answer_of(folders["untied"], adapter) in capsys.readouterr().out
    assert mlx_lm_chat.load is mlx_lm.load


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("chat --adapter-path /no/such", "adapter /no/such: no such folder"),
        ("chat --model /no/such", "model /no/such: no such folder here"),
        ("generate hello", "unrecognized arguments: hello; a value needs its flag, such as --prompt;"),
        ("chat --temp -1", "--temp -1.0: must be at least 0"),
        ("generate --prompt a --min-p 2", "--min-p 2.0: must be at least 0 and at most 1"),
        ("generate --prompt a --top-k -2", "--top-k -2: must be at least -1"),
        ("server --port 65536 --max-tokens -1", "--max-tokens -1: must be at least 1"),
        ("generate --prompt a --kv-bits 7", "--kv-bits 7: must be one of 2, 3, 4, 5, 6, 8"),
        ("generate --prompt a --seed -1", "--seed -1: must be at least 0"),
        ("generate --prompt a --chat-template-config [1]", "--chat-template-config: [1]: must be a JSON object"),
        ("generate --prompt a --prompt-cache-file /no/such", "--prompt-cache-file /no/such: no such file"),
        ("generate --prompt a --draft-model /no/such", "model /no/such: no such folder here"),
        ("server --port 0 --prompt-cache-bytes much", "--prompt-cache-bytes: much: must be a size"),
        ("chat --max-tokens many", "argument --max-tokens/-m: invalid int value: 'many'"),
        ("server --port 0 --adapter-path /no/such", "adapter /no/such: no such folder"),
        ("server --port 0 --model /no/such", "model /no/such: no such folder here"),
        ("server --port {taken}", "--host 127.0.0.1 --port {taken}: cannot listen there (Address already in use)"),
        ("server --port 65536", "--port 65536: must be from 0 to 65535"),
        ("server --chat-template-args {{", "--chat-template-args: {{: must be a JSON object"),
    ],
)
def test_bad_input_is_one_line_and_the_process_ends(folders, monkeypatch, capsys, words, message):
    name, *words = words.split()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        taken = listening.getsockname()[1]
        words = ["--model", folders["untied"], *(word.format(taken=taken) for word in words)]
        with pytest.raises(SystemExit) as exit_:
            call(monkeypatch, name, *words)
    assert exit_.value.code == 2
    errors = capsys.readouterr().err
    assert message.format(taken=taken) in errors
    assert errors.startswith(f"ember-mlx {name}: error: ")
    assert errors.count("\n") == 1
    assert mlx_lm_server.load is mlx_lm.load
