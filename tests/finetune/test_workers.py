"""Two workers, or three, over MLX's ring, on this machine: they agree, refuse together and train what one does."""

import json
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from finetune.streamed_runs import STREAMED, without_compilation
from processes import without_torch
from tiny_models import HIDDEN

from ember_mlx.finetune import checkpoints, options, workers
from ember_mlx.finetune.run import run
from ember_mlx.finetune.workers import Workers, announced_workers
from ember_mlx.planner import plan
from ember_mlx.planner.inputs import read_inputs
from ember_mlx.shared.errors import InputError

ROOT = Path(__file__).parents[2]
LIMIT = 120  # seconds, for whatever is started here


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def start(folder, commands):
    """A worker for each command, its words after ``python``."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(len(commands))]))
    common = without_torch(ROOT, ROOT / "tests", MLX_HOSTFILE=str(hosts), OMP_NUM_THREADS="1")
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=common | {"MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]


def finish(processes):
    """Exit code, stdout and stderr of each; none outlives this."""
    try:
        return [(process, *process.communicate(timeout=LIMIT)) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def words(folders, tmp_path_factory):
    """Options of a run over uneven rows: one batch has nothing to learn, another has nothing for the last worker."""
    data = tmp_path_factory.mktemp("uneven")
    sizes = [(5, 3), (9, 20), (3, 1), (20, 7), (2, 30), (90, 1), (91, 2), (92, 3)]  # letters of prompt and completion
    rows = [json.dumps({"prompt": "p" * prompt, "completion": "c" * completion}) for prompt, completion in sizes]
    for name in ("train", "valid"):
        (data / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    lengths = {"--iters": 6, "--batch-size": 2, "--max-seq-length": 64, "--save-every": 2, "--steps-per-report": 2}
    paths = {"--model": folders["untied"], "--data": data, "--on-nonfinite": "skip", "--val-batches": 4}
    paths["--keep-checkpoints"] = 3  # it goes on from an earlier one, too
    (data / "prompts.txt").write_text("ppp\n")
    paths |= {"--sample-prompts": data / "prompts.txt", "--sample-tokens": 3}
    return ["--mask-prompt", *(str(word) for pair in (lengths | paths).items() for word in pair)]


@pytest.fixture(scope="module")
def found(words, tmp_path_factory):
    """What tests/finetune/worker_checks.py found on both, and its ``folder`` and ``output``."""
    folder = tmp_path_factory.mktemp("workers")
    ended = finish(start(folder, [[ROOT / "tests/finetune/worker_checks.py", folder, *words]] * 2))
    assert [process.returncode for process, *_ in ended] == [75, -signal.SIGKILL], ended
    each = [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(2)]
    return [
        one | {"folder": folder, "output": output[1], "errors": output[2]}
        for one, output in zip(each, ended, strict=True)
    ]


def test_a_refusal_on_one_worker_is_told_once_and_ends_all(found):
    assert [each["rank"] for each in found] == [0, 1]
    assert found[0]["refusals"] == [None, "InputError: refused by 0", "InputError: worker 1: refused by 1"]
    assert found[1]["refusals"] == [None, "SystemExit: 2", "SystemExit: 2"]


def test_what_the_workers_do_not_agree_on_is_named(found):
    same, other_value, other_names = found[0]["agreement"]
    assert same is None
    assert "the same --a (worker 1 against worker 0)" in other_value
    assert "--b" not in other_value
    assert "different releases" in other_names
    assert found[1]["agreement"] == [None, "SystemExit: 2", "SystemExit: 2"]


@pytest.mark.parametrize(
    ("fault", "line"),
    {
        "--seed": r"the 2 workers do not have the same --seed \(worker 1 against worker 0\)",
        "--iters": "do not have the same --iters",
        "--batch-size": "do not have the same --batch-size",
        "--add-tokens": "do not have the same --add-tokens",
        "another row": r"do not have the same rows \(--data\)",
        "other weights": r"do not have the same weights \(--model\)",
        "another version": "do not have the same version: ember-mlx",
        "no sum_scatter": "--shard-optimizer: this backend of MLX has no sum_scatter",
        "no options": "worker 1: --config .*: no such file",
        "no data": "worker 1: --data .*: this file does not exist",
        "no model": "worker 1: model .*none: no such folder here",
        "a full disk": "--adapter-path .*: 1.00 kB are free there",
        "a disk that fills": r"--adapter-path .*: what was trained could not be saved: .* \(No space left on device\)",
        "a folder that is taken": "--adapter-path .*: already holds another run",
        "a folder that is locked": "--adapter-path .*: another run is writing there",
        "a damaged checkpoint": "--resume .*: weights.safetensors is damaged",
    }.items(),
)
def test_what_is_wrong_on_one_worker_ends_all_with_one_line(found, fault, line):
    """No data, no room, other options: the exit code is 2, and the first worker alone says why."""
    (code, lines), other = (each["refused"][fault] for each in found)
    assert (code, other) == (2, [2, []])
    assert len(lines) == 1
    assert re.match(f"ember-mlx train: error: .*{line}", lines[0])


def test_a_nan_of_one_worker_is_one_for_all(found):
    """In a step it leaves the step out, or stops the run; a validation loss is NaN for all. Nothing is told twice."""
    ours, other = (each["nan"] for each in found)
    assert ours["checksums"] == other["checksums"]
    assert ours["left out"] == other["left out"]
    assert 2 in ours["left out"]
    assert ours["validated"] == other["validated"] == ["nan"] * len(ours["validated"])
    assert (ours["stopped"][0], other["stopped"]) == (2, [2, []])
    assert len(ours["stopped"][1]) == 1
    assert re.match("ember-mlx train: error: step [12]: a NaN", ours["stopped"][1][0])
    assert [(each["reports"], each["logs"]) for each in (ours, other)] == [(1, True), (0, False)]


def test_averages_by_dtype_are_mlxs_own_in_one_call_a_dtype(found):
    assert [each["averages"] for each in found] == [[True, 2]] * 2


def test_every_bit_of_the_leaders_arrays_and_texts_arrives(found):
    assert [each["arrays"] for each in found] == [True, True]
    assert [each["text"] for each in found] == ["é0", "é0"]


def test_between_two_steps_the_workers_meet_once(found):
    """Only a report, every second step, gathers beside it what all have trained."""
    for each in found:
        assert {step: each["met"][step] for step in "1234"} == {
            "1": ["all_max"],
            "2": ["all_gather", "all_max"],
            "3": ["all_max"],
            "4": ["all_gather", "all_max"],
        }


def test_workers_drop_out_each_their_own_and_go_on_with_one_state(found):
    (left, state), (other, same) = (each["dropped"] for each in found)
    assert left != other
    assert state == same
    keys = [tuple(key) for each in found for key in each["keys"]]
    assert len(set(keys)) == len(keys) > 0


@pytest.mark.parametrize("variables", [{"MLX_RANK": "1"}, {"MLX_WORLD_SIZE": "2"}], ids=["rank", "size"])
def test_a_group_of_one_where_several_were_announced_is_refused(monkeypatch, variables):
    monkeypatch.setattr("ember_mlx.finetune.workers._JOINED", [])
    monkeypatch.setattr("ember_mlx.finetune.workers.mx.distributed.init", lambda: Alone())
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"at least 2 workers are announced, but MLX connects 1"):
        Workers.join(60)


def test_who_has_joined_asks_the_environment_no_more(monkeypatch):
    here = Workers.join()
    monkeypatch.setenv("MLX_RANK", "x")
    assert Workers.join() == here


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("MLX_RANK", "x", r"MLX_RANK=x: cannot be read"),
        ("MLX_WORLD_SIZE", "two", "MLX_WORLD_SIZE=two: cannot be read"),
        ("MLX_HOSTFILE", None, r"hosts\.json: cannot be read \(.*No such file"),
        ("MLX_HOSTFILE", "", "one alone starts without mlx.launch"),  # mlx.launch -n 1
        ("MLX_HOSTFILE", '[{"ssh": "a", "ips": ["10.0.0.1"]}]', "is for --hostfile of mlx.launch"),
        ("MLX_HOSTFILE", "[[1], [2]]", "MLX reads"),
        ("MLX_IBV_DEVICES", "7", "MLX_IBV_DEVICES=.* cannot be read"),
    ],
)
def test_what_announces_workers_and_cannot_be_read_is_named(monkeypatch, tmp_path, name, text, message):
    value, path = text, tmp_path / "hosts.json"
    if name in ("MLX_HOSTFILE", "MLX_IBV_DEVICES"):
        value = str(path)
        if text is not None:
            path.write_text(text)
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        announced_workers()


class Alone:
    """A group of one."""

    def rank(self):
        return 0

    def size(self):
        return 1


def test_two_workers_train_what_one_does(found, words, folders, tmp_path):
    """Float32 sums in another order are all that differs: a few eps of a gradient, which Ember divides by its size."""
    assert found[0]["trained"] == found[1]["trained"]
    ours, theirs = tmp_path / "alone", found[0]["folder"] / "host0" / "at_once"
    run(options.parse([*words, "--adapter-path", str(ours)]))
    alone, together = same_updates(folders, ours, theirs)
    records = alone.position.record, together.position.record
    assert records[0]["trained_tokens"] == records[1]["trained_tokens"]
    for name, losses in records[0]["losses"].items():
        assert records[1]["losses"][name] == pytest.approx(losses, rel=1e-5)
    left_out = [
        {name: array.item() for name, array in each.optimizer.items() if "nonfinite" in name}
        for each in (alone, together)
    ]
    assert left_out[0] == left_out[1]
    assert sum(left_out[0].values()) > 0


@pytest.mark.parametrize("name", STREAMED)
def test_two_workers_stream_what_one_does(found, words, folders, tmp_path, name):
    """Clipped, accumulated, with uneven rows and a batch that has nothing to learn."""
    assert found[0][name] == found[1][name]
    with without_compilation():
        run(options.parse([*words, *STREAMED[name], "--adapter-path", str(tmp_path / "alone")]))
    alone, together = same_updates(folders, tmp_path / "alone", found[0]["folder"] / "host0" / name)
    assert alone.position.record["trained_tokens"] == together.position.record["trained_tokens"]
    losses = [each.position.record["losses"]["train_loss"] for each in (alone, together)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, nan_ok=True)


def test_two_workers_share_out_the_optimizers_state(found):
    """Each has a half; weights, checkpoints and what goes on from these are as if each had all, bit for bit."""
    (ours, resumed), (others, others_resumed) = (each["sharded"] for each in found)
    weights, state, random = found[0]["streamed_full"]
    assert [ours[0], ours[2]] == [others[0], others[2]] == [weights, random]
    assert len({ours[1], others[1], state}) == 3
    assert (resumed, others_resumed) == (ours, others)
    folders = [found[0]["folder"] / "host0" / name for name in ("streamed_full", "sharded", "sharded_resumed")]
    whole, *of_shards = [checkpoints.read(checkpoints.in_folder(folder)[-1]).optimizer for folder in folders]
    for found_state in of_shards:
        assert found_state.keys() == whole.keys()
        assert all(mx.array_equal(found_state[name], array) for name, array in whole.items())


def test_an_untied_embedding_sends_the_rows_of_the_batch_and_gets_the_bits_of_the_whole(found, words):
    assert [each["dense"] for each in found] == [each["trained"] for each in found]
    lengths = (32, 63)  # of a padded batch, and one cut by --max-seq-length
    rows, every = set(found[0]["sent"]), set(found[0]["dense_sent"])
    assert {max(every) - each for each in rows} == {(260 - 2 * length) * HIDDEN for length in lengths}
    assert len(every) == 1
    assert len(found[0]["sent"]) == 6, "one evaluation of each update, and no part of a compiled graph"
    args = options.parse(words)
    inputs = read_inputs(args, workers=2)
    plans = [plan(inputs.model, replace(inputs.run, length=length), "cpu") for length in lengths]
    assert {4 * each for each in rows} == {planned.traffic.payload[4] for planned in plans}


def test_rows_of_accumulated_batches_are_sent_together_and_get_the_bits_of_the_whole(found):
    for each in found:
        (rows, sent), (whole, all_sent) = each["accumulated"]
        assert rows == whole
        assert sent < all_sent
    assert found[0]["accumulated"] == found[1]["accumulated"]


def same_updates(folders, ours, theirs):
    """The newest checkpoints of two folders, whose weights have taken the same steps."""
    alone, together = (checkpoints.read(checkpoints.in_folder(folder)[-1]) for folder in (ours, theirs))
    begun = mx.load(str(folders["untied"] / "model.safetensors"))
    for name, weight in alone.weights.items():
        if not name.endswith("lora_a"):  # which begins at random
            step = weight - begun.get(name, mx.zeros_like(weight))
            error = mx.linalg.norm((together.weights[name] - weight).reshape(-1)) / mx.linalg.norm(step.reshape(-1))
            assert error.item() < 1e-5, name
    return alone, together


@pytest.fixture(scope="module")
def three(words, tmp_path_factory):
    """The folder in which three workers trained, the options, and how they ended when one stood still after that."""
    folder = tmp_path_factory.mktemp("three")
    words = [*words, "--batch-size", "3", "--iters", "2", "--val-batches", "1", "--sample-tokens", "1"]
    script = [ROOT / "tests/finetune/worker_checks.py", folder, *words, "stands-still"]
    return folder, words, finish(start(folder, [script] * 3))


def test_three_workers_train_what_one_does(three, folders, tmp_path):
    folder, words, ended = three
    assert len({(folder / f"found{rank}.json").read_text() for rank in range(3)}) == 1, ended
    run(options.parse([*words, "--adapter-path", str(tmp_path / "alone")]))
    same_updates(folders, tmp_path / "alone", folder / "host0")


def test_resuming_needs_the_checkpoint_on_rank_0_alone(found):
    assert [each["checkpoint"] for each in found] == [True, False]
    assert [each["resumed"] for each in found] == [found[0]["trained"]] * 2


def test_one_worker_alone_tells_of_the_run(found):
    assert "Validation loss" in found[0]["output"]
    assert re.search(r"Peak memory .*, of worker [01];", found[0]["output"])
    assert "answers after 0 steps\n    ppp\n" in found[0]["output"]
    assert not found[1]["output"].strip()


def test_a_signal_to_one_worker_stops_all_at_one_step_with_one_checkpoint(found):
    assert [each["signalled"] for each in found] == [128 + signal.SIGTERM] * 2
    saved = [checkpoints.in_folder(found[0]["folder"] / f"host{rank}" / "signalled") for rank in range(2)]
    assert [[path.name for path in each] for each in saved] == [["step-0000002", "step-0000004"], []]
    assert found[0]["errors"].count("To resume:") == 1
    assert "To resume:" not in found[1]["errors"]


def test_what_began_without_a_row_floor_goes_on_without_where_rank_0_alone_has_its_checkpoint(found):
    assert [each["goes on"] for each in found] == [None, None]
    assert (
        found[0]["output"].count("As in the run that is resumed: --table-row-floor 0 and --table-learning-rate 0.0001")
        == 1
    )


@pytest.mark.parametrize("name", ["over_memory", "over_memory_shared"])
def test_too_much_memory_of_one_worker_ends_all_saved_once_and_told_once(found, name):
    """As of one alone: exit code 2, and the checkpoint of that step. What is shared out is met for no more often."""
    (code, lines, met), (other_code, other_lines, _) = (each[name] for each in found)
    assert (code, other_code, other_lines) == (2, 2, [])
    (line,) = lines
    assert re.match(r"ember-mlx train: error: worker 1: --memory-limit 1000\.00 GB: a step took 2000\.00 GB; ", line)
    saved = [checkpoints.in_folder(found[0]["folder"] / f"host{rank}" / name) for rank in range(2)]
    assert [[path.name for path in each] for each in saved] == [["step-0000003"], []]
    assert met == 1


def test_a_killed_worker_ends_the_other_in_one_line_and_nothing_is_saved(found):
    """The exit code, 75, is looked at where the two are started."""
    folder = found[0]["folder"] / "host0" / "killed"
    assert [path.name for path in checkpoints.in_folder(folder)] == ["step-0000002"]
    assert "Traceback" not in found[0]["errors"]
    assert found[0]["errors"].splitlines()[-1].startswith("ember-mlx train: error: worker 0: another worker is lost (")


def test_a_worker_that_stands_still_ends_all_after_the_limit(three):
    *_, ended = three
    assert [process.returncode for process, *_ in ended] == [75] * 3, ended
    waited = "waited 2 s for another worker, which is lost or stands still (--peer-timeout 2)"
    told = [errors for *_, errors in ended]
    assert any(waited in errors for errors in told)
    # Whoever is a moment later may see the other go instead.
    assert all(waited in errors or "connection to a peer was lost" in errors for errors in told)


def test_whoever_waits_in_vain_to_join_says_so_and_ends(tmp_path):
    wait = "from ember_mlx.finetune.workers import Workers; Workers.join(2)"
    first, other = start(tmp_path, [["-c", wait], ["-c", "pass"]])
    ended = finish([first, other])
    assert ended[0][0].returncode == -signal.SIGALRM
    assert ended[0][2].strip() == "worker 0 waits up to 2 s for the others (2 in all)"


def test_large_gradients_are_sent_alone_and_small_ones_of_a_dtype_together(monkeypatch):
    monkeypatch.setattr(workers, "GRADIENTS_TOGETHER", 400)
    sizes = {"a": 10, "b": 99, "head": 100, "c": 50, "d": 1}
    gradients = {name: mx.ones(size) for name, size in sizes.items()} | {"half": mx.ones(10, mx.bfloat16)}
    assert list(workers.Averages(gradients).sums) == [("half",), ("a", "b"), ("head",), ("c", "d")]
