"""YAML keys with values of their own: each value is right, or refused in one line of ours that names it."""

import re

import mlx.core as mx
import pytest
from mlx_lm.tuner.utils import build_schedule

from ember_mlx import InputError
from ember_mlx.finetune import options
from ember_mlx.finetune.mlx_lm_internals import CONFIG_DEFAULTS
from ember_mlx.finetune.optimizer_names import CLASSES, canonical
from ember_mlx.finetune.yaml_sections import BY_NAME, check_schedule, make_optimizer

OPTIMIZERS = [*CONFIG_DEFAULTS["optimizer_config"], *CLASSES]
COSINE = {"name": "cosine_decay", "arguments": [1e-4, 100]}
EXAMPLE = """
optimizer: adamw
optimizer_config: {adam: {}, adamw: {betas: [0.9, 0.98], eps: 1e-6, weight_decay: 0.05, bias_correction: true}, sgd: {}}
learning_rate: 1e-5
lora_parameters: {keys: [self_attn.q_proj], rank: 8, scale: 20.0, dropout: 0.0}
lr_schedule: {name: cosine_decay, warmup: 100, warmup_init: 1e-7, arguments: [1e-5, 1000, 1e-7]}
"""


def refusal(call):
    """The message of an InputError, or ""."""
    try:
        call()
    except InputError as error:
        return str(error)
    return ""


@pytest.fixture
def read(tmp_path):
    def read(text):
        (tmp_path / "options.yaml").write_text(text)
        return options.parse(["--config", str(tmp_path / "options.yaml")])

    return read


def test_what_mlx_lms_example_holds_is_taken_in_silence(read, capsys):
    assert read(EXAMPLE).learning_rate == 1e-5
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_parameters: {rank: true}", "lora_parameters: rank: True must be a whole number"),
        ("lora_parameters: {rank: '8'}", "lora_parameters: rank: '8' must be a whole number"),
        (
            "optimizer_config: {adam: {beta: 0.9}}",
            "optimizer_config: adam: beta: .*did you mean 'betas'.* it takes betas,",
        ),
        (
            "optimizer_config: {adam: {learning_rate: 1}}",
            "optimizer_config: adam: learning_rate: .*by --learning-rate;",
        ),
        (
            "optimizer_config: {sage: {weight_decay: 1}}",
            "optimizer_config: sage: weight_decay: .*--table-weight-decay;",
        ),
        (
            "optimizer_config: {adamw_8bit: {eps: 1}, flash-adamw: {eps: 1}}",
            "flash-adamw: is another name of adamw_8bit",
        ),
        ("optimizer_config: {sgd: {nesterov: true}}", "optimizer_config: sgd: {'nesterov': True}: Nesterov"),
        ("optimizer_config: {muon: {ns_steps: 0}}", "optimizer_config: muon: ns_steps: 0 must be at least 1"),
        ("optimizer_config: {adafactor: {decay_rate: 0.8}}", "adafactor: decay_rate: 0.8 must be below 0"),
        ("optimizer_config: {adam: {eps: .nan}}", "optimizer_config: adam: eps: nan must be finite"),
        ("lr_schedule: cosine_decay", "lr_schedule: 'cosine_decay': must hold a name and arguments"),
        ("hf_dataset: billsum", "hf_dataset: 'billsum': must hold the name of a data set as path"),
    ],
)
def test_a_mistake_is_named_before_anything_is_loaded(read, text, message):
    # An optimizer's settings matter where it is the run's.
    used = next((name for name in OPTIMIZERS if text.startswith(f"optimizer_config: {{{name}: ")), None)
    used = f"\noptimizer: {used}" if used not in (None, "sage") else ""
    with pytest.raises(InputError, match=f"^--config [^:]*: (optimizer_config: )?{message}"):
        read(text + used)


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("lora_parameters: {rank: 8, scale: 1.0, dropout: 0, alpha: 16}", "lora_parameters: alpha: .*alpha / rank"),
        ("lora_parameters: {rnak: 8}", "lora_parameters: rnak: no effect: .*did you mean 'rank'"),
        ("lr_schedule: {name: cosine_decay, arguments: [1, 9], warmups: 3}", "lr_schedule: warmups: .*'warmup'"),
        ("hf_dataset: [{path: x, promt_feature: y}]", "hf_dataset: promt_feature: .*did you mean 'prompt_feature'"),
        ("optimizer_config: {adamw: {lr: 3}}", "optimizer_config: adamw: no effect: --optimizer is adam"),
        *((f"{key}: {no}", None) for key in ("lr_schedule", "hf_dataset") for no in ("false", "{}", "''")),
    ],
)
def test_what_mlx_lm_passes_over_is_no_more_than_warned_of(read, capsys, text, warning):
    read(text)
    said = capsys.readouterr().out
    assert re.match(f"Warning: --config [^:]*: {warning}.*\n$", said) if warning else said == ""


