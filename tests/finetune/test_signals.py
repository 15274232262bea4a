"""Ctrl-C, SIGTERM and SIGHUP: the step is finished, the run saved, and the second signal waits for nothing."""

import os
import shlex
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from ember_mlx import InputError
from ember_mlx.finetune import adapters, checkpoints, options
from ember_mlx.finetune.loop import Display
from ember_mlx.finetune.run import run
from ember_mlx.finetune.saving import Saving
from ember_mlx.finetune.stop_signals import SIGNALS, Interrupted, StopSignals

pytestmark = pytest.mark.usefixtures("eager")


class Sends:
    """A training callback that sends the process a signal at an iteration."""

    def __init__(self, number, iteration=3, validation=None):
        self.number = number
        self.iteration = iteration
        self.validation = validation

    def on_train_loss_report(self, info):
        if info["iteration"] == self.iteration:
            os.kill(os.getpid(), self.number)

    def on_val_loss_report(self, info):
        pass


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(parse, tmp_path, number, code):
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Interrupted, match="stopped at step 3; .*step-0000003 is saved, and --resume") as stopped:
        run(parse("--iters", 9), Sends(number))
    assert stopped.value.exit_code == code
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert checkpoints.find(tmp_path / "adapters", True).position.step == 3


def test_what_a_stopped_run_left_says_how_to_make_an_adapter_of_it(parse, tmp_path, folders):
    adapter = tmp_path / "adapters"
    inside = [adapter, adapter / "checkpoints", adapter / "checkpoints" / "step-0000003"]
    with pytest.raises(Interrupted):
        run(parse("--iters", 9), Sends(signal.SIGINT))
    for folder in inside:
        with pytest.raises(InputError) as refused:
            adapters.read_config(folder)
        for said in (f"{folder}: it has no", f"in {adapter} stopped at step 3", "--resume, or ends", "--iters 3"):
            assert said in str(refused.value)
    run(parse("--iters", 3, "--resume"))
    assert adapters.load(folders["untied"], adapter_path=adapter)
    for folder in inside[1:]:
        with pytest.raises(InputError, match=f"checkpoints are for .*; give {adapter}, which has the adapter"):
            adapters.read_config(folder)


def test_what_a_stopped_run_left_names_its_best(parse, tmp_path, folders):
    best = tmp_path / "adapters" / "best"
    with pytest.raises(Interrupted):
        run(parse("--iters", 9, "--steps-per-eval", 2, "--table-learning-rate", 1e-2), Sends(signal.SIGINT))
    with pytest.raises(InputError, match=f"before it saved an adapter; give {best}, which has the lowest validation"):
        adapters.read_config(best.parent)
    assert adapters.load(folders["untied"], adapter_path=best)


@pytest.mark.parametrize("keeps", [True, False])
def test_where_the_state_cannot_be_used_the_weights_of_a_stopped_run_are_named_where_they_are(parse, tmp_path, keeps):
    words = ["--iters", 4, "--steps-per-eval", 2, "--table-learning-rate", 1e-2]
    words.append("--keep-best" if keeps else "--no-keep-best")
    with pytest.raises(Interrupted):
        run(parse(*words, "--optimizer", "adam-mini"), Sends(signal.SIGINT))
    with pytest.raises(InputError) as refused:
        run(parse(*words, "--optimizer", "sinkgd", "--resume"))
    file = tmp_path / "adapters" / ("best" if keeps else "") / "adapters.safetensors"
    assert f"by a new run: --resume-adapter-file {file}, without" in str(refused.value)
    first = "To have that file, end this run first, as it was made, with --resume --iters 3"
    assert str(refused.value).endswith(first) is not keeps
    if not keeps:
        run(parse(*words, "--optimizer", "adam-mini", "--iters", 3, "--resume"))
    run(parse(*words, "--optimizer", "sinkgd", "--resume-adapter-file", file, adapter="new"))


