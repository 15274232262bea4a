"""Reinforcement learning: GRPO of mlx-lm-lora with Ember on the token tables, against AdamW on them.

    pip install mlx-lm-lora
    R=examples/benchmarks/quality/results/grpo/tinystories-656k.jsonl
    python examples/benchmarks/quality/grpo.py ../shared/models/tinystories-656k --out $R
    python examples/benchmarks/quality/grpo.py --table $R

A model of 0.7 M weights continues the beginning of a story by 16 tokens; the reward, which can be checked, is how many
of 24 words with a b it says, over 8. (Paid for any word that begins with b, it soon says nonsense.) Everything is
trained, with the settings of the package: a KL penalty of 0.1 against the model at the start, temperature 0.8, top-p
0.95, top-k 20. What is measured is the reward on prompts that were not trained on.

``adamw-everywhere`` is AdamW at one learning rate, as the package has it. ``adamw`` and ``ember`` are AdamW on the body
at that best rate and AdamW or Ember on the tables at a rate of their own. ``sinkgd`` is SinkGD, which has no state, on
the body at a rate of its own, and Ember on the tables at its best rate. All rates are tuned by half decades, by the
mean of two seeds, until the best has a worse one on either side (of the tables and of SinkGD, five rates at least). The
reported runs have other seeds. A run that is in ``--out`` is not done again.
"""

import argparse
import contextlib
import json
import os
import time
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from string import punctuation as PUNCTUATION

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from plan import best_rate
from reported import Reported, paired

from ember_mlx import Ember, PairedOptimizer, SinkGD

STEPS, PROMPTS, GROUP, LENGTH = 20, 8, 4, 16  # of a run; a step's prompts, completions of each, their tokens
EVALUATION_SAMPLES = 12  # of every held-out prompt
TUNING_SEEDS, REPORTED_SEEDS = (0, 4), (1, 2, 3, 5, 6, 7)
B_WORDS = frozenset(
    ("ball", "bark", "bear", "bed", "bee", "bell", "bench", "big", "bike", "bird", "black", "blue", "boat", "book",
     "bow", "box", "boy", "bread", "brother", "brown", "bug", "bunny", "bus", "butterfly")
)  # fmt: skip
# name -> the learning rate to try first, as a power of sqrt(10); the first is tuned first and gives the body's
OPTIMIZERS = {"adamw-everywhere": -5, "adamw": -5, "ember": -5, "sinkgd": -5}
WORDS = {
    "adamw-everywhere": "AdamW on everything, one rate",
    "adamw": "AdamW, tables at their own rate",
    "ember": "AdamW, Ember on the tables",
    "sinkgd": "SinkGD, Ember on the tables",
}


def reward_b_words(prompts, completions, answer, types=None):
    """How many different words of the list each completion says, over 8; once is enough, and nonsense does not pay."""
    words = ({word.strip(PUNCTUATION) for word in text.lower().split()} for text in completions)
    return [len(said & B_WORDS) / 8 for said in words]


