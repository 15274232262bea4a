"""Ctrl-C and SIGTERM: the step is finished, the run saved, and the second signal waits for nothing."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from ember_mlx.finetune import checkpoints
from ember_mlx.finetune.run import run
from ember_mlx.finetune.stop_signals import Interrupted, StopSignals


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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(parse, tmp_path, number, code):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match="stopped at step 3; .*step-0000003 is saved, and --resume") as stopped:
        run(parse("--iters", 9), Sends(number))
    assert stopped.value.exit_code == code
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert checkpoints.find(tmp_path / "adapters", True).position.step == 3


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


def test_with_no_checkpoints_to_keep_it_says_that_there_is_nothing_to_go_on_from(parse):
    with pytest.raises(Interrupted, match="there is no checkpoint to go on from"):
        run(parse("--iters", 9, "--keep-checkpoints", 0), Sends(signal.SIGINT))


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
            assert signals.number is None
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_command_line_says_how_to_go_on_and_exits_with_143(folders, tmp_path):
    options = {"--model": folders["untied"], "--data": folders["data"], "--adapter-path": tmp_path / "my run"}
    options |= {"--iters": 10**6, "--batch-size": 2, "--val-batches": 2, "--steps-per-report": 1}
    words = [str(word) for pair in options.items() for word in pair]
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


def test_the_second_signal_leaves_at_once_also_while_the_first_was_not_heard():
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
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("SIGINT: finishing this step")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
