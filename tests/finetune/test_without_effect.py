"""Every option has an effect, or says that it has none: a row for each, of ``train`` and of the commands beside it."""

import pytest

from ember_mlx import InputError
from ember_mlx.commands import export, fuse, plan
from ember_mlx.finetune import options
from ember_mlx.finetune.data import load_sets
from ember_mlx.finetune.keywords import options_of
from ember_mlx.finetune.row_keys import layout_of
from ember_mlx.finetune.run import run
from ember_mlx.finetune.without_effect import OF_TEST, RULES, endless_warmups, idle_patience
from ember_mlx.shared.command_line import actions_of, flag

REFUSED = [  # an option of ours that asks for something, and what leaves it nothing to do
    ("table_beta2", "--table-beta2 0.9", "--train-tables none"),
    ("table_beta2_decay", "--table-beta2-decay 0.8", "--train-tables none"),
    ("table_row_clip", "--table-row-clip 3", "--train-tables none"),
    ("table_row_floor", "--table-row-floor 3", "--train-tables none"),
    ("table_rounding", "--table-rounding nearest", "--train-tables none"),
    ("table_weight_decay", "--table-weight-decay 0.1", "--train-tables none"),
    ("bias_correction", "--bias-correction", "--num-layers 0"),
    ("body_rounding", "--body-rounding stochastic", "--num-layers 0"),
    ("body_rounding", "--body-rounding stochastic", "--fine-tune-type dora"),
    ("clip_layer_norm", "--clip-layer-norm 1 --stream", "--num-layers 0"),
    ("resume_with_changes", "--resume-with-changes", ""),
]
WARNED = [  # one with a default, or of mlx-lm's
    ("table_optimizer", "--table-optimizer adamw", "--train-tables none"),
    ("table_learning_rate", "--table-learning-rate 1e-3", "--train-tables none"),
    ("auto_savings", "--auto-savings", "--train-tables none"),
    ("optimizer", "--optimizer adamw", "--num-layers 0"),
    ("learning_rate", "--learning-rate 1e-4", "--num-layers 0"),
    ("learning_rate", "--learning-rate 1e-4", "--optimizer adafactor"),
    ("sample_tokens", "--sample-tokens 9", ""),
    ("test_batches", "--test-batches 9", ""),
    ("project_name", "--project-name x", ""),
    ("dequantize_tables", "--dequantize-tables", ""),
    ("iters", "--iters 9", "--test"),
    ("add_tokens", "--add-tokens x.txt", "--test"),
]
ELSEWHERE = {  # refused or warned of where more is known, each with a test there
    *("stream", "keep_inputs", "shard_optimizer", "shard_tables"),  # choices.py, run.py: tables and workers
    *("keep_best", "patience", "sample_prompts", "valid_fraction"),  # where it is known which rows validate
    *("prompt_feature", "completion_feature", "chat_feature", "text_feature", "mask_prompt"),  # what the rows are
    *("peer_timeout", "overwrite", "quantize", "packing", "grad_accumulation_steps", "epochs"),
}
ALWAYS = {  # of a run that trains, whatever the other options are
    *("model", "data", "max_seq_length", "batch_size", "seed", "test", "train", "config", "trust_remote_code"),
    *("fine_tune_type", "num_layers", "warmup", "clip_grad_norm", "on_nonfinite", "train_tables", "grad_checkpoint"),
    *("chunked_loss", "memory_limit", "clear_cache_threshold", "adapter_path", "save_every", "keep_checkpoints"),
    *("resume", "resume_adapter_file", "steps_per_report", "steps_per_eval", "val_batches", "log_jsonl", "report_to"),
}


def test_the_tables_here_name_every_option_and_every_rule_is_tried():
    names = {action.dest for action in actions_of(options.build_parser())} - {"help"}
    tried = {name for name, *_ in REFUSED + WARNED}
    assert tried | ELSEWHERE | ALWAYS == names
    assert not (tried - {"iters", "add_tokens"}) & (ELSEWHERE | ALWAYS)
    ruled = {name for rule in RULES for name in rule.names or ()} - {"table_lr_schedule"}
    assert ruled <= tried
    assert names >= OF_TEST - {"hf_dataset"}


@pytest.mark.parametrize(("name", "asked", "beside"), REFUSED)
def test_what_would_not_happen_is_refused_in_one_line(name, asked, beside):
    with pytest.raises(InputError, match=f"^{flag(name)}[^:]*: no effect: .*leave it out$"):
        options.parse([*asked.split(), *beside.split()])