def test_weights_that_no_step_has_trained_are_not_offered(parse, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("ember_mlx.finetune.loop.Display", stops_at_once)
        with pytest.raises(Interrupted, match="step-0000000 is saved"):
            run(parse("--optimizer", "adam-mini"))
    with pytest.raises(InputError, match="cannot be used with that; no weight is trained yet: start without --resume"):
        run(parse("--optimizer", "sinkgd", "--resume"))


def test_a_best_that_is_not_kept_up_is_told_of(parse, capsys):
    words = ["--steps-per-eval", 2, "--table-learning-rate", 1e-2]
    run(parse(*words))
    run(parse(*words, "--iters", 4, "--resume"))
    assert "kept up" not in capsys.readouterr().out
    run(parse(*words, "--iters", 5, "--resume", "--no-keep-best"))
    assert "best/ is of step 4 and is not kept up: --no-keep-best\n" in capsys.readouterr().out


def test_while_gradients_gather_the_checkpoint_is_of_the_update_before(parse, tmp_path):
    with pytest.raises(Interrupted, match="stopped at step 4"):
        run(parse("--iters", 9, "--grad-accumulation-steps", 4), Sends(signal.SIGINT, iteration=6))
    with pytest.raises(Interrupted, match="stopped at step 0"):
        run(parse("--iters", 9, "--grad-accumulation-steps", 4, adapter="early"), Sends(signal.SIGINT, iteration=2))


def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(parse, monkeypatch):
    from mlx_lm.tuner import trainer

    batches = []

    def loss(model, batch, lengths):
        if not model.training:
            batches.append(batch)
            os.kill(os.getpid(), signal.SIGINT)
        return trainer.default_loss(model, batch, lengths)

    monkeypatch.setattr("ember_mlx.finetune.run.choose_loss", lambda args, model: loss)
    with pytest.raises(Interrupted, match="stopped at step 0"):
        run(parse("--val-batches", 5))
    assert len(batches) == 1


def test_with_no_checkpoints_to_keep_it_says_that_none_is_saved(parse, capfd):
    with pytest.raises(Interrupted, match="no checkpoint exists to resume from"):
        run(parse("--iters", 9, "--keep-checkpoints", 0), Sends(signal.SIGINT))
    assert "SIGINT: finishing this step, saving no checkpoint (--keep-checkpoints 0)" in capfd.readouterr().err


def test_in_another_thread_signals_are_left_alone():
    seen = []

    def in_thread():
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_a_signal_that_was_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.number == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_command_line_says_how_to_go_on_and_exits_with_143(folders, tmp_path):
    given = {"--model": folders["untied"], "--data": folders["data"], "--adapter-path": tmp_path / "my run"}
    given |= {"--iters": 10**6, "--batch-size": 2, "--val-batches": 2, "--steps-per-report": 1}
    words = [str(word) for pair in given.items() for word in pair]
    command = [sys.executable, "-u", "-m", "ember_mlx", "train", *words, "--overwrite"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "val" in line:
            process.send_signal(signal.SIGTERM)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "SIGTERM: finishing this step, then saving; once more leaves at once" in errors
    assert f"--adapter-path '{tmp_path / 'my run'}'" in errors
    assert errors.rstrip().endswith("--steps-per-report 1 --resume")
    assert checkpoints.find(tmp_path / "my run", True)


def test_a_pipe_that_nobody_reads_any_more_ends_the_run_with_a_checkpoint(parse, tmp_path, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr("ember_mlx.finetune.run.rprint", lambda *_: None)  # before the training
        monkeypatch.setattr("ember_mlx.finetune.run.print_trainable_parameters", lambda _: None)
        with pytest.raises(Interrupted, match="SIGPIPE: stopped at step 0; ") as stopped:
            run(parse("--iters", 9))
    assert stopped.value.exit_code == 141
    assert checkpoints.find(tmp_path / "adapters", True).position.step == 0


def test_a_run_whose_reader_dies_of_the_same_ctrl_c_is_saved_and_keeps_its_exit_code(folders, tmp_path):
    given = {"--model": folders["untied"], "--data": folders["data"], "--adapter-path": tmp_path / "adapters"}
    given |= {"--iters": 10**6, "--batch-size": 2, "--val-batches": 2, "--steps-per-report": 1}
    words = [str(word) for pair in given.items() for word in pair]
    command = [sys.executable, "-u", "-m", "ember_mlx", "train", *words]
    # As with `2>&1 | tee log`.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if "val" in line:
            break
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert checkpoints.find(tmp_path / "adapters", True).position.step > 0


def test_a_signal_that_comes_when_all_is_saved_is_not_forgotten(parse, tmp_path, monkeypatch):
    @contextmanager
    def telling_what_is_left(saving):
        yield
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Saving, "telling_what_is_left", telling_what_is_left)
    with pytest.raises(Interrupted, match="stopped at step 3") as stopped:
        run(parse())
    assert stopped.value.exit_code == 143
    assert (tmp_path / "adapters" / "adapters.safetensors").exists()


def stops_at_once(*arguments, **options):
    os.kill(os.getpid(), signal.SIGINT)
    return Display(*arguments, **options)


def test_the_command_to_go_on_takes_the_checkpoint_of_this_run_and_its_changes(parse, tmp_path, monkeypatch):
    def stopped_at(iteration, *arguments):
        with pytest.raises(Interrupted) as stopped:
            run(parse("--iters", 9, "--save-every", 2, *arguments), Sends(signal.SIGINT, iteration))
        again = stopped.value.resume_words
        assert f"{shlex.join(again)} continues from it" in str(stopped.value)
        return again

    folder = tmp_path / "adapters" / "checkpoints"
    second = folder / "step-0000002"
    assert stopped_at(5) == ["--resume"]
    changed = ["--resume", second, "--learning-rate", 0.5, "--resume-with-changes"]
    # Nothing new is saved: the newer ones stay, and a bare --resume would take one of them.
    with monkeypatch.context() as context:
        context.setattr("ember_mlx.finetune.loop.Display", stops_at_once)
        assert stopped_at(None, *changed) == ["--resume", str(second), "--resume-with-changes"]
    assert [path.name for path in checkpoints.in_folder(tmp_path / "adapters")][-1] == "step-0000005"
    assert stopped_at(3, *changed) == ["--resume"]
    assert [path.name for path in checkpoints.in_folder(tmp_path / "adapters")] == ["step-0000002", "step-0000003"]
    assert stopped_at(5, "--resume", "--learning-rate", 0.5) == ["--resume"]


def test_the_printed_command_says_what_to_resume_in_the_place_of_what_was_said():
    words = ["--iters", "9", "--resume", "old", "--overwrite", "--resume=old", "--resume-with-changes", "--seed", "1"]
    assert options.command_to_resume(words, ["--resume", "new"]) == ["--iters", "9", "--seed", "1", "--resume", "new"]


def test_the_second_signal_but_for_sighup_leaves_at_once_also_while_the_first_was_not_heard():
    # The main thread is out of Python for minutes, as in a very long step of MLX.
    program = (
        "import hashlib\n"
        "from ember_mlx.finetune.stop_signals import StopSignals\n"
        "with StopSignals():\n"
        "    print('ready', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    assert process.stderr.readline().startswith("SIGHUP: finishing this step")
    process.send_signal(signal.SIGHUP)  # as the shell does in a terminal that is closed
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    assert process.stderr.read() == "SIGINT: left at once; what was saved before is kept\n"
