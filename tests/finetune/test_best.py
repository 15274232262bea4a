"""``best/``, ``--patience``, and what a run takes on the disk."""

import os
import re
import shutil
from types import SimpleNamespace

import mlx.core as mx
import pytest
from finetune.breaking import BreakAt, Breaks
from finetune.test_full_disks import Refusing

from ember_mlx import InputError, load
from ember_mlx.finetune import adapter_saving, adapters, loop, run_log, safe_writing
from ember_mlx.finetune import run as run_module
from ember_mlx.finetune.best import Validations, read_best
from ember_mlx.finetune.checkpoints import in_folder
from ember_mlx.finetune.disk import Kept, disk_use, what_is_kept
from ember_mlx.finetune.run import run

pytestmark = pytest.mark.usefixtures("eager")

EVERY_2 = ["--table-learning-rate", 1e-2, "--steps-per-eval", 2, "--save-every", 2]
STEPS = (0, 1, 3, 5, 6)  # after which a run of 6 steps validates then, the last time when it has ended


@pytest.fixture
def losses(monkeypatch):
    """The losses that validations are to find, in turn."""
    coming = []
    for module in (loop, run_module):
        monkeypatch.setattr(module, "evaluate", lambda *arguments: coming.pop(0))
    return coming


@pytest.fixture
def train(parse, losses):
    """A run of 6 steps whose validations find these losses: train([3.0, ...], "--flag", ...)."""

    def train(found, *words, callback=None, **folders):
        losses[:] = found
        result = run(parse("--iters", 6, *EVERY_2, *words, **folders), callback)
        assert losses == []
        return result

    return train


def weights(folder):
    files = [folder / name for name in (adapters.ADAPTERS, adapters.TABLES)]
    return {name: array for file in files for name, array in mx.load(str(file)).items()}


def equal(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(mx.array_equal(array, other[name]) for name, array in one.items())


def best_of(folder):
    found = read_best(folder / "best")
    return found and (found.step, found.validation_loss)


@pytest.mark.parametrize(
    ("before", "after", "words", "shown", "saved"),
    [
        (2.5, 3.0, [], ["0", "1", "3", "5"], ["2.900", "2.500"]),
        (2.5, 2.25, [], ["0", "1", "3", "5"], ["2.900", "2.500", "2.250"]),
        (2.95, 2.25, [], ["0", "1", "3"], ["2.900", "2.250"]),
        (float("nan"), 3.0, [], ["0", "1", "3"], ["2.900"]),
        (2.5, 3.0, ["--no-keep-best"], ["0", "1", "3"], []),
        (2.5, 3.0, ["--no-keep-best", "--patience", 3], ["0", "1", "3", "5"], []),
    ],
)
def test_every_lowest_loss_is_shown_and_one_that_no_line_speaks_of_is_not(
    train, capsys, before, after, words, shown, saved
):
    train([3.0, 2.9, 2.95, before, after], *words)
    said = capsys.readouterr().out
    assert re.findall(r"^ +(\d+) +val ", said, re.MULTILINE) == shown
    assert re.findall(r"^  save  best    val (.*)$", said, re.MULTILINE) == saved


@pytest.mark.parametrize("lowest", [1, 4])
def test_the_weights_of_the_lowest_loss_are_kept_and_taken(train, parse, folders, tmp_path, losses, capsys, lowest):
    result = train([2.0 if i == lowest else 3.0 for i in range(5)])
    best, step = tmp_path / "adapters" / "best", STEPS[lowest]
    assert best_of(tmp_path / "adapters") == (step, 2.0)
    assert (result.best.step, result.best.validation_loss) == (step, 2.0)
    said = capsys.readouterr().out
    is_last = f"The last validation loss is the lowest: use it with --adapter-path {best.parent}\n"
    is_earlier = f"The lowest validation loss was 2.000, after step {step}: use it with --adapter-path {best}\n"
    assert (is_last in said, is_earlier in said) == (step == 6, step != 6)
    assert "  save  best    val 2.000\n" in said
    losses[:] = [3.0] * 9
    run(parse(*EVERY_2, "--iters", step, "--no-keep-best", adapter="short"))
    assert not (tmp_path / "short" / "best").exists()
    assert equal(best, tmp_path / "short")
    load(folders["untied"], adapter_path=best)
    with pytest.raises(InputError, match=r"is an adapter and no checkpoint; .* --resume-adapter-file .*best/adapters"):
        run(parse("--resume", best, adapter="next"))
    same = [(best / name).samefile(best.parent / name) for name in (adapters.ADAPTERS, adapters.TABLES)]
    assert same == [step == 6] * 2  # on the disk once
    if step == 6:  # the files of best/ and of the adapter are one: neither is changed when the other is replaced
        before = weights(best)
        losses[:] = [3.0] * 4
        run(parse(*EVERY_2, "--iters", 8, "--resume"))
        assert all(mx.array_equal(array, before[name]) for name, array in weights(best).items())
        run(
            parse("--resume-adapter-file", best / adapters.ADAPTERS, adapter="next") | {"steps_per_eval": 9, "iters": 1}
        )


def test_without_a_lower_loss_nothing_is_kept_and_nan_is_none(train, tmp_path):
    nan = float("nan")
    for number, found in enumerate(([3.0] * 5, [3.0, nan, float("-inf"), 4.0, nan])):
        assert train(found, adapter=str(number)).best is None
        assert not (tmp_path / str(number) / "best").exists()


def test_it_is_off_where_no_table_trains_and_refused_without_validation_rows(parse, folders, tmp_path, losses):
    losses[:] = [3.0, 2.0, 1.0]
    run(parse("--train-tables", "none"))
    assert not (tmp_path / "adapters" / "best").exists()
    shutil.copytree(folders["data"], tmp_path / "data")
    (tmp_path / "data" / "valid.jsonl").unlink()
    for words in (["--keep-best"], ["--patience", 2]):
        args = parse("--data", tmp_path / "data", "--valid-fraction", 0, *words, adapter="none")
        with pytest.raises(InputError, match=f"{words[0]}.*: there are no validation rows; give some"):
            run(args)
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match="--patience 0: must be a whole number of at least 1"):
        parse("--patience", 0)


