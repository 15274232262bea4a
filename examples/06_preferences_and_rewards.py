"""Preferences and rewards: the trainers of mlx-lm-lora, with Ember on the token tables.

    pip install mlx-lm-lora
    python examples/06_preferences_and_rewards.py dpo      (or orpo, or grpo)

Trains the bundled model twice, by LoRA on the layers with AdamW: once with the tables frozen, once with Ember on them.
It prints what was gained on prompts that it did not train on. A method takes half a minute of one CPU core with
OpenBLAS, and up to two minutes with the slow BLAS of MLX's Linux wheel.

dpo, orpo  Asked what a function of Python's library does, prefer its own docstring to that of another function.
grpo       The reward is 1 for an answer of one whole sentence of at most 12 words, otherwise 0.

--out FILE adds the numbers, with machine, versions and seeds, to a JSON file. --seeds 0 1 2 repeats all.
--keep FOLDER writes the adapter with tables, for `ember-mlx generate` and `fuse`.
"""

import argparse
import json
import random
import re
import tempfile
import time
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.optimizers import AdamW
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm_lora.trainer.datasets import DPODataset, ORPODataset
from mlx_lm_lora.trainer.dpo_trainer import DPOTrainingArgs, get_token_scores, iterate_dpo_batches, train_dpo
from mlx_lm_lora.trainer.grpo_trainer import GRPOTrainingArgs, generate_grpo, train_grpo
from mlx_lm_lora.trainer.orpo_trainer import ORPOTrainingArgs, train_orpo

from ember_mlx import Ember, PairedOptimizer, find_token_tables
from ember_mlx.demo import MODEL
from ember_mlx.demo.corpus import finetuning_pairs
from ember_mlx.shared.environment import environment
from ember_mlx.shared.replacing import replaced

STEPS = {"dpo": 30, "orpo": 40, "grpo": 16}
LEARNING_RATE, TABLE_LEARNING_RATE = 1e-3, 1e-3
LORA = {"rank": 8, "scale": 4.0, "dropout": 0.0}
BATCH, LENGTH = 4, {"max_seq_length": 64}
HELD_OUT = 64  # prompts
ANSWER = 20  # tokens, of an answer to be rewarded
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}


def model_and_optimizer(train_tables):
    """The bundled model with LoRA on its layers, and the optimizer of what trains. This is all that Ember asks for."""
    model, tokenizer = load(str(MODEL))
    model.set_dtype(mx.float32)  # a CPU multiplies bfloat16 many times slower
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), LORA)
    rest = AdamW(LEARNING_RATE, bias_correction=True)
    if not train_tables:
        return model, tokenizer, rest
    modules = dict(model.named_modules())
    for table in find_token_tables(model):
        modules[table.module_path].unfreeze(keys=["weight"], recurse=False)
    return model, tokenizer, PairedOptimizer(model, tables=Ember(TABLE_LEARNING_RATE), rest=rest)


def keep(model, folder):
    """Write what trained as an adapter of ember-mlx. mlx-lm's loader refuses tables among the LoRA matrices."""
    weights = dict(tree_flatten(model.trainable_parameters()))
    tables = {table.path: weights.pop(table.path) for table in find_token_tables(model)}
    config = {"fine_tune_type": "lora", "num_layers": len(model.layers), "lora_parameters": LORA}
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"token_tables": [*tables]}))
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    mx.save_safetensors(str(folder / "token_tables.safetensors"), tables)


def short_rows():
    """Rows to train on, and rows to measure on, of at most 12 words: a minute is short."""
    short = [
        [row for row in rows if len(row["completion"].split()) <= 12 and len(row["prompt"]) <= 60]
        for rows in finetuning_pairs(valid=4 * HELD_OUT)
    ]
    return short[0], short[1][:HELD_OUT]


def preferences(rows):
    """Each prompt with its own docstring and that of another function, by a permutation without fixed points."""
    others = rows[1:] + rows[:1]
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
        for row, other in zip(rows, others, strict=True)
    ]


def preferred(model, dataset):
    """Of how many pairs the chosen answer is the likelier one by the mean over its tokens, and by how many nats."""
    margins = []
    for chosen, rejected, *masks in iterate_dpo_batches(dataset, BATCH, LENGTH["max_seq_length"]):
        scores = [
            get_token_scores(model, tokens, mask).sum(-1) / mask[:, 1:].sum(-1)
            for tokens, mask in zip((chosen, rejected), masks, strict=True)
        ]
        margins += (scores[0] - scores[1]).tolist()
    return {"accuracy": float(np.mean(np.array(margins) > 0)), "margin": float(np.mean(margins))}


