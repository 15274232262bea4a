"""`train --stream`: the same run as without it, or one line that says why not."""

import json
import os
import signal

import mlx.core as mx
import numpy as np
import pytest
from finetune.breaking import BreakAt, Breaks
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tiny_models import write_model

from ember_mlx import InputError
from ember_mlx.cli import main
from ember_mlx.finetune import checkpoints, run_log
from ember_mlx.finetune.run import run
from ember_mlx.finetune.stop_signals import Interrupted
from ember_mlx.streaming.sinks import Stepping

pytestmark = pytest.mark.usefixtures("eager")

FULL = ["--fine-tune-type", "full"]
RATES = ["--learning-rate", 1e-3, "--table-learning-rate", 1e-3]


class Watch:
    """A watcher and a callback: keeps the reports, the results of the steps and the weights after each."""

    def __init__(self):
        self.train, self.valid, self.results, self.weights = [], [], [], []

    def before_training(self, model, optimizer, tables, rows):
        self.model = model

    def before_step(self, step, batch):
        pass

    def after_step(self, step, result):
        self.results.append(result)
        weights = tree_flatten(self.model.trainable_parameters())
        self.weights.append({name: np.array(w.astype(mx.float32)) for name, w in weights})

    def after_validation(self, step, loss):
        pass

    def on_train_loss_report(self, info):
        self.train.append((info["iteration"], info["train_loss"], info["trained_tokens"]))

    def on_val_loss_report(self, info):
        self.valid.append((info["iteration"], info["val_loss"]))


def watched(options):
    watch = Watch()
    run(options, training_callback=watch, watchers=[watch])
    return watch


def arrays(folder):
    """All that a run's newest checkpoint holds, as bytes."""
    found = checkpoints.find(folder, True)
    return {
        name: bytes(np.array(w.reshape(-1).view(mx.uint8)))
        for part in (found.weights, found.optimizer)
        for name, w in part.items()
    }


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


RUNS = {
    "full": FULL,
    "full, tied": ["tied", *FULL],
    "lora": ["--fine-tune-type", "lora"],
    "dora, one table": ["--fine-tune-type", "dora", "--train-tables", "head"],
    "last layer": [*FULL, "--num-layers", 1],
    "inputs made again": ["deeper", *FULL],
    "clipped": [*FULL, "--clip-grad-norm", 0.5],
    "masked": [*FULL, "--mask-prompt"],
    "no tables": [*FULL, "--train-tables", "none"],
    "AdamW on tables": [*FULL, "--table-optimizer", "adamw"],
    "checkpointed": [*FULL, "--grad-checkpoint", "--chunked-loss"],
    "quantized": ["quantized"],
    **{name: [*FULL, "--optimizer", name] for name in ("adafactor", "muon", "adam-mini", "sinkgd")},
}


@pytest.mark.parametrize("name", RUNS)
def test_its_losses_are_those_of_the_ordinary_run(parse, folders, name):
    model, *words = RUNS[name] if RUNS[name][0] in folders else ["untied", *RUNS[name]]
    common = ["--iters", 3, "--steps-per-eval", 2, *RATES, *words]
    keep = ["--keep-inputs", 2] if name == "inputs made again" else []
    streamed = watched(parse(*common, *keep, "--stream", adapter="streamed", model=model))
    plain = watched(parse(*common, "--no-stream", adapter="plain", model=model))
    assert (len(plain.train), len(plain.valid)) == (3, 3)
    for kind in ("train", "valid"):
        np.testing.assert_allclose(getattr(streamed, kind), getattr(plain, kind), rtol=1e-5, atol=0)


def test_weights_with_a_rest_stream_too(parse, tmp_path):
    model = write_model(tmp_path / "model", dtype=mx.bfloat16)
    config = tmp_path / "split.yaml"
    config.write_text("optimizer: sinkgd\noptimizer_config: {sinkgd: {weights: bf16+int8}}\n")
    words = [*FULL, *RATES, "--model", model, "--config", config]
    streamed = watched(parse(*words, "--stream", adapter="streamed"))
    plain = watched(parse(*words, adapter="plain"))
    np.testing.assert_allclose(streamed.train, plain.train, rtol=2e-3)  # bfloat16 has 2^-8


