"""Resumed runs: bit for bit what they would have been, or refused by what is another."""

import datetime
import gc
import json
import math
import shutil
from types import SimpleNamespace

import mlx.core as mx
import pytest
from finetune.breaking import BreakAt, Breaks
from mlx.utils import tree_flatten

from ember_mlx import InputError
from ember_mlx.finetune import checkpoints, options, resume
from ember_mlx.finetune import run as run_module
from ember_mlx.finetune.display import Display
from ember_mlx.finetune.run import run
from ember_mlx.finetune.watchers import Watcher

YAML = """
lora_parameters: {rank: 4, scale: 10.0, dropout: 0.3}
lr_schedule: {name: cosine_decay, warmup: 3, warmup_init: 1e-7, arguments: [1e-3, 12, 1e-6]}
"""


@pytest.fixture
def parse_resumable(parse, tmp_path):
    """Options under which everything random and everything scheduled matters; 12 rows are 6 batches an epoch."""
    config = tmp_path / "config.yaml"
    config.write_text(YAML)
    common = ["--config", config, "--table-learning-rate", 1e-2, "--steps-per-eval", 4]
    return lambda *arguments, **folders: parse(*common, *arguments, **folders)


def last_checkpoint(folder):
    return checkpoints.find(folder, True)


def assert_same(folder, other):
    one, two = last_checkpoint(folder), last_checkpoint(other)
    assert one.position == two.position
    for arrays, others in ((one.weights, two.weights), (one.optimizer, two.optimizer)):
        assert arrays.keys() == others.keys()
        assert [name for name in arrays if not mx.array_equal(arrays[name], others[name])] == []


@pytest.mark.parametrize(("kind", "accumulate"), [("lora", 1), ("lora", 3), ("dora", 1), ("full", 3)])
def test_the_rest_of_a_resumed_run_is_that_of_an_uninterrupted_one_bit_for_bit(
    parse_resumable, tmp_path, kind, accumulate
):
    common = ["--fine-tune-type", kind, "--grad-accumulation-steps", accumulate, "--iters", 15]
    whole = run(parse_resumable(*common, adapter="whole"))
    # Step 8 is in the middle of the second epoch and, with 3 to accumulate, of the third update.
    broken = [*common, "--save-every", 8]
    with pytest.raises(Breaks):
        run(parse_resumable(*broken, adapter="broken"), BreakAt(12))
    assert last_checkpoint(tmp_path / "broken").position.step == (8 if accumulate == 1 else 6)
    resumed = run(parse_resumable(*broken, "--resume", adapter="broken"))
    assert_same(tmp_path / "whole", tmp_path / "broken")
    assert (resumed.loss_before, resumed.loss_after) == (whole.loss_before, whole.loss_after)


def test_a_finished_run_is_made_longer_as_if_it_had_been_so_from_the_start(parse_resumable, tmp_path):
    run(parse_resumable("--iters", 14, "--train-tables", "none", adapter="whole"))
    short = ["--train-tables", "none", "--save-every", 5]
    run(parse_resumable("--iters", 7, *short))  # 7: evaluated because it is the last, which a longer run would not
    run(parse_resumable("--iters", 14, *short, "--resume"))
    assert_same(tmp_path / "whole", tmp_path / "adapters")
    before = last_checkpoint(tmp_path / "adapters").position
    run(parse_resumable("--iters", 14, *short, "--resume"))  # nothing is left to do
    assert last_checkpoint(tmp_path / "adapters").position == before
    with pytest.raises(InputError, match="--iters 13: checkpoint .*step-0000014 has 14 steps done"):
        run(parse_resumable("--iters", 13, *short, "--resume"))


