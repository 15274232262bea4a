"""The campaigns of examples/benchmarks/interruptions.py in small: nothing of a run is lost, whatever breaks it off."""

import json
import random
from pathlib import Path

import pytest
from processes import without_torch

from ember_mlx.finetune import checkpoints

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def interruptions():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        for name, value in without_torch().items():  # for the server that its processes are forked from
            patch.setenv(name, value)
        import interruptions

        yield interruptions


@pytest.fixture
def folder(interruptions, folders, tmp_path):
    """Model, data and options of the campaigns' runs: the tests' own tiny ones."""
    import interrupted_runs

    (tmp_path / "model").symlink_to(folders["untied"])
    (tmp_path / "data").symlink_to(folders["data"])
    interrupted_runs.write_config(tmp_path)
    return tmp_path


def test_a_killed_run_ends_as_if_it_had_not_been(interruptions, folder):
    ways = ["at a call in a save", "when an unfinished checkpoint shows"]
    report = interruptions.kill(folder, 2, random.Random(0), print, ["lora, 3 accumulated"], ways)
    assert report["broken"] == []
    assert report["counts"]["bitwise_equal"] == 2
    assert report["counts"]["kills"] >= 2
    assert report["counts"]["kills_in_a_save"] >= 1


def test_what_a_kill_left_goes_though_nothing_is_left_to_save(interruptions, folder):
    import interrupted_runs

    words = interrupted_runs.train_words(folder, folder / "adapters", "--iters", 4)
    interrupted_runs.train(words)
    (folder / "adapters" / "checkpoints" / ".removed-step-0000001").mkdir()
    interrupted_runs.train([*words, "--resume"])
    assert interrupted_runs.unfinished(folder / "adapters") == []


def test_damage_is_found_or_harmless(interruptions, folder):
    report = interruptions.flips(folder, 40, random.Random(0), print)
    assert report["broken"] == []
    assert report["counts"]["detected, the older one taken"] > 30


def test_the_campaign_would_see_what_loads_wrong(interruptions, folder, monkeypatch):
    def believe(path, where):
        return json.loads((path.parent / checkpoints.INDEX).read_text())["content"]["files"][path.name]["sha256"]

    monkeypatch.setattr("ember_mlx.finetune.safe_reading.sha256", believe)
    report = interruptions.flips(folder, 40, random.Random(0), print)
    assert any(broken.endswith("LOADED WRONG") for broken in report["broken"])


def test_a_disk_that_fills_up_at_any_call_of_a_save_costs_that_save_alone(interruptions, folder):
    report = interruptions.disk(folder, 0, random.Random(0), print, kinds=["full"])
    assert report["broken"] == []
    assert sum(report["counts"].values()) > 2 * 50
    assert any(outcome.endswith("the one of before loads") for outcome in report["counts"])


def test_the_state_of_a_large_table_is_small(interruptions, tmp_path):
    assert 4 * (151_936 + 1024) < interruptions.table_state_bytes(tmp_path) < 700_000