def test_micro_batches_are_gathered_and_told_of_with_their_update(parse):
    words = [*FULL, *RATES, "--iters", 8, "--grad-accumulation-steps", 3, "--steps-per-report", 2]
    streamed = watched(parse(*words, "--stream", adapter="streamed"))
    plain = watched(parse(*words, "--steps-per-report", 1, adapter="plain"))
    assert [result.updated for result in streamed.results] == [result.updated for result in plain.results]
    losses = [loss for _, loss, _ in plain.train]
    expected = [(i, np.mean(losses[i - 3 : i]), plain.train[i - 1][2]) for i in (3, 6)]
    np.testing.assert_allclose(streamed.train, expected, rtol=1e-5)
    for name, weight in plain.weights[-1].items():
        np.testing.assert_allclose(streamed.weights[-1][name], weight, rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("words", [FULL, ["--grad-accumulation-steps", 2, "--clip-grad-norm", 1]], ids=["full", "lora"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(parse, folders, tmp_path, words):
    model = write_model(tmp_path / "model", dtype=mx.bfloat16)
    (tmp_path / "dropout.yaml").write_text("lora_parameters: {rank: 4, scale: 10.0, dropout: 0.3}\nstream: true\n")
    words = [*words, *RATES, "--model", model, "--config", tmp_path / "dropout.yaml", "--iters", 8, "--save-every", 2]
    run(parse(*words, adapter="whole"))
    with pytest.raises(Breaks):
        run(parse(*words, adapter="broken"), training_callback=BreakAt(6))
    assert checkpoints.find(tmp_path / "broken", True).position.step == 4
    with pytest.raises(InputError, match=r"--stream was true and is now false"):
        run(parse(*words, "--no-stream", "--resume", adapter="broken"))
    run(parse(*words, "--resume", adapter="broken"))
    assert arrays(tmp_path / "broken") == arrays(tmp_path / "whole")


@mx.custom_function
def spoilt(x):
    return x * 1


@spoilt.vjp
def _nan(x, cotangent, output):
    return cotangent * mx.nan


class Poison(Watch):
    """A watcher that makes the gradient that comes into the first layer NaN in a step."""

    def __init__(self, step):
        super().__init__()
        self.step, self.on = step, False

    def before_training(self, model, optimizer, tables, rows):
        super().before_training(model, optimizer, tables, rows)

        class Poisoned(type(model.layers[0])):
            def __call__(layer, *arguments, **keywords):
                output = super().__call__(*arguments, **keywords)
                return spoilt(output) if self.on else output

        model.layers[0].__class__ = Poisoned

    def before_step(self, step, batch):
        self.on = step == self.step

    def after_step(self, step, result):
        super().after_step(step, result)
        self.on = False


def test_skip_leaves_out_what_lies_below_a_nan_and_names_it(parse, capsys):
    watch = Poison(2)
    result = run(parse(*FULL, *RATES, "--stream", "--on-nonfinite", "skip"), watchers=[watch])
    said = " ".join(capsys.readouterr().out.split())
    assert "Warning: step 2: a NaN or an infinity in the gradient of model.layers.0." in said
    assert "these weights were left out, the others stepped, 1 so far" in said
    assert "1 step was left out" in said
    assert [step.nonfinite for step in watch.results] == [False, True, False]
    before, after = watch.weights[:2]
    unstepped = watch.results[1].unstepped
    assert {name for name in before if np.array_equal(before[name], after[name])} == set(unstepped)
    assert set(unstepped) == {name for name in before if ".layers.0." in name or "embed_tokens" in name}
    assert all(np.isfinite(weight).all() for weight in watch.weights[-1].values())
    assert result.loss_after < result.loss_before


def test_stop_goes_back_to_the_last_checkpoint(parse, tmp_path):
    words = [*FULL, *RATES, "--stream", "--iters", 6, "--save-every", 2]
    run(parse(*words, adapter="whole"))
    run(parse(*words, "--iters", 2, adapter="two"))
    with pytest.raises(InputError) as stopped:
        run(parse(*words, adapter="stopped"), watchers=[Poison(4)])
    where = tmp_path / "stopped" / "checkpoints" / "step-0000002"
    assert "step 4: a NaN or an infinity in the gradient of model.layers.0." in str(stopped.value)
    assert f"other weights were stepped: the run went back to {where}." in str(stopped.value)
    assert str(stopped.value).endswith(". --resume continues from there")
    assert arrays(tmp_path / "stopped") == arrays(tmp_path / "two")
    saved = [mx.load(str(tmp_path / name / "adapters.safetensors")) for name in ("stopped", "two")]
    assert all(mx.array_equal(saved[0][name], array) for name, array in saved[1].items())
    run(parse(*words, "--resume", adapter="stopped"))
    assert arrays(tmp_path / "stopped") == arrays(tmp_path / "whole")


def test_stop_before_the_first_checkpoint_leaves_the_disk_as_it_was(parse, tmp_path):
    run(parse("--iters", 2))
    before = contents(tmp_path / "adapters")
    with pytest.raises(InputError, match="other weights were stepped: of this half step nothing is saved"):
        run(parse(*FULL, "--stream", "--overwrite"), watchers=[Poison(2)])
    assert contents(tmp_path / "adapters") == before


@pytest.mark.parametrize("what", ["stop", "skip"])
def test_a_loss_that_is_not_finite_changes_nothing(parse, tmp_path, capsys, what):
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"prompt": f"{i} and", "completion": f"{i + 1}"} for i in range(3)]
    rows.append({"prompt": "long " * 20, "completion": "lost"})
    for file, some in (("train", rows), ("valid", rows[:3])):
        (data / f"{file}.jsonl").write_text("\n".join(map(json.dumps, some)))
    watch = Watch()
    options = parse(
        *FULL, *RATES, "--stream", "--on-nonfinite", what, "--data", data, "--mask-prompt", "--max-seq-length", 48,
        "--batch-size", 1, "--iters", 4, "--val-batches", 1, "--seed", 5,
    )  # fmt: skip
    if what == "stop":
        with pytest.raises(InputError, match=r"a new weight; it reached .* --resume continues before that step"):
            run(options, watchers=[watch])
    else:
        run(options, watchers=[watch])
    bad = [result.nonfinite for result in watch.results].index(True)
    assert bad > 0  # with this seed
    assert (watch.results[bad].updated, watch.results[bad].unstepped) == (False, ())
    for name, weight in watch.weights[bad].items():
        assert np.array_equal(weight, watch.weights[bad - 1][name])
    if what == "stop":
        assert checkpoints.find(tmp_path / "adapters", True).position.step == bad


def inside_a_step(monkeypatch, number, what):
    """Call ``what`` as the streamed steps of a run come to their weights for that time; three times are a step."""
    own, seen = Stepping.arrays, []

    def stepping(*arguments):
        seen.append(None)
        if len(seen) == number:
            what()
        return own(*arguments)

    monkeypatch.setattr(Stepping, "arrays", stepping)


def test_a_step_that_breaks_off_saves_nothing(parse, tmp_path, monkeypatch):
    def breaks():
        raise Breaks

    inside_a_step(monkeypatch, 5, breaks)
    with pytest.raises(Breaks):
        run(parse(*FULL, "--stream", "--save-every", 1))
    assert checkpoints.find(tmp_path / "adapters", True).position.step == 1


def test_a_signal_inside_a_step_waits_for_its_end(parse, tmp_path, monkeypatch):
    words = [*FULL, *RATES, "--stream", "--iters", 4]
    run(parse(*words, adapter="whole"))
    inside_a_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="stopped at step 2"):
        run(parse(*words))
    run(parse(*words, "--resume"))
    assert arrays(tmp_path / "adapters") == arrays(tmp_path / "whole")