@pytest.mark.parametrize(("name", "asked", "beside"), WARNED)
def test_what_has_a_default_is_warned_of_in_one_line(name, asked, beside, capsys):
    options.parse([*asked.split(), *beside.split()])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"Warning: {flag(name)}")
    assert ": no effect: " in line


@pytest.mark.parametrize(("name", "asked", "_"), [row for row in REFUSED + WARNED if row[0] != "dequantize_tables"])
def test_where_it_has_an_effect_nothing_is_said(name, asked, _, capsys):
    full = ["--fine-tune-type", "full", "--optimizer", "adam", "--test", "--train", "--resume", "--report-to", "wandb"]
    options.parse([*full, "--sample-prompts", "x.txt", *asked.split()])
    assert capsys.readouterr().out == ""


def test_whole_gradients_of_tables_are_clipped_too(capsys):
    options.parse(["--num-layers", "0", "--stream", "--clip-layer-norm", "1", "--table-optimizer", "adamw"])
    assert capsys.readouterr().out == ""


def test_adapters_of_a_file_may_have_16_bits(capsys):
    options.parse(["--body-rounding", "stochastic", "--resume-adapter-file", "adapters.safetensors"])
    assert capsys.readouterr().out == ""


def test_of_a_yaml_file_a_flag_may_leave_lines_without_effect(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    schedule = "lr_schedule: {name: step_decay, arguments: [1e-4, 0.5, 9]}"
    file.write_text(f"table_row_clip: 3\ntest_batches: 9\n{schedule}\nlearning_rate: 1e-4\n")
    options.parse(["--config", str(file), "--train-tables", "none"])
    said = capsys.readouterr().out
    assert said == f"Warning: --config {file}: table_row_clip 3: no effect: no table trains with --train-tables none\n"
    options.parse(["--config", str(file), "--learning-rate", "1e-3"])
    assert capsys.readouterr().out == "Warning: --learning-rate 0.001: no effect: lr_schedule replaces it\n"


def test_of_a_file_file_and_key_are_named_and_of_the_command_line_the_flag(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text("bias_correction: true\noptimizer_config: {adamw: {eps: 1e-7}}\ntable_row_clip: 3\n")
    options.parse(
        ["--config", str(file), "--optimizer", "flash-adamw", "--train-tables", "none", "--test-batches", "9"]
    )
    clip, idle, flags = capsys.readouterr().out.splitlines()
    assert idle.startswith(
        f"Warning: --config {file}: bias_correction: no effect: flash-adamw always corrects its bias"
    )
    assert clip.startswith(f"Warning: --config {file}: table_row_clip 3: no effect: ")
    assert flags.startswith("Warning: --test-batches 9: no effect: ")


def test_a_schedule_of_the_tables_replaces_their_rate(capsys):
    schedule = {"name": "step_decay", "arguments": [1, 1, 1]}
    given = {"data": "x", "table_learning_rate": 1e-3, "table_lr_schedule": schedule}
    options_of(given)
    assert "table_learning_rate 0.001: no effect: table_lr_schedule replaces it" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"^table_lr_schedule \{.*\}: no effect: no table trains"):
        options_of(given | {"table_learning_rate": None, "train_tables": "none"})


def test_a_warmup_from_a_rate_needs_a_warmup(capsys):
    schedule = {"name": "step_decay", "arguments": [1, 1, 1], "warmup_init": 0.5}
    for more in ({}, {"lr_schedule": schedule | {"warmup": 2}}, {"warmup": 2.0}, {"train": False, "test": True}):
        options_of({"data": "x", "lr_schedule": schedule} | more)
        warned = "lr_schedule: warmup_init: no effect: nothing is warmed up; add a warmup" in capsys.readouterr().out
        assert warned == (not more)


def test_what_the_run_knows_alone_is_told_by_the_run(parse, capsys):
    with pytest.raises(InputError, match=r"--overwrite: --resume continues the run in --adapter-path"):
        run(parse("--peer-timeout", 9, "--resume", "--overwrite"))
    assert "Warning: --peer-timeout 9: no effect: it is for several workers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "done", "has"),
    [
        ("--patience 5 --iters 200", (), "1 validation at --steps-per-eval 200"),
        ("--patience 1 --iters 199", (), "0 validations at --steps-per-eval 200"),
        ("--patience 1 --iters 200", (), None),
        ("--patience 4 --iters 4 --steps-per-eval 1", (), "3 validations at --steps-per-eval 1"),  # all after a step
        ("--patience 3 --iters 4 --steps-per-eval 1", (), None),
        ("--patience 5 --iters 800", (400, 2), "2 validations left at --steps-per-eval 200"),
        ("--patience 5 --iters 800", (400, 3), None),
        ("--patience 5 --iters 200", (200, 1), None),  # nothing is left to train
        ("--iters 9", (), None),
    ],
)
def test_a_patience_that_outlasts_the_run_is_warned_of(words, done, has):
    line = idle_patience(options.parse(words.split()), *done)
    assert line == (has and f"Warning: --patience {words.split()[1]}: never ends this run: it has {has}")


