"""The rows of streaming_memory.py: what each name stands for, and which belong to which machine."""

import re

import training_memory_rows
from training_memory_rows import MODELS, MORE_MODELS

QWEN3_8B = MODELS["qwen3-0.6b"] | {
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
}
QWEN3_1_7B = MODELS["qwen3-0.6b"] | {"hidden_size": 2048, "intermediate_size": 6144}
# An 8B model scaled down by 16 in width, so that a CPU sees what share of it each part has.
TALL_QWEN3 = MORE_MODELS["mini-qwen3"] | {"num_hidden_layers": 36, "vocab_size": 9496}
SHAPES = MODELS | MORE_MODELS | {"qwen3-1.7b": QWEN3_1_7B, "qwen3-8b": QWEN3_8B, "tall-qwen3": TALL_QWEN3}
TINY = training_memory_rows.TINY | {"num_hidden_layers": 3}
RECIPES = {
    "stateless": ["--fine-tune-type", "full", "--optimizer", "sinkgd"],
    "adamw": ["--fine-tune-type", "full", "--optimizer", "adamw"],
    "adam-mini": ["--fine-tune-type", "full", "--optimizer", "adam-mini"],
    "adam-mini-int8": ["--fine-tune-type", "full", "--optimizer", "adam-mini"],
    "flash-adamw": ["--fine-tune-type", "full", "--optimizer", "flash-adamw"],
    "adamw-everywhere": ["--fine-tune-type", "full", "--optimizer", "adamw", "--table-optimizer", "adamw"],
    "lora": ["--fine-tune-type", "lora", "--optimizer", "adamw"],
    "lora-adamw": ["--fine-tune-type", "lora", "--optimizer", "adamw", "--table-optimizer", "adamw"],
    "adamw-tables": ["--fine-tune-type", "full", "--optimizer", "sinkgd", "--table-optimizer", "adamw"],
}
OPTIMIZER_CONFIG = {"adam-mini-int8": {"adam-mini": {"momentum": "int8"}}}
ADAMW_ALONE = ("adamw-everywhere", "lora-adamw")  # what mlx-lm can do by itself
WAYS = ("streamed", "checkpointed")
WAY = r"(?:streamed(?:@[1-9]\d*)?|checkpointed|ordinary|ordinary-checkpointed)"
ROW = re.compile(
    rf"(?P<model>{'|'.join(map(re.escape, SHAPES))})(?P<tied>/tied)?/(?P<batch_size>[1-9]\d*)x(?P<length>[1-9]\d*)/"
    rf"(?P<recipe>{'|'.join(RECIPES)})/(?P<way>mlx-lm(?:-checkpointed)?|{WAY}(?:\+{WAY})*)(?:/keep(?P<keep_inputs>[1-9]\d*))?"
    r"(?P<float32>/float32)?"
)
ON_A_GPU = [
    f"{case}/{way}"
    for case in (
        "qwen3-0.6b/1x512/stateless",
        "qwen3-8b/1x512/stateless",
        "qwen3-0.6b/1x512/adamw",
        "qwen3-0.6b/1x512/lora",
        "qwen3-0.6b/4x1024/stateless",
        "qwen3-0.6b/1x512/adam-mini-int8",
        "qwen3-0.6b/1x512/flash-adamw",
    )
    for way in WAYS
] + [f"{case}/stateless/streamed+checkpointed" for case in ("qwen3-0.6b/1x512", "qwen3-8b/1x512", "qwen3-0.6b/4x1024")]
# The table of recipes, the most telling first, so that a run that is cut off has these. Where a GPU takes one row after
# another, neighbours compile different kernels.
TABLE_OF_RECIPES = [
    "qwen3-0.6b/1x512/adamw-everywhere/mlx-lm",
    "qwen3-0.6b/1x512/stateless/streamed",
    "qwen3-0.6b/1x512/adamw-everywhere/ordinary",
    "qwen3-0.6b/1x512/adamw/streamed",
    "qwen3-0.6b/1x512/adam-mini-int8/streamed",
    "qwen3-8b/1x512/stateless/streamed",
    "qwen3-0.6b/1x512/flash-adamw/streamed",
    "qwen3-0.6b/1x512/lora-adamw/mlx-lm",
    "qwen3-0.6b/1x512/lora/streamed",
    "qwen3-1.7b/tied/1x512/adamw-everywhere/mlx-lm",
    "qwen3-1.7b/tied/1x512/stateless/streamed",
    "llama-3.2-1b/tied/1x512/adamw-everywhere/mlx-lm",
    "llama-3.2-1b/tied/1x512/stateless/streamed",
    "qwen3-8b/1x512/adam-mini-int8/streamed",
    "qwen3-8b/1x512/lora/streamed",
    "qwen3-0.6b/1x512/adamw/ordinary",
    "qwen3-0.6b/1x512/stateless/ordinary",
    "qwen3-0.6b/1x512/adam-mini-int8/ordinary",
    "qwen3-0.6b/1x512/flash-adamw/ordinary",
    "qwen3-0.6b/1x512/lora/ordinary",
    "qwen3-0.6b/1x512/lora-adamw/ordinary",
    "qwen3-8b/1x512/stateless/ordinary-checkpointed",
    "qwen3-8b/1x512/adamw/streamed",
    "qwen3-8b/1x512/flash-adamw/streamed",
    "qwen3-0.6b/1x512/stateless/ordinary-checkpointed",
    "qwen3-8b/1x512/lora-adamw/mlx-lm",
    "qwen3-8b/1x512/adamw-everywhere/mlx-lm",
    "qwen3-0.6b/4x1024/stateless/streamed",
    "qwen3-0.6b/4x1024/stateless/ordinary-checkpointed",
    "qwen3-0.6b/4x1024/adamw-everywhere/mlx-lm",
    "qwen3-0.6b/4x1024/adamw-everywhere/mlx-lm-checkpointed",
    "qwen3-0.6b/1x4096/stateless/streamed",
    "qwen3-0.6b/1x4096/stateless/ordinary-checkpointed",
    "qwen3-0.6b/1x4096/adamw-everywhere/mlx-lm-checkpointed",
    "llama-3.2-1b/tied/1x512/adam-mini-int8/streamed",
    "qwen3-1.7b/tied/1x512/adam-mini-int8/streamed",
    "llama-3.2-1b/tied/1x512/adamw-everywhere/ordinary",
    "qwen3-1.7b/tied/1x512/adamw-everywhere/ordinary",
    "llama-3.2-1b/tied/1x512/flash-adamw/streamed",
    "qwen3-1.7b/tied/1x512/flash-adamw/streamed",
    "llama-3.2-1b/tied/1x512/adamw/streamed",
    "qwen3-1.7b/tied/1x512/adamw/streamed",
    "llama-3.2-1b/tied/1x512/stateless/ordinary",
    "qwen3-1.7b/tied/1x512/stateless/ordinary",
    "qwen3-8b/1x512/adamw/ordinary-checkpointed",
    "qwen3-8b/1x512/flash-adamw/ordinary-checkpointed",
    "qwen3-8b/1x512/adam-mini-int8/ordinary-checkpointed",
    "qwen3-8b/1x512/lora/ordinary-checkpointed",
    "qwen3-8b/4x1024/stateless/streamed",
    "qwen3-8b/1x4096/stateless/streamed",
    "qwen3-0.6b/4x1024/adam-mini-int8/streamed",
    "qwen3-0.6b/4x1024/adamw/streamed",
    "qwen3-0.6b/4x1024/flash-adamw/streamed",
    "qwen3-0.6b/1x4096/adam-mini-int8/streamed",
    "qwen3-0.6b/4x1024/lora/streamed",
    "qwen3-0.6b/4x1024/lora-adamw/mlx-lm",
    "llama-3.2-1b/tied/1x512/lora/streamed",
    "llama-3.2-1b/tied/1x512/lora-adamw/mlx-lm",
    "qwen3-1.7b/tied/1x512/lora/streamed",
    "qwen3-1.7b/tied/1x512/lora-adamw/mlx-lm",
    "qwen3-0.6b/tied/1x512/stateless/streamed",
    "qwen3-0.6b/tied/1x512/adamw-everywhere/mlx-lm",
    "qwen3-0.6b/tied/1x512/adamw-everywhere/ordinary",
    "qwen3-0.6b/tied/1x512/adam-mini-int8/streamed",
    "qwen3-0.6b/tied/1x512/stateless/ordinary",
    "llama-3.2-1b/tied/4x1024/stateless/streamed",
    "qwen3-1.7b/tied/4x1024/stateless/streamed",
    "llama-3.2-1b/tied/4x1024/adamw-everywhere/mlx-lm-checkpointed",
    "qwen3-1.7b/tied/4x1024/adamw-everywhere/mlx-lm-checkpointed",
    "llama-3.2-1b/tied/1x512/adam-mini-int8/ordinary",
    "qwen3-1.7b/tied/1x512/adam-mini-int8/ordinary",
    "llama-3.2-1b/tied/1x512/flash-adamw/ordinary",
    "qwen3-1.7b/tied/1x512/flash-adamw/ordinary",
    "llama-3.2-1b/1x512/stateless/streamed",
    "qwen3-1.7b/1x512/stateless/streamed",
]
ON_A_CPU = [  # bfloat16 products are slow there
    "mini-qwen3/1x128/stateless/streamed",
    "mini-qwen3/1x128/adamw/streamed",
    "mini-qwen3/1x128/lora/streamed",
    "mini-llama/tied/1x128/adam-mini/streamed",
    "mini-qwen3/1x512/stateless/streamed/float32",
    "mini-qwen3/1x512/adamw/streamed/float32",
    "mini-qwen3/1x512/adam-mini/streamed/float32",
    "mini-qwen3/1x512/lora/streamed/float32",
    "mini-qwen3/1x128/adamw-tables/streamed/float32",
    "mini-qwen3/4x1024/stateless/streamed/float32",
    "mini-qwen3/tied/1x512/stateless/streamed/float32",
    "mini-llama/tied/1x256/adamw/streamed/float32",
    "mini-llama/1x1024/stateless/streamed/float32",
    "mini-llama/1x1024/stateless/streamed/keep4/float32",
    "mini-llama/tied/4x256/lora/streamed/float32",
    "tall-qwen3/1x32/stateless/streamed/float32",
    "tall-qwen3/1x256/adamw/streamed/float32",
    "tall-qwen3/1x1024/stateless/streamed/keep6/float32",
]