def test_with_lora_too_every_weight_that_trains_is_stepped_inside_the_backward_pass(parse, monkeypatch, capsys):
    stepped = set()
    arrays, table = Stepping.arrays, Stepping.table

    def of_arrays(self, gradients):
        stepped.update(gradients)
        arrays(self, gradients)

    def of_table(self, of, *arguments):
        stepped.add(of.path)
        table(self, of, *arguments)

    monkeypatch.setattr(Stepping, "arrays", of_arrays)
    monkeypatch.setattr(Stepping, "table", of_table)
    trained = watched(parse("--stream")).weights[-1]
    assert any("lora" in name for name in trained)
    assert stepped == trained.keys()
    assert "Streamed: every weight that trains is stepped inside the backward pass" in capsys.readouterr().out


def test_the_run_says_that_it_streams_and_records_it(parse, tmp_path, capsys):
    log = tmp_path / "run.jsonl"
    words = ["--grad-checkpoint", "--chunked-loss", "--clip-grad-norm", 1, "--log-jsonl", log]
    run(parse(*FULL, "--stream", *words, "--table-optimizer", "sgd"))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    start = lines.index("Streamed: every weight that trains is stepped inside the backward pass")
    notes = lines[start + 1 : lines.index("", start)]
    assert notes[0] == "lm_head.weight is not trained by Ember: its gradient is whole"
    assert notes[1] == "--grad-checkpoint and --chunked-loss: streaming includes them"
    assert notes[2].startswith("--clip-grad-norm: exact, by a backward pass more")
    assert len(notes) == 3
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert (config["stream"], config["streaming_notes"]) == (True, notes)
    written = run_log.read(log)
    assert written.options["stream"] is True
    assert len(written.train) == 3
    assert written.train[0]["update_ratio_body"] is None  # a streamed step has no moment to measure it


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--no-stream", "--keep-inputs", 2],
            "--keep-inputs 2: is for a run that streams; add --stream, or use --grad-checkpoint",
        ),
        (["--stream", "--shard-optimizer"], "--shard-optimizer: is for several workers; start them with mlx.launch"),
        (
            ["--no-stream", "--clip-layer-norm", 1],
            "--clip-layer-norm 1.0: is for a run that streams; add --stream, or use --clip",
        ),
        (["--stream", "--keep-inputs", 0], "--keep-inputs 0: must be a whole number of at least 1"),
        (["--stream", "--clip-layer-norm", 0], "--clip-layer-norm 0.0: must be a finite number above 0"),
        (["--stream", "--clip-grad-norm", "nan"], "--clip-grad-norm nan: must be a finite number above 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folders, tmp_path, capsys, monkeypatch, words, said):
    paths = ["--model", folders["untied"], "--data", folders["data"], "--adapter-path", tmp_path / "new"]
    monkeypatch.setattr("sys.argv", ["ember-mlx", "train", *map(str, [*paths, *FULL, *words])])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
    assert not (tmp_path / "new").exists()


def test_a_model_that_cannot_be_differentiated_is_named(parse, tmp_path, monkeypatch):
    @mx.custom_function
    def broken(x):
        return x * 1

    @broken.vjp
    def gradient(x, cotangent, output):
        raise ValueError("no VJP of it")

    monkeypatch.setattr(llama.TransformerBlock, "__call__", lambda layer, x, *arguments, **keywords: broken(x))
    with pytest.raises(InputError, match=r"--stream: .*cannot differentiate mlx_lm.models.llama \(.*--no-stream"):
        run(parse(*FULL, "--stream"))
    assert not (tmp_path / "adapters").exists()


def test_full_streams_by_default_and_a_model_that_cannot_says_why_and_takes_an_ordinary_step(
    parse, monkeypatch, capsys
):
    assert run(parse(*FULL, "--iters", 1)) is not None
    assert "Streamed: every weight" in capsys.readouterr().out
    run(parse(*FULL, "--iters", 1, "--clip-grad-norm", 1, adapter="clipped"))
    assert "Not streamed: --clip-grad-norm" in capsys.readouterr().out

    def refuses(model, optimizer, args):
        raise InputError("--stream: it cannot be")

    monkeypatch.setattr("ember_mlx.finetune.streamed.Streamed", refuses)
    run(parse(*FULL, "--iters", 1, adapter="ordinary"))
    assert "Not streamed: it cannot be" in capsys.readouterr().out
    with pytest.raises(InputError, match="it cannot be"):
        run(parse(*FULL, "--stream", adapter="refused"))


def test_a_run_that_began_without_streaming_goes_on_without(parse, capsys):
    words = [*FULL, "--save-every", 1]
    run(parse(*words, "--no-stream", "--iters", 1))
    capsys.readouterr()
    run(parse(*words, "--iters", 2, "--resume"))
    assert "Streamed:" not in capsys.readouterr().out