def test_same_validation_batches_leave_the_training_batches_as_they_were(parse, tmp_path):
    common = ["--train-tables", "none", "--iters", 9, "--steps-per-eval", 2, "--learning-rate", 1e-2]  # 6 an epoch
    run(parse(*common, adapter="mlx-lm"))
    run(parse(*common, "--patience", 99, adapter="ours"))
    one, other = (mx.load(str(tmp_path / name / adapters.ADAPTERS)) for name in ("mlx-lm", "ours"))
    assert all(mx.array_equal(array, other[name]) for name, array in one.items())


@pytest.mark.parametrize("at", [1, 3])  # best/ is older then, or newer, than the checkpoint of step 2
def test_a_resumed_run_knows_its_best(train, tmp_path, at):
    found = [3.0, 2.5, 2.5, 2.5, 2.5]
    found[STEPS.index(at)] = 2.0
    train(found, adapter="whole")
    with pytest.raises(Breaks):
        train(found[: 2 if at == 1 else 3], callback=BreakAt(3 if at == 1 else 4))
    assert best_of(tmp_path / "adapters") == (at, 2.0)
    assert [path.name for path in in_folder(tmp_path / "adapters")] == ["step-0000002"]
    train(found[2:], "--resume")
    assert best_of(tmp_path / "adapters") == (at, 2.0)
    assert equal(tmp_path / "adapters" / "best", tmp_path / "whole" / "best")


def test_a_branch_brings_the_best_of_before_it_and_no_later_one(train, tmp_path, capsys):
    train([3.0, 2.5, 2.0, 2.5, 2.5])
    folder = tmp_path / "adapters"
    train([2.5, 2.5], "--resume", folder / "checkpoints" / "step-0000004", adapter="after")
    assert best_of(tmp_path / "after") == (3, 2.0)
    assert "save  best (still that of step 3, whose loss was lower)    val 2.000\n" in capsys.readouterr().out
    assert equal(tmp_path / "after" / "best", folder / "best")
    train([2.5, 2.7, 2.9], "--resume", folder / "checkpoints" / "step-0000002", adapter="before")
    assert best_of(tmp_path / "before") == (3, 2.5)


def test_losses_of_other_batches_do_not_compare(train, tmp_path):
    train([3.0, 2.5, 2.0, 2.5, 2.5])
    checkpoint = tmp_path / "adapters" / "checkpoints" / "step-0000004"
    train([9.0, 8.0], "--resume", checkpoint, "--resume-with-changes", "--val-batches", 1)
    assert best_of(tmp_path / "adapters") == (6, 8.0)


