"""The table of recipes as Markdown, and a picture of it, from a file of `streaming_memory.py --rows recipes`.

    python examples/benchmarks/recipes_report.py RESULT.json > RESULT.md
    python examples/benchmarks/recipes_report.py RESULT.json --draw 'qwen3-0.6b, 1 x 512'

Prints a table for each model and batch that was measured. With `--draw` it writes memory_of_recipes_light.svg and
_dark.svg beside the file: of that model and batch, what is held between steps, and on top of it what a step takes.
"""

import argparse
from functools import partial
from pathlib import Path

from streaming_rows import parts_of
from training_memory_pictures import save_light_and_dark
from training_memory_rows import read_report

WAYS = {  # recipe and way, the label, the colour
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
    parser.add_argument("measured", type=Path, help="the JSON file")
    parser.add_argument("--draw", metavar="CASE", help="model and batch, as its table has them; beside the file")
    args = parser.parse_args()
    report = read_report(args.measured)
    cases = cases_of(report["rows"])
    machine = f"{report['machine']['device']}, MLX {report['machine']['versions']['mlx']}"
    heading = f"# Recipes, each with its peak, what it holds, and its time: {machine}"
    print("\n\n".join([heading, *(table(case, rows) for case, rows in cases.items())]))
    if args.draw is None:
        return
    bars = {way: cases[args.draw][way] for way in WAYS if way in cases.get(args.draw, {})}
    bars = {way: result for way, result in bars.items() if "peak_memory" in result}
    if not bars:
        raise SystemExit(f"--draw {args.draw}: no rows to draw; there are {', '.join(cases)}")
    save_light_and_dark(args.measured.parent / "memory_of_recipes", partial(_draw, args.draw, bars, machine))


def cases_of(rows: dict[str, dict]) -> dict[str, dict[str, dict]]:
    """Model and batch -> recipe and way -> what was measured."""
    cases = {}
    for row, result in rows.items():
        of = parts_of(row)
        if of["recipe"] in RECIPES and "+" not in of["way"]:
            model = " ".join([of["model"], *(["tied"] if of["tied"] else []), *(["float32"] if of["float32"] else [])])
            case = cases.setdefault(f"{model}, {of['batch_size']} x {of['length']}", {})
            case[f"{of['recipe']}/{of['way']}"] = result
    return cases


def table(case: str, rows: dict[str, dict]) -> str:
    """As Markdown: peak, held, milliseconds and tokens a second of each recipe and way."""
    lines = [
        f"| {case} | way | peak, MB | held, MB | ms a step | tokens/s |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name in sorted(rows, key=lambda name: (list(RECIPES).index(name.split("/")[0]), name)):
        recipe, way = name.split("/")
        figures = [rows[name]["error"][:60], "", "", ""] if "error" in rows[name] else _figures(rows[name])
        lines.append(f"| {RECIPES[recipe]} | {way} | {' | '.join(figures)} |")
    return "\n".join(lines)


def _figures(result):
    sizes = [f"{result[name] / 1e6:,.0f}" for name in ("peak_memory", "held")]
    return [*sizes, f"{result['seconds'] * 1e3:.0f}", f"{result['tokens_per_second']:,.0f}"]


def _draw(case, bars, machine, colours):
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(9, 0.9 + 0.42 * len(bars)), layout="constrained")
    labels, shades = zip(*((label, colours[colour]) for label, colour in map(WAYS.get, bars)), strict=True)
    held, peaks = ([result[name] / 1e6 for result in bars.values()] for name in ("held", "peak_memory"))
    panel.barh(labels, held, color=shades)
    above = [peak - kept for peak, kept in zip(peaks, held, strict=True)]
    light = panel.barh(labels, above, left=held, color=shades, alpha=0.45)
    panel.bar_label(light, [f"{peak:,.0f} MB" for peak in peaks], padding=4)
    panel.invert_yaxis()
    panel.margins(x=0.12)
    panel.set_xticks([])
    panel.set_xlabel(f"dark: held between steps; with the light part: peak. {machine}", fontsize=9, loc="right")
    figure.suptitle(f"Memory of training all weights: {case} tokens")
    return figure


if __name__ == "__main__":
    main()
