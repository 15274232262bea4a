"""The demo, by running it."""

import json
import re
import resource
import subprocess
import sys

import mlx_lm
import pytest

from ember_mlx import load
from ember_mlx.commands import demo

# The demo with 6 of its 40 steps, few rows to validate on and one to show, a seventh of its work: the losses fall
# as clearly.
SHORTER = """from ember_mlx import cli
from ember_mlx.shared.replacing import torch_hidden
with torch_hidden():
    from ember_mlx.commands import demo
demo.SETTINGS |= {"--iters": 6, "--val-batches": 1}
demo.EXAMPLES = 1
cli.main()"""


def test_a_seventh_of_the_demo_does_what_it_says_in_a_third_of_its_time(tmp_path):
    keep = tmp_path / "kept"
    before_it = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    shorter = [sys.executable, "-c", SHORTER, "demo", "--keep", str(keep)]
    done = subprocess.run(shorter, capture_output=True, text=True, timeout=600, check=False)
    processor_seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before_it
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^([a-z ]+?)  +(\S.*)$", done.stdout, re.MULTILINE))
    before, after = ([float(loss) for loss in rows[f"validation loss {when}"].split()] for when in ("before", "after"))
    assert before[0] == before[1]
    assert max(after) < before[0] - 1
    # V + D numbers a table for Ember, 2 V D for AdamW.
    assert rows["optimizer state of the tables"].split("  ")[0] == "33.79 kB"
    assert rows["optimizer state of the tables"].endswith("8.39 MB")
    assert {"prompt", "in the library", "before"} < rows.keys()
    assert int(re.search(r"(\d+) s in all", done.stdout)[1]) > 0
    kept = f"Kept: --model {keep}/model, --data {keep}/data, --adapter-path {keep}/Ember or {keep}/AdamW\n"
    assert done.stdout.endswith(kept)
    assert "use it with" not in done.stdout  # of a folder that is gone without --keep
    assert processor_seconds < 45  # of one core; a clock would count what else the machine does

    # What it kept is an ordinary model, data set and adapter.
    model, _ = load(keep / "model", adapter_path=keep / "Ember")
    assert "lora_a" in model.layers[0].mlp.up_proj
    with pytest.raises(ValueError, match="Use ember-mlx generate"):
        mlx_lm.load(str(keep / "model"), adapter_path=str(keep / "AdamW"))
    rows = (keep / "data" / "train.jsonl").read_text().splitlines()
    assert all(json.loads(row).keys() == {"prompt", "completion"} for row in rows)

    command = [sys.executable, "-m", "ember_mlx", "demo", "--keep", str(keep)]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 2
    assert "folder already exists; choose a new one" in refused.stderr


def test_without_keep_no_path_is_named_that_is_gone_at_its_end(monkeypatch, capsys):
    folders = []

    def short(folder):
        (folder / "Ember").mkdir()
        print("written:", folder / "Ember")
        folders.append((folder / "Ember").resolve())

    monkeypatch.setattr(demo, "demo", short)
    demo.main([])
    assert capsys.readouterr().out.startswith("written: Ember\nNothing is kept; --keep FOLDER keeps")
    assert not folders[0].parent.exists()
