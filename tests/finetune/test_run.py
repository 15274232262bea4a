"""A run: the same as mlx_lm.lora's where that is asked for, and what it leaves behind."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import lora
from mlx_lm.tuner.trainer import default_loss, evaluate
from tiny_models import write_model

from ember_mlx import InputError, load
from ember_mlx.finetune import loop as loop_module
from ember_mlx.finetune import run as run_module
from ember_mlx.finetune import run_log
from ember_mlx.finetune.adapters import ADAPTERS, REFUSAL
from ember_mlx.finetune.base_models import load_base
from ember_mlx.finetune.run import run

IDS = mx.array([[4, 60, 70, 80, 90]])


def arrays(folder, name="adapters.safetensors"):
    return mx.load(str(folder / name))


def without_refusal(folder):
    """The adapter as it was saved once, which still loads here."""
    weights, metadata = mx.load(str(folder / ADAPTERS), return_metadata=True)
    del weights[REFUSAL]
    mx.eval(weights)
    mx.save_safetensors(str(folder / ADAPTERS), weights, metadata)


@pytest.mark.parametrize("words", [[], ["--fine-tune-type", "dora"], ["--num-layers", 0], ["--train-tables", "head"]])
def test_stock_mlx_lm_refuses_an_adapter_with_tables_and_names_what_loads_it(parse, folders, tmp_path, words):
    run(parse(*words, "--save-every", 1))
    folder = tmp_path / "adapters"
    for file in ("adapters.safetensors", "0000001_adapters.safetensors"):
        (folder / file).replace(folder / "adapters.safetensors")
        with pytest.raises(ValueError, match=r"token tables, which mlx-lm would leave out\. Use ember-mlx generate"):
            mlx_lm.load(str(folders["untied"]), adapter_path=str(folder))


def test_an_adapter_without_tables_loads_in_stock_mlx_lm(parse, folders, tmp_path):
    run(parse("--train-tables", "none"))
    stock, _ = mlx_lm.load(str(folders["untied"]), adapter_path=str(tmp_path / "adapters"))
    ours, _ = load(folders["untied"], adapter_path=tmp_path / "adapters")
    assert mx.array_equal(stock(IDS), ours(IDS))


def test_an_adapter_of_stock_mlx_lm_begins_a_run_here_and_ours_one_there(parse, tmp_path):
    lora.run(parse("--num-layers", 2, adapter="theirs"))
    stay = ["--learning-rate", 0, "--table-learning-rate", 0, "--num-layers", 2]
    run(parse(*stay, "--resume-adapter-file", tmp_path / "theirs" / ADAPTERS, adapter="ours"))
    theirs, ours = arrays(tmp_path / "theirs"), arrays(tmp_path / "ours")
    assert ours.keys() - theirs.keys() == {REFUSAL}
    assert all(mx.array_equal(array, ours[name]) for name, array in theirs.items())
    # mlx_lm.lora takes the matrices of any file, and of ours nothing else.
    lora.run(parse(*stay, "--resume-adapter-file", tmp_path / "ours" / ADAPTERS, adapter="back"))
    back = arrays(tmp_path / "back")
    assert back.keys() == theirs.keys()
    assert all(mx.array_equal(array, back[name]) for name, array in theirs.items())


def names_in(folder):
    """Without the checkpoints, the lock and the best weights so far, which are always there."""
    return sorted(path.name for path in folder.iterdir() if path.name not in ("checkpoints", ".lock", "best"))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [(kind, "adam") for kind in ("lora", "dora", "full")]
    + [(kind, optimizer) for kind in ("lora", "full") for optimizer in ("adamw", "muon", "sgd", "adafactor")],
)
def test_without_tables_it_is_mlx_lms_run_bit_for_bit(parse, folders, tmp_path, capsys, kind, optimizer):
    data = tmp_path / "data"
    shutil.copytree(folders["data"], data)
    shutil.copy(data / "valid.jsonl", data / "test.jsonl")
    common = ["--train-tables", "none", "--fine-tune-type", kind, "--iters", 5, "--grad-accumulation-steps", 2]
    common += ["--data", data, "--train", "--test", "--test-batches", 1]
    common += ["--optimizer", optimizer, "--max-seq-length", 32]  # which cuts some rows
    run(parse(*common, adapter="ours"))
    lora.run(SimpleNamespace(**vars(parse(*common, "--num-layers", 2, adapter="theirs"))))  # it writes to them
    ours, reference = arrays(tmp_path / "ours"), arrays(tmp_path / "theirs")
    assert ours.keys() == reference.keys()
    assert all(mx.array_equal(array, reference[name]) for name, array in ours.items())
    # The test draws its batches from the random state that the training left.
    out = capsys.readouterr().out
    ours, theirs = out[: out.rindex("Loading pretrained model")], out[out.rindex("Loading pretrained model") :]
    assert ("\x1b" in ours, "\x1b" in theirs) == (False, True)  # mlx-lm colours what is no terminal
    assert ("[WARNING]" in ours, "[WARNING]" in theirs) == (False, True)  # mlx-lm warns of each batch with a cut row
    assert re.findall(r"^ +(\d+) +val ", ours, re.MULTILINE) == ["0", "4"]  # steps done; theirs name the next step
    said = [re.findall(r"\d+\.\d+", line) for line in out.splitlines() if line.startswith("Test loss")]
    assert [len(numbers) for numbers in said] == [2, 2]
    assert said[0] == said[1]


def test_tables_that_train_lower_the_loss_more_than_frozen_ones(parse):
    rate = ["--table-learning-rate", 1e-2, "--iters", 10]
    frozen = run(parse("--train-tables", "none", *rate, adapter="none"))
    trained = run(parse(*rate, adapter="auto"))
    assert frozen.loss_before == trained.loss_before
    assert trained.loss_after < frozen.loss_after - 0.2


def test_the_tables_lie_beside_a_lora_adapter_and_without_the_refusal_stock_mlx_lm_would_leave_them_out(
    parse, folders, tmp_path
):
    result = run(parse())
    folder = tmp_path / "adapters"
    assert names_in(folder) == ["adapter_config.json", "adapters.safetensors", "token_tables.safetensors"]
    assert [path.name for path in result.files] == names_in(folder)
    assert set(arrays(folder, "token_tables.safetensors")) == {"model.embed_tokens.weight", "lm_head.weight"}
    without_refusal(folder)
    stock, _ = mlx_lm.load(str(folders["untied"]), adapter_path=str(folder))
    ours, _ = load(folders["untied"], adapter_path=folder)
    differing = [
        name
        for (name, a), (_, b) in zip(tree_flatten(stock.parameters()), tree_flatten(ours.parameters()), strict=True)
        if not mx.array_equal(a, b)
    ]
    assert sorted(differing) == ["lm_head.weight", "model.embed_tokens.weight"]


def test_a_full_adapter_loads_in_stock_mlx_lm_as_it_is(parse, folders, tmp_path):
    run(parse("--fine-tune-type", "full"))
    folder = tmp_path / "adapters"
    assert names_in(folder) == ["adapter_config.json", "adapters.safetensors"]
    stock, _ = mlx_lm.load(str(folders["untied"]), adapter_path=str(folder))
    ours, _ = load(folders["untied"], adapter_path=folder)
    assert mx.array_equal(stock(IDS), ours(IDS))
    base = dict(tree_flatten(load(folders["untied"])[0].parameters()))
    assert base.keys() == arrays(folder).keys()
    assert [name for name, array in arrays(folder).items() if mx.array_equal(array, base[name])] == []


def test_checkpoints_are_written_between_steps_as_mlx_lm_names_them(parse, folders, tmp_path):
    run(parse("--iters", 4, "--save-every", 2, "--fine-tune-type", "full", "--keep-checkpoints", 2))
    run(parse("--iters", 2, "--save-every", 2, "--fine-tune-type", "full", adapter="two"))
    folder = tmp_path / "adapters"
    assert {"0000002_adapters.safetensors", "0000004_adapters.safetensors"} < set(names_in(folder))
    for name, array in arrays(tmp_path / "two").items():
        assert mx.array_equal(array, arrays(folder, "0000002_adapters.safetensors")[name])
    for name, array in arrays(folder).items():
        assert mx.array_equal(array, arrays(folder, "0000004_adapters.safetensors")[name])


def test_checkpoints_of_a_lora_run_have_their_tables_beside_them(parse, tmp_path):
    run(parse("--iters", 3, "--save-every", 2))
    assert names_in(tmp_path / "adapters") == [
        "0000002_adapters.safetensors",
        "0000002_token_tables.safetensors",
        "adapter_config.json",
        "adapters.safetensors",
        "token_tables.safetensors",
    ]


def test_the_loss_after_is_of_the_same_batches_as_the_loss_before(parse, folders, tmp_path, monkeypatch):
    drawn, sets = [], []

    def recording(**options):
        batches = options["iterate_batches"]
        sets.append(options["dataset"])

        def wrapped(**arguments):
            for batch in batches(**arguments):
                drawn[-1].append(batch)
                yield batch

        drawn.append([])
        return evaluate(**(options | {"iterate_batches": wrapped}))

    monkeypatch.setattr("mlx_lm.tuner.trainer.evaluate", recording)
    result = run(parse("--steps-per-eval", 2))
    first, *_, last = drawn
    assert len(first) == 2
    assert all(each is sets[0] for each in sets)  # which keeps the tokens
    assert all(mx.array_equal(a[0], b[0]) for a, b in zip(first, last, strict=True))
    # And it is the loss of the weights that were saved.
    model, _ = load(folders["untied"], adapter_path=tmp_path / "adapters")
    losses = [default_loss(model, *batch) for batch in last]
    mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert result.loss_after == pytest.approx(mean.item(), abs=1e-5)


def test_the_end_of_a_run_tells_one_loss_and_its_log_tells_both(parse, tmp_path, capsys):
    of_others = ("--train-tables", "none")  # batches
    for words, shown in ((("--no-keep-best",), ["0", "1", "3"]), (of_others, ["0", "1", "3", "4"])):
        log = tmp_path / f"{len(words)}.jsonl"
        run(parse("--iters", 5, "--steps-per-eval", 2, "--log-jsonl", log, *words, adapter=log.stem))
        assert re.findall(r"^ +(\d+) +val ", capsys.readouterr().out, re.MULTILINE) == shown
        rows = run_log.read(log)
        assert [row["step"] for row in rows.validation + rows.end] == [0, 1, 3, 4, 5]


def test_a_run_goes_on_from_an_adapter_file_and_its_tables(parse, folders, tmp_path):
    run(parse(adapter="first"))
    run(parse("--resume-adapter-file", tmp_path / "first" / "adapters.safetensors", "--learning-rate", 0,
              "--table-learning-rate", 0, adapter="second"))  # fmt: skip
    for name in ("adapters.safetensors", "token_tables.safetensors"):
        for path, array in arrays(tmp_path / "first", name).items():
            assert mx.array_equal(array, arrays(tmp_path / "second", name)[path]), path


def test_overwriting_the_folder_that_is_resumed_from_loses_nothing(parse, tmp_path):
    run(parse())
    before = {name: mx.array(array) for name, array in arrays(tmp_path / "adapters").items()}
    mx.eval(before)
    file = tmp_path / "adapters" / "adapters.safetensors"
    run(parse("--resume-adapter-file", file, "--overwrite", "--learning-rate", 0))
    assert all(mx.array_equal(array, arrays(tmp_path / "adapters")[name]) for name, array in before.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train-tables", "none"], "token_tables.safetensors.*weight is not among .*use the --fine-tune-type, --tra"),
        (["--fine-tune-type", "full"], "lora_. is not among the parameters to load"),
    ],
)
def test_resuming_what_this_run_does_not_train_is_refused(parse, tmp_path, arguments, message):
    run(parse(adapter="first"))
    file = tmp_path / "first" / "adapters.safetensors"
    with pytest.raises(InputError, match=message):
        run(parse("--resume-adapter-file", file, *arguments, adapter="second"))
    assert not (tmp_path / "second").exists()
    for other, wrong in (("nothing", "this file does not exist; give an ada"), ("first", f"is a folder; give {file}")):
        with pytest.raises(InputError, match=wrong):
            run(parse("--resume-adapter-file", tmp_path / other, adapter="second"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="adapters.safetensors cannot be read"):
        run(parse("--resume-adapter-file", file, adapter="second"))


def test_a_folder_that_holds_a_run_is_kept_unless_overwrite_is_given(parse, tmp_path):
    run(parse("--save-every", 1))
    folder = tmp_path / "adapters"
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    with pytest.raises(InputError, match="already holds another run; give another path, or --overwrite"):
        run(parse())
    assert before == contents(folder)
    run(parse("--overwrite", "--fine-tune-type", "full"))
    assert names_in(folder) == ["adapter_config.json", "adapters.safetensors", "notes.txt"]


def test_a_run_that_breaks_off_before_its_first_save_loses_nothing_of_the_earlier_one(parse, tmp_path, monkeypatch):
    run(parse("--save-every", 1))
    folder = tmp_path / "adapters"
    before = contents(folder)

    def broken(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_lm.tuner.trainer.evaluate", broken)
    with pytest.raises(KeyboardInterrupt):
        run(parse("--overwrite"))
    assert before == contents(folder)
    with pytest.raises(KeyboardInterrupt):
        run(parse(adapter="new"))
    monkeypatch.undo()
    run(parse(adapter="new"))


@pytest.mark.parametrize("arguments", [["--learning-rate", 1e10], ["--table-learning-rate", 1e10]])
def test_weights_that_are_no_numbers_are_not_saved(parse, tmp_path, arguments):
    with pytest.raises(InputError, match="it reached neither the weights nor the optimizer's state"):
        run(parse(*arguments, "--iters", 6, "--model", write_model(tmp_path / "model", dtype=mx.float16)))
    folder = tmp_path / "adapters"
    assert names_in(folder) == []
    # What was before that step is kept, to go on from with other rates.
    (weights,) = folder.glob("checkpoints/*/weights.safetensors")
    assert all(mx.isfinite(array).all() for array in mx.load(str(weights)).values())


@pytest.mark.parametrize("path", ["", "file", "file/below"])
def test_a_folder_that_cannot_be_written_to_is_refused_at_once(parse, tmp_path, path):
    (tmp_path / "file").write_text("mine")
    args = parse() | {"adapter_path": str(tmp_path / path) if path else ""}
    with pytest.raises(InputError, match="--adapter-path .*(give a folder|no folder that can be written to)"):
        run(args)
    assert names_in(tmp_path) == ["file"]


def test_the_config_tells_what_stock_mlx_lm_needs_and_which_tables_trained(parse, tmp_path):
    run(parse())
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert (config["fine_tune_type"], config["num_layers"], config["lora_parameters"]["rank"]) == ("lora", 2, 8)
    assert config["token_tables"] == ["model.embed_tokens.weight", "lm_head.weight"]


def test_the_options_of_the_loop_arrive_there_those_that_mlx_lm_drops_too(parse, monkeypatch):
    seen = {}
    real = loop_module.Training._loop

    def spy(training, *options):
        seen["args"] = training.args
        return real(training, *options)

    monkeypatch.setattr(loop_module.Training, "_loop", spy)
    asked = {"--clear-cache-threshold": "3MB", "--max-seq-length": 77, "--steps-per-eval": 5, "--val-batches": 1}
    asked |= {"--grad-accumulation-steps": 2, "--steps-per-report": 4, "--iters": 2}
    run(parse(*[word for pair in asked.items() for word in pair], "--grad-checkpoint"))
    args = seen["args"]
    assert (args.clear_cache_threshold, args.max_seq_length, args.steps_per_eval) == (3 * 10**6, 77, 5)
    assert (args.val_batches, args.grad_accumulation_steps, args.steps_per_report) == (1, 2, 4)
    assert (args.iters, args.batch_size, args.grad_checkpoint) == (2, 2, True)


def test_reports_go_to_the_services_and_to_a_callback_with_both_learning_rates(parse, monkeypatch):
    reports, own = [], []

    class Service:
        on_train_loss_report = reports.append
        on_val_loss_report = reports.append

    class Own:
        on_train_loss_report = own.append
        on_val_loss_report = own.append

    monkeypatch.setattr(run_module, "get_reporting_callbacks", lambda *args, **options: Service)
    run(parse("--learning-rate", 0.5, "--table-learning-rate", 0.25, "--iters", 2), training_callback=Own)
    assert own == reports
    training = [report for report in reports if "train_loss" in report]
    assert [(r["learning_rate"], r["table_learning_rate"]) for r in training] == [(0.5, 0.25)] * 2
    assert [report["iteration"] for report in reports if "val_loss" in report] == [0, 1]


def test_an_unknown_reporting_service_is_refused(parse):
    with pytest.raises(InputError, match="--report-to nowhere: nowhere is no service of mlx-lm's"):
        run(parse("--report-to", "nowhere"))


def test_without_a_validation_set_the_training_losses_are_told(parse, folders, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_bytes((folders["data"] / "train.jsonl").read_bytes())
    result = run(parse("--data", data, "--valid-fraction", 0))
    assert result.loss_name == "Training loss"
    assert np.isfinite([result.loss_before, result.loss_after]).all()


def test_a_yaml_file_can_ask_for_a_test_alone(parse, folders, tmp_path, capsys):
    run(parse())
    data = tmp_path / "data"
    data.mkdir()
    (data / "test.jsonl").write_bytes((folders["data"] / "valid.jsonl").read_bytes())
    (tmp_path / "test.yaml").write_text("train: false\ntest: true\n")
    assert run(parse("--config", tmp_path / "test.yaml", "--data", data)) is None
    assert "Test loss" in capsys.readouterr().out
    (tmp_path / "test.yaml").write_text("train: false\n")
    with pytest.raises(InputError, match="nothing to do"):
        run(parse("--config", tmp_path / "test.yaml"))


def test_a_model_that_does_not_load_is_an_input_error(parse, tmp_path):
    (tmp_path / "empty").mkdir()
    for model, message in (
        (tmp_path / "empty", "this folder has no config.json"),
        ("/no/such/model", "no such folder here"),
    ):
        with pytest.raises(InputError, match=message):
            load_base(model)


@pytest.mark.parametrize("loss", [0.0, 709.0, 710.0, 1e6, math.inf, math.nan])
def test_any_test_loss_is_printed(parse, monkeypatch, capsys, loss):
    monkeypatch.setattr("ember_mlx.finetune.run.evaluate", lambda *_: loss)
    run_module._test(parse(), None, [], None)
    assert f"Test loss {loss:.3f} nats a token; perplexity " in capsys.readouterr().out
