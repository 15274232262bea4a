"""The table of recipes as Markdown, and the README's picture, from a file of `streaming_memory.py --rows recipes`.

    python examples/benchmarks/recipes_report.py examples/benchmarks/results/recipes_h100.json

Prints a table for each model and batch that was measured. Writes peak_of_a_full_fine_tune_light.svg and _dark.svg
beside the file: of Qwen3-0.6B, 1 x 512 tokens, what is held between steps, and on top of it what a step takes.
"""

import argparse
from pathlib import Path

from streaming_rows import parts_of
from training_memory_pictures import COLOURS, save, style
from training_memory_rows import read_report

CASE = "qwen3-0.6b/1x512"
WAYS = {  # the end of a row's name, its label, the colour
    "adamw-everywhere/mlx-lm": ("mlx-lm: AdamW", "theirs"),
    "adamw-everywhere/ordinary": ("train --no-stream: AdamW", "theirs"),
    "adamw/ordinary": ("train --no-stream: Ember, AdamW on the rest", "ours"),
    "adamw/streamed": ("train --stream: Ember, AdamW on the rest", "ours"),
    "flash-adamw/streamed": ("train --stream: Ember, FlashAdamW on the rest", "ours"),
    "adam-mini-int8/streamed": ("train --stream: Ember, AdamMini (int8) on the rest", "ours"),
    "stateless/streamed": ("train --stream: Ember, SinkGD on the rest", "ours"),
}
RECIPES = {
    "adamw-everywhere": "AdamW on all",
    "adamw": "Ember, AdamW",
    "flash-adamw": "Ember, FlashAdamW",
    "adam-mini-int8": "Ember, AdamMini int8",
    "stateless": "Ember, SinkGD",
    "lora-adamw": "LoRA, AdamW on all",
    "lora": "LoRA, Ember on the tables",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, help="the JSON file; the pictures are written beside it")
    args = parser.parse_args()
    report = read_report(args.measured)
    rows = {row: result for row, result in report["rows"].items() if parts_of(row)["recipe"] in RECIPES}
    print(tables(rows))
    bars = {end: rows[f"{CASE}/{end}"] for end in WAYS if "peak_memory" in rows.get(f"{CASE}/{end}", {})}
    if not bars:
        raise SystemExit(f"{args.measured}: no row of {CASE} to draw")
    import matplotlib

    matplotlib.use("svg")
    machine = f"{report['machine']['device']}, MLX {report['machine']['versions']['mlx']}"
    for mode, colours in COLOURS.items():
        with matplotlib.rc_context(style(colours["text"])):
            save(_draw(bars, colours, machine), args.measured.parent / f"peak_of_a_full_fine_tune_{mode}.svg")


def tables(rows: dict[str, dict]) -> str:
    """A table for each model and batch: peak, held, milliseconds and tokens a second of each recipe and way."""
    cases = {}
    for row, result in rows.items():
        of = parts_of(row)
        case = f"{of['model']}{' tied' if of['tied'] else ''}, {of['batch_size']} x {of['length']}"
        cases.setdefault(case, []).append((list(RECIPES).index(of["recipe"]), of["way"], result))
    lines = []
    for case, found in cases.items():
        lines += [
            f"| {case} | way | peak, GB | held, GB | ms a step | tokens/s |",
            "| --- | --- " + "| ---: " * 4 + "|",
        ]
        for place, way, result in sorted(found, key=lambda one: one[:2]):
            figures = [result["error"][:60], "", "", ""] if "error" in result else _figures(result)
            lines.append(f"| {list(RECIPES.values())[place]} | {way} | {' | '.join(figures)} |")
        lines.append("")
    return "\n".join(lines)


def _figures(result):
    sizes = [f"{result[name] / 1e9:.2f}" for name in ("peak_memory", "held")]
    return [*sizes, f"{result['seconds'] * 1e3:.0f}", f"{result['tokens_per_second']:,.0f}"]


def _draw(bars, colours, machine):
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(9, 0.9 + 0.42 * len(bars)), layout="constrained")
    labels, shades = zip(*((label, colours[colour]) for label, colour in map(WAYS.get, bars)), strict=True)
    held, peaks = ([result[name] / 1e9 for result in bars.values()] for name in ("held", "peak_memory"))
    panel.barh(labels, held, color=shades)
    above = [peak - kept for peak, kept in zip(peaks, held, strict=True)]
    light = panel.barh(labels, above, left=held, color=shades, alpha=0.45)
    panel.bar_label(light, [f"{peak:.2f} GB" for peak in peaks], padding=4)
    panel.invert_yaxis()
    panel.margins(x=0.12)
    panel.set_xticks([])
    panel.set_xlabel(f"dark: held between steps; with the light part: peak. {machine}", fontsize=9, loc="right")
    figure.suptitle("Memory of training all weights of Qwen3-0.6B, untied, bfloat16, 1 x 512 tokens")
    return figure


if __name__ == "__main__":
    main()
