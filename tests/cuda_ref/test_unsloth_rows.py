"""examples/benchmarks/unsloth_rows.py on a tiny model: it runs, and a package that is missing is said to be so."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples/benchmarks/unsloth_rows.py"


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is not None, reason="unsloth is installed")
def test_transformers_is_measured_where_unsloth_is_missing(tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, str(SCRIPT), "--smoke", "--models", "tied", "--steps", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    of_unsloth, its_8_bit, of_transformers = report["rows"]
    missing = "ModuleNotFoundError: No module named 'unsloth'"
    assert of_unsloth["error"] == its_8_bit["error"] == missing
    assert report["machine"]["versions"]["unsloth"] is None
    assert of_transformers["weights_dtypes"] == ["bfloat16"]
    assert of_transformers["losses"][-1] < of_transformers["losses"][0]
    assert of_transformers["tokens_a_second"] > 0
