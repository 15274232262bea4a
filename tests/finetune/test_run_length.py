"""How long a run is: epochs, passes over the rows, warm-up as a share; settled once, and the same on resuming."""

import json
import re

import mlx.core as mx
import pytest
from finetune.breaking import BreakAt, Breaks
from tiny_models import tiny_llama

from ember_mlx import InputError
from ember_mlx.commands import plan
from ember_mlx.finetune import checkpoints, options, run_log
from ember_mlx.finetune.build_optimizer import body_learning_rate, build_optimizer, table_learning_rate
from ember_mlx.finetune.choices import choose
from ember_mlx.finetune.run import run
from ember_mlx.finetune.run_length import passes, settled
from ember_mlx.finetune.trainable import make_trainable, shapes_of

pytestmark = pytest.mark.usefixtures("eager")

SCHEDULE = {"name": "cosine_decay", "arguments": [1e-3, 20, 1e-5]}


@pytest.fixture
def in_epochs(folders, tmp_path):
    """Options of a run on the tiny model and its 12 rows, 6 batches, whose --iters are not given."""

    def parse(*arguments, adapter="adapters"):
        paths = {"--model": folders["untied"], "--data": folders["data"], "--adapter-path": tmp_path / adapter}
        short = {"--batch-size": 2, "--val-batches": 2, "--steps-per-report": 1, "--steps-per-eval": 4}
        return options.parse([str(word) for pair in (paths | short).items() for word in pair] + [*map(str, arguments)])

    return parse


def yaml(folder, **values):
    (folder / "run.yaml").write_text(json.dumps(values))
    return "--config", folder / "run.yaml"


@pytest.mark.parametrize(
    ("epochs", "batches", "accumulation", "iters"),
    [(1, 6, 1, 6), (0.5, 6, 1, 3), (0.07, 100, 1, 7), (1e-9, 6, 1, 1), (2, 5, 4, 12), (0.1, 6, 4, 4), (1e6, 1, 1, 1e6)],
)
def test_epochs_are_whole_updates_that_draw_at_least_so_much(in_epochs, epochs, batches, accumulation, iters):
    args = settled(in_epochs("--epochs", epochs, "--grad-accumulation-steps", accumulation), batches)
    assert args.iters == iters
    assert settled(args, batches) == args


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs 0", "--epochs 0: must be a number above 0 and at most 1,000,000, such as 2 or 0.5"),
        ("--epochs nan", "--epochs nan: must be a number above 0"),
        ("--epochs inf", "--epochs inf: must be a number above 0"),
        ("--epochs 2 --iters 5", "--iters 5 and --epochs 2: each says how long to train; give one of them"),
        ("--warmup -1", "--warmup -1: must be a share of the run below 1, such as 0.03, or a whole number of updates"),
        ("--warmup nan", "--warmup nan: must be a share"),
        ("--warmup inf", "--warmup inf: must be a share"),
        ("--warmup 2.5", "--warmup 2.5: must be a share"),
        ("--warmup 5 --iters 5", "--warmup 5: must be fewer than the 5 updates of --iters 5; a share, such as 0.03,"),
        ("--warmup 3 --iters 8 --grad-accumulation-steps 4", "--warmup 3: must be fewer than the 2 updates"),
        ("--sample-tokens 0", "--sample-tokens 0: must be a whole number of at least 1"),
    ],
)
def test_a_length_that_cannot_be_is_refused_in_one_line(arguments, message):
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        options.parse(arguments.split())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("file", "flags", "kept", "told"),
    [
        ("iters: 400", "--epochs 1", (1000, 1.0), "--epochs 1 replaces iters 400 of --config"),
        ("epochs: 2", "--iters 5", (5, None), "--iters 5 replaces epochs 2 of --config"),
        ("iters: 400\nepochs: 2", "--iters 5", (5, None), "--iters 5 replaces epochs 2 of --config"),
    ],
)
def test_the_length_on_the_command_line_goes_before_that_of_the_file(tmp_path, capsys, file, flags, kept, told):
    path = tmp_path / "a.yaml"
    path.write_text(file)
    args, given = options.parse_given(["--config", str(path), *flags.split()])
    assert (args.iters, args.epochs) == kept
    assert len({"iters", "epochs"} & given) == 1
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "arguments", "message"),
    [
        ({"epochs": 1, "iters": 9}, [], r"^--config .*: iters 9 and epochs 1: each says how long"),
        ({"epochs": "many"}, [], "epochs: 'many' must be a number"),
        ({"lr_schedule": SCHEDULE | {"warmup": 3}}, ["--warmup", 0.1], "--warmup 0.1: lr_schedule has a warmup of its"),
        ({"table_lr_schedule": SCHEDULE | {"warmup": 3}, "warmup": 2}, [], "table_lr_schedule has a warmup of its own"),
    ],
)
def test_a_length_in_yaml_that_cannot_be_is_refused(in_epochs, tmp_path, values, arguments, message):
    with pytest.raises(InputError, match=message):
        in_epochs(*yaml(tmp_path, **values), *arguments)


