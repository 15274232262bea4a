"""The model card of a fused model: a README.md as the Hugging Face hub reads it, of what the run recorded alone."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from ember_mlx.finetune import adapters, options, safe_reading
from ember_mlx.finetune.best import Best
from ember_mlx.finetune.optimizer_names import decided_defaults
from ember_mlx.finetune.resume import as_json

__all__ = ["RESULT", "model_card"]

RESULT = "result"  # the key of adapter_config.json for what came of a run: at its end, or for best/ until then
TYPES = {
    "loss_name": str,
    "loss_before": (float, int, type(None)),
    "loss_after": (float, int, type(None)),
    "steps": int,
    "rows": [int],
    "versions": dict,
}
FROM_THE_BASE = ("license", "license_name", "license_link", "language")
# Places on the machine of the run, and what does not bear on what was learned.
NOT_SHOWN = {
    *("adapter_path", "add_tokens", "config", "data", "log_jsonl", "model", "overwrite", "project_name", "report_to"),
    *("resume", "resume_adapter_file", "sample_prompts", "test", "train", "wandb"),
}


def model_card(model: str, name: str, adapter_config: dict[str, Any], layers: int | None = None) -> str:
    """The card of ``model`` with the adapter of ``adapter_config`` merged.

    Of the base model's own card its licence and languages stand in the front matter, and its text below ours.

    Args:
        model: The base model: a folder, or a name on the hub. A folder is not named: it is of this machine.
        name: The heading.
        adapter_config: As ``read_config`` gives it. What it lacks is left out.
        layers: How many the model has, if that is known.

    Raises:
        InputError: for a result that no run writes.
    """
    base = _card_of(model)
    data = base.data.to_dict() if base else {}
    kind = adapter_config.get("fine_tune_type", "lora")
    front = {key: data[key] for key in FROM_THE_BASE if data.get(key)}
    origin = data.get("base_model") if Path(model).exists() else model
    if origin:
        front |= {"base_model": origin, "base_model_relation": "finetune"}
    front |= {"library_name": "mlx", "pipeline_tag": "text-generation", "tags": ["mlx", "ember-mlx", kind]}
    rows = [f"| {what} | {_in_a_cell(text)} |" for what, text in _facts(adapter_config, layers)]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}",
        f"{origin or 'A base model'}, fine-tuned with ember-mlx. The adapter is merged: mlx-lm loads it as it is.",
        "\n".join(["| | |", "| --- | --- |", *rows]),
    ]
    if flags := _flags(adapter_config):
        lines = yaml.safe_dump(flags)
        told = "Options that are not the defaults of `ember-mlx train`, given or decided for this model"
        parts.append(f"{told}:\n\n```yaml\n{lines}```")
    if base and base.text.strip():
        parts.append(f"## The card of the base model\n\n{base.text.strip()}")
    return "\n\n".join(parts) + "\n"


def _card_of(model):
    path = Path(model)
    if path.exists() and not (path / "README.md").is_file():
        return None
    try:
        return ModelCard.load(path / "README.md" if path.exists() else model, ignore_metadata_errors=True)
    # The hub may be out of reach, and a front matter may be anything.
    except Exception:
        return None


def _facts(config, layers):
    yield "trained", _what_trained(config, layers)
    result, best = config.get(RESULT), config.get(adapters.BEST)
    if isinstance(config.get("data"), str):
        # Of a path its last part: the rest is of this machine.
        data = config["data"] if config["data"].count("/") == 1 else Path(config["data"]).name
        yield "data", data
    if result is not None:
        safe_reading.check_types(result, TYPES, f"adapter_config.json: {RESULT}")
        yield "rows", ", ".join(f"{n} {of}" for n, of in zip(result["rows"], ("to train", "to validate"), strict=False))
        yield "steps", str(result["steps"])
        losses = ((result["loss_before"], "before"), (result["loss_after"], "after"))
        words = ", ".join(f"{loss:.3f} {when}" for loss, when in losses if loss is not None)
        if words:
            lowest = ", the lowest of the run" if best is not None else ""
            yield result["loss_name"].lower(), f"{words}, in nats a token{lowest}"
        yield "with", ", ".join(f"{what} {which}" for what, which in result["versions"].items())
    elif best is not None:
        safe_reading.check_types(best, Best.TYPES, "adapter_config.json: best")
        yield "steps", str(best["step"])
        yield "validation loss", f"{best['validation_loss']:.3f} nats a token, the lowest of the run"


def _in_a_cell(text):
    return " ".join(text.split()).replace("|", "\\|")


def _what_trained(config, of):
    kind, tables = config.get("fine_tune_type", "lora"), config.get("token_tables") or []
    layers = config.get("num_layers")
    words = kind if kind == "full" else f"{kind} of rank {config['lora_parameters']['rank']}"
    outside = kind == "full" and tables  # with tables all that is outside the layers trains
    if layers == 0:
        words = "full outside the layers" if outside else "no layer"
    elif layers is not None:
        last = {1: "the last layer", -1: "all layers", of: "all layers"}.get(layers, f"the last {layers} layers")
        words += f" in {last}" + (" and outside them" if outside else "")
    return words + (f"; token tables {', '.join(tables)}" if tables else "")


def _flags(config):
    """By name, in JSON's types, which YAML has too."""
    defaults = as_json(options.defaults())
    if decided_defaults(defaults | config)["table_row_floor"] and config.get("table_row_floor", 0) is None:
        config = config | {"table_row_floor": 0.0}  # of a run of before it had a default
    decided = decided_defaults(defaults | config)
    shown = (defaults.keys() & config.keys()) - NOT_SHOWN
    return {key: config[key] for key in sorted(shown) if not config[key] == defaults[key] == (defaults | decided)[key]}
