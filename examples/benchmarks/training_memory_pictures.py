"""The two pictures of the README, from the JSON file of mlx_training_memory.py; light and dark, as SVG."""

COLOURS = {  # Okabe and Ito's, which the colour-blind can tell apart; the lighter ones on dark
    "light": {"text": "#1f2328", "ours": "#0072B2", "theirs": "#D55E00", "others": "#8c959f"},
    "dark": {"text": "#e6edf3", "ours": "#56B4E9", "theirs": "#E69F00", "others": "#7d8590"},
}
LABELS = {"ember": "Ember", "adamw": "AdamW", "adafactor": "Adafactor", "sgd": "SGD", "frozen": "tables frozen"}
KINDS = {"lora": "LoRA and both tables", "full": "all weights"}
MODEL = "qwen3-0.6b/untied"


def draw(report, folder):
    """Write peak_by_optimizer_{light,dark}.svg and peak_of_chunked_loss_{light,dark}.svg into ``folder``."""
    import matplotlib

    matplotlib.use("svg")
    folder.mkdir(parents=True, exist_ok=True)
    where = f"{report['machine']['device']}, MLX {report['machine']['versions']['mlx']}"
    for mode, colours in COLOURS.items():
        with matplotlib.rc_context(_style(colours["text"])):
            _by_optimizer(report["rows"], where, colours, folder / f"peak_by_optimizer_{mode}.svg")
            _of_chunked_loss(report["rows"], where, colours, folder / f"peak_of_chunked_loss_{mode}.svg")


def _by_optimizer(rows, where, colours, path):
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 2.9), layout="constrained")
    for panel, (kind, title) in zip(panels, KINDS.items(), strict=True):
        peaks = {name: _peak(rows, f"{MODEL}/{kind}/1x512/{name}") for name in LABELS}
        there = [name for name in LABELS if peaks[name]]
        fill = [{"ember": colours["ours"], "adamw": colours["theirs"]}.get(name, colours["others"]) for name in there]
        bars = panel.barh([LABELS[name] for name in there], [peaks[name] for name in there], color=fill)
        panel.bar_label(bars, fmt="%.2f GB", padding=4)
        panel.invert_yaxis()
        panel.set_title(title)
        panel.margins(x=0.22)
        panel.set_xticks([])
    figure.suptitle("Peak memory of an mlx-lm training step: Qwen3-0.6B, bfloat16, 1 x 512 tokens")
    figure.supxlabel(where, fontsize=9)
    _save(figure, path)


def _of_chunked_loss(rows, where, colours, path):
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 2.9), layout="constrained", sharey=True)
    for panel, (kind, title) in zip(panels, KINDS.items(), strict=True):
        tokens = [t for t in ("1x2048", "4x1024") if _peak(rows, f"{MODEL}/{kind}/{t}/ember/chunked")]
        for i, (ending, label, colour) in enumerate(
            [("", "plain loss", colours["theirs"]), ("/chunked", "--chunked-loss", colours["ours"])]
        ):
            peaks = [_peak(rows, f"{MODEL}/{kind}/{t}/ember{ending}") for t in tokens]
            bars = panel.bar([x + 0.4 * i for x in range(len(tokens))], peaks, 0.36, label=label, color=colour)
            panel.bar_label(bars, fmt="%.1f GB", padding=3)
        panel.set_xticks([x + 0.2 for x in range(len(tokens))], [t.replace("x", " x ") + " tokens" for t in tokens])
        panel.set_title(title)
        panel.margins(y=0.2)
        panel.set_yticks([])
    panels[0].legend(frameon=False, loc="upper left")
    figure.suptitle("Peak memory with long sequences: Qwen3-0.6B, bfloat16, Ember on the tables")
    figure.supxlabel(where, fontsize=9)
    _save(figure, path)


def _peak(rows, name):
    """In GB; 0 for a row that is not there or did not fit."""
    return rows.get(name, {}).get("peak_memory", 0) / 1e9


def _style(text):
    named = ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    style = dict.fromkeys(named, text) | {"font.size": 11, "axes.titlesize": 11, "figure.titlesize": 12}
    style |= {f"axes.spines.{side}": False for side in ("top", "right", "bottom", "left")}
    return style | {"xtick.bottom": False, "ytick.left": False, "svg.hashsalt": "ember-mlx"}


def _save(figure, path):
    import matplotlib.pyplot as plt

    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)
