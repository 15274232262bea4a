"""``ember-mlx demo``: a whole fine-tune with nothing to download, on the bundled model and Python's own library."""

import argparse
import json
import shlex
import tempfile
import time
from contextlib import chdir
from pathlib import Path

import mlx.core as mx
from mlx_lm import generate
from mlx_lm.utils import save

from ember_mlx.demo import MODEL
from ember_mlx.demo.corpus import finetuning_pairs
from ember_mlx.finetune import options
from ember_mlx.finetune.adapters import load
from ember_mlx.finetune.base_models import load_base
from ember_mlx.finetune.run import run
from ember_mlx.shared.command_line import describe
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.text_tables import text_table
from ember_mlx.shared.units import format_bytes

__all__ = ["demo", "main"]

HELP = {
    "what is kept": {
        "keep": ("FOLDER", "Keep data, model and both adapters in this new folder. Default: keep nothing."),
    }
}
EPILOG = """\
examples:
  ember-mlx demo
      nothing to download, and nothing left behind
  ember-mlx demo --keep kept
      then: ember-mlx generate --model kept/model --adapter-path kept/Ember --prompt "json.dumps" """
TABLE_RATES = {"Ember": 1.5e-3, "AdamW": 5e-4}  # Ember's row floor of 3 lets an average row step a third as far
EXAMPLES = 3  # validation rows that are shown with the model's answers: the first ones, not the best
SETTINGS = {
    "--iters": 40,
    "--batch-size": 4,
    "--learning-rate": 5e-4,
    "--val-batches": -1,
    "--steps-per-eval": 1000,
    "--max-seq-length": 128,
    "--seed": 0,
}


def main(arguments: list[str]) -> None:
    """Fine-tune the bundled model twice, with Ember and with AdamW on its tables, and print both beside each other."""
    parser = argparse.ArgumentParser(
        prog="ember-mlx demo",
        description="Fine-tune the bundled model on docstrings of Python's own library, once with Ember on the token "
        "tables and once with AdamW. The layers train by LoRA. Takes about two minutes on two CPU cores.",
        epilog=EPILOG,
    )
    parser.add_argument("--keep")
    keep = describe(parser, HELP).parse_args(arguments).keep
    if keep is None:
        # From within: it prints what it writes, and a path that is soon gone would send somebody there.
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            demo(Path())
        print("Nothing is kept; --keep FOLDER keeps data, model and both adapters.")
    elif Path(keep).exists():
        raise InputError(f"--keep {keep}: folder already exists; choose a new one")
    else:
        demo(Path(keep))
        model, data, *adapters = (shlex.quote(str(Path(keep, name))) for name in ("model", "data", "Ember", "AdamW"))
        print(f"Kept: --model {model}, --data {data}, --adapter-path {' or '.join(adapters)}")


def demo(folder: Path) -> None:
    """Write data, model and both adapters to ``folder``, and print the comparison."""
    start = time.perf_counter()
    examples = _write_data(folder / "data")
    model, tokenizer, config = load_base(MODEL)
    model.set_dtype(mx.float32)  # a CPU multiplies bfloat16 many times slower
    save(folder / "model", MODEL, model, tokenizer, config, donate_model=False)
    completions = {"before": _complete(model, tokenizer, examples)}
    results = {}
    for name in ("Ember", "AdamW"):
        print(f"\n=== {name} on the token tables ===\n", flush=True)
        results[name] = run(options.parse(_train_options(folder, name)))
        model, tokenizer = load(folder / "model", adapter_path=folder / name)
        completions[f"after, {name}"] = _complete(model, tokenizer, examples)
    print(_format(results, examples, completions))
    print(f"{time.perf_counter() - start:.0f} s in all.")


def _write_data(folder):
    folder.mkdir(parents=True)
    train, valid = finetuning_pairs()
    for name, pairs in (("train", train), ("valid", valid)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return valid[:EXAMPLES]


def _train_options(folder, name):
    paths = {"--model": folder / "model", "--data": folder / "data", "--adapter-path": folder / name}
    words = [str(word) for pair in (paths | SETTINGS).items() for word in pair]
    # The rate is one for Adam with bias correction: without, 40 steps end at 2.9 nats in place of 2.2.
    # It validates at both ends alone, so the best adapter is the last.
    words += ["--table-optimizer", name, "--table-learning-rate", str(TABLE_RATES[name])]
    return [*words, "--bias-correction", "--no-keep-best"]


def _complete(model, tokenizer, examples):
    """The model's answer to each prompt, at most 40 tokens, on one line."""
    texts = []
    for example in examples:
        messages = [{"role": "user", "content": example["prompt"]}]
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        texts.append(" ".join(generate(model, tokenizer, tokens, max_tokens=40).split()))
    return texts


def _format(results, examples, completions):
    rows = [
        ("learning rate of the tables", *(f"{TABLE_RATES[name]:g}" for name in results)),
        ("validation loss before", *(f"{result.loss_before:.3f}" for result in results.values())),
        ("validation loss after", *(f"{result.loss_after:.3f}" for result in results.values())),
        ("optimizer state of the tables", *(format_bytes(result.table_state_bytes) for result in results.values())),
        ("peak memory", *(format_bytes(result.peak_memory) for result in results.values())),
    ]
    header = ("", *(f"{name} on the tables" for name in results))
    lines = ["", text_table(header, rows, right=(1, 2)), ""]
    for i, example in enumerate(examples):
        shown = {"prompt": example["prompt"], "in the library": example["completion"]}
        shown |= {name: texts[i] for name, texts in completions.items()}
        lines += [*(f"{name:<16}{text}" for name, text in shown.items()), ""]
    lines.append("So small a model, of 1.6 M weights, goes in circles now and then.\n")
    return "\n".join(lines)