@pytest.mark.parametrize(("epochs", "validates"), [(None, True), (0.5, False)])
def test_a_finished_run_that_is_resumed_says_that_nothing_is_left(parse, folders, tmp_path, capsys, epochs, validates):
    (tmp_path / "data").mkdir()
    for name in ("train", "valid") if validates else ("train",):
        shutil.copy(folders["data"] / f"{name}.jsonl", tmp_path / "data")
    words = ["--data", tmp_path / "data", *([] if validates else ["--valid-fraction", 0])]
    first = run(parse(*words) | {"epochs": epochs})
    before = last_checkpoint(tmp_path / "adapters").position
    capsys.readouterr()
    again = run(parse(*words, "--resume") | {"epochs": epochs})
    out = " ".join(capsys.readouterr().out.split())
    length, more = ("--epochs 0.5 (3 steps)", "--epochs") if epochs else ("--iters 3", "--iters")
    assert f"step-0000003 is the last of {length}; --resume with a higher {more} continues" in out
    for untrue in ("Resuming after", "eak memory", "tok/s", "100%", "Disk:", "save ", "where Adam", ".safetensors"):
        assert untrue not in out
    assert again.peak_memory is None
    assert (again.loss_before, again.loss_after) == (first.loss_before, first.loss_after)
    assert last_checkpoint(tmp_path / "adapters").position == before


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_a_resumed_run_takes_no_more_memory_than_from_its_start(parse, monkeypatch, stream):
    """Of a run before in this process nothing is left, nor of the weights that the checkpoint's replace."""
    monkeypatch.setattr(run_module, "WORTH_COLLECTING", 0)
    held = []

    class Looks(Watcher):
        def before_training(self, model, optimizer, tables, rows):
            trees = (model.parameters(), optimizer.state)
            held.append(mx.get_active_memory() - sum(array.nbytes for tree in trees for _, array in tree_flatten(tree)))

    common = ["--fine-tune-type", "full", "--optimizer", "adamw", stream, "--iters", 1]
    gc.collect()
    cache = mx.set_cache_limit(0)  # which hands out larger buffers than are asked for
    others = mx.get_active_memory()
    try:
        run(parse(*common), watchers=[Looks()])
        run(parse(*common, "--resume"), watchers=[Looks()])
    finally:
        mx.set_cache_limit(cache)
    assert held[1] - others < 4096  # bytes; weights and state have 390,336


def test_reports_after_a_resume_go_on_counting(parse_resumable, monkeypatch):
    reports, shown = [], []
    monkeypatch.setattr(Display, "report_train", lambda self, step, loss, speed, tokens: shown.append((step, tokens)))

    class Listens(BreakAt):
        def on_train_loss_report(self, info):
            reports.append((info["iteration"], info["trained_tokens"]))
            super().on_train_loss_report(info)

    with pytest.raises(Breaks):
        run(parse_resumable("--iters", 6, "--save-every", 2), Listens(5))
    assert shown == reports
    first, reports[:], shown[:] = reports[:], [], []
    run(parse_resumable("--iters", 6, "--save-every", 2, "--resume"), Listens(None))
    assert [iteration for iteration, _ in reports] == [5, 6]
    assert reports[0] == first[4]
    assert shown == reports


@pytest.mark.parametrize("more", [["--mask-prompt"], ["--grad-accumulation-steps", 2]])
def test_tokens_that_no_report_has_told_of_yet_are_counted_on(parse, tmp_path, more):
    reports = []
    callback = type("", (), {"on_train_loss_report": reports.append, "on_val_loss_report": lambda _: None})
    common = ["--iters", 7, "--save-every", 3, "--steps-per-report", 4, "--max-seq-length", 24, *more]
    run(parse(*common), callback)
    for path in checkpoints.in_folder(tmp_path / "adapters")[:2]:  # of steps 3, or 2, and 6
        run(parse(*common, "--resume", path, adapter=path.name), callback)
    at_end = [report["trained_tokens"] for report in reports if report["iteration"] == 7]
    assert len(at_end) == 3
    assert len(set(at_end)) == 1


