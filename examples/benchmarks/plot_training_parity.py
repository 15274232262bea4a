"""Draw what training_parity.py wrote: the two loss curves, and below them how far apart they are.

    python examples/benchmarks/plot_training_parity.py RESULT.json PICTURE.png

Needs matplotlib.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ALLOWED = 1e-3
SMALLEST = 1e-7  # losses here are float32 numbers between 1 and 8: equal ones are drawn at the bottom
# words, pairs of curves (the larger difference is drawn), color, width; the result comes last, on top
LINES = (
    ("wrong on purpose: AdamW without bias correction", [("mlx, AdamW bias uncorrected", "mlx")], "#e8a0a0", 1.0),
    ("wrong on purpose: Ember with beta2 0.99, not 0.999", [("torch, Ember beta2 0.99", "torch")], "#c0392b", 1.0),
    (
        "each against itself, weights moved by one rounding",
        [("mlx, neighbours", "mlx"), ("torch, neighbours", "torch")],
        "#9a9a9a",
        1.0,
    ),
    ("MLX with two roundings mended, against PyTorch", [("mlx, exact sums", "torch")], "#5dade2", 1.0),
    ("MLX against PyTorch", [("mlx", "torch")], "#1f4e9c", 1.8),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    draw(json.loads(args.result.read_text()), args.picture)


def draw(report, picture):
    losses = {name: np.array(curve) for name, curve in report["losses"].items()}
    steps = np.arange(1, len(losses["mlx"]) + 1)
    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=[2, 3])
        top.plot(steps, losses["mlx"], color="#f2a65a", linewidth=4, label="MLX (mlx-lm, ember_mlx)")
        top.plot(steps, losses["torch"], color="#1f4e9c", linewidth=1.1, label="PyTorch (transformers, cuda_ref)")
        top.set_ylabel("loss, nats a token")
        top.legend(frameon=False)
        top.set_title(title(report), fontsize=11, loc="left")

        for words, pairs, color, width in LINES:
            differences = [np.abs(losses[name] - losses[other]) for name, other in pairs if name in losses]
            if differences:
                bottom.plot(steps, np.max([*differences, np.full(len(steps), SMALLEST)], axis=0), color=color,
                            linewidth=width, label=words)  # fmt: skip
        bottom.axhline(ALLOWED, color="black", linestyle="--", linewidth=1)
        bottom.text(steps[-1], ALLOWED * 1.15, "allowed", ha="right", va="bottom")
        bottom.set_yscale("log")
        bottom.set_ylim(SMALLEST, 2)
        bottom.set_xlim(1, steps[-1])
        bottom.set_xlabel("step")
        bottom.set_ylabel("difference of the losses")
        handles, labels = bottom.get_legend_handles_labels()
        bottom.legend(handles[::-1], labels[::-1], frameon=False, loc="upper left", bbox_to_anchor=(0, -0.17))
        figure.subplots_adjust(hspace=0.08)
        figure.align_ylabels()
        figure.savefig(picture, dpi=140, bbox_inches="tight")


def title(report):
    options, shapes = report["options"], report["shapes"]
    gpu = report["machine"]["gpu"]
    where = gpu if options["torch_device"].startswith("cuda") else "CPU"
    return (
        f"{shapes['all'] / 1e6:.3g}M-parameter Llama, float32, {options['batch_size']} x {options['length']} tokens "
        f"a step, on {where}"
    )


if __name__ == "__main__":
    main()
