"""Peak memory and step time of mlx-lm's own training loop, for the shapes of real models with random weights.

    python examples/benchmarks/mlx_training_memory.py --out RESULT.json --rows 'qwen3-0.6b/untied/*/1x512/*'
    python examples/benchmarks/mlx_training_memory.py --draw docs --out RESULT.json

A row is model/tying/type/batch x tokens/optimizer of the tables, then /chunked with `--chunked-loss` and /checkpoint
with `--grad-checkpoint`: `--list` names those of the usual grid, the most telling first; any other that is named in
full runs too. The weights are bfloat16, the body is trained by AdamW, LoRA stands in all layers. Each row is a fresh
process; its peak is that of all its steps, its time the median after the warm-up. The JSON file is written after each
row, and rows that it has already are not run again. On a CPU say `--smoke`: tiny shapes.

For memory alone, say `--fast` (two steps, no times) and `--jobs 4` (rows side by side; each counts its own memory).
"""

import argparse
import contextlib
import fnmatch
import io
import json
import re
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from benchmarking import SEED, in_fresh_process, machine, write
from training_memory_pictures import draw

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
# Only in rows that are named in full: a third architecture, with biases.
MORE_MODELS = {
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
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = ["1x512", "4x1024", "1x2048"]
TABLES = ["ember", "adamw", "frozen", "adafactor", "sgd"]
WITH_CHUNKED_LOSS = ["ember", "adamw", "frozen"]
FIRST = ["qwen3-0.6b/untied/*/1x512/*", "qwen3-0.6b/untied/*/4x1024/*", "*/tied/*/4x1024/ember*", "qwen3-0.6b/*"]
WARM_UP = 2
ROW = re.compile(
    rf"(?P<model>{'|'.join(map(re.escape, MODELS | MORE_MODELS))})/(?P<tying>untied|tied)/(?P<type>lora|full)/"
    rf"(?P<batch_size>[1-9]\d*)x(?P<length>[1-9]\d*)/(?P<tables>{'|'.join(TABLES)})(?P<chunked>/chunked)?"
    r"(?P<checkpoint>/checkpoint)?"
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


class SameBatch:
    """In the place of mlx-lm's ``iterate_batches``: one batch again and again; between two steps the loop asks here."""

    def __init__(self, batch, lengths):
        self.batch = batch
        self.lengths = lengths
        self.asked_at = []
        self.peak_memory = 0

    def __call__(self, dataset, batch_size, max_seq_length, **options):
        import mlx.core as mx

        while True:
            self.asked_at.append(time.perf_counter())
            self.peak_memory = mx.get_peak_memory()
            yield self.batch, self.lengths

    def seconds(self):
        return [after - before for before, after in zip(self.asked_at, self.asked_at[1:], strict=False)]


def config_of(row):
    """The config.json of a row's model."""
    of = ROW.fullmatch(row).groupdict()
    return (MODELS | MORE_MODELS)[of["model"]] | {"tie_word_embeddings": of["tying"] == "tied"}


def words_of(row):
    """The flags of ``ember-mlx train`` that a row stands for."""
    of = ROW.fullmatch(row).groupdict()
    words = ["--optimizer", "adamw", "--fine-tune-type", of["type"], "--num-layers", "-1"]
    words += ["--train-tables", "none"] if of["tables"] == "frozen" else ["--table-optimizer", of["tables"]]
    return words + ["--chunked-loss"] * bool(of["chunked"]) + ["--grad-checkpoint"] * bool(of["checkpoint"])


def measure(row, warm_up, steps, smoke):
    """Train a few steps with mlx-lm's ``train``, set up as ``ember-mlx train`` does it.

    The time is the median of ``steps`` after the first ``warm_up``, or None for no warm-up.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.utils import _get_classes

    from ember_mlx.finetune import options
    from ember_mlx.finetune.build_optimizer import build_optimizer
    from ember_mlx.finetune.run import choose_loss
    from ember_mlx.finetune.trainable import choose_tables, make_trainable

    of = ROW.fullmatch(row).groupdict()
    batch_size, length = int(of["batch_size"]), int(of["length"])
    length = max(length // 16, 1) if smoke else length
    args = options.parse(words_of(row))

    mx.random.seed(SEED)
    config = config_of(row) | (TINY if smoke else {})
    model_class, arguments_class = _get_classes(config)
    model = model_class(arguments_class.from_dict(config))
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    tables = choose_tables(model, args.train_tables, dequantize=False)
    make_trainable(model, args, tables)
    optimizer = build_optimizer(model, args, tables)
    loss = choose_loss(args, model)
    batch = mx.random.randint(0, config["vocab_size"], (batch_size, length + 1))
    batches = SameBatch(batch, mx.array([[0, length]] * batch_size))
    mx.eval(model.parameters(), optimizer.state, batch)

    sizes = {
        "weights": sum(array.nbytes for _, array in tree_flatten(model.parameters())),
        "gradients": sum(array.nbytes for _, array in tree_flatten(model.trainable_parameters())),
        "optimizer_state": sum(array.nbytes for _, array in tree_flatten(optimizer.state) if array.ndim),
        "logits": batch_size * length * config["vocab_size"] * mx.bfloat16.size,
    }
    losses = []

    class Callback:
        def on_train_loss_report(self, report):
            losses.append(report["train_loss"])

    mx.clear_cache()
    mx.reset_peak_memory()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train(
            model=model,
            optimizer=optimizer,
            train_dataset=None,
            # One more step than is measured: after the last, the loop does not ask for a batch.
            args=TrainingArgs(
                iters=warm_up + steps + 1,
                steps_per_report=1,
                adapter_file=f"{folder}/weights.safetensors",
                grad_checkpoint=args.grad_checkpoint,
            ),
            loss=loss,
            iterate_batches=batches,
            training_callback=Callback(),
        )
    return {
        "peak_memory": batches.peak_memory,
        "seconds": round(statistics.median(batches.seconds()[warm_up:]), 4) if warm_up else None,
        "bytes": sizes,
        "losses": [round(value, 4) for value in losses],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write, and to draw from")
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="PATTERN", help="such as 'smollm2-135m/*/chunked'")
    parser.add_argument("--list", action="store_true", help="name the rows and end")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--fast", action="store_true", help="memory alone: two steps, no times")
    parser.add_argument("--jobs", type=int, default=1, help="with --fast: how many rows to run side by side")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to try this script where there is no GPU")
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="draw the pictures from --out and end")
    args = parser.parse_args()
    if args.jobs < 1 or (args.jobs > 1 and not args.fast):
        raise SystemExit(f"--jobs {args.jobs}: must be 1, or more with --fast: side by side, times mean nothing")
    rows = asked_rows(args.rows)
    if args.list:
        print("\n".join(rows))
        return
    report = json.loads(args.out.read_text()) if args.out.exists() else {"rows": {}}
    if args.draw:
        draw(report, args.draw)
        return
    warm_up, steps = (0, 2) if args.fast else (WARM_UP, args.steps)
    report["machine"] = in_fresh_process(machine) | {"steps": steps, "smoke": args.smoke}
    rows = [row for row in rows if "peak_memory" not in report["rows"].get(row, {})]
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(in_fresh_process, measure, row, warm_up, steps, args.smoke): row for row in rows}
        for done in as_completed(running):
            row, result = running[done], done.result()
            report["rows"][row] = result
            write(args.out, report)
            print(f"{row:48} {_said(result)}", flush=True)


def _said(result):
    if "error" in result:
        return result["error"]
    time_of_step = f" {result['seconds'] * 1e3:9.1f} ms a step" if result["seconds"] else ""
    return f"{result['peak_memory'] / 1e9:8.3f} GB{time_of_step}"


if __name__ == "__main__":
    main()