def test_what_makes_another_run_is_refused_by_name_unless_asked_for(parse, folders, tmp_path):
    run(parse("--iters", 4, "--save-every", 2))
    data = tmp_path / "data"
    shutil.copytree(folders["data"], data)
    (data / "train.jsonl").write_text((data / "train.jsonl").read_text().replace("number 3", "number 4"))
    changes = {
        "--learning-rate was 1e-05 and is now 0.5": ["--learning-rate", 0.5],
        "--batch-size was 2 and is now 3": ["--batch-size", 3],
        "--steps-per-eval was 200 and is now 2": ["--steps-per-eval", 2],
        "--seed was 0 and is now 1": ["--seed", 1],
        '--table-optimizer was "ember" and is now "adamw"': ["--table-optimizer", "adamw"],
        "--data: its rows are not those": ["--data", data],
    }
    for message, arguments in changes.items():
        with pytest.raises(InputError, match=message):
            run(parse("--iters", 6, "--resume", *arguments))
    with pytest.raises(InputError, match="--model: its weights are not those"):
        run(parse("--iters", 6, "--resume", model="tied"))
    free = ["--save-every", 3, "--steps-per-report", 2, "--keep-checkpoints", 1]
    run(parse("--iters", 6, "--resume", *free))
    assert [path.name for path in checkpoints.in_folder(tmp_path / "adapters")] == ["step-0000006"]

    changed = ["--learning-rate", 0.5, "--batch-size", 3]
    reports = []
    callback = type("", (), {"on_train_loss_report": reports.append, "on_val_loss_report": lambda _: None})
    run(parse("--iters", 8, "--resume", *changed, "--resume-with-changes"), callback)
    assert [report["learning_rate"] for report in reports] == [0.5, 0.5]


def test_a_state_that_cannot_be_used_is_refused_with_the_way_to_its_weights_alone(parse, tmp_path):
    run(parse("--iters", 2, "--optimizer", "adam-mini"))
    adapter = tmp_path / "adapters" / "adapters.safetensors"
    for other in (["--optimizer", "sinkgd"], ["--optimizer", "adam-mini", "--table-optimizer", "sgd"]):
        for more in ([], ["--resume-with-changes"]):
            with pytest.raises(InputError, match=f"was .* and is now .*alone can.*--resume-adapter-file {adapter}, "):
                run(parse("--iters", 4, *other, "--resume", *more))
    run(parse("--iters", 1, "--optimizer", "sinkgd", "--resume-adapter-file", adapter, adapter="new"))
    with pytest.raises(InputError, match=r"--num-layers was .*\. Give what it was made with$"):
        run(parse("--iters", 4, "--optimizer", "adam-mini", "--num-layers", 1, "--resume", "--resume-with-changes"))


def test_the_same_data_and_model_elsewhere_are_the_same(parse, folders, tmp_path):
    run(parse("--iters", 2))
    model, data = shutil.copytree(folders["untied"], tmp_path / "m"), shutil.copytree(folders["data"], tmp_path / "d")
    run(parse("--iters", 3, "--resume", "--model", model, "--data", data))


def test_more_iterations_that_move_a_schedules_peak_are_refused(parse_resumable, tmp_path):
    run(parse_resumable("--iters", 2))  # the warm-up takes 3
    with pytest.raises(InputError, match="--iters was 2 and is now 6, which moves the peak of lr_schedule"):
        run(parse_resumable("--iters", 6, "--resume"))
    run(parse_resumable("--iters", 6, "--resume", "--train-tables", "auto", "--resume-with-changes"))


def test_a_run_branches_off_from_a_checkpoint_into_another_folder(parse_resumable, tmp_path):
    run(parse_resumable("--iters", 6, "--save-every", 2))
    second = tmp_path / "adapters" / "checkpoints" / "step-0000002"
    run(parse_resumable("--iters", 6, "--resume", second, adapter="branch"))
    assert_same(tmp_path / "adapters", tmp_path / "branch")
    with pytest.raises(InputError, match="already holds another run than that of --resume .*, or --adapter-path "):
        run(parse_resumable("--iters", 6, "--resume", second, adapter="branch"))
    # In its own folder it goes back: what came later is made again.
    run(parse_resumable("--iters", 5, "--resume", second))
    assert [path.name for path in checkpoints.in_folder(tmp_path / "adapters")] == ["step-0000002", "step-0000005"]


