"""The PyTorch examples, each run as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script, *arguments):
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # several wait for each other where the machine is shared
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=one_thread)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_reference_run_learns_at_two_rates_with_kilobytes_of_state():
    said = run("03_cuda_reference_run.py", "--steps", 16)
    steps = re.findall(r"step +\d+  loss (\S+)  learning rate (\S+), of the tables (\S+)", said)
    losses, rates, table_rates = zip(*(map(float, step) for step in steps), strict=True)
    assert losses[-1] < losses[0] - 1
    assert table_rates == pytest.approx([2 * rate for rate in rates], rel=1e-2)
    kept, of_adamw = (int(number.replace(",", "")) for number in re.findall(r"keeps? ([\d,]+)", said))
    assert kept == 2 * (4096 + 128 + 1) * 4
    assert of_adamw == 2 * 2 * 4096 * 128 * 4
