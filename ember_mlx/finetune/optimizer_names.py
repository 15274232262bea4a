"""The names that ``--optimizer`` and ``--table-optimizer`` have for our optimizers, and the classes that they mean.

It needs no MLX, so that options are checked and ``plan`` counts without it.
"""

from typing import Any

__all__ = ["ALIASES", "BODY", "CLASSES", "RATES", "SPLIT", "canonical", "planned", "settings"]

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
RATES = {"adam-mini": 1e-4, "sinkgd": 3e-4, "flash-adamw": 1e-4, "flash-lion": 3e-5}
"""The default of ``--learning-rate`` by optimizer of ours; mlx-lm's have mlx-lm's 1e-5, at which ours hardly learn.

AdamMini's and SinkGD's are the best half decades for all weights on two data sets (examples/benchmarks/quality).
FlashAdamW's was 3.2e-4 there, with warm-up and a cosine: at a constant rate it has AdamW's careful one of our recipes.
FlashLion's is a third of that, by advice alone.
"""
SPLIT = "bf16+int8"
"""The value of the option ``weights`` that keeps an int8 rest of each bfloat16 weight."""


def canonical(name: str) -> str:
    """The name in lower case, of an alias what it stands for."""
    return ALIASES.get(name.lower(), name.lower())


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
