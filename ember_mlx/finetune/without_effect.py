"""Options that change nothing since another option, or the lack of one, leaves them nothing to do.

One of ours that asks for something is refused on a command line: what was asked for would not happen. Three kinds are
warned of: those with a default; mlx-lm's, which it takes in silence; those of a YAML file, which a flag may go over.
What ``--stream`` alone has, :mod:`ember_mlx.finetune.choices` refuses; what rows decide, the data's readers.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ember_mlx.finetune.mlx_lm_internals import CONFIG_DEFAULTS
from ember_mlx.finetune.optimizer_names import canonical, settings
from ember_mlx.finetune.run_length import SCHEDULES, updates, warmup_of
from ember_mlx.shared.command_line import flag
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.float_formats import SMALLEST_NORMAL
from ember_mlx.shared.units import counted

__all__ = ["CORRECTED", "OF_TEST", "RULES", "Rule", "endless_warmups", "idle_patience", "refuse_idle"]

OF_TEST = frozenset(
    [
        *("model", "data", "hf_dataset", "prompt_feature", "completion_feature", "chat_feature", "text_feature"),
        *("mask_prompt", "max_seq_length", "batch_size", "seed", "test", "test_batches", "train", "config"),
        *("trust_remote_code", "adapter_path", "quantize", "stream", "chunked_loss", "memory_limit", "peer_timeout"),
        *("report_to", "project_name"),  # they get the options, as mlx-lm's do
    ]
)
"""The options that a test without training reads."""
OBSOLETE = ("dequantize_tables",)
ALONE = "the tables train alone with --num-layers 0"
OF_TABLES = (
    *("table_optimizer", "table_learning_rate", "table_weight_decay", "table_beta2", "table_beta2_decay"),
    *("table_row_clip", "table_row_floor", "table_rounding", "table_lr_schedule", "auto_savings"),
)
CORRECTED = ("adam", "adamw")
ITS_BIAS = {
    "adam-mini": "adam-mini always corrects its bias",
    "flash-adamw": "flash-adamw always corrects its bias",
    "sinkgd": "sinkgd's vectors always have their bias corrected, and its matrices have none",
    "flash-lion": "flash-lion has no bias to correct",
}
"""Why our optimizers leave ``--bias-correction`` nothing to do."""


class Rule(NamedTuple):
    """Some options, and where they have no effect.

    Attributes:
        names: Of the options; None for all that a test does not read.
        where: Says of a run's options whether that is so.
        why: In words, with what makes them have one; or says it of the options.
    """

    names: tuple[str, ...] | None
    where: Callable[[Any], bool]
    why: str | Callable[[Any], str]


def _tables_alone(options):
    return options.num_layers == 0 and options.fine_tune_type != "full"


def _has_its_own_rate(options):
    asked = settings(options, "adafactor")
    return canonical(options.optimizer) == "adafactor" and asked.get("relative_step", True) is not False


def _why_not_corrected(options):
    why = ITS_BIAS.get(canonical(options.optimizer), f"{options.optimizer} corrects no bias")
    return f"{why}; it is for {' and '.join(CORRECTED)}"


def _has_new_adapters_rounded(options):
    """Those of ``--resume-adapter-file`` have the dtype of that file; build_optimizer.py looks at it."""
    new = options.fine_tune_type != "full" and options.resume_adapter_file is None
    return new and options.body_rounding == "stochastic"


RULES = (
    Rule(None, lambda run: not run.train, "--test alone trains nothing; add --train to train before it"),
    Rule(OF_TABLES, lambda run: run.train_tables == "none", "no table trains with --train-tables none"),
    Rule(
        ("bias_correction", "body_rounding", "optimizer", "learning_rate"),
        _tables_alone,
        ALONE,
    ),
    Rule(
        ("clip_layer_norm",),
        lambda run: _tables_alone(run) and run.table_optimizer == "ember",
        f"{ALONE}, and under Ember have no whole gradient",
    ),
    Rule(
        ("body_rounding",),
        _has_new_adapters_rounded,
        "new adapters are in float32; it is for --fine-tune-type full",
    ),
    Rule(("learning_rate",), lambda run: bool(run.lr_schedule), "lr_schedule replaces it"),
    Rule(("table_learning_rate",), lambda run: bool(run.table_lr_schedule), "table_lr_schedule replaces it"),
    Rule(
        ("learning_rate",),
        _has_its_own_rate,
        "adafactor takes a rate of its own; set relative_step: false under optimizer_config",
    ),
    Rule(("bias_correction",), lambda run: canonical(run.optimizer) not in CORRECTED, _why_not_corrected),
    Rule(("sample_tokens",), lambda run: run.sample_prompts is None, "nothing is answered; add --sample-prompts"),
    Rule(("test_batches",), lambda run: not run.test, "nothing is tested; add --test"),
    Rule(("project_name",), lambda run: run.report_to is None, "nothing is reported; add --report-to"),
    Rule(("resume_with_changes",), lambda run: run.resume is None, "nothing is resumed; add --resume"),
    Rule(OBSOLETE, lambda run: True, "quantized tables that train are dequantized"),
)


def _idle(options):
    """The options of those given that change nothing, each with why. One that is switched off asks for nothing."""
    found = {}
    for rule in RULES:
        given = options.given.keys()
        names = given - OF_TEST if rule.names is None else given & set(rule.names)
        if names and rule.where(options):
            why = rule.why(options) if callable(rule.why) else rule.why
            for name in sorted(names):
                if getattr(options, name, None) not in (None, False):
                    found.setdefault(name, why)
    return found


def _idle_sections(options):
    """The YAML keys with values of their own that say more than mlx-lm's defaults in vain, by why: its files do too.

    A file may say something of several optimizers: of those that ``--optimizer`` goes over, nothing is said.
    """
    alone = ALONE if _tables_alone(options) else ""
    no_adapters = "--fine-tune-type full has no adapters" if options.fine_tune_type == "full" else alone
    found = {}
    if no_adapters and options.lora_parameters != CONFIG_DEFAULTS["lora_parameters"]:
        found[no_adapters] = ["lora_parameters"]
    for name, asked in options.optimizer_config.items():
        if not asked or asked == CONFIG_DEFAULTS["optimizer_config"].get(name):
            continue
        if name == "sage":
            used = options.table_optimizer == "sage" and options.train_tables != "none"
            why = "" if used else "no table trains with --table-optimizer sage"
        elif canonical(name) == canonical(options.optimizer):
            why = alone
        elif options.given.get("optimizer") == "" and options.given.get("optimizer_config"):
            why = ""
        else:
            why = f"--optimizer is {options.optimizer}"
        if why:
            found.setdefault(why, []).append(f"optimizer_config: {name}")
    for key in SCHEDULES:
        asked = getattr(options, key) or {}
        if asked.get("warmup_init") and not (asked.get("warmup") or options.warmup):
            found.setdefault("nothing is warmed up; add a warmup", []).append(f"{key}: warmup_init")
    return found


def refuse_idle(options: Any, own: Mapping[str, Any], warn: Callable[[str], None]) -> None:
    """Refuse the first option that changes nothing, or warn of it, as the top of this file says.

    Args:
        options: The run's, with where each is given.
        own: The defaults of those that mlx-lm does not have.
        warn: Is told each warning, a line.

    Raises:
        InputError: for one of ours without a default, on the command line of a run that trains. A test alone may be
            given all that its run was given.
    """
    warnings = {}  # by where and why
    for why, keys in (_idle_sections(options) if options.train else {}).items():
        for key in keys:
            warnings.setdefault((options.given.get(key.partition(":")[0], ""), why), []).append(key)
    for name, why in _idle(options).items():
        value, file = getattr(options, name), options.given[name]
        named = name if file or name in SCHEDULES else flag(name)
        shown = named if value is True else f"{named} {value:g}" if isinstance(value, float) else f"{named} {value}"
        if not file and name not in OBSOLETE and options.train and not own.get(name, "mlx-lm's"):
            raise InputError(f"{shown}: no effect: {why}, or leave it out")
        if not file or name in own:  # files of mlx-lm's have every key
            warnings.setdefault((file, why), []).append(shown)
    for (file, why), several in warnings.items():
        warn(f"Warning: {file}{', '.join(several)}: no effect: {why}")
    if options.train:
        for line in _nothing_moves(options):
            warn(f"Warning: {line}")


def idle_patience(options: Any, step: int = 0, waited: int = 0) -> str | None:
    """A warning where ``--patience`` can never end the run, whose length is settled.

    Args:
        options: The run's.
        step: How many steps are done.
        waited: How many validations in a row had found no lower loss by then.
    """
    each = options.steps_per_eval
    validations = options.iters // each - max(step, 1) // each  # the one before the first step does not count
    if options.patience is None or step == options.iters or waited + validations >= options.patience:
        return None
    has = f"{counted(validations, 'validation')}{' left' if step else ''} at --steps-per-eval {each}"
    return f"Warning: --patience {options.patience}: never ends this run: it has {has}"


def endless_warmups(options: Any) -> list[str]:
    """A warning for each schedule whose warm-up outlasts the run, whose length is settled; ``--warmup`` is refused."""
    number = updates(options)
    warmups = {key: warmup_of(getattr(options, key)) or 0 for key in SCHEDULES}
    has = f"never ends in this run: it has {counted(number, 'update')}, so no learning rate reaches its peak"
    return [f"Warning: {key}: warmup {warmup}: {has}" for key, warmup in warmups.items() if warmup >= number]


def _nothing_moves(options):
    """A line for each learning rate under which no weight would change; a schedule has no such rate."""
    tables = options.train_tables != "none"
    still = options.learning_rate < SMALLEST_NORMAL and not options.lr_schedule and not _has_its_own_rate(options)
    if still and not _tables_alone(options):
        alone = "the token tables would train alone, as with --num-layers 0 --fine-tune-type lora in less memory"
        yield f"--learning-rate {options.learning_rate:g}: {alone if tables else 'no weight would change'}"
    if tables and options.table_learning_rate < SMALLEST_NORMAL and not options.table_lr_schedule:
        rate = f"--table-learning-rate {options.table_learning_rate:g}"
        yield f"{rate}: no token table would change; --train-tables none leaves them out"
