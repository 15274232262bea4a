"""The picture of the README: peak of a full fine-tune, five ways, from JSON files of two benchmarks; as SVG.

    python examples/benchmarks/full_fine_tune_picture.py

It reads `two_checkouts_full_h200.json` and `streaming_h200.json` in results/, and writes
peak_of_a_full_fine_tune_light.svg and _dark.svg beside them. All are of one kind of machine, or it ends.
"""

import json
from functools import partial
from pathlib import Path

from training_memory_pictures import save_light_and_dark

RESULTS = Path(__file__).parent / "results"
ORDINARY, STREAMED = "qwen3-0.6b/untied/full/1x512", "qwen3-0.6b/1x512"
WAYS = (  # the file, the way to the row in it, the label, the colour
    ("two_checkouts_full", (f"{ORDINARY}/ember", "before"), "mlx-lm's loop: Ember, AdamW on the rest", "theirs"),
    ("two_checkouts_full", (f"{ORDINARY}/adamw", "after"), "train: AdamW on all weights", "theirs"),
    ("two_checkouts_full", (f"{ORDINARY}/ember", "after"), "train: Ember, AdamW on the rest", "ours"),
    ("streaming", (f"{STREAMED}/adamw/streamed",), "train --stream: Ember, AdamW on the rest", "ours"),
    ("streaming", (f"{STREAMED}/stateless/streamed",), "train --stream: Ember, SinkGD on the rest", "ours"),
)


def main():
    reports = {name: json.loads((RESULTS / f"{name}_h200.json").read_text()) for name, *_ in WAYS}
    machines = {(of["machine"]["device"], of["machine"]["versions"]["mlx"]) for of in reports.values()}
    if len(machines) != 1:
        raise SystemExit(f"the results are of several machines: {sorted(machines)}")
    ((device, version),) = machines
    peaks = [_of(reports[name]["rows"], way)["peak_memory"] / 1e9 for name, way, *_ in WAYS]
    weights = reports["streaming"]["rows"][f"{STREAMED}/stateless/streamed"]["bytes"]["weights"] / 1e9
    draw = partial(_draw, peaks, weights, f"{device}, MLX {version}")
    save_light_and_dark(RESULTS / "peak_of_a_full_fine_tune", draw)


def _of(rows, way):
    for name in way:
        rows = rows[name]
    return rows


def _draw(peaks, weights, machine, colours):
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(9, 2.9), layout="constrained")
    bars = panel.barh([label for *_, label, _ in WAYS], peaks, color=[colours[colour] for *_, colour in WAYS])
    panel.bar_label(bars, fmt="%.2f GB", padding=4)
    panel.axvline(weights, color=colours["text"], linestyle="--", linewidth=1)
    panel.text(weights, len(WAYS) - 0.35, f"weights: {weights:.2f} GB", ha="center", va="top", fontsize=9)
    panel.invert_yaxis()
    panel.margins(x=0.12)
    panel.set_xticks([])
    panel.set_xlabel(machine, fontsize=9, loc="right")
    figure.suptitle("Peak memory, all weights of Qwen3-0.6B, untied, bfloat16, 1 x 512 tokens")
    return figure


if __name__ == "__main__":
    main()
