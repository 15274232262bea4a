"""The command line, by running it."""

import os
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from processes import without_torch

import ember_mlx
from ember_mlx import cli
from ember_mlx.finetune.workers import announced_workers
from ember_mlx.shared import environment


def command(*arguments, module="ember_mlx", **environment):
    words = [sys.executable, "-m", module, *map(str, arguments)]
    variables = os.environ | environment
    return subprocess.run(words, env=variables, capture_output=True, text=True, timeout=120, check=False)


def short_run(folders, adapter, model="untied"):
    options = {"--model": folders[model], "--data": folders["data"], "--adapter-path": adapter}
    options |= {"--iters": 3, "--batch-size": 2, "--val-batches": 2}
    return [str(word) for pair in options.items() for word in pair]


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory):
    """A short run of the command, and the adapter it left; nothing may write into that."""
    adapter = tmp_path_factory.mktemp("trained") / "adapters"
    done = command("train", *short_run(folders, adapter))
    assert done.returncode == 0, done.stderr
    return adapter, done


def test_train_generate_and_fuse_as_a_person_would(folders, trained, tmp_path):
    (adapter, trained), fused = trained, tmp_path / "fused"
    for said in ("lm_head (head, 260 x 32 float32)", "Ember", "Adam would keep", "before", "Peak memory", str(adapter)):
        assert said in trained.stdout
    model = ["--model", folders["untied"], "--adapter-path", adapter]
    text = ["--prompt", "train 3", "--max-tokens", "8", "--temp", "0"]
    generated = command("generate", *model, *text)
    assert generated.returncode == 0, generated.stderr
    assert command("fuse", *model, "--save-path", fused).returncode == 0
    stock = command("generate", "--model", fused, *text, module="mlx_lm", **without_torch())
    written = [output.stdout.split("==========")[1] for output in (generated, stock)]
    assert written[0] == written[1]


def test_a_checkout_that_is_not_installed_tells_its_version(monkeypatch, capsys):
    """As on PYTHONPATH alone; of other packages it then knows none."""

    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(environment, "version", missing)
    checkout = Path(__file__).parents[1]  # while the tests may run on an installed copy
    monkeypatch.setattr(environment, "__file__", str(checkout / "ember_mlx" / "shared" / "environment.py"))
    monkeypatch.setattr(sys, "argv", ["ember-mlx", "--version"])
    cli.main()
    assert capsys.readouterr().out == f"{version('ember-mlx')}\n"
    assert environment.version_of("mlx") is None


