"""Tiny models, tokenizers and data folders for the tests, made on the spot."""

import json
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama
from mlx_lm.utils import quantize_model, save_config, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HIDDEN = 32
LAYERS = 2
SPECIAL = ["<s>", "</s>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def llama_config(tied, layers=LAYERS, vocabulary=260, hidden=HIDDEN):
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "eos_token_id": 1,
    }


def tiny_llama(tied=False, seed=0, **options):
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(llama_config(tied, **options)))
    mx.eval(model.parameters())
    return model


def write_model(folder: Path, tied=False, quantized=False, dtype=mx.float32, **options) -> Path:
    """A folder that mlx_lm.load takes: a tiny Llama over bytes."""
    model, config = tiny_llama(tied, **options), llama_config(tied, **options)
    model.set_dtype(dtype)
    if quantized:
        model, config = quantize_model(model, config, group_size=32, bits=8)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    _write_tokenizer(folder)
    return folder


def write_data(folder: Path, rows=12, kind="completions") -> Path:
    """A data folder of mlx-lm's: train.jsonl and valid.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "valid"):
        lines = []
        for i in range(rows):
            words = f"{name} number {i} is {i * i}"
            row = {"text": words} if kind == "text" else {"prompt": f"{name} {i}", "completion": words}
            lines.append(json.dumps(row))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def loss(model, tokens):
    return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")


def _write_tokenizer(folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def alone(gradients, _):
    """The averages over workers of whom no other is there: how a step of several is taken, without a network."""
    return SimpleNamespace(sums={}, means=dict(gradients))