def test_with_epochs_the_rows_say_whether_a_patience_outlasts_the_run(folders, tmp_path, capsys):
    words = ["--model", folders["untied"], "--data", folders["data"], "--adapter-path", tmp_path / "a"]
    short = ["--batch-size", 2, "--epochs", 1, "--steps-per-eval", 4]
    for patience, warned in ((2, True), (1, False)):
        run(options.parse([str(word) for word in [*words, *short, "--patience", patience, "--overwrite"]]))
        line = f"Warning: --patience {patience}: never ends this run: it has 1 validation at --steps-per-eval 4\n"
        assert (line in capsys.readouterr().out) == warned


def test_a_warmup_that_outlasts_the_run_is_warned_of():
    schedule = {"name": "cosine_decay", "arguments": [1e-4, 360], "warmup": 40}
    short = options.parse(["--iters", "80", "--grad-accumulation-steps", "2"]) | {"lr_schedule": schedule}
    (line,) = endless_warmups(short)
    has = "never ends in this run: it has 40 updates, so no learning rate reaches its peak"
    assert line == f"Warning: lr_schedule: warmup 40: {has}"
    assert len(endless_warmups(short | {"table_lr_schedule": schedule})) == 2
    assert endless_warmups(short | {"iters": 82}) == []  # the last update has the whole rate
    assert endless_warmups(short | {"lr_schedule": schedule | {"warmup": 0}}) == []


def test_with_epochs_the_rows_say_whether_a_warmup_outlasts_the_run(folders, tmp_path, capsys):
    words = ["--model", folders["untied"], "--data", folders["data"], "--adapter-path", tmp_path / "a"]
    args = options.parse([str(word) for word in [*words, "--batch-size", 2, "--epochs", 1, "--overwrite"]])
    for warmup in (9, 2):
        run(args | {"lr_schedule": {"name": "step_decay", "arguments": [1e-5, 1, 1], "warmup": warmup}})
        warned = f"Warning: lr_schedule: warmup {warmup}: never ends in this run: it has " in capsys.readouterr().out
        assert warned == (warmup == 9)


def test_a_part_to_split_off_is_not_asked_for_in_vain(parse, capsys):
    load_sets(parse("--valid-fraction", 0.2), None)
    assert "Warning: --valid-fraction 0.2: no effect: the data has validation rows" in capsys.readouterr().out


@pytest.mark.parametrize("row", [{"text": "a"}, {"prompt": "a", "completion": "b"}, {"messages": []}])
@pytest.mark.parametrize("name", ["prompt", "completion", "chat", "text"])
def test_a_key_that_is_named_is_trained_on_or_refused(name, row):
    args = options.parse([f"--{name}-feature", "other"])
    with pytest.raises(
        InputError, match=rf"--{name}-feature other: (no effect|line 1 has no such key)|no kind that mlx-lm trains on"
    ):
        layout_of(args, row, "line 1")


@pytest.mark.parametrize(
    ("main", "words", "refused"),
    [
        (plan.main, "--model x --link TB", "--link TB: no effect"),
        (plan.main, "--model x --workers 1 --link 10GbE", "--link 10GbE: no effect"),
        (fuse.main, "--gguf-path a.gguf", "--gguf-path a.gguf: no effect"),
        (export.main, "--format peft --llama-cpp x", "--llama-cpp x: is of --format gguf"),
        (export.main, "--format ollama --outtype q8_0", "--outtype q8_0: is of --format gguf"),
        (export.main, "--format gguf --base-model x", "--base-model x: is of --format peft"),
        (export.main, "--format peft --no-adapter", "--no-adapter: peft holds adapters"),
    ],
)
def test_the_other_commands_refuse_too(main, words, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=refused):
        main(words.split())
