"""The user's text is text, and no two writers share a path: names of logs, tokens, and where the log goes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ember_mlx import InputError
from ember_mlx.finetune import adapter_saving, run_log_writer, safe_reading
from ember_mlx.finetune.added_tokens import grow_tokenizer
from ember_mlx.finetune.base_models import load_base
from ember_mlx.finetune.folder_lock import FolderLock
from ember_mlx.finetune.run import run
from ember_mlx.shared.text_tables import text_table

pytestmark = pytest.mark.usefixtures("eager")


@pytest.mark.parametrize(
    "name",
    [
        *("adapters.safetensors", "token_tables.safetensors", "adapter_config.json", "0000002_adapters.safetensors"),
        *(
            ".lock",
            ".partial-adapters.safetensors",
            "checkpoints",
            "checkpoints/log.jsonl",
            "Adapters.safetensors",
            ".",
        ),
    ],
)
def test_a_log_in_the_place_of_a_file_of_the_run_is_refused(parse, tmp_path, name):
    args = parse("--log-jsonl", tmp_path / "adapters" / name)
    with pytest.raises(InputError, match="is a file that the run itself writes there"):
        run(args)
    assert not (tmp_path / "adapters").exists()
    through = tmp_path / "elsewhere"
    through.symlink_to(tmp_path / "adapters")
    with pytest.raises(InputError, match="is a file that the run itself writes there"):
        run_log_writer.check(args | {"log_jsonl": str(through / name)}, goes_on=False)


def test_two_runs_do_not_write_one_log(parse, folders, tmp_path):
    log = tmp_path / "log.jsonl"
    words = ("--log-jsonl", log, "--overwrite")
    with FolderLock(tmp_path / "first") as lock:
        lock.hold(log, "--log-jsonl")
        log.write_text("of the first\n")
        # Where it is a log and may be replaced: with --overwrite, or in the moment in which both begin.
        run_log_writer.RunLogWriter(parse(*words) | {"token_tables": []}, 0, goes_on=False)
        before = log.read_bytes()
        with pytest.raises(InputError, match="log.jsonl: another run is writing to it; wait for it, or give another"):
            run(parse(*words, adapter="second"))
        assert log.read_bytes() == before
        assert not (tmp_path / "second").exists()
    run(parse(*words, adapter="second"))


def test_every_file_of_a_run_is_known_to_be_one(parse, tmp_path):
    """Whatever a run writes into its folder: no log may go there."""
    folder = tmp_path / "adapters"
    run(parse("--save-every", 1, "--log-jsonl", folder / "run.jsonl"))
    files = {path for path in folder.rglob("*") if path.is_file()}
    assert {path for path in files if not adapter_saving.is_run_path(folder, path)} == {folder / "run.jsonl"}
    assert len(files) > 10


@pytest.mark.parametrize("content", ["\ud800", "a\udfffb"])
def test_half_of_a_surrogate_pair_is_no_token(parse, tmp_path, folders, content):
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps([content]))
    with pytest.raises(InputError, match="half of a surrogate pair; leave it out"):
        run(parse("--add-tokens", path))
    tokenizer = load_base(folders["untied"])[1]
    with pytest.raises(InputError, match="adapter A: '.*half of a surrogate pair"):
        grow_tokenizer(tokenizer, [(content, True)], "adapter A")


def test_a_config_that_could_not_be_read_again_is_not_written(parse, tmp_path, monkeypatch):
    monkeypatch.setattr(safe_reading, "JSON_LIMIT", 2000)
    with pytest.raises(
        InputError, match=r"adapter_config.json would have [\d,]+ bytes, and at most 1,000 are read again"
    ):
        run(parse())
    assert not adapter_saving.run_files(tmp_path / "adapters")


@given(
    cells=st.lists(st.text(st.characters(categories=["L", "P", "S"]), min_size=1, max_size=9), min_size=2, max_size=2)
)
def test_cells_of_a_table_are_read_literally(cells):
    assert all(cell in text_table(("a", "b"), [cells]) for cell in cells)


def test_a_table_folds_at_the_width_of_a_terminal_and_not_in_a_file(monkeypatch):
    rows = [("the rest " * 12, "Ember", "1,000,000"), ("in all", "", "2,000,000")]
    wide = text_table(("trains", "optimizer", "parameters"), rows, right=(2,), total=True)
    assert max(map(len, wide.splitlines())) > 100
    assert len(wide.splitlines()) == 5
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    folded = text_table(("trains", "optimizer", "parameters"), rows, right=(2,), total=True)
    assert max(map(len, folded.splitlines())) <= 80
    assert "1,000,000" in folded
    assert "\x1b" not in folded
