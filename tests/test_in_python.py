"""`ember_mlx.train`: the command's bits, its checks by keyword, what comes back, and nothing left behind."""

import gc
import json
import signal
import sys
import threading
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.llama import TransformerBlock

import ember_mlx
from ember_mlx import InputError
from ember_mlx.commands import train as command
from ember_mlx.finetune import options
from ember_mlx.finetune.keywords import NAMES, options_of
from ember_mlx.finetune.samples import Prompt
from ember_mlx.finetune.watchers import Watcher

SHORT = {"iters": 3, "batch_size": 2, "val_batches": 2, "steps_per_report": 1, "keep_checkpoints": 0}


def words(given):
    """The command line that gives the same options."""
    for name, value in given.items():
        if value is True:
            yield options.flag(name)
        else:
            yield from (options.flag(name), str(value))


def rows_of(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def arrays_in(folder):
    return {path.name: mx.load(str(path)) for path in folder.glob("*.safetensors")}


def same(one, other):
    flat, others = dict(tree_flatten(one)), dict(tree_flatten(other))
    return flat.keys() == others.keys() and all(mx.array_equal(flat[name], others[name]) for name in flat)


@pytest.mark.parametrize(
    ("how", "given"),
    [
        ("folders", {"fine_tune_type": "full", "learning_rate": 1e-3, "grad_checkpoint": True}),
        ("folders", {"mask_prompt": True, "table_row_floor": 2.0, "seed": 7, "optimizer": "sinkgd"}),
        ("loaded model and rows", {}),
    ],
    ids=["full", "masked", "in memory"],
)
def test_the_bits_are_those_of_the_command(folders, tmp_path, capsys, given, how):
    given = SHORT | given
    paths = {"model": folders["untied"], "data": folders["data"], "adapter_path": tmp_path / "command"}
    command.main(list(words(paths | given)))
    said = capsys.readouterr().out
    if how == "folders":
        model, data = folders["untied"], folders["data"]
    else:
        model = mlx_lm.load(str(folders["untied"]))
        data = tuple(rows_of(folders["data"] / f"{name}.jsonl") for name in ("train", "valid"))
    result = ember_mlx.train(model, data=data, adapter_path=tmp_path / "python", **given)
    of_command = arrays_in(tmp_path / "command")
    assert of_command
    assert same(of_command, arrays_in(tmp_path / "python"))
    assert f"{result.loss_before:.3f} before, {result.loss_after:.3f} after" in said
    assert f"{result.loss_after:.3f} after" in capsys.readouterr().out
    loaded, _ = ember_mlx.load(folders["untied"], adapter_path=tmp_path / "python")
    assert same(loaded.parameters(), result.model.parameters())


def test_what_comes_back(folders, tmp_path):
    heard = []

    class Counts(Watcher):
        def after_step(self, step, result):
            heard.append(step)

    result = ember_mlx.train(
        folders["tied"], data=str(folders["data"]), adapter_path=tmp_path / "a", watchers=[Counts()], **SHORT
    )
    assert heard == list(result.train_losses) == [1, 2, 3]
    assert result.valid_losses[0] == result.loss_before
    assert result.loss_name == "Validation loss"
    assert result.peak_memory > 0
    assert [line.table for line in result.trained] == ["model.embed_tokens.weight", None]
    assert all(path.is_file() for path in result.files)
    assert not result.model.training
    assert isinstance(mlx_lm.generate(result.model, result.tokenizer, prompt="train 3", max_tokens=2), str)
    assert "Llama" not in repr(result)
    with pytest.raises(AttributeError, match="options are never written to"):
        result.options.iters = 5


def test_the_sample_of_the_page_asks_as_the_rows_were_trained(folders, tmp_path, monkeypatch):
    page = (Path(ember_mlx.__file__).parent / "README.md").read_text()
    sample = page.partition("```python\n")[2].partition("```")[0]
    for named, here in {"Qwen/Qwen3-0.6B": folders["untied"], "questions.csv": folders["data"]}.items():
        sample = sample.replace(named, str(here))
    asked = []
    monkeypatch.setattr(mlx_lm, "generate", lambda model, tokenizer, prompt: asked.append((tokenizer, prompt)))
    monkeypatch.chdir(tmp_path)
    exec(sample.replace("iters=200", "iters=1"), {})
    [(tokenizer, prompt)] = asked
    assert prompt == Prompt("", "Hello").tokens(tokenizer)  # those of `ember-mlx generate`


def global_state():
    limits = []
    for set_limit in (mx.set_memory_limit, mx.set_cache_limit):
        limits.append(set_limit(10**9))
        set_limit(limits[-1])
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    randoms = np.random.get_state()[1].tolist(), np.random.get_state()[2:], mx.random.state[0].tolist()
    return limits, handlers, randoms, TransformerBlock.__call__, sys.stdout, sys.stderr


def test_nothing_is_left_behind_and_a_second_run_is_the_first_one_again(folders, tmp_path):
    mx.random.seed(2**40 + 3)
    np.random.seed(5)
    before = global_state()
    rows = rows_of(folders["data"] / "train.jsonl")
    given = SHORT | {"grad_checkpoint": True, "fine_tune_type": "full", "quiet": True}
    for name in ("first", "second"):
        ember_mlx.train(folders["untied"], data=rows, adapter_path=tmp_path / name, **given)
        assert global_state() == before
    assert same(arrays_in(tmp_path / "first"), arrays_in(tmp_path / "second"))
    with pytest.raises(InputError):
        ember_mlx.train(folders["untied"], data=rows, adapter_path=tmp_path / "first", **given)
    assert global_state() == before


def test_the_model_goes_when_the_result_goes(folders, tmp_path):
    result = ember_mlx.train(folders["untied"], data=folders["data"], adapter_path=tmp_path / "a", **SHORT)
    held = mx.get_active_memory()
    size = sum(array.nbytes for _, array in tree_flatten(result.model.parameters()))
    del result
    gc.collect()
    assert held - mx.get_active_memory() >= size


def test_another_thread_trains_and_handles_no_signals(folders, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a signal handler, in a thread")

    monkeypatch.setattr(signal, "signal", refuse)
    results, failed = [], []

    def work():
        try:
            results.append(
                ember_mlx.train(folders["untied"], data=folders["data"], adapter_path=tmp_path / "a", **SHORT)
            )
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
    assert results[0].loss_after < results[0].loss_before


def test_quiet_is_silent_and_else_it_prints(folders, tmp_path, capsys):
    given = SHORT | {"val_batches": 1}
    ember_mlx.train(folders["untied"], data=folders["data"], adapter_path=tmp_path / "a", quiet=True, **given)
    shown = capsys.readouterr()
    assert not shown.out
    assert not shown.err


def test_every_option_is_a_keyword_and_given_its_default_nothing_changes():
    default = vars(options.parse(["--data", "x"]))
    assert vars(options_of({"data": "x"})[0]) == default
    assert vars(options_of(default)[0]) == default
    assert default.keys() - NAMES == set()
    assert vars(options_of(dict.fromkeys(default) | {"data": Path("x")})[0]) == default


def test_what_was_given_can_change_without_changing_the_options():
    lora = {"rank": 4, "scale": 1.0, "dropout": 0.0}
    made = options_of({"data": "x", "lora_parameters": lora})[0]
    lora["rank"] = 0
    assert made.lora_parameters["rank"] == 4


def test_a_tuple_is_a_list():
    betas = {"betas": (0.9, 0.99)}
    given = {"data": "x", "optimizer": "adam", "optimizer_config": {"adam": betas}}
    given |= {"lr_schedule": {"name": "cosine_decay", "arguments": (1e-3, 10)}}
    made = options_of(given)[0]
    assert (made.optimizer_config["adam"]["betas"], made.lr_schedule["arguments"]) == ([0.9, 0.99], [1e-3, 10])
    assert betas == {"betas": (0.9, 0.99)}


ROW = {"text": "a"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learnin_rate": 1}, "learnin_rate: is no option of train (did you mean 'learning_rate'?)"),
        ({"lr": 1}, "lr: is no option of train (did you mean 'learning_rate'?)"),
        ({"zzz": 1}, "zzz: is no option of train; `ember-mlx train --help` lists them"),
        ({"iters": "many"}, "iters: 'many' must be a whole number"),
        ({"iters": 2.5}, "iters: 2.5 must be a whole number"),
        ({"iters": float("inf")}, "iters: inf must be a whole number"),
        ({"iters": True}, "iters: True must be a whole number"),
        ({"batch_size": 0}, "batch_size 0: must be a whole number of at least 1"),
        ({"learning_rate": [1]}, "learning_rate: [1] must be a number"),
        ({"learning_rate": float("nan")}, "learning_rate nan: must be a number of at least 0"),
        ({"fine_tune_type": "half"}, "fine_tune_type: 'half' must be one of lora, dora, full"),
        ({"grad_checkpoint": "yes"}, "grad_checkpoint: 'yes' must be true or false"),
        ({"memory_limit": "much"}, "memory_limit: 'much' must be a size"),
        ({"adapter_path": 3}, "adapter_path: 3 must be text"),
        ({"lora_parameters": {"rank": 0}}, "lora_parameters: rank: 0 must be"),
        ({"lora_parameters": {"rank": {1}}}, "lora_parameters: rank: {1} is read as a set"),
        ({"resume": True}, "resume: adapter_path {tmp}/a: it has no checkpoint; give another, or start without resume"),
        ({"adapter_path": "{tmp}/taken"}, "already holds another run; give another path, or overwrite=True to"),
        ({"adapter_path": "{tmp}/taken"}, "with the first save of this one, or resume=True to continue it"),
        ({"mask_prompt": True, "data": [ROW] * 9}, "mask_prompt=True: data: train[0] has text and so no prompt"),
        ({"data": [ROW, {"txt": "b"}]}, "data: train[1] has no text"),
        ({"data": [ROW, 5]}, "data: train[1] has no text"),
        ({"data": ["a"]}, "data: train[0] is of no kind that mlx-lm trains on"),
        ({"data": ([ROW] * 3, [ROW, {}])}, "data: valid[1] has no text"),
        ({"data": ([ROW], [ROW], [ROW])}, "data: 3 lists: give one list of rows, or a (train, valid) pair"),
        ({"data": []}, "data: no rows to train on"),
        ({"data": [ROW]}, "the train set has 1 row, fewer than batch_size 2"),
        ({"data": [ROW] * 9, "test": True}, "test=True: rows in memory have no test set"),
        ({"data": None}, "data is required"),
        ({"data": 7}, "data: int: give a path"),
        ({"data": "/no/such/folder/at/all"}, "data /no/such/folder/at/all: this folder does not exist"),
        ({"model": 7}, "model: int: give a folder"),
        ({"model": ("a", "b")}, "model: (str, str): give (model, tokenizer)"),
        ({"model": "/no/such/model"}, "model /no/such/model: no such folder here"),
        ({"train": False}, "train: False would not train"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_bad_input_is_one_line_that_names_the_keyword_and_writes_nothing(folders, tmp_path, given, message):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "adapters.safetensors").write_text("of another run")
    (tmp_path / "taken" / "checkpoints" / "step-0000001").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))

    def filled(value):
        return value.format(tmp=tmp_path, **folders) if isinstance(value, str) else value

    given = {"model": folders["untied"], "data": folders["data"], "adapter_path": tmp_path / "a"} | SHORT | given
    with pytest.raises(InputError) as error:
        ember_mlx.train(**{name: filled(value) for name, value in given.items()})
    said = str(error.value)
    assert message.replace("{tmp}", str(tmp_path)) in said
    assert "\n" not in said
    assert sorted(tmp_path.rglob("*")) == before


def test_an_option_without_effect_is_warned_of_by_its_keyword(capsys):
    options_of({"data": "d", "learning_rate": 0.0})
    said = capsys.readouterr().out
    assert said.startswith("Warning: learning_rate 0: the token tables would train alone, as with num_layers 0")
    assert "--" not in said


def test_a_model_that_has_an_adapter_is_refused(folders, tmp_path):
    result = ember_mlx.train(folders["untied"], data=folders["data"], adapter_path=tmp_path / "a", **SHORT)
    with pytest.raises(InputError, match="it has an adapter already"):
        ember_mlx.train((result.model, result.tokenizer), data=folders["data"], adapter_path=tmp_path / "b", **SHORT)


def test_a_loaded_model_takes_new_tokens(folders, tmp_path):
    (tmp_path / "tokens.txt").write_text("zebra\n")
    loaded = mlx_lm.load(str(folders["untied"]))
    result = ember_mlx.train(
        loaded, data=folders["data"], adapter_path=tmp_path / "a", add_tokens=tmp_path / "tokens.txt", **SHORT
    )
    [token] = result.tokenizer.encode("zebra", add_special_tokens=False)
    assert ember_mlx.load(folders["untied"], adapter_path=tmp_path / "a")[1].decode([token]) == "zebra"