def test_what_a_shell_has_closed_is_nowhere(monkeypatch):
    """Python has None for it, and the first file opened would have its number."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    monkeypatch.setattr(sys, "argv", ["ember-mlx", "--version"])
    cli.main()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        assert stream.name == os.devnull
        stream.close()


def test_help_and_version_need_no_model():
    assert command("--version").stdout.strip() == version("ember-mlx")
    assert "ember-mlx train" in command("--help").stdout
    helped = command("train", "--help", PYTHONPROFILEIMPORTTIME="1")
    assert "transformers" in helped.stderr
    assert "torch._C" not in helped.stderr  # which transformers imports where it finds it
    options = helped.stdout
    assert "--train-tables" in options
    assert "--lora-parameters" not in options
    assert "--grad-checkpoint" in options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model /no/such/model", "model /no/such/model: no such folder here"),
        ("--data /no/such/folder/at/all", "--data /no/such/folder/at/all: this folder does not exist"),
        ("--data {untied}", "it has no train.jsonl"),
        ("--data {broken}", "train.jsonl line 2 is not JSON"),
        ("--table-beta2 1.5", "--table-beta2 1.5: must be at least 0 and, in float32, below 1"),
        ("--table-learning-rate nan", "--table-learning-rate nan: must be a number of at least 0"),
        ("--table-weight-decay -1", "--table-weight-decay -1.0: must be a number of at least 0"),
        ("--learning-rate nan", "--learning-rate nan: must be a number of at least 0"),
        ("--model {quantized} --quantize 4", ": is quantized already: leave --quantize out"),
        ("--quantize 4", ": no layer has rows of a multiple of 64 numbers"),
        ("--quantize 4 --fine-tune-type full", "quantized layers cannot be trained, and --fine-tune-type full"),
        ("--quantize 7", "argument --quantize: invalid choice: 7"),
        ("--model {tied} --train-tables head", "--train-tables head: the head is the embedding"),
        ("--num-layers 17", "--num-layers 17: the model has 2 layers"),
        ("--adapter-path {taken}", "already holds another run; give another path, or --overwrite"),
        ("--batch-size 64", "the train set has 12 rows, fewer than --batch-size 64"),
        ("--iters many", "argument --iters: invalid int value: 'many'"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(
    folders, tmp_path, monkeypatch, capsys, arguments, message
):
    broken, taken = tmp_path / "broken", tmp_path / "taken"
    broken.mkdir()
    (broken / "train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    taken.mkdir()
    (taken / "adapters.safetensors").write_text("of another run")
    words = arguments.format(broken=broken, taken=taken, **folders).split()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["ember-mlx", "train", *short_run(folders, tmp_path / "new"), *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.startswith("ember-mlx train: error: ")
    assert errors.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert (taken / "adapters.safetensors").read_text() == "of another run"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("generate", ["--prompt", "a"]), ("chat", []), ("server", ["--port", "0"]), ("fuse", [])],
)
def test_an_adapter_of_another_model_is_one_line_and_exit_code_2(
    folders, trained, monkeypatch, capsys, name, arguments
):
    adapter, _ = trained
    words = [name, "--model", str(folders["tied"]), "--adapter-path", str(adapter), *arguments]
    monkeypatch.setattr(sys, "argv", ["ember-mlx", *words])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    errors = capsys.readouterr().err
    assert errors.splitlines()[-1].startswith(f"ember-mlx {name}: error: adapter {adapter}: token_tables")
    assert "lm_head.weight is not among the parameters to load" in errors
    assert "Traceback" not in errors


def test_an_unknown_command_is_refused():
    refused = command("fine-tune")
    assert refused.returncode == 2
    assert "unknown command 'fine-tune'; the commands are train, " in refused.stderr
    assert "unknown command 'trian' (did you mean 'train'?)" in command("trian").stderr


def test_of_the_workers_of_mlx_launch_the_first_does_what_one_process_does_and_waits_for_nobody(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ember-mlx", "recipes"])
    for rank, told in (("1", False), ("0", True)):
        monkeypatch.setenv("MLX_RANK", rank)
        monkeypatch.setenv("MLX_HOSTFILE", "/no/such")
        cli.main()
        said = capsys.readouterr()
        assert bool(said.out) == told
        assert said.err == ("" if told else "ember-mlx recipes: left to the first worker; this one has MLX_RANK=1\n")
    assert announced_workers() == 1


@pytest.mark.parametrize("words", [["data", "--model", "untied", "data"], ["recipes"], ["--help"]])
def test_a_reader_that_has_enough_ends_a_command_without_a_word(folders, words):
    """As `| head -1` does."""
    words = [sys.executable, "-m", "ember_mlx", words[0], *(folders.get(word, word) for word in words[1:])]
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nowhere:
        ended = subprocess.run(list(map(str, words)), stdout=nowhere, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_while_a_command_is_imported_is_told(monkeypatch, capsys, name, code):
    number = getattr(signal, name)
    ours = signal.default_int_handler if name == "SIGINT" else lambda *_: None
    before = signal.signal(number, ours)
    monkeypatch.setattr(cli, "import_module", lambda _: os.kill(os.getpid(), number))
    monkeypatch.setattr(sys, "argv", ["ember-mlx", "parity"])
    try:
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert signal.getsignal(number) is ours
    finally:
        signal.signal(number, before)
    assert exit_.value.code == code
    assert capsys.readouterr().err == "ember-mlx parity: error: interrupted; what was saved before is kept\n"


def test_the_public_names_are_those_listed_and_all_are_there():
    assert sorted(ember_mlx.__all__) == sorted(ember_mlx._MODULES)
    for name in ember_mlx.__all__:
        assert getattr(ember_mlx, name).__name__ == name
        assert name in dir(ember_mlx)
    with pytest.raises(AttributeError, match="has no attribute 'Amber'"):
        _ = ember_mlx.Amber


def test_without_a_backend_of_mlx_it_says_what_to_install(tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: cannot open shared object file')")
    refused = subprocess.run(
        [sys.executable, "-m", "ember_mlx", "train"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert "mlx has no backend here (libmlx.so" in refused.stderr
    assert "pip install '.[cpu]'" in refused.stderr
    assert refused.stderr.count("\n") == 1