def test_an_adapter_folder_stands_for_its_newest_good_checkpoint(parse, tmp_path):
    run(parse("--iters", 4, "--save-every", 2))
    folder = tmp_path / "adapters"
    (folder / "checkpoints" / "step-0000004" / "weights.safetensors").write_bytes(b"")
    for asked, adapter in ((folder, "branch"), (folder / "checkpoints", "twig"), (f"{folder}/", "adapters")):
        run(parse("--iters", 3, "--resume", asked, adapter=adapter))
        assert last_checkpoint(tmp_path / adapter).position.step == 3
    assert [path.name for path in checkpoints.in_folder(folder)] == ["step-0000002", "step-0000003"]
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="--resume .*empty: it has no checkpoint; give another"):
        run(parse("--resume", tmp_path / "empty", adapter="new"))
    with pytest.raises(InputError, match="--resume '': give the folder of a checkpoint"):
        parse("--resume", "")


def test_without_a_checkpoint_there_is_nothing_to_resume(parse, tmp_path):
    with pytest.raises(InputError, match="it has no checkpoint; give another, or start without"):
        run(parse("--resume"))
    with pytest.raises(InputError, match="--resume .*nowhere: .*this folder does not exist; .*has no good one either"):
        run(parse("--resume", tmp_path / "nowhere"))
    run(parse("--keep-checkpoints", 0))
    assert not (tmp_path / "adapters" / "checkpoints").exists()


