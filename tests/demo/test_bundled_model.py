"""The model that the package brings: small enough to bring, and a real one."""

import json
import math

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm import load, stream_generate

from ember_mlx import demo
from ember_mlx.demo.corpus import HELD_OUT, finetuning_pairs
from ember_mlx.token_tables import find_token_tables

TEXT = "Return the mean of `data`, a 2-D array.\n\n    x_1 = 3.14  # naïve\n"


@pytest.fixture(scope="module")
def bundled():
    model, tokenizer = load(str(demo.MODEL))
    model.set_dtype(mx.float32)  # bfloat16 products are slow on a CPU
    return model, tokenizer


@pytest.fixture(scope="module")
def pairs():
    return finetuning_pairs()[1]


def test_the_folder_is_small():
    assert sum(file.stat().st_size for file in demo.MODEL.iterdir()) <= 4_000_000


def test_it_is_an_untied_llama_of_about_4096_tokens(bundled):
    model, tokenizer = bundled
    assert [(table.path, table.shape) for table in find_token_tables(model)] == [
        ("model.embed_tokens.weight", (4096, 128)),
        ("lm_head.weight", (4096, 128)),
    ]
    assert not mx.array_equal(model.model.embed_tokens.weight, model.lm_head.weight)
    assert len(tokenizer.get_vocab()) == 4096
    stored = mx.load(str(demo.MODEL / "model.safetensors"))
    assert {weight.dtype for weight in stored.values()} == {mx.bfloat16}


def test_its_loss_on_the_demos_validation_pairs_is_2_nats_under_that_of_guessing(bundled, pairs):
    model, tokenizer = bundled
    total = count = 0
    for pair in pairs[:32]:
        messages = [
            {"role": "user", "content": pair["prompt"]},
            {"role": "assistant", "content": pair["completion"]},
        ]
        tokens = mx.array(tokenizer.apply_chat_template(messages, return_dict=False))[None]
        losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        total, count = total + losses.sum().item(), count + losses.size
    assert total / count < math.log(4096) - 2


def test_the_tokenizer_gives_text_back(bundled):
    _, tokenizer = bundled
    assert tokenizer.decode(tokenizer.encode(TEXT, add_special_tokens=False)) == TEXT
    assert tokenizer.encode(TEXT)[0] == tokenizer.bos_token_id
    assert max(tokenizer.encode(TEXT)) < 4096


def test_the_chat_template_frames_both_turns_and_asks_for_the_answer(bundled):
    _, tokenizer = bundled
    question, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
    whole = tokenizer.apply_chat_template([question, answer], tokenize=False)
    assert whole == "<|begin|><|user|>Why?<|end|><|assistant|>So.<|end|>"
    prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
    assert whole.startswith(prompt)
    assert prompt.endswith("<|assistant|>")
    tokens = tokenizer.apply_chat_template([question, answer], return_dict=False)
    assert tokens[0] == tokenizer.bos_token_id == 1
    assert tokens[-1] == tokenizer.eos_token_id == 2
    assert tokens.count(2) == 2
    assert tokenizer.pad_token_id == 0


def test_most_completions_end(bundled, pairs):
    model, tokenizer = bundled
    ended = 0
    for pair in pairs[:4]:
        messages = [{"role": "user", "content": pair["prompt"]}]
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        *_, last = stream_generate(model, tokenizer, tokens, max_tokens=60)
        ended += last.finish_reason == "stop"
    assert ended >= 2


def test_its_making_is_told():
    made = json.loads((demo.MODEL / "training.json").read_text())
    assert made["validation_loss_nats_per_token"] < made["ln_vocab_size"] - 2
    assert set(made["held_out_for_the_demo"]) == HELD_OUT
    assert all(package["license"] for package in made["text"]["packages"].values())
    weights = mx.load(str(demo.MODEL / "model.safetensors"))
    assert made["parameters"] == sum(weight.size for _, weight in tree_flatten(weights))