def parts_of(row: str) -> dict:
    """What the name of a row says."""
    of = ROW.fullmatch(row).groupdict()
    numbers = {name: int(of[name] or 1) for name in ("batch_size", "length", "keep_inputs")}
    return of | numbers


def config_of(row: str) -> dict:
    """The config.json of a row's model."""
    of = parts_of(row)
    dtype = "float32" if of["float32"] else "bfloat16"
    return SHAPES[of["model"]] | {"tie_word_embeddings": bool(of["tied"]), "torch_dtype": dtype}


def words_of(row: str) -> list[str]:
    """The flags of ``ember-mlx train`` that a row stands for, but for how it is stepped."""
    of = parts_of(row)
    # Of each row of --max-seq-length tokens, the last is only predicted.
    sizes = ["--batch-size", str(of["batch_size"]), "--max-seq-length", str(of["length"] + 1), "--num-layers", "-1"]
    return [*RECIPES[of["recipe"]], *sizes]


def optimizer_config_of(row: str) -> dict:
    """The YAML key of the same name."""
    return OPTIMIZER_CONFIG.get(parts_of(row)["recipe"], {"sinkgd": {"passes": 2}})


def streaming_words_of(row: str) -> list[str]:
    """Those that say how it is stepped."""
    of = parts_of(row)
    if of["way"] in ("ordinary", "mlx-lm"):
        return ["--no-stream"]
    if of["way"].endswith("checkpointed"):
        return ["--grad-checkpoint", "--no-stream"]
    return ["--stream", "--keep-inputs", str(of["keep_inputs"])]
