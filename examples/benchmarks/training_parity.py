"""The same Llama, batches and optimizers in MLX and in PyTorch: is it the same training?

    python examples/benchmarks/training_parity.py --out RESULT.json
    python examples/benchmarks/training_parity.py --out RESULT.json --mlx-device gpu --torch-device cuda
    python examples/benchmarks/plot_training_parity.py RESULT.json PICTURE.png

mlx-lm's Llama and transformers' load one folder in float32 and train all of it: Ember on the token tables, AdamW on the
body, under warm-up and cosine, everything from the framework's own hand. Exit 1 if a loss differs by more than 1e-3.
Three kinds of runs beside the two show what a difference means:

- neighbours: a framework against itself, from weights that are each moved to the next float32, up or down. That is what
  one rounding error grows to.
- exact sums: what MLX rounds most, mended. On a CPU it adds up a row of the softmax in one float32 number, which
  drifts by 1e-6 to 1e-5 (here: in blocks of 64); and the bias correction of its Adam is off by 1e-5.
- wrong twins: one hyperparameter is not the same.
"""

import argparse
import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from training_parity_twins import (
    BETAS,
    EPS,
    load_both,
    make_batches,
    to_neighbouring_floats,
    train_mlx,
    train_torch,
)

from ember_mlx.demo import MODEL
from ember_mlx.shared.environment import environment

ALLOWED = 1e-3  # of the loss, in nats a token
BESIDE = ("mlx, neighbours", "torch, neighbours", "mlx, exact sums",
          "torch, Ember beta2 0.99", "mlx, AdamW bias uncorrected")  # fmt: skip


def main(arguments=None):
    args = parse(arguments)
    os.environ["MLX_ENABLE_TF32"] = "0"  # MLX reads it at its first product
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    mx.set_default_device(getattr(mx, args.mlx_device))
    batches = make_batches(args)
    mlx_model, torch_model, start, logit_difference = load_both(args, batches[0, :, :-1])
    neighbours = to_neighbouring_floats(start, args.seed)

    in_mlx = partial(train_mlx, mlx_model, batches=batches, args=args)
    in_torch = partial(train_torch, torch_model, batches=batches, args=args)
    trainings = {
        "mlx": partial(in_mlx, start),
        "torch": partial(in_torch, start),
        "mlx, neighbours": partial(in_mlx, neighbours),
        "torch, neighbours": partial(in_torch, neighbours),
        "mlx, exact sums": partial(in_mlx, start, exact=True),
        "torch, Ember beta2 0.99": partial(in_torch, start, table_beta2=0.99),
        "mlx, AdamW bias uncorrected": partial(in_mlx, start, bias_correction=False),
    }
    runs = {}
    for name in ("mlx", "torch", *args.beside):
        runs[name] = trainings[name]()
        print(f"{name}: {runs[name].seconds:.1f} s", flush=True)
    against = {name: name.split(",")[0] for name in runs} | {"mlx": "torch", "mlx, exact sums": "torch"}
    comparisons = {f"{name} | {against[name]}": compare(runs[name], runs[against[name]], start)
                   for name in runs if name != "torch"}  # fmt: skip
    sizes = {name: list(weight.shape) for name, weight in start.items() if name in runs["mlx"].moments}
    report = {
        **environment(),
        "preloaded": Path(os.environ.get("LD_PRELOAD", "")).name or None,  # MLX on a CPU takes its products from there
        "options": {name: value for name, value in vars(args).items() if name not in ("out", "beside")}
        | {"model": args.model.name, "betas": BETAS, "eps": EPS},
        "batches_sha256": hashlib.sha256(batches.tobytes()).hexdigest(),
        "shapes": sizes | {"all": sum(weight.size for weight in start.values())},
        "first_logits": logit_difference,
        "rates": rate_difference(runs["mlx"], runs["torch"], args),
        "seconds": {name: round(run.seconds, 1) for name, run in runs.items()},
        "comparisons": comparisons,
        "losses": {name: [round(loss, 7) for loss in run.losses] for name, run in runs.items()},
    }
    write(report, args.out)
    print_table(report)
    within = comparisons["mlx | torch"]["loss"]["largest"] <= ALLOWED
    print("mlx and torch agree" if within else "mlx and torch DIFFER", f"(allowed: {ALLOWED})")
    return 0 if within else 1


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--model", type=Path, default=MODEL, help="a Llama that mlx-lm and transformers both load")
    parser.add_argument("--mlx-device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--torch-device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens in a row")
    parser.add_argument("--table-learning-rate", type=float, default=1e-3)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of tables and body")
    parser.add_argument("--seed", type=int, default=0, help="of the batches and of the neighbours")
    parser.add_argument("--beside", nargs="*", choices=BESIDE, default=BESIDE, help="the other runs; default: all")
    return parser.parse_args(arguments)


