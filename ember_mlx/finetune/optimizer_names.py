"""The names that ``--optimizer`` and ``--table-optimizer`` have for our optimizers, and the classes that they mean.

It needs no MLX, so that options are checked and ``plan`` counts without it.
"""

from typing import Any

__all__ = ["ALIASES", "BODY", "CLASSES", "SPLIT", "canonical", "planned", "settings"]

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
    marks = [asked.get(key) for key in ("momentum", "weights")] if name in BODY else []
    return " ".join([name, *(str(mark) for mark in marks if mark in ("int8", SPLIT))])