def test_a_whole_number_may_stand_in_quotes_as_other_numbers_may(read):
    assert read("iters: '5'\nlearning_rate: '1e-4'").iters == 5
    with pytest.raises(InputError, match=r"iters: '5\.0' must be a whole number"):
        read("iters: '5.0'")


@pytest.mark.parametrize("value", ["x", None, True, 3, 0.5, [], [0.5], [0.5, "x"], [0.5, 0.5], {}, float("nan"), -7])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_value_of_any_setting_is_taken_or_refused_with_its_name(name, value):
    for key in (
        "betas",
        "eps",
        "weight_decay",
        "bias_correction",
        "momentum",
        "nesterov",
        "ns_steps",
        "beta_1",
        "weights",
    ):
        message = refusal(lambda key=key: make_optimizer(canonical(name), 1e-3, {}, {key: value}))
        assert message or value != "x"
        assert not message or (message.startswith(f"optimizer_config: {name}: ") and key in message)
        assert message.count("optimizer_config") <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "cosine"}, "name: 'cosine' is no schedule .did you mean 'cosine_decay'.*; use one of exponential"),
        ({"name": ["a"]}, r"name: \['a'\] is no schedule"),
        ({"name": "join_schedules"}, "name: 'join_schedules' is no schedule"),
        ({"arguments": [1e-4]}, r"arguments: \[0.0001\]: cosine_decay takes a list of init, decay_steps, end"),
        ({"arguments": [1e-4, 9, 0.0, 0.0]}, "arguments: .*: cosine_decay takes a list of"),
        ({"arguments": None}, "arguments: None: cosine_decay takes a list of"),
        ({"arguments": [float("nan"), 9]}, "arguments: init of cosine_decay: nan must be a number"),
        ({"arguments": {"init": 1}}, "arguments: .*: cosine_decay takes a list of"),
        ({"arguments": ["1e-4", 9]}, "arguments: init of cosine_decay: '1e-4' must be a number"),
        *(({"arguments": [1e-4, steps]}, "arguments: decay_steps .*must be a whole") for steps in (0, 9.5, 2**31)),
        *(({"warmup": warmup}, "warmup: .*must be a share below 1") for warmup in ("x", -3, True, 2.5, 2**31)),
        ({"warmup": 2, "warmup_init": "x"}, "warmup_init: 'x' must be a number"),
    ],
)
def test_a_schedule_says_which_part_of_it_cannot_be(changes, message):
    with pytest.raises(InputError, match=f"^lr_schedule: {message}"):
        check_schedule("lr_schedule", COSINE | changes)


def test_every_schedule_of_mlx_that_yaml_can_name_is_known():
    assert set(BY_NAME) == {"exponential_decay", "step_decay", "cosine_decay", "linear_schedule"}
    schedule = COSINE | {"warmup": 2, "arguments": [1e-4, 1e3]}
    check_schedule("lr_schedule", schedule)
    assert build_schedule(schedule)(mx.array(1)).item() == pytest.approx(5e-5)


def test_a_warm_up_may_be_a_share_of_the_run(read):
    schedule = "lr_schedule: {name: cosine_decay, warmup: 0.5, arguments: [1e-4, 10]}"
    assert read(f"iters: 10\n{schedule}").lr_schedule["warmup"] == 5


def test_settings_that_change_nothing_are_warned_of_unless_they_are_mlx_lms_defaults(read, tmp_path, capsys):
    idle = "optimizer_config: {adam: {}, sgd: {momentum: 0.9}, adamw_8bit: {eps: 1e-7}, sage: {eps: 1e-7}}\n"
    other = "lora_parameters: {rank: 4, scale: 20.0, dropout: 0.0}\n"
    usual = "lora_parameters: {rank: 8, scale: 20.0, dropout: 0.0}\n"
    for text, lines in (
        (
            idle + "optimizer: flash-adamw\ntable_optimizer: sage\n",
            ["optimizer_config: sgd: no effect: --optimizer is fl"],
        ),
        (
            idle,
            [
                "optimizer_config: sgd, optimizer_config: adamw_8bit: no effect: --optimizer is adam",
                "optimizer_config: sage: no effect: no table trains with --table-optimizer sage",
            ],
        ),
        (usual + "fine_tune_type: full", []),
        (other + "fine_tune_type: full", ["lora_parameters: no effect: --fine-tune-type full has no adapters"]),
        (other + "num_layers: 0", ["lora_parameters: no effect: the tables train alone with --num-layers 0"]),
        (other + idle + "test: true\nfine_tune_type: full", []),  # a test may take the file of its run
    ):
        read(text)
        said = capsys.readouterr().out.splitlines()
        assert len(said) == len(lines)
        where = f"--config {tmp_path / 'options.yaml'}: "
        assert all(line.startswith(f"Warning: {where}{start}") for line, start in zip(said, lines, strict=True))