def one_sentence(prompts, completions, answer, types=None):
    """The reward of each answer: 1 for one sentence, with its full stop, of at most 12 words on one line."""
    whole = re.compile(r"[A-Z][^.!?\n]*[^.!?\s]\.")
    return [float(bool(whole.fullmatch(text)) and len(text.split()) <= 12) for text in completions]


def prompts(rows, tokenizer):
    """Rows as train_grpo takes them: prompt and answer, as tokens and as text."""
    tokens = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=False
        )
        for row in rows
    ]
    return [(prompt, [], row["prompt"], row["completion"]) for prompt, row in zip(tokens, rows, strict=True)]


def rewarded(model, tokenizer, dataset):
    """The mean reward over one sampled answer to each prompt; the same random numbers each time."""
    mx.random.seed(0)
    _, texts, _ = generate_grpo(model, tokenizer, [row[0] for row in dataset], ANSWER, 1, 32, "", **SAMPLING)
    return {"reward": float(np.mean(one_sentence(None, texts, None))), "distinct answers": len(set(texts)) / len(texts)}


def train(method, train_tables, seed, steps, rows, held_out, folder=None):
    """Train once; what was measured on the held-out prompts before and after. The adapter is kept in ``folder``."""
    rows = random.Random(seed).sample(rows, len(rows))
    np.random.seed(seed)
    mx.random.seed(seed)
    model, tokenizer, optimizer = model_and_optimizer(train_tables)
    reference = load(str(MODEL))[0]
    reference.set_dtype(mx.float32)
    reference.freeze()
    if method == "grpo":
        rows, held_out = prompts(rows, tokenizer), prompts(held_out, tokenizer)
        measure = lambda: rewarded(model, tokenizer, held_out)  # noqa: E731
    else:
        dataset = DPODataset if method == "dpo" else ORPODataset
        rows, held_out = (dataset(preferences(each), tokenizer) for each in (rows, held_out))
        measure = lambda: preferred(model, held_out)  # noqa: E731
    before = measure()
    mx.random.seed(seed)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        common = {"batch_size": BATCH, "iters": steps, "steps_per_save": steps + 1} | LENGTH
        common |= {"adapter_file": str(Path(scratch) / "adapters.safetensors")}
        if method == "dpo":
            train_dpo(model, reference, optimizer, rows, args=DPOTrainingArgs(**common))
        elif method == "orpo":
            train_orpo(model, optimizer, rows, args=ORPOTrainingArgs(beta=0.5, **common))
        else:
            own = {"group_size": 4, "beta": 0.02, "max_completion_length": ANSWER} | SAMPLING
            train_grpo(
                model, reference, tokenizer, optimizer, rows, reward_funcs=[one_sentence], end_answer_token="",
                args=GRPOTrainingArgs(**common | own),
            )  # fmt: skip
    seconds = time.process_time() - start
    model.eval()
    if folder:
        keep(model, folder)
    return {"before": before, "after": measure(), "cpu_seconds": seconds}


def without_metal():
    """train_dpo and train_orpo ask for a number that only Apple's GPU has; without one, give them none."""
    if mx.metal.is_available():
        return nullcontext()
    return replaced(mx, "device_info", lambda: {"max_recommended_working_set_size": 0})


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("method", choices=STEPS)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    steps = args.steps or STEPS[args.method]
    arms = {"tables frozen": False, "Ember on the tables": True}
    results = {name: [] for name in arms}
    rows = short_rows()
    for seed in args.seeds:
        for name, train_tables in arms.items():
            with without_metal(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # their reports are long
                folder = args.keep if train_tables and seed == args.seeds[-1] else None
                found = train(args.method, train_tables, seed, steps, *rows, folder)
            results[name].append({"seed": seed} | found)
            gained = [f"{key} {found['before'][key]:.2f} -> {value:.2f}" for key, value in found["after"].items()]
            print(f"{args.method}, {name}, seed {seed}: {', '.join(gained)}", flush=True)
    if args.out:
        report = json.loads(args.out.read_text()) if args.out.exists() else {}
        settings = {"steps": steps, "learning_rate": LEARNING_RATE, "table_learning_rate": TABLE_LEARNING_RATE}
        report[args.method] = {"results": results, "settings": settings} | environment()
        report[args.method]["versions"]["mlx-lm-lora"] = version("mlx-lm-lora")
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
