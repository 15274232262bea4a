"""The rows of mlx_training_memory.py: what each name stands for, which make up the usual grid, and its JSON files."""

import fnmatch
import json
import re

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# From the config.json of each model on the Hugging Face hub.
MODELS = {
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 40_960,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128_256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": LLAMA_3_ROPE,
        "max_position_embeddings": 131_072,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "max_position_embeddings": 8192,
    },
}
# Only in rows that are named in full: a third architecture, with biases, and two that a CPU trains in seconds.
MORE_MODELS = {
    "mini-qwen3": {
        "model_type": "qwen3",
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "intermediate_size": 768,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 16_384,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 8192,
    },
    "mini-llama": {
        "model_type": "llama",
        "hidden_size": 192,
        "num_hidden_layers": 12,
        "intermediate_size": 512,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 12_288,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e5,
        "max_position_embeddings": 8192,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 32_768,
    },
}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 4096, "head_dim": 16}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}  # of --smoke
TOKENS = ["1x512", "4x1024", "1x2048"]
TABLES = ["ember", "adamw", "frozen", "adafactor", "sgd"]
WITH_CHUNKED_LOSS = ["ember", "adamw", "frozen"]
FIRST = ["qwen3-0.6b/untied/*/1x512/*", "qwen3-0.6b/untied/*/4x1024/*", "*/tied/*/4x1024/ember*", "qwen3-0.6b/*"]
ROW = re.compile(
    rf"(?P<model>{'|'.join(map(re.escape, MODELS | MORE_MODELS))})/(?P<tying>untied|tied)/(?P<type>lora|full)/"
    rf"(?P<batch_size>[1-9]\d*)x(?P<length>[1-9]\d*)/(?P<tables>{'|'.join(TABLES)})(?P<chunked>/chunked)?"
    r"(?P<checkpoint>/checkpoint)?(?P<nearest>/nearest)?(?P<unguarded>/unguarded)?"
)


def all_rows():
    rows = []
    for model in MODELS:
        for tying in ("untied", "tied"):
            for tokens in TOKENS:
                for fine_tune_type in ("lora", "full"):
                    rows += [f"{model}/{tying}/{fine_tune_type}/{tokens}/{tables}" for tables in TABLES]
    rows += [f"{row}/chunked" for row in rows if "1x512" not in row and row.rpartition("/")[2] in WITH_CHUNKED_LOSS]
    rank = {row: next((i for i, first in enumerate(FIRST) if fnmatch.fnmatch(row, first)), len(FIRST)) for row in rows}
    return sorted(rows, key=rank.get)


def asked_rows(patterns):
    """The rows of the grid that fit a pattern, and those outside it that are named in full."""
    grid = all_rows()
    rows = [row for row in grid if any(fnmatch.fnmatch(row, pattern) for pattern in patterns)]
    for pattern in patterns:
        if ROW.fullmatch(pattern) and pattern not in rows:
            rows.append(pattern)
        elif not fnmatch.filter(rows, pattern):
            raise SystemExit(f"--rows {pattern}: no row of the grid, and no name of one in full (see --help)")
    return rows


def config_of(row):
    """The config.json of a row's model."""
    of = ROW.fullmatch(row).groupdict()
    return (MODELS | MORE_MODELS)[of["model"]] | {"tie_word_embeddings": of["tying"] == "tied"}


def words_of(row):
    """The flags of ``ember-mlx train`` that a row stands for."""
    of = ROW.fullmatch(row).groupdict()
    words = ["--optimizer", "adamw", "--fine-tune-type", of["type"], "--num-layers", "-1", "--no-stream"]
    words += ["--train-tables", "none"] if of["tables"] == "frozen" else ["--table-optimizer", of["tables"]]
    words += ["--body-rounding", "nearest"] * bool(of["nearest"])
    return words + ["--chunked-loss"] * bool(of["chunked"]) + ["--grad-checkpoint"] * bool(of["checkpoint"])


def read_report(path):
    """The report of a JSON file; ends the program, saying why, where that is none of mlx_training_memory.py's."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(report, dict) or not all(isinstance(report.get(part), dict) for part in ("machine", "rows")):
        raise SystemExit(f"{path}: must be a file of mlx_training_memory.py: it has no machine and rows by name")
    return report