def test_a_damaged_checkpoint_is_passed_over_and_when_asked_for_refused(parse, tmp_path, capsys):
    run(parse("--iters", 4, "--save-every", 2))
    newest = tmp_path / "adapters" / "checkpoints" / "step-0000004"
    (newest / "weights.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="step-0000004: weights.safetensors is damaged.*newest good one is .*0000002"):
        run(parse("--iters", 4, "--resume", newest))
    with pytest.raises(InputError, match="newest good one is .*adapters/checkpoints/step-0000002"):
        run(parse("--iters", 4, "--resume", newest, adapter="branch"))
    run(parse("--iters", 5, "--resume"))
    said = capsys.readouterr().out
    assert "Skipped: checkpoint" in said
    assert "Resuming after step 2" in said
    assert last_checkpoint(tmp_path / "adapters").position.step == 5


@pytest.mark.usefixtures("eager")
def test_what_is_refused_has_told_of_no_run(parse, tmp_path, monkeypatch, capsys):
    run(parse("--iters", 1))
    assert "passes over" in capsys.readouterr().out
    with pytest.raises(InputError, match="--seed was 0 and is now 1"):
        run(parse("--seed", 1, "--resume"))
    (last_checkpoint(tmp_path / "adapters").folder / "weights.safetensors").unlink()
    with pytest.raises(InputError, match="all 1 checkpoints in it are damaged"):
        run(parse("--resume"))
    monkeypatch.setattr("ember_mlx.finetune.saving.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(InputError, match="0 B are free"):
        run(parse(adapter="other"))
    assert "passes over" not in capsys.readouterr().out


def test_yaml_can_ask_for_it(tmp_path):
    config = tmp_path / "config.yaml"
    asked = {"true": True, "false": None, "some/folder": "some/folder"}
    for text, value in asked.items():
        config.write_text(f"resume: {text}\nresume_with_changes: true\nkeep_checkpoints: 5\n")
        args = options.parse(["--config", str(config)])
        assert (args.resume, args.resume_with_changes, args.keep_checkpoints) == (value, True, 5)


def test_a_position_that_cannot_be_is_refused_even_with_right_checksums(parse, tmp_path):
    run(parse("--iters", 4))
    index = tmp_path / "adapters" / "checkpoints" / "step-0000004" / "checkpoint.json"
    good = json.loads(index.read_text())["content"]
    state = good["position"]["numpy_random"]
    for change, message in (
        ({"drawn": 4, "step": 4} | {"drawn": 6}, "drawn 6 cannot be"),
        ({"drawn": -1}, "drawn -1 cannot be"),
        ({"mlx_random": [1, 2, 3]}, "cannot be resumed from"),
        ({"mlx_random": [1, 2**40]}, "cannot be resumed from"),
        ({"numpy_random": state | {"position": 10**9}}, "cannot be resumed from"),
        ({"epoch_random": state | {"keys": "00"}}, "cannot be resumed from"),
        ({"record": {"losses": {"val_loss": "low"}, "trained_tokens": 1}}, "losses: val_loss is of type str"),
        ({"step": 3}, "is that of step 3"),
    ):
        content = good | {"position": good["position"] | change}
        index.write_text(json.dumps({"sha256": checkpoints._checksum(content), "content": content}))
        with pytest.raises(InputError, match=message):
            run(parse("--iters", 5, "--resume", index.parent))


def test_options_that_json_does_not_have_are_saved_as_words(parse, tmp_path):
    others = {"note": float("inf"), "day": datetime.date(2026, 1, 1)}
    run(parse("--iters", 2, "--save-every", 1) | others)
    run(parse("--iters", 3, "--save-every", 1, "--resume") | others)
    assert sorted(path.name for path in (tmp_path / "adapters/checkpoints").iterdir())[-1] == "step-0000003"


def edited(folder, place, file, change):
    """A copy of a model folder with something else in a file."""
    copy = shutil.copytree(folder, place)
    path = copy / file
    if path.suffix == ".safetensors":
        arrays = mx.load(str(path))
        change(arrays)
        mx.save_safetensors(str(path), arrays, {"format": "mlx"})
    else:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return copy


def last_number(arrays):
    name = sorted(arrays)[-1]
    flat = arrays[name].reshape(-1)
    flat[-1] += 1
    arrays[name] = flat.reshape(arrays[name].shape)


def swap_rows(arrays):
    table = arrays["model.embed_tokens.weight"]
    arrays["model.embed_tokens.weight"] = mx.concatenate([table[:200], table[201:202], table[200:201], table[202:]])


def swap_letters(tokenizer):
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["t"], vocabulary["r"] = vocabulary["r"], vocabulary["t"]


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}</s>{% endfor %}"


@pytest.fixture(scope="module")
def of_one_step(folders, tmp_path_factory):
    """The adapter folder of a run of one step."""
    folder = tmp_path_factory.mktemp("one-step") / "adapters"
    words = {"--model": folders["untied"], "--data": folders["data"], "--adapter-path": folder, "--iters": 1}
    words |= {"--batch-size": 2, "--val-batches": 1}
    run(options.parse([str(word) for pair in words.items() for word in pair]))
    return folder


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda c: c.update(rope_theta=500.0), "config.json: rope_theta was 10000.* and is now 500.0"),
        ("config.json", lambda c: c.update(rms_norm_eps=1e-6), "config.json: rms_norm_eps was 1e-05 and is now 1e-06"),
        ("model.safetensors", last_number, "its weights are not those of the checkpoint"),
        ("model.safetensors", swap_rows, "its weights are not those of the checkpoint"),
        ("tokenizer.json", swap_letters, "its tokenizer or chat template makes other tokens of the rows"),
        ("tokenizer_config.json", lambda c: c.update(chat_template=TEMPLATE), "its tokenizer or chat template makes o"),
    ],
)
def test_a_change_of_the_model_is_seen_wherever_it_is(parse, folders, tmp_path, of_one_step, file, change, message):
    model = edited(folders["untied"], tmp_path / "m", file, change)
    with pytest.raises(InputError, match=message):
        run(parse("--iters", 2, "--val-batches", 1, "--resume", of_one_step, "--model", model))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.uint32, mx.uint8, mx.int64, mx.bool_])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (7, 1), (64, 33), ()])
def test_a_checksum_sees_each_element_and_the_order(dtype, shape, monkeypatch):
    monkeypatch.setattr(resume, "PART", 100)
    size = math.prod(shape)
    flat = mx.random.randint(0, 2, (size,)).astype(dtype)
    checksum = resume.checksum(flat.reshape(shape))
    assert checksum == resume.checksum(mx.array(flat).reshape(shape))
    for i in {0, size // 2, size - 1}:
        other = mx.array(flat)
        other[i] = (1 - other[i].astype(mx.int32)).astype(dtype)
        assert resume.checksum(other.reshape(shape)) != checksum
    if size > 99 and dtype == mx.float32:
        assert resume.checksum(mx.arange(float(size))) != resume.checksum(mx.arange(float(size))[::-1])
