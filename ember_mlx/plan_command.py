"""``ember-mlx plan``: the flags of ``train``, and what that run will take."""

import argparse
import json
import math
import os
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ember_mlx.errors import InputError, with_one_line_errors
from ember_mlx.planner import advice, alternatives, plan, read_architecture, run_of

GPU_SHARE_OF_A_MAC = 0.75  # about what macOS lets the GPU use, unless told otherwise
LEAST_MEMORY = 10**6  # bytes: `--memory 16` is 16GB without its unit
LABELS = {
    "--table-optimizer ember": "Ember",
    "--table-optimizer adamw": "AdamW",
    "--table-optimizer adafactor": "Adafactor",
    "--train-tables none": "no training (frozen)",
}
ROWS = ("weights", "gradients", "optimizer state", "activations", "logits", "scratch")


def main(arguments: list[str]):
    """What ``ember-mlx plan`` does.

    Raises:
        InputError: for options that ``train`` would refuse, a config.json that cannot be planned, or no memory.
    """
    from ember_mlx.finetune import options

    own, theirs = _parser().parse_known_args(arguments)
    args = options.parse(theirs)
    backend = own.backend or _backend()
    memory, whose = _memory(own.memory, backend)
    config, where = find_config(args.model)
    model = read_architecture(config, where)
    run = run_of(args, model)
    planned = plan(model, run, backend)
    others = {flags: plan(model, other, backend) for flags, other in alternatives(run).items()}
    changes = advice(model, run, backend, memory) if planned.peak > memory else []
    if own.json:
        print(json.dumps(_as_json(planned, others, changes, memory, backend, model), indent=1))
    else:
        print(_format(args.model, model, run, backend, planned, others, changes, memory, whose))


def warning(args) -> str | None:
    """One line for ``train`` to say before it begins, if the run is planned to take more than there is; else None."""
    try:
        backend = _backend()
        memory, whose = _memory(None, backend)
        config, where = find_config(args.model)
        model = read_architecture(config, where)
        planned = plan(model, run_of(args, model), backend)
    except InputError:
        return None  # train itself says what is wrong, or it is no model that can be planned
    if planned.peak <= memory:
        return None
    return (
        f"Warning: with rows of --max-seq-length {args.max_seq_length} tokens this run is planned to take "
        f"{_gb(planned.peak)}, and {whose} {_gb(memory)}: `ember-mlx plan` with the same flags says what to change"
    )


def find_config(model: str) -> tuple[dict, str]:
    """The config.json of a model folder, of a file, or of a name on the Hugging Face hub; and where it is from.

    Nothing is downloaded: of a name on the hub, the cache is looked into.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise InputError(f"--model {model}: there is no config.json in it; give a model's folder, or a config.json")
    elif not path.is_file():
        if path.suffix == ".json" or path.is_absolute() or model.count("/") != 1:
            raise InputError(
                f"--model {model}: there is no such file or folder; give a model's folder, or a config.json"
            )
        path = _in_hub_cache(model)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--model {model}: {path.name} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise InputError(f"--model {model}: {path.name} holds no names and values; give the config.json of a model")
    return config | _stored_dtype(path.parent), path.name


def _stored_dtype(folder):
    """The dtype of the weights that lie beside a config.json, as its key: mlx_lm.convert leaves the old one there."""
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    found = Counter()
    for path in sorted(folder.glob("*.safetensors"))[:1]:
        with suppress(OSError, SafetensorError), safe_open(path, "numpy") as weights:
            found.update(weights.get_slice(name).get_dtype() for name in weights.keys())  # noqa: SIM118
    return next(({"torch_dtype": names[dtype]} for dtype, _ in found.most_common() if dtype in names), {})


def _in_hub_cache(name):
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        path = None
    if not isinstance(path, str):  # None, or a mark that the hub has none
        raise InputError(
            f"--model {name}: no such folder, no model of that name in the Hugging Face cache, and planning "
            "downloads nothing: give a model's folder, or its config.json, which its page on the hub has"
        )
    return Path(path)


def _parser():
    parser = argparse.ArgumentParser(
        prog="ember-mlx plan",
        description="Say how much memory `ember-mlx train` with the same flags will take; no weights are needed.",
        epilog="All other flags are those of `ember-mlx train`; --model may be a folder, a config.json or a hub name.",
        allow_abbrev=False,
    )
    parser.add_argument("--memory", help="Plan for a machine with this much, such as 16GB. Default: what this one has.")
    parser.add_argument("--backend", choices=["metal", "cuda", "cpu"], help="Default: the one that MLX uses here.")
    parser.add_argument("--json", action="store_true", help="Print bytes, as JSON.")
    return with_one_line_errors(parser)


def _backend():
    import mlx.core as mx

    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def _memory(asked, backend):
    """Bytes, and whose they are, in words that end a sentence's first half."""
    if asked is not None:
        from mlx_lm.utils import _parse_size

        try:
            memory = _parse_size(asked)
        except (ArithmeticError, KeyError, ValueError):
            memory = 0
        if not LEAST_MEMORY <= memory < math.inf:
            raise InputError(f"--memory {asked}: must be a size of at least 1MB, with its unit: such as 16GB or 512MB")
        if backend == "metal":
            return int(GPU_SHARE_OF_A_MAC * memory), f"of --memory {asked} a Mac's GPU may use about 75 % by default,"
        return int(memory), "--memory is"
    if backend == "cuda":
        import mlx.core as mx

        size = mx.device_info().get("total_memory") if hasattr(mx, "device_info") else None
        if size:
            return int(size), "the GPU has"
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sys.platform == "darwin":
        return int(GPU_SHARE_OF_A_MAC * ram), f"of this Mac's {_gb(ram)} the GPU may use about 75 % by default,"
    return ram, "this machine has"


