"""The names that ``--optimizer`` and ``--table-optimizer`` have for our optimizers, and the classes that they mean.

It needs no MLX, so that options are checked and ``plan`` counts without it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ember_mlx.shared.command_line import in_any_case
from ember_mlx.shared.errors import InputError

__all__ = [
    "ALIASES",
    "BODY",
    "CLASSES",
    "FLOORED_TABLE_RATE",
    "LORA_RATES",
    "RATES",
    "ROW_FLOOR",
    "SPLIT",
    "TABLE_RATE",
    "canonical",
    "decided_defaults",
    "named",
    "planned",
    "settings",
]

BODY = ("adam-mini", "sinkgd", "flash-adamw", "flash-lion")
"""Of ours, for all that is no token table; beside those of mlx-lm."""
ALIASES = {"adamw_8bit": "flash-adamw"}
CLASSES = {
    "adam-mini": "AdamMini",
    "sinkgd": "SinkGD",
    "flash-adamw": "FlashAdamW",
    "flash-lion": "FlashLion",
    "sage": "SAGE",
}
"""The class of :mod:`ember_mlx.optimizers` by name."""
RATES = {"adam-mini": 1e-4, "sinkgd": 1e-4, "flash-adamw": 1e-4, "flash-lion": 3e-5}
"""The default of ``--learning-rate`` for all weights, by optimizer of ours; mlx-lm's have mlx-lm's 1e-5, at which ours
hardly learn.

They rest on all weights of SmolLM2-135M, three data sets (examples/benchmarks/quality). AdamMini's is the best half
decade, or 0.0005 nats off. SinkGD's is the best on the longest, where 3.2e-4 is 0.12 to 0.14 nats worse; on the others
it is at most 0.029 behind 3.2e-4. FlashAdamW's were 3.2e-4, 3.2e-4 and 1e-4, with warm-up and a cosine: at a constant
rate it has AdamW's careful one of our recipes. A quarter decade lower is 0.008 to 0.013 better for all three on the
longest. FlashLion's is a third of FlashAdamW's, by advice alone.
"""
LORA_RATES = {"adam-mini": 3e-4, "sinkgd": 3e-4, "flash-adamw": 3e-4, "flash-lion": 1e-4}
"""The same for adapters, which may step further.

With LoRA on the same data sets, with warm-up and a cosine, the best half decades were 3.2e-4 and 1e-3; wherever 1e-4
was run, it was 0.015 to 0.12 nats behind the best (results/recipes/h200_8.jsonl). At a constant rate AdamW's were
3.2e-4, 3.2e-4, and 1e-4, 0.0002 ahead of 3.2e-4 (results/h200_2.jsonl). Adam's without bias correction was 1e-4
(results/recipes/h200_5.jsonl). Ours correct it, or have none. On one data set 3.2e-4 was 0.057 and 0.033 ahead of 1e-4
with SinkGD and FlashAdamW, 0.004 behind with AdamMini (results/cpu/lora_rates.jsonl). DoRA has not run. FlashLion's is
by advice alone.
"""
ROW_FLOOR, FLOORED_TABLE_RATE, TABLE_RATE = 3.0, 3e-4, 1e-4
"""The defaults of ``--table-row-floor`` with Ember, and of ``--table-learning-rate`` with a floor and without one.

Fine-tuning SmolLM2-135M by LoRA at constant rates, three data sets, three seeds each: with the floor, at 3.2e-4, Ember
ended 0.014 to 0.045 nats lower than without one at 1e-4. Each is its best half decade beside a tuned body
(examples/benchmarks/quality: results/recipes/h200_4.jsonl beside results/h200_2.jsonl). With MLX's Adam on the body, at
1e-5, it ended 0.058 to 0.079 lower (results/recipes/h200_5.jsonl). Most of that on two data sets is the higher rate.
"""
SPLIT = "bf16+int8"
"""The value of the option ``weights`` that keeps an int8 rest of each bfloat16 weight."""


def canonical(name: str) -> str:
    """The name, of an alias what it stands for."""
    return ALIASES.get(name, name)


def decided_defaults(given: Mapping[str, Any]) -> dict[str, float | None]:
    """The defaults that other options decide, by name; ``given`` has None for what is not given."""
    rates = RATES if given["fine_tune_type"] == "full" else LORA_RATES
    rate = rates.get(canonical(given["optimizer"] or ""))
    return _table_defaults(given) | ({} if rate is None else {"learning_rate": rate})


def _table_defaults(given: Mapping[str, Any]) -> dict[str, float | None]:
    """Of the tables' floor and rate; ``given`` as above."""
    if given["train_tables"] == "none" or given["table_optimizer"] not in (None, "ember"):
        return {"table_row_floor": None, "table_learning_rate": TABLE_RATE}
    floor = ROW_FLOOR if given["table_row_floor"] is None else given["table_row_floor"]
    return {"table_row_floor": ROW_FLOOR, "table_learning_rate": FLOORED_TABLE_RATE if floor else TABLE_RATE}


def named(config: Any, of_mlx_lm: Iterable[str]) -> Any:
    """``optimizer_config`` with its names, also those that settings have as values, as they are written here.

    Args:
        config: As it was given; what is no dictionary stays, to be refused.
        of_mlx_lm: The names of mlx-lm's optimizers, beside ours.

    Raises:
        InputError: for two keys that are one name.
    """
    if not isinstance(config, dict):
        return config
    read, found = in_any_case((*of_mlx_lm, *CLASSES, *ALIASES)), {}
    for key, asked in config.items():
        if read(key) in found:
            raise InputError(f"optimizer_config: {key}: its settings are there twice; leave one of them out")
        if isinstance(asked, dict):
            asked = {name: value.lower() if isinstance(value, str) else value for name, value in asked.items()}
        found[read(key)] = asked
    return found


def settings(options: Any, name: str) -> dict[str, Any]:
    """What ``optimizer_config`` says of the optimizer ``name``, or of an alias of it."""
    aliases = [alias for alias, meant in ALIASES.items() if meant == name]
    return next((options.optimizer_config[key] for key in (name, *aliases) if options.optimizer_config.get(key)), {})


def planned(options: Any) -> str:
    """The body's optimizer with what changes its state: "adam-mini", "adam-mini int8", "flash-adamw bf16+int8"."""
    name = canonical(options.optimizer)
    asked = settings(options, name)
    marks = [mark for key, mark in (("momentum", "int8"), ("weights", SPLIT)) if asked.get(key) == mark]
    return " ".join([name, *(marks if name in BODY else [])])