def rate_difference(run, other, args):
    """The largest difference between two rates of one step, in peak rates."""
    difference = np.abs(np.array(run.rates) - np.array(other.rates))
    return float((difference / [args.table_learning_rate, args.learning_rate]).max())


def compare(run, other, start):
    """How far apart two runs are: the losses, the final tables with their r and c, and the body as one vector."""
    loss = np.abs(np.array(run.losses) - np.array(other.losses))
    result = {"loss": {"largest": float(loss.max()), "at_step": int(loss.argmax()) + 1, "last": float(loss[-1])}}
    for path, moments in run.moments.items():
        result[path] = distance(run.weights[path], other.weights[path], start[path])
        for name in "rc":
            result[path][name] = distance(moments[name], other.moments[path][name])["relative"]
    body = [name for name in start if name not in run.moments]
    vectors = [
        np.concatenate([weights[name].ravel() for name in body]) for weights in (run.weights, other.weights, start)
    ]
    return result | {"body": distance(*vectors)}


def distance(array, other, start=None):
    """Norm of the difference, relative to the array and to how far it went from its start; the largest difference."""
    other = other.astype(np.float64)
    difference = np.linalg.norm(array - other)
    result = {"relative": difference / np.linalg.norm(other), "largest": np.abs(array - other).max()}
    if start is not None:
        result["of_the_way"] = difference / np.linalg.norm(other - start)
    return {name: float(f"{value:.3g}") for name, value in result.items()}


def write(report, path):
    """JSON with a curve on a line, not a number on a line."""
    entries = []
    for key, value in report.items():
        if key in ("comparisons", "losses"):
            lines = [f"\n  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items()]
            entries.append(f" {json.dumps(key)}: {{{','.join(lines)}\n }}")
        else:
            entries.append(f" {json.dumps(key)}: {json.dumps(value)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n")


def print_table(report):
    print(f"\n{'':46}{'first loss':>12}{'last loss':>12}")
    for name, losses in report["losses"].items():
        print(f"{name:46}{losses[0]:12.4f}{losses[-1]:12.4f}")
    print(f"\n{'difference':46}{'largest loss':>14}{'last loss':>12}{'tables':>10}{'body':>10}")
    for name, entry in report["comparisons"].items():
        tables = max(value["of_the_way"] for path, value in entry.items() if path not in ("loss", "body"))
        loss = f"{entry['loss']['largest']:14.1e}{entry['loss']['last']:12.1e}"
        print(f"{name:46}{loss}{tables:10.1e}{entry['body']['of_the_way']:10.1e}")
    print("tables, body: the norm of the difference, relative to how far training moved them")
    columns = ("of_the_way", "relative", "largest", "r", "c")
    print(f"\n{'mlx | torch, after the last step':34}" + "".join(f"{name:>12}" for name in columns))
    for path, entry in report["comparisons"]["mlx | torch"].items():
        if path != "loss":
            print(f"{path:34}" + "".join(f"{entry[name]:12.1e}" for name in columns if name in entry))


if __name__ == "__main__":
    sys.exit(main())