def _gb(nbytes):
    return f"{nbytes / 1e9:.2f} GB"


def _format(name, model, run, backend, planned, others, changes, memory, whose):
    kinds = "all weights" if run.fine_tune_type == "full" else f"{run.fine_tune_type} in {run.layers} layers"
    unit, size = ("GB", 1e9) if planned.peak >= 1e9 else ("MB", 1e6)
    title = f"in {unit} (1 {unit} = 10^{len(f'{size:.0f}') - 1} bytes)"

    def line(label, *sizes):
        return f"{label:32}" + "".join(f" {'' if nbytes is None else f'{nbytes / size:.3f}':>12}" for nbytes in sizes)

    lines = [
        f"{name}: {model.model_type}, {model.layers} layers, {model.vocabulary:,} tokens",
        f"{kinds}, batches of {run.batch_size} x {run.length} tokens, on {backend}",
        "as if every row filled --max-seq-length; shorter rows take less",
        "",
        f"{title:32}{'at most':>13}{'at the peak':>13}",
    ]
    sizes = {"weights": planned.weights, "gradients": planned.gradients, "optimizer state": planned.optimizer_state}
    for role in ROWS:
        lines.append(line(role, sizes.get(role, planned.most[role]), planned.at_peak[role]))
        if role == "weights":
            lines.append(line("  of which train", planned.trainable))
    lines += [
        line("predicted peak", None, planned.peak),
        "At most: at any one moment of a step. At the peak: when all together are most.",
        "",
        f"{'with the token tables by':32}{'all state':>13}{'peak':>13}",
    ]
    lines += [line(LABELS[flags], other.optimizer_state, other.peak) for flags, other in others.items()]
    lines += ["", _verdict(planned, changes, memory, whose, model.notes)]
    lines += [line(f"  {flags}", None, after.peak) for flags, after in changes]
    if changes and changes[-1][1].peak > memory:
        lines.append("With all of these it still does not fit: a smaller model, or a quantized one, is needed.")
    lines += [f"Note: {note}." for note in model.notes]
    return "\n".join(lines)


def _verdict(planned, changes, memory, whose, notes):
    said = f"{whose[0].upper()}{whose[1:]} {_gb(memory)}"
    if planned.peak <= memory:
        fits = "what is planned fits (see the note)" if notes else "it fits"
        return f"{said}: {fits}, with {_gb(memory - planned.peak)} to spare."
    if not changes:
        return f"{said}: it does not fit, and no change of flags makes it fit."
    return f"{said}: it does not fit. The cheapest changes, each on top of those before, and the new peak:"


def _as_json(planned, others, changes, memory, backend, model):
    return {
        "backend": backend,
        "memory": memory,
        "fits": planned.peak <= memory,
        "planned": _plan_as_json(planned),
        "alternatives": {flags: _plan_as_json(other) for flags, other in others.items()},
        "changes": [{"flags": flags, "peak": after.peak} for flags, after in changes],
        "notes": model.notes,
    }


def _plan_as_json(planned):
    return {
        "weights": planned.weights,
        "trainable": planned.trainable,
        "gradients": planned.gradients,
        "optimizer_state": planned.optimizer_state,
        "at_most": dict(planned.most),
        "at_peak": dict(planned.at_peak),
        "peak": planned.peak,
    }
