"""The two pictures of the README, from JSON files of mlx_training_memory.py; light and dark, as SVG."""

from functools import partial

COLOURS = {  # Okabe and Ito's, which the colour-blind can tell apart; the lighter ones on dark
    "light": {"text": "#1f2328", "ours": "#0072B2", "theirs": "#D55E00", "others": "#8c959f"},
    "dark": {"text": "#e6edf3", "ours": "#56B4E9", "theirs": "#E69F00", "others": "#7d8590"},
}
LABELS = {"ember": "Ember", "adamw": "AdamW", "adafactor": "Adafactor", "sgd": "SGD", "frozen": "tables frozen"}
KINDS = {"lora": "LoRA and both tables", "full": "all weights"}
MODEL = "qwen3-0.6b/untied"
SAVINGS = {
    "": "no savings",
    "/chunked": "--chunked-loss",
    "/checkpoint": "--grad-checkpoint",
    "/chunked/checkpoint": "both",
}


def draw(reports, folder):
    """Write peak_by_optimizer_{light,dark}.svg and peak_of_long_sequences_{light,dark}.svg into ``folder``.

    A panel's bars are all of one report: of the one that has the most of them. Ends the program where none has any.
    """
    if not any("peak_memory" in row for report in reports for name, row in report["rows"].items() if MODEL in name):
        raise SystemExit(f"--draw {folder}: the files must have rows of {MODEL} that were measured")
    folder.mkdir(parents=True, exist_ok=True)
    tables = {name: {"ember": "ours", "adamw": "theirs"}.get(name, "others") for name in LABELS}
    by_optimizer = {f"1x512/{name}": (LABELS[name], colour) for name, colour in tables.items()}
    title = "Peak memory of an mlx-lm training step: Qwen3-0.6B, bfloat16, 1 x 512 tokens"
    save_light_and_dark(folder / "peak_by_optimizer", partial(_draw_panels, reports, title, by_optimizer))
    by_saving = {f"4x1024/ember{saving}": (label, "ours") for saving, label in SAVINGS.items()}
    title = "Peak memory with long sequences: Qwen3-0.6B, bfloat16, 4 x 1024 tokens, Ember"
    save_light_and_dark(folder / "peak_of_long_sequences", partial(_draw_panels, reports, title, by_saving))


def _draw_panels(reports, title, bars, colours):
    """A panel each for LoRA and for all weights; ``bars`` has label and kind of colour by the end of a row's name."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 2.9), layout="constrained")
    for panel, (kind, what_trains) in zip(panels, KINDS.items(), strict=True):
        peaks, machine = max((_peaks(report, kind, bars) for report in reports), key=lambda found: len(found[0]))
        labels, kinds = zip(*(bars[end] for end in peaks), strict=True) if peaks else ((), ())
        shades = [colours[kind] for kind in kinds]
        panel.bar_label(panel.barh(labels, peaks.values(), color=shades), fmt="%.2f GB", padding=4)
        panel.invert_yaxis()
        panel.set_title(what_trains)
        panel.margins(x=0.22)
        panel.set_xticks([])
        panel.set_xlabel(f"{machine['device']}, MLX {machine['versions']['mlx']}", fontsize=9)
    figure.suptitle(title)
    return figure


def _peaks(report, kind, ends):
    """In GB, of the rows that are there and fitted; and the report's machine."""
    rows = {end: report["rows"].get(f"{MODEL}/{kind}/{end}", {}) for end in ends}
    return {end: row["peak_memory"] / 1e9 for end, row in rows.items() if "peak_memory" in row}, report["machine"]


def save_light_and_dark(path, draw):
    """Save the figure that ``draw(colours)`` returns, in both modes, as PATH_light.svg and PATH_dark.svg."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    for mode, colours in COLOURS.items():
        with matplotlib.rc_context(_style(colours["text"])):
            figure = draw(colours)
            figure.savefig(f"{path}_{mode}.svg", transparent=True, metadata={"Date": None})
            plt.close(figure)


def _style(text):
    named = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    style = dict.fromkeys(named, text) | {"font.size": 11, "axes.titlesize": 11, "figure.titlesize": 12}
    style |= {f"axes.spines.{side}": False for side in ("top", "right", "bottom", "left")}
    return style | {"xtick.bottom": False, "ytick.left": False, "svg.hashsalt": "ember-mlx"}
