"""What `plan` advises where a run does not fit: the same training first, fewer rows at a time, and no contradiction."""

import json
import re
from dataclasses import replace

import pytest
from planned_models import QWEN

from ember_mlx.commands.plan import main
from ember_mlx.finetune import options
from ember_mlx.planner import advice, plan, read_architecture, run_of

MODEL = read_architecture(QWEN | {"num_hidden_layers": 8}, "config.json")
LONG = ["--max-seq-length", "600"]


def advised(*words, memory=1, workers=1):
    args = options.parse([*LONG, *words])
    return dict(advice(args, MODEL, run_of(args, MODEL, workers), "cpu", memory))


def test_before_sequences_are_cut_fewer_rows_are_taken_at_a_time():
    flags = list(advised("--batch-size", "4", "--table-rounding", "stochastic"))
    first = flags.index("--batch-size 1 --grad-accumulation-steps 4 --iters 4000")
    assert flags.index("--stream") < first < flags.index("--max-seq-length 300")
    enough = advised("--batch-size", "4", memory=18_000_000)
    assert list(enough)[-1] == "--batch-size 1 --grad-accumulation-steps 4 --iters 4000"


@pytest.mark.parametrize(
    ("words", "workers", "flags"),
    [
        (("--batch-size", "6"), 1, "--batch-size 3 --grad-accumulation-steps 2 --iters 2000"),
        (("--batch-size", "4", "--epochs", "2"), 1, "--batch-size 1 --grad-accumulation-steps 4"),
        (
            ("--batch-size", "2", "--grad-accumulation-steps", "3", "--iters", "30"),
            1,
            "--batch-size 1 --grad-accumulation-steps 6 --iters 60",
        ),
        (("--batch-size", "12"), 3, "--batch-size 3 --grad-accumulation-steps 4 --iters 4000"),
        (("--batch-size", "1"), 1, None),
        (("--batch-size", "3"), 1, None),
        (("--batch-size", "6"), 2, None),
    ],
)
def test_rows_are_halved_as_long_as_every_worker_keeps_as_many(words, workers, flags):
    found = [each for each in advised(*words, workers=workers) if re.match("--batch-size .* --grad", each)]
    assert found == ([flags] if flags else [])


def test_what_does_not_fit_so_gets_fewer_rows_a_step():
    """What is kept of each batch until the step is let go of in the end."""
    found = advised("--batch-size", "6", "--stream")
    halved, cut, alone, one = list(found)[1:5]
    assert halved == "--batch-size 3 --grad-accumulation-steps 2 --iters 2000"
    assert (cut, alone, one) == ("--max-seq-length 300", "--grad-accumulation-steps 1 --iters 1000", "--batch-size 1")
    args = options.parse(" ".join([*LONG, "--batch-size 6 --stream", *found]).split())  # of a flag the last counts
    assert plan(MODEL, run_of(args, MODEL), "cpu") == list(found.values())[-1]


def test_rows_are_not_split_where_the_sum_of_gradients_takes_more_than_that_saves():
    words = ["--batch-size", "2", "--max-seq-length", "17", "--fine-tune-type", "full", "--train-tables", "none"]
    run = run_of(options.parse(words), MODEL)
    assert plan(MODEL, replace(run, batch_size=1, micro_batches=2), "cpu").peak > plan(MODEL, run, "cpu").peak
    found = advised(*words)
    assert found
    assert not any("--grad-accumulation-steps" in flags for flags in found)


@pytest.mark.parametrize(("memory", "fits"), [("18MB", True), ("2MB", False)])
def test_what_is_recommended_is_what_the_list_ends_in(tmp_path, capsys, memory, fits):
    (tmp_path / "config.json").write_text(json.dumps(QWEN | {"num_hidden_layers": 8}))
    words = ["--model", str(tmp_path), *LONG, "--backend", "cpu", "--memory", memory]
    main(words)
    said = capsys.readouterr().out
    recommended = re.findall("^Recommended: (.*), with a peak of (.*)\\.$", said, re.MULTILINE)
    assert said.count("Recommended") == len(recommended) == fits
    assert "On a GPU few short rows at a time take longer." in said
    main([*words, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["recommendations"] == []
    if fits:
        ((flags, peak),) = recommended
        assert flags.split() == " ".join(each["flags"] for each in report["changes"]).split()
        main([*words, *flags.split()])
        assert re.search(f"^predicted peak +{peak}$", capsys.readouterr().out, re.MULTILINE)
