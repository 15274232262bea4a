"""`ember-mlx plan` for one of several hosts: its rows, what it sends, and what the buffers of the averages take."""

import json

import pytest
from tiny_models import llama_config

from ember_mlx.commands.plan import main
from ember_mlx.demo import MODEL
from ember_mlx.finetune import options
from ember_mlx.planner import advice, plan, read_architecture, run_of
from ember_mlx.planner.network import LINKS
from ember_mlx.shared.errors import InputError

WORDS = ["--max-seq-length", "17", "--batch-size", "4"]
CONFIG = llama_config(tied=False, vocabulary=384)
LARGE = CONFIG | {"vocab_size": 100_000, "hidden_size": 256}  # tables of 51 MB: more than a buffer


def planned(*words, workers=2, config=CONFIG):
    model = read_architecture(config, "config.json")
    return plan(model, run_of(options.parse([*WORDS, *words]), model, workers), "cpu")


def test_one_host_sends_nothing():
    assert planned(workers=1).traffic is None


@pytest.mark.parametrize(("workers", "part"), [(2, 1), (4, 1.5)])
def test_a_ring_sends_that_part_of_the_gradients(workers, part):
    found = planned("--train-tables", "head", workers=workers)
    assert found.traffic.sent == part * found.gradients
    assert sum(found.traffic.payload.values()) == found.gradients


def test_an_untied_embedding_sends_a_row_for_each_token_of_the_whole_batch_if_it_has_more():
    columns = CONFIG["hidden_size"]
    head = planned("--train-tables", "head").traffic.payload
    assert planned().traffic.payload[2] - head[2] == 4 * 16 * columns * 2
    accumulated = planned("--grad-accumulation-steps", "3").traffic  # a power of two
    assert accumulated.payload[2] - head[2] == 256 * columns * 2
    whole = CONFIG["vocab_size"] * columns * 2
    for words in (["--batch-size", "24"], ["--grad-accumulation-steps", "5"]):
        found = planned(*words).traffic
        assert (found.payload[2] - head[2], found.embedding_rows) == (whole, 0)
    tied = planned(config=llama_config(tied=True, vocabulary=384)).traffic
    assert (tied.payload[2], tied.embedding_rows) == (whole, 0)


def test_the_averages_of_what_is_joined_take_a_buffer():
    def most(workers, *words):
        return planned("--batch-size", "4", *words, workers=workers, config=LARGE).most["gradients"]

    alone = most(1, "--train-tables", "none", "--fine-tune-type", "full")
    assert alone < most(2, "--train-tables", "none", "--fine-tune-type", "full") <= 2 * alone


@pytest.mark.parametrize(
    ("words", "measured"),
    [
        ("--batch-size 4 --max-seq-length 33", 16.42e6),
        ("--batch-size 8 --max-seq-length 65", 28.42e6),
        ("--batch-size 8 --max-seq-length 65 --fine-tune-type full --optimizer adamw", 33.46e6),
        ("--batch-size 4 --max-seq-length 33 --fine-tune-type full", 26.93e6),
        ("--batch-size 4 --max-seq-length 33 --fine-tune-type full --grad-accumulation-steps 3", 22.56e6),
    ],
)
def test_the_peak_of_one_of_two_hosts_is_planned(words, measured):
    """Measured with the demo's model in float32, by `mlx.launch -n 2 --backend ring` on a CPU, on 2026-11-29."""
    config = json.loads((MODEL / "config.json").read_text()) | {"torch_dtype": "float32"}
    assert planned(*words.split(), config=config).peak == pytest.approx(measured, rel=0.15)


def test_advice_for_several_hosts_names_whole_batches():
    model = read_architecture(CONFIG, "config.json")
    args = options.parse([*WORDS, "--max-seq-length", "129"])
    run = run_of(args, model, 2)
    flags = [flags for flags, _ in advice(args, model, run, "cpu", 1)]
    assert "--stream" in flags
    assert "--batch-size 2 --grad-accumulation-steps 2 --iters 2000" in flags
    assert not any("--batch-size 1" in each for each in flags)


def test_the_command_tells_of_one_host(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    words = ["--model", str(tmp_path), *WORDS, "--memory", "1GB", "--backend", "cpu", "--workers", "2", "--link", "TB"]
    main(words)
    said = capsys.readouterr().out
    assert "batches of 2 x 16 tokens on each of 2 hosts" in said
    assert "Network: each of the 2 hosts sends " in said
    main([*words, "--json"])
    found = json.loads(capsys.readouterr().out)["network"]
    assert found["sent"] == sum(found["payload"].values()) == planned().traffic.sent
    assert found["seconds"] == found["sent"] / LINKS["TB"]


def test_under_mlx_launch_the_first_worker_alone_tells_of_one(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "hosts").write_text(json.dumps([["a:1"], ["b:1"]]))
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    for rank, printed in (("0", True), ("1", False)):
        monkeypatch.setenv("MLX_RANK", rank)
        main(["--model", str(tmp_path), *WORDS, "--memory", "1GB"])
        assert ("on each of 2 hosts" in capsys.readouterr().out) == printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "3"], "--workers 3: must divide --batch-size 4"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--workers", "2", "--shard-optimizer"], "--shard-optimizer: is for a run that streams; add --stream"),
        (["--workers", "1", "--shard-tables"], "--shard-tables: is for several workers; add --workers N"),
    ],
)
def test_workers_that_cannot_be_are_one_line(tmp_path, words, message):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(InputError, match=message):
        main(["--model", str(tmp_path), *WORDS, *words])


@pytest.mark.parametrize("tied", [False, True])
def test_sharded_tables_send_what_goes_through_them_and_take_their_rows(tied):
    config = llama_config(tied=tied, vocabulary=383)  # which two do not divide
    whole, found = planned(config=config), planned("--shard-tables", config=config)
    tokens, columns = 2 * 16, config["hidden_size"]
    hidden = tokens * columns * 2
    ids, losses, means = 2 * 4 * tokens, 4 * tokens + 2 * 4 * 2 * tokens, (1 if tied else 2) * columns * 4
    assert found.traffic.around_tables == 6 * hidden + ids + losses + means
    assert found.traffic.payload == {4: whole.traffic.payload[4]}  # the adapters' gradients
    assert found.traffic.sent == whole.traffic.payload[4] + found.traffic.around_tables
    gone = (1 if tied else 2) * 191 * columns
    assert whole.weights - found.weights == whole.gradients - found.gradients == gone * 2
    assert whole.optimizer_state - found.optimizer_state == (1 if tied else 2) * 191 * 4


def test_sharded_tables_save_memory_where_tables_are_large():
    assert planned("--shard-tables", config=LARGE).peak < planned("--chunked-loss", config=LARGE).peak


def test_a_frozen_table_is_not_sharded():
    head, whole = planned("--train-tables", "head", "--shard-tables"), planned("--train-tables", "head")
    assert whole.weights - head.weights == CONFIG["vocab_size"] // 2 * CONFIG["hidden_size"] * 2
