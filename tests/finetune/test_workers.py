"""Two workers over MLX's ring, on this machine: they agree, refuse together and train what one does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ember_mlx.finetune.workers import Workers
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
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    common = os.environ | {"MLX_HOSTFILE": str(hosts), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
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
def found(tmp_path_factory):
    """What tests/finetune/worker_checks.py found on both."""
    folder = tmp_path_factory.mktemp("workers")
    ended = finish(start(folder, [[ROOT / "tests/finetune/worker_checks.py", folder]] * 2))
    assert [process.returncode for process, *_ in ended] == [0, 0], ended
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(2)]


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


def test_averages_by_dtype_are_mlxs_own_in_one_call_a_dtype(found):
    assert [each["averages"] for each in found] == [[True, 2]] * 2


def test_every_bit_of_the_leaders_arrays_and_texts_arrives(found):
    assert [each["arrays"] for each in found] == [True, True]
    assert [each["text"] for each in found] == ["é0", "é0"]


@pytest.mark.parametrize("variables", [{"MLX_RANK": "1"}, {"MLX_WORLD_SIZE": "2"}], ids=["rank", "size"])
def test_a_group_of_one_where_several_were_announced_is_refused(monkeypatch, variables):
    monkeypatch.setattr("ember_mlx.finetune.workers.mx.distributed.init", lambda: Alone())
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"at least 2 workers are announced, but MLX connects 1"):
        Workers.join(60)


class Alone:
    """A group of one."""

    def rank(self):
        return 0

    def size(self):
        return 1
