"""Sharded weights: 2 and 3 processes run a script of checks together, and each check of theirs is a test here.

sharded_checks.py has those of tables under Ember, sharded_body_checks.py those of weights under the other optimizers.

    python -m pytest tests/cuda_ref/test_sharding.py -s

prints the numbers. Where every rank can have a GPU the processes use CUDA and NCCL, otherwise the CPU and gloo.
"""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from processes import run_here

TABLES, BODY = (Path(__file__).with_name(f"{name}.py") for name in ("sharded_checks", "sharded_body_checks"))
START = Path(__file__).with_name("sharded_start.py")
EXAMPLE = Path(__file__).parents[2] / "examples" / "04_fsdp2_with_torchrun.py"
CHECKS = {script: re.findall(r"^def (check_\w+)", script.read_text(), re.MULTILINE) for script in (TABLES, BODY)}
DEADLINE = 240  # seconds; 30 where nobody else uses the machine


def run(script, ranks, folder):
    """What each rank found: check -> numbers or traceback; and what it printed."""
    environment = os.environ | {"WORLD_SIZE": str(ranks), "CHECK_FOLDER": str(folder)}
    if torch.cuda.device_count() < ranks:
        environment["TRITON_INTERPRET"] = "1"  # the kernels on the CPU, where Triton is installed
    # Each with what it starts: a fork after the imports, which takes seconds less, is for Linux alone.
    numbers = [str(rank) for rank in range(ranks)]
    started = [numbers] if sys.platform == "linux" else [[number] for number in numbers]
    commands = [[sys.executable, str(START), str(script), *together] for together in started]
    processes = [subprocess.Popen(command, env=environment, start_new_session=True) for command in commands]
    end = time.monotonic() + DEADLINE
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        time.sleep(0.1)
    for process in processes:
        with suppress(ProcessLookupError):  # nothing is left of those that have ended
            os.killpg(process.pid, signal.SIGKILL)  # one that waits for another for ever
        process.wait()
    found = []
    for rank in range(ranks):
        results = folder / f"rank{rank}.json"
        log = folder / f"rank{rank}.log"
        printed = log.read_text()[-2000:] if log.exists() else ""
        found.append((json.loads(results.read_text()) if results.exists() else {}, printed))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return functools.cache(lambda script, ranks: run(script, ranks, tmp_path_factory.mktemp(f"{ranks}_ranks")))


# On a CPU three alone: they divide neither the rows nor the columns, and what two do is in test_sharded_weights.
@pytest.mark.parametrize("ranks", [2, 3] if torch.cuda.device_count() > 1 else [3])
@pytest.mark.parametrize("check", CHECKS[TABLES])
def test_sharded_tables(check, ranks, found):
    look_at(check, ranks, found(TABLES, ranks))


@pytest.mark.parametrize("check", CHECKS[BODY])
def test_sharded_weights(check, found):
    look_at(check, 2, found(BODY, 2))


def look_at(check, ranks, found):
    failed = [f"rank {rank}: {r[check]['traceback']}" for rank, (r, _) in enumerate(found)
              if "traceback" in r.get(check, {})]  # fmt: skip
    assert not failed, "\n".join(failed)
    for rank, (results, printed) in enumerate(found):
        assert check in results, f"rank {rank} never finished {check}; it printed\n{printed}"
    results, _ = found[0]
    print(f"\n{check}, {ranks} ranks, {results['device']}: passed in {results[check]['seconds']:.1f} s")
    for case, errors in results[check]["numbers"].items():
        print(f"  {case}: " + ", ".join(f"{name} {error:.2f}" for name, error in errors.items()) + " of the allowed")


# What the example imports, so that torchrun can fork its ranks, which then do not import it each. CUDA bears no fork.
TORCHRUN = """
import torch._dynamo, torch.distributed.checkpoint.state_dict, torch.distributed.fsdp, transformers
from torch.distributed.run import main
transformers.LlamaForCausalLM
main()
"""


def with_torchrun(processes):
    launcher = ["-c", TORCHRUN, "--run-path", "--start-method=fork"]
    if sys.platform != "linux" or torch.cuda.is_available():
        launcher = ["-m", "torch.distributed.run"]
    launcher += ["--standalone", f"--nproc-per-node={processes}"]
    command, threads = [sys.executable, *launcher, str(EXAMPLE)], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=threads, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("processes", [0, 2], ids=["python", "torchrun"])
def test_the_example_learns_and_goes_on_from_its_checkpoint(processes, monkeypatch, capsys):
    said = with_torchrun(processes) if processes else run_here(EXAMPLE, monkeypatch=monkeypatch, capsys=capsys)
    losses = [float(line.split("loss ")[1]) for line in said.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0] - 0.5
    assert "loaded: loss" in said
    before, after = (float(line.split("loss ")[1]) for line in said.splitlines() if "ed: loss" in line)
    assert before == after
    assert f"on {processes or 1} rank" in said
