"""The PyTorch examples, each run as it stands."""

import re
from pathlib import Path

import pytest
from processes import run_here

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_reference_run_learns_at_two_rates_with_kilobytes_of_state(monkeypatch, capsys):
    said = run_here(EXAMPLES / "03_cuda_reference_run.py", "--steps", 16, monkeypatch=monkeypatch, capsys=capsys)
    steps = re.findall(r"step +\d+  loss (\S+)  learning rate (\S+), of the tables (\S+)", said)
    losses, rates, table_rates = zip(*(map(float, step) for step in steps), strict=True)
    assert losses[-1] < losses[0] - 1
    assert table_rates == pytest.approx([2 * rate for rate in rates], rel=1e-2)
    kept, of_adamw = (int(number.replace(",", "")) for number in re.findall(r"keeps? ([\d,]+)", said))
    assert kept == 2 * (4096 + 128 + 1) * 4
    assert of_adamw == 2 * 2 * 4096 * 128 * 4