def prompts():
    """Beginnings of stories: those to train on, and those held out."""
    heroes = ("girl named Lily", "boy named Tim", "dog named Max", "cat named Lucy", "boy named Ben", "girl named Mia")
    times = (
        "One day,",
        "Every day,",
        "In the park,",
        "It was a sunny day.",
        "It was cold and dark.",
        "On the way home,",
    )
    beginnings = [f"Once upon a time, there was a little {hero}. {time}" for hero, time in product(heroes, times)]
    return beginnings[:-12], beginnings[-12:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of a model for mlx-lm")
    parser.add_argument("--out", type=Path, help="JSON lines are added to this file")
    parser.add_argument("--table", type=Path, help="print the table of such a file, and do nothing else")
    args = parser.parse_args()
    if args.table:
        print(table_of(read(args.table)))
        return
    if not args.model or not args.out:
        parser.error("MODEL and --out are needed, or --table FILE")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    while runs := wanted(read(args.out), Path(args.model).name):
        line = train(args.model, runs[0])
        with args.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(runs[0], f"reward {line['reward_before']:.4f} -> {line['reward']:.4f}, {line['seconds']} s", flush=True)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wanted(lines, model):
    """Runs that are not in ``lines`` and can be done now: the search for the rates, then the other seeds."""
    rewards = {tuple(line["run"].values()): line["reward"] for line in lines}
    tuning, reported, best = [], [], {}
    for optimizer, guess in OPTIMIZERS.items():
        other = best.get("ember" if optimizer == "sinkgd" else "adamw-everywhere")

        def runs(rate, seeds, optimizer=optimizer, other=other):
            return [(model, optimizer, rate, other, seed) for seed in seeds]

        rates = {run[2] for run in rewards if run in runs(run[2], TUNING_SEEDS)}
        found = {rate: [rewards[run] for run in runs(rate, TUNING_SEEDS) if run in rewards] for rate in rates}
        losses = {rate: -mean(values) for rate, values in found.items() if len(values) == len(TUNING_SEEDS)}
        best[optimizer], missing = best_rate(losses, guess, finely=False)
        if other is not None and best[optimizer] is not None:  # rewards are noisy: five rates at least
            missing = [rate for rate in range(guess - 2, guess + 3) if rate not in losses]
            best[optimizer] = None if missing else best[optimizer]
        if best[optimizer] is None:
            tuning += [run for rate in missing for run in runs(rate, TUNING_SEEDS)]
            break
        reported += runs(best[optimizer], REPORTED_SEEDS)
    return [dict(zip(_names(run[1]), run, strict=True)) for run in (*tuning, *reported) if run not in rewards]


def _names(optimizer):
    """What the numbers of a run are: "rate" is the one that is tuned."""
    return "model", "optimizer", "rate", "table_rate" if optimizer == "sinkgd" else "body_rate", "seed"


def optimizer_of(model, run):
    def adamw(rate):
        return optim.AdamW(10 ** (rate / 2), weight_decay=0.0, bias_correction=True)

    if run["optimizer"] == "adamw-everywhere":
        return adamw(run["rate"])
    if run["optimizer"] == "sinkgd":
        body = SinkGD(10 ** (run["rate"] / 2), weight_decay=0.0)
        return PairedOptimizer(model, tables=Ember(10 ** (run["table_rate"] / 2)), rest=body)
    tables = Ember(10 ** (run["rate"] / 2)) if run["optimizer"] == "ember" else adamw(run["rate"])
    return PairedOptimizer(model, tables=tables, rest=adamw(run["body_rate"]))


class Curve:
    """Takes down the reward that the package reports while it trains."""

    def __init__(self):
        self.rewards = []

    def on_train_loss_report(self, report):
        self.rewards.append(round(report["train_total_rewards_mean"], 4))


def train(folder, run):
    """Train one run; what is to be kept of it, as JSON."""
    from mlx_lm import load
    from mlx_lm_lora._version import __version__
    from mlx_lm_lora.trainer.grpo_trainer import GRPOTrainingArgs, generate_grpo, train_grpo

    start = time.perf_counter()
    (model, tokenizer), (reference, _) = load(folder), load(folder)
    model.unfreeze()
    tokens = [[(tokenizer.encode(prompt), [], prompt, "") for prompt in part] for part in prompts()]
    how = GRPOTrainingArgs(
        iters=STEPS, batch_size=PROMPTS, group_size=GROUP, max_completion_length=LENGTH, steps_per_report=5,
        steps_per_save=STEPS + 1, adapter_file=os.devnull, epsilon_high=None,
    )  # fmt: skip

    def evaluate():
        mx.random.seed(1000)
        held_out = [prompt for prompt, *_ in tokens[1]]
        _, texts, _ = generate_grpo(
            model, tokenizer, held_out, LENGTH, EVALUATION_SAMPLES, 64, "",
            how.temperature, how.top_p, how.top_k, how.min_p,
        )  # fmt: skip
        return round(mean(reward_b_words(None, texts, None)), 5), texts[:2]

    before, _ = evaluate()
    mx.random.seed(run["seed"])
    np.random.seed(run["seed"])  # the package draws the order of the prompts from it
    curve = Curve()
    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        train_grpo(
            model, reference, tokenizer, optimizer_of(model, run), tokens[0], reward_funcs=[reward_b_words], args=how,
            training_callback=curve, end_answer_token="",
        )  # fmt: skip
    after, examples = evaluate()
    return {
        "run": run, "reward_before": before, "reward": after, "rewards": curve.rewards, "examples": examples,
        "steps": STEPS, "seconds": round(time.perf_counter() - start, 1), "mlx": mx.__version__,
        "mlx_lm_lora": __version__,
    }  # fmt: skip


def table_of(lines):
    """A markdown table: the reward on held-out prompts over the reported seeds, and its paired distance to AdamW's."""
    rows = [
        "| model | trained by | reward before | after | minus AdamW | runs | learning rate |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model in sorted({line["run"]["model"] for line in lines}):
        adamw = _reported(lines, model, "adamw-everywhere")
        for optimizer, words in WORDS.items():
            mine = _reported(lines, model, optimizer)
            if not mine.by_seed:
                continue
            rewards = [line["reward"] for line in mine.by_seed.values()]
            spread = f" ± {stdev(rewards):.3f}" if len(rewards) > 1 else ""
            difference, half, _ = paired(mine, adamw, lambda line: line["reward"])
            apart = f"{difference:+.3f} ± {half:.3f}" if difference else ""
            first = next(iter(mine.by_seed.values()))
            rows.append(
                f"| {model} | {words} | {first['reward_before']:.3f} | {mean(rewards):.3f}{spread} | {apart} "
                f"| {len(rewards)} | {10 ** (first['run']['rate'] / 2):.2g} |"
            )
    return "\n".join(rows)


def _reported(lines, model, optimizer):
    mine = (line for line in lines if (line["run"]["model"], line["run"]["optimizer"]) == (model, optimizer))
    return Reported(None, {line["run"]["seed"]: line for line in mine if line["run"]["seed"] in REPORTED_SEEDS})


if __name__ == "__main__":
    main()