@pytest.mark.parametrize("packing", [False, True])
def test_a_warm_up_that_outlasts_epochs_is_refused_when_the_rows_are_known(in_epochs, packing, capsys):
    with pytest.raises(InputError, match=r"fewer than the (\d) updates of --epochs 1 \(\1 steps\)"):
        run(in_epochs("--epochs", 1, "--warmup", 6, *["--packing", "--max-seq-length", "64"] * packing))
    assert ("Loading" in capsys.readouterr().out) == packing  # tokens say how many packs there are


def rates(schedule, number):
    return schedule(mx.arange(number)).tolist()


@pytest.mark.parametrize(("warmup", "updates"), [(0.25, 5), (5, 5), (5, 20)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_warm_up_counts_updates_of_the_weights_and_the_tables_follow(parse, warmup, updates, accumulation):
    iters = accumulation * 4 * updates
    number = round(warmup * 4 * updates) if warmup < 1 else warmup
    words = ["--iters", iters, "--grad-accumulation-steps", accumulation, "--warmup", warmup]
    args = parse(*words, "--learning-rate", 1e-3, "--table-learning-rate", 2e-3)
    assert args.warmup == number
    for schedule, rate in ((body_learning_rate(args), 1e-3), (table_learning_rate(args), 2e-3)):
        expected = [rate * min(i / number, 1) for i in range(4 * updates)]
        assert rates(schedule, 4 * updates) == pytest.approx(expected, rel=1e-6)
    # A schedule goes on where the ramp ends, as with its own key in stock mlx-lm; the tables peak at their rate.
    args |= {"lr_schedule": SCHEDULE}
    own = body_learning_rate(args | {"warmup": None, "lr_schedule": SCHEDULE | {"warmup": number}})
    assert rates(body_learning_rate(args), 40) == rates(own, 40)
    tables = rates(table_learning_rate(args), 4 * updates)
    assert max(tables) == pytest.approx(2e-3)
    assert tables.index(max(tables)) in (number, number + 1)  # mlx-lm's ramp ends at the rate that its schedule begins


def test_a_rate_of_zero_stays_zero_and_a_warm_up_of_no_update_is_none(parse):
    args = parse("--iters", 10, "--learning-rate", 0, "--table-learning-rate", 0, "--warmup", 0.5)
    assert (body_learning_rate(args), table_learning_rate(args)) == (0, 0)
    args = parse("--iters", 10, "--warmup", 0.03, "--learning-rate", 1e-3)
    assert (args.warmup, body_learning_rate(args)) == (0, 1e-3)


def test_a_share_in_a_schedule_of_the_yaml_file_is_understood(in_epochs, tmp_path):
    words = yaml(tmp_path, lr_schedule=SCHEDULE | {"warmup": 0.25}, table_lr_schedule=SCHEDULE | {"warmup": 0.1})
    args = settled(in_epochs(*words, "--epochs", 10), 6)
    assert (args.lr_schedule["warmup"], args.table_lr_schedule["warmup"]) == (15, 6)
    assert in_epochs(*words, "--iters", 20).lr_schedule["warmup"] == 5
    assert in_epochs(*yaml(tmp_path, lr_schedule=SCHEDULE | {"warmup": 7})).lr_schedule["warmup"] == 7  # as mlx-lm


def test_both_optimizers_take_the_warm_up(parse):
    args = parse("--iters", 8, "--warmup", 4, "--learning-rate", 1e-3, "--table-learning-rate", 2e-3)
    model = tiny_llama()
    choices = choose(args, shapes_of(model))
    make_trainable(model, args, choices)
    optimizer = build_optimizer(model, args, choices)
    gradients = model.trainable_parameters()
    for _ in range(3):  # the third update has the rate of two that are done
        optimizer.update(model, gradients)
    assert optimizer.learning_rate.item() == pytest.approx(5e-4)
    assert optimizer.table_learning_rate.item() == pytest.approx(1e-3)


def test_a_run_of_epochs_is_one_of_as_many_iterations_bit_for_bit_and_says_its_passes(in_epochs, tmp_path, capsys):
    log = ["--log-jsonl", tmp_path / "run.jsonl"]
    run(in_epochs("--epochs", 1.5, "--warmup", 0.25, *log))
    assert "9 steps of 2 rows: 1.5 passes over 12 rows (6 batches); learning rates rise over the first 2" in (
        " ".join(capsys.readouterr().out.split())
    )
    run(in_epochs("--iters", 9, "--warmup", 2, adapter="other"))
    one, two = (checkpoints.find(tmp_path / name, True) for name in ("adapters", "other"))
    assert one.position == two.position
    assert all(mx.array_equal(one.weights[name], array) for name, array in two.weights.items())
    # The records have numbers, and the wish beside them.
    recorded = run_log.read(tmp_path / "run.jsonl").options
    assert (recorded["iters"], recorded["epochs"], recorded["warmup"]) == (9, 1.5, 2)


def test_a_resumed_run_of_epochs_ends_as_one_that_never_stopped_and_may_be_longer(in_epochs, tmp_path):
    flags = ["--grad-accumulation-steps", 2, "--warmup", 2, "--save-every", 4]
    run(in_epochs("--epochs", 2, *flags, adapter="whole"))
    with pytest.raises(Breaks):
        run(in_epochs("--epochs", 1.4, *flags), BreakAt(7))  # rounded up to 10 steps
    run(in_epochs("--epochs", 1.4, *flags, "--resume"))
    assert checkpoints.find(tmp_path / "adapters", True).position.step == 10
    run(in_epochs("--epochs", 2, *flags, "--resume"))
    one, two = (checkpoints.find(tmp_path / name, True) for name in ("adapters", "whole"))
    assert one.position == two.position
    for arrays, others in ((one.weights, two.weights), (one.optimizer, two.optimizer)):
        assert all(mx.array_equal(arrays[name], array) for name, array in others.items())
    with pytest.raises(InputError, match=re.escape("--epochs 1 (6 steps): checkpoint")):
        run(in_epochs("--epochs", 1, *flags, "--resume"))


def test_a_longer_run_whose_share_means_another_warm_up_is_refused_by_name(in_epochs):
    run(in_epochs("--epochs", 1, "--warmup", 0.34))
    with pytest.raises(InputError, match="--warmup was 2 and is now 4"):
        run(in_epochs("--epochs", 2, "--warmup", 0.34, "--resume"))
    run(in_epochs("--epochs", 2, "--warmup", 2, "--resume", "--sample-tokens", 3))  # which reach no weight


@pytest.mark.parametrize(
    ("options", "rows", "line"),
    [
        ({"iters": 600, "batch_size": 4}, 1000, "600 steps of 4 rows: 2.4 passes over 1,000 rows (250 batches)"),
        (
            {"iters": 1, "batch_size": 4},
            5,
            "1 step of 4 rows: 1 pass over 5 rows (1 batch; the longest row fills no batch)",
        ),
        ({"iters": 8, "grad_accumulation_steps": 4}, 12, "8 steps of 2 rows, 2 updates: 1.3 passes over 12 rows"),
        (
            {"iters": 9, "packing": True},
            7,
            "9 steps of 2 packs: 3 passes over 7 packs (3 batches; the longest pack fills",
        ),
        ({"iters": 1, "batch_size": 1}, 1, "1 step of 1 row: 1 pass over 1 row (1 batch)"),
        ({"iters": 1}, 100_000, "1 step of 2 rows: 2e-05 passes over 100,000 rows (50,000 batches)"),
    ],
)
def test_the_line_of_passes(parse, options, rows, line):
    assert passes(parse() | options, rows).startswith(line)


def test_epochs_of_packs_are_passes_over_the_packs_in_training_and_in_plan(in_epochs, folders, capsys):
    flags = ["--packing", "--max-seq-length", 64, "--epochs", 1]
    run(in_epochs(*flags, "--keep-checkpoints", 0))
    line = re.search(r"(\d+) steps of 2 packs: 1 pass over (\d+) packs \((\d+) batches", capsys.readouterr().out)
    steps, packs, batches = map(int, line.groups())
    assert (steps, batches) == (packs // 2, packs // 2)
    assert packs < 12
    plan.main(
        ["--model", str(folders["untied"]), "--data", str(folders["data"]), "--batch-size", "2", *map(str, flags)]
    )
    assert f"--epochs 1 is {line.group()}" in " ".join(capsys.readouterr().out.split())


def test_plan_takes_the_same_flags_and_says_the_steps(folders, capsys):
    words = ["--model", folders["untied"], "--data", folders["data"], "--batch-size", 2, "--epochs", 2]
    plan.main([*map(str, words), "--warmup", "0.1", "--sample-tokens", "8"])
    assert "--epochs 2 is 12 steps of 2 rows: 2 passes over 12 rows (6 batches)" in (
        " ".join(capsys.readouterr().out.split())
    )
    with pytest.raises(InputError, match="--warmup 20: must be fewer than the 12 updates"):
        plan.main([*map(str, words), "--warmup", "20"])