def test_another_run_goes_with_its_best(train, tmp_path):
    folder = tmp_path / "adapters"
    with pytest.raises(Breaks):
        train([3.0, 2.0], callback=BreakAt(2))
    assert best_of(folder) == (1, 2.0)
    for file in (folder / "checkpoints").glob("*"):
        shutil.rmtree(file)
    with pytest.raises(InputError, match="already holds another run"):
        train([])
    with pytest.raises(Breaks):  # the first save of the new run, which is of its best, replaces the old run
        train([3.0, 2.7], "--overwrite", "--seed", 1, callback=BreakAt(2))
    assert best_of(folder) == (1, 2.7)
    assert (folder / adapters.ADAPTERS).exists()
    train([3.0] * 5, "--overwrite")
    assert best_of(folder) is None
    assert not (folder / "best").exists()


def test_patience_ends_a_run_as_if_it_had_finished(train, parse, losses, tmp_path, capsys):
    found = [3.0, 2.0, float("nan"), 2.2]  # after steps 0, 1, 3, and 5, which is the end: it is not measured again
    log = tmp_path / "log.jsonl"
    common = ["--iters", 20, "--patience", 2, "--log-jsonl", log]
    train(found, *common)
    line = "Stopped after step 5, by --patience 2: 2 validations found no lower loss; the lowest is 2.000 after step 1"
    assert line in " ".join(capsys.readouterr().out.split())
    assert [(row["step"], row["validation_loss"]) for row in run_log.read(log).end] == [(5, 2.2)]
    losses[:] = [3.0] * 9
    run(parse(*EVERY_2, "--iters", 5, adapter="short"))
    assert equal(tmp_path / "adapters", tmp_path / "short")
    train([2.5], *common, "--resume")
    assert line in " ".join(capsys.readouterr().out.split())
    train([2.5, 2.5], *common, "--patience", 3, "--resume")  # after steps 5 and 7
    assert "Stopped after step 7" in " ".join(capsys.readouterr().out.split())
    assert best_of(tmp_path / "adapters") == (1, 2.0)


@pytest.mark.parametrize(
    ("words", "found", "lowest"),
    [
        ([], [3.0, 2.0, 3.0, 3.0], "2.000 after step 1."),
        (["--no-keep-best"], [3.0, 2.0, 3.0, 3.0], "2.000 after step 1 (its weights were not kept: --no-keep-best)."),
        (["--no-keep-best"], [2.0, 3.0, 3.0], "2.000 after step 0."),
        (["--train-tables", "none"], [3.0, 2.0, 3.0, 3.0], "2.000 after step 1 (its weights were not kept: add --keep"),
    ],
)
def test_patience_says_where_the_weights_of_the_lowest_loss_are_gone(train, capsys, words, found, lowest):
    train(found, "--patience", 2, *words)
    assert f"no lower loss; the lowest is {lowest}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "rates"),
    [
        ([], "lower rates (--learning-rate, --table-learning-rate)"),
        (["--num-layers", 0], "a lower --table-learning-rate"),
        (["--train-tables", "none", "--keep-best"], "a lower --learning-rate"),
        (["--optimizer", "adafactor"], "a lower --table-learning-rate"),
    ],
)
def test_after_a_loss_that_rose_the_rates_of_the_run_are_named(train, capsys, words, rates):
    train([2.0, 3.0, 3.0, 3.0, 3.0], *words)
    assert capsys.readouterr().out.endswith(f": best/ is not kept; try {rates}\n")


def test_patience_counts_regular_validations_since_the_lowest():
    validations = Validations(2)
    heard = [(0, 3.0), (1, 2.0), (2, 2.0), (3, 1.5), (4, 1.6)]
    for step, loss in heard:
        validations.hear(step, loss, "some", counts=step > 0)
        assert not validations.exhausted
    validations = Validations(2, validations.to_json())
    validations.hear(5, 1.6, "some", counts=False)
    assert not validations.exhausted
    validations.hear(6, 1.6, "some", counts=True)
    assert validations.exhausted
    assert (validations.lowest, validations.step, validations.untrained) == (1.5, 3, 3.0)
    validations.hear(7, 9.0, "others", counts=True)
    assert not validations.exhausted


@pytest.mark.parametrize("is_saved", [False, True])
def test_whichever_write_a_full_disk_refuses_a_whole_best_is_there(train, folders, tmp_path, is_saved):
    train([3.0, 2.0, 2.5, 2.5, 2.5])
    folder, at, refused = tmp_path / "adapters", 0, True
    saver = adapter_saving.Saver(
        folder, load(folders["untied"])[0], SimpleNamespace(fine_tune_type="full", token_tables=[]), True
    )
    saver.save(9, False)
    before = {path.name: path.read_bytes() for path in (folder / "best").iterdir()}
    while refused:
        with pytest.MonkeyPatch.context() as broken:
            writes = [(safe_writing, name) for name in ("_sync", "link", "sync_folder", "remove")]
            disk = Refusing(broken, at, [*writes, (os, "mkdir"), (os, "rename"), (safe_writing, "_exchange")])
            try:
                saver.save_best({"best": {"step": 9, "validation_loss": 1.0, "batches": ""}}, is_saved)
            except OSError:
                assert {path.name: path.read_bytes() for path in (folder / "best").iterdir()} == before
            else:
                assert best_of(folder) == (9, 1.0)
                adapters.apply_adapter(saver.model, folder / "best", {})
                break
        refused, at = disk.left < 0, at + 1
    assert at > 4


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(tmp_path, exchanges):
    at, killed = 0, True
    while killed:
        best = tmp_path / str(at) / "best"
        best.mkdir(parents=True)
        (best / "file").write_text("old")
        pid = os.fork()
        if pid == 0:  # no MLX in here
            left = [at]

            def or_die(function, left=left):
                def call(*arguments, **options):
                    left[0] -= 1
                    return os._exit(9) if left[0] < 0 else function(*arguments, **options)

                return call

            for name in ("mkdir", "rename", "unlink", "rmdir", "open", "fsync"):
                setattr(os, name, or_die(getattr(os, name)))
            safe_writing._exchange = or_die(safe_writing._exchange if exchanges else lambda *_: False)
            with safe_writing.new_folder(best) as folder:
                safe_writing.write_bytes(folder / "file", b"new")
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        if not exchanges:
            safe_writing.finish_replacing(best)  # as the run does that goes on
        assert (best / "file").read_text() in ("old", "new")
        with safe_writing.new_folder(best) as folder:
            safe_writing.write_bytes(folder / "file", b"newest")
        assert [path.name for path in best.parent.iterdir()] == ["best"]
        assert (best / "file").read_text() == "newest"
        at += 1
    assert at > 8


def arrays_on_disk(folder):
    """Bytes of arrays that are weights or state, of a file with two names once."""
    files = {path.stat().st_ino: path for path in folder.rglob("*.safetensors")}
    arrays = [(name, array) for file in files.values() for name, array in mx.load(str(file)).items()]
    return sum(array.nbytes for name, array in arrays if name != adapters.REFUSAL)


@pytest.mark.parametrize(
    ("save_every", "keep"),
    [
        (1, []),
        (9, []),
        (2, ["--keep-checkpoints", 0]),
        (1, ["--keep-checkpoints", 2]),
        (4, ["--keep-checkpoints", 2, "--no-keep-best"]),
    ],
)
def test_the_disk_that_a_run_takes_is_what_is_told(folders, tmp_path, losses, monkeypatch, save_every, keep):
    from ember_mlx.finetune import options

    words = ["--model", folders["untied"], "--data", folders["data"], "--adapter-path", tmp_path / "a", "--iters", 6,
             "--batch-size", 1, "--steps-per-eval", 2, "--save-every", save_every, *keep]  # fmt: skip
    told, taken, refuse, sync = [], [], run_module.refuse_full_disk, safe_writing._sync

    def watched(descriptor):
        sync(descriptor)
        taken.append(arrays_on_disk(tmp_path / "a"))

    monkeypatch.setattr(run_module, "refuse_full_disk", lambda *arguments: told.append(refuse(*arguments)) or told[0])
    monkeypatch.setattr(safe_writing, "_sync", watched)
    losses[:] = [3.0, 2.0, 1.0, 0.5, 3.0]
    run(options.parse([*map(str, words)]))
    assert (arrays_on_disk(tmp_path / "a"), max(taken)) == (told[0].final, told[0].peak)


def test_a_default_run_of_qwen3_takes_less_than_1_5_gb():
    table, lora, layers = 151_936 * 1024 * 2, 8 * 4 * (3072 + 2048 + 2048 + 3072 + 3 * 4096), 16
    args = SimpleNamespace(iters=1000, save_every=100, steps_per_eval=200, keep_checkpoints=None)
    kept = what_is_kept(args, tables=True, best=True)
    assert kept == Kept(checkpoints=1, numbered=0, best=True)
    use = disk_use(args, table + layers * lora, 2 * layers * lora + 4 * (151_936 + 1024), kept)
    assert use.final < use.peak < 1.5e9
