"""The pictures of the quality benchmark; ``draw.py`` saves them."""

import math
from functools import partial
from statistics import mean

from plan import BASELINE, SETTINGS
from reported import WORDS, against

from ember_mlx.plots.style import DASHES, MARKERS

__all__ = ["PICTURES"]

PICTURED = ("ember", "ember-growing", "adafactor", "adamw-b1=0", "rows", "ember-clip3")
COMPARED = PICTURED[:3]  # with AdamW, in the picture of differences
TRAINED = ("ember", "adamw", "ember-bf16", "ember-bf16-stochastic", "columns")  # compared with frozen tables
BY_DECILE = ("ember", "ember-growing", "adafactor", "ember-0.99", "ember-clip3", "rows")
FORGETFUL = ("ember", "adamw", "rows", "sgd", "columns")
PANELS = {None: "pretraining", "smollm2": "fine-tuning of SmolLM2-135M"}  # by what training starts from
BETA2 = {"ember-0.95": 0.95, "ember-0.99": 0.99, "ember": 0.999, "ember-0.9999": 0.9999}
AGES = [str(2**i) for i in range(11)] + ["never"]


def reported_settings(results):
    return [s for s in results.settings if results.reported(s, BASELINE).by_seed]


def fine_tuned_settings(results):
    """Those of fine-tuning, with the usual schedule, in which frozen tables were tried too."""
    return [s for s in results.settings if SETTINGS[s].start and not SETTINGS[s].constant
            and results.reported(s, "frozen").by_seed]  # fmt: skip


def draw_differences(results, shown, figure, theme, rules=COMPARED, baseline=BASELINE):
    """Distances to the baseline, a panel each for pretraining, where they are ten times as large, and fine-tuning."""
    panels = {}
    for setting in shown:
        title = PANELS.get(SETTINGS[setting].start, "fine-tuning of the pretrained model")
        panels.setdefault(title, []).append(setting)
    heights = [1 + len(settings) for settings in panels.values()]
    many_axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, settings) in zip(many_axes, panels.items(), strict=True):
        for i, optimizer in enumerate(rules):
            pairs = [against(results.reported(s, optimizer), results.reported(s, baseline)) for s in settings]
            beside = 0.66 / len(rules) * (i - (len(rules) - 1) / 2)
            points = [(d, half, y + beside) for y, (d, half, _) in enumerate(pairs) if math.isfinite(d)]
            if points:
                x, half, y = zip(*points, strict=True)
                half = [0 if math.isnan(h) else h for h in half]
                axes.errorbar(x, y, xerr=half, linestyle="none", marker=MARKERS[i], color=theme.lines[i], capsize=3,
                              label=WORDS[optimizer], markevery=1)  # fmt: skip
        axes.axvline(0, color=theme.text, linewidth=1, linestyle="-", marker="")
        axes.set_title(name)
        axes.set_yticks(range(len(settings)), [in_short(setting) for setting in settings])
        axes.set_ylim(len(settings) - 0.5, -0.5)
        axes.grid(False, axis="y")
    with_what = "frozen tables" if baseline == "frozen" else f"{WORDS[baseline]} on the tables"
    scales = "; the scales differ" if len(panels) > 1 else ""
    words = (
        f"validation loss minus that with {with_what}, nats a token: left is better\n"
        f"(mean of the seeds, 95 % interval of their differences{scales})"
    )
    figure.supxlabel(words, fontsize=11)
    _legend(figure, *many_axes)


def in_short(setting):
    """For an axis, under a title that says whether it is pretraining or what is fine-tuned."""
    s = SETTINGS[setting]
    if s.start is None:
        return f"{'tied' if s.shape.tied else 'untied'}, {s.batch * s.length:,} tokens a step"
    how = f"{'LoRA' if s.shape.lora_layers else 'all weights'}{', constant rate' if s.constant else ''}"
    return f"{s.data.removeprefix('smollm2_')}, {how}"


def tuned_settings(results):
    return [s for s in results.settings if any(len(results.tuning(s, o)) > 1 for o in (*PICTURED, BASELINE))]


def draw_rates(results, shown, figure, theme):
    grid = _grid(figure, len(shown), 3)
    for axes, setting in zip(grid, shown, strict=True):
        curves = [results.tuning(setting, optimizer) for optimizer in (*PICTURED, BASELINE)]
        losses = sorted(loss for curve in curves for loss in curve.values())
        height = min(0.5, 1.3 * (losses[3 * len(losses) // 4] - losses[0])) or 0.1  # the worst quarter may lie outside
        seen = sorted({r for curve in curves for r, loss in curve.items() if r == int(r) and loss < losses[0] + height})
        for i, (optimizer, curve) in enumerate(zip((*PICTURED, BASELINE), curves, strict=True)):
            near = {rate: loss for rate, loss in curve.items() if loss < losses[0] + 3 * height}
            if near:
                _plot(axes, theme, i, [10 ** (rate / 2) for rate in near], list(near.values()), WORDS[optimizer])
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(
            [10 ** (rate / 2) for rate in seen], [f"{10 ** (rate / 2):.0e}".replace("e-0", "e-") for rate in seen]
        )
        axes.set_title(setting)
        axes.set_ylim(losses[0] - height / 20, losses[0] + height)
    figure.supxlabel("learning rate of the tables")
    figure.supylabel("validation loss, nats")
    _legend(figure, *grid)


def pretraining_settings(results):
    return [s for s in reported_settings(results) if SETTINGS[s].start is None]


def draw_deciles(results, shown, figure, theme, rules=BY_DECILE, baseline=BASELINE):
    grid, drawn = _grid(figure, len(shown), 4 if len(shown) < 5 else 3, sharey=True), [0.0]
    for axes, setting in zip(grid, shown, strict=True):
        base = results.reported(setting, baseline).by_seed
        for i, optimizer in enumerate(rules):
            theirs = results.reported(setting, optimizer).by_seed
            pairs = [(theirs[s]["decile_losses"], base[s]["decile_losses"]) for s in theirs if s in base]
            if pairs:
                y = [mean(a[d] - b[d] for a, b in pairs) for d in range(10)]
                drawn += y
                _plot(axes, theme, i, range(1, 11), y, WORDS[optimizer])
        axes.axhline(0, color=theme.text, linewidth=1, linestyle="-", marker="")
        axes.set_title(setting)
        axes.set_xticks([1, 4, 7, 10])
        axes.set_yscale("symlog", linthresh=0.1)
        ticks = [-1, -0.3, -0.1, -0.05, 0, 0.05, 0.1, 0.3, 1, 3]
        axes.set_yticks(ticks, [f"{tick:+g}" if tick else "0" for tick in ticks])
    axes.set_ylim(1.3 * min(drawn), 1.3 * max(drawn))
    figure.supxlabel("tenth of the vocabulary, the most frequent tokens first")
    figure.supylabel(
        "loss minus " + ("that of frozen tables" if baseline == "frozen" else f"{WORDS[baseline]}'s") + ", nats"
    )
    _legend(figure, *grid)


def settings_with_beta2(results):
    """Those with Ember at 0.999, which the others are compared with, and at two others."""
    reported = {s: [o for o in BETA2 if results.reported(s, o).by_seed] for s in results.settings}
    return [s for s, rules in reported.items() if "ember" in rules and len(rules) > 2]


def draw_beta2(results, shown, figure, theme):
    axes = figure.subplots()
    for setting in shown:
        points = [
            (b, against(results.reported(setting, o), results.reported(setting, "ember"))) for o, b in BETA2.items()
        ]
        points = [(b, d, half) for b, (d, half, _) in points if math.isfinite(d)]
        x, y, half = zip(*points, strict=True)
        axes.errorbar(
            [1 / (1 - b) for b in x], y, yerr=[0 if math.isnan(h) else h for h in half], label=setting, capsize=3,
            markevery=1,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks([1 / (1 - b) for b in BETA2.values()], [str(b) for b in BETA2.values()])
    axes.set_xlabel("Ember's beta2, each at its own best learning rate")
    axes.set_ylabel("validation loss minus that at 0.999")
    _legend(figure, axes)


def probed_tables(results):
    return [(s, t) for s in results.settings if results.probe(s, "ember") for t in results.probe(s, "ember")]


def draw_row_steps(results, shown, figure, theme):
    grid = figure.subplots(1, len(shown), sharey=True, squeeze=False)
    for axes, (setting, table) in zip(grid.flat, shown, strict=False):
        for i, optimizer in enumerate(("ember", "adamw", "adafactor", "ember-clip3")):
            probe = results.probe(setting, optimizer)
            if probe:
                bins = [b for b in range(len(AGES)) if probe[table]["count"][b]]
                _plot(axes, theme, i, bins, [probe[table]["mean"][b] for b in bins], WORDS[optimizer])
        axes.set_xticks(range(0, len(AGES), 2), AGES[::2])
        axes.set_yscale("log")
        axes.set_title(f"{setting}, {table}")
    figure.supxlabel("steps since the row's token was last in a batch")
    figure.supylabel("mean size of its step, learning rates")
    _legend(figure, *grid.flat)


def _grid(figure, count, columns, **how):
    """So many axes, in rows of that many columns; the last row may have fewer."""
    grid = list(figure.subplots(-(-count // columns), min(columns, count), squeeze=False, **how).flat)
    for axes in grid[count:]:
        axes.remove()
    return grid[:count]


def _plot(axes, theme, i, x, y, label):
    """The i-th line, which looks the same in every panel, whichever others are missing there."""
    style = {"color": theme.lines[i], "linestyle": DASHES[i], "marker": MARKERS[i]}
    axes.plot(x, y, label=label, markevery=1, **style)


def _legend(figure, *many_axes):
    """One for all axes, above them; what is in several of them is named once."""
    entries = {}
    for axes in many_axes:
        handles, labels = axes.get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True)) | entries
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=3)


PICTURES = {  # name -> (what it shows: of nothing there is no picture, how, inches of width, of height by how much)
    "differences": (reported_settings, draw_differences, 8, lambda shown: 1.8 + 0.45 * len(shown)),
    "rates": (tuned_settings, draw_rates, 10, lambda shown: 1.5 + 2.8 * -(-len(shown) // 3)),
    "gains": (
        fine_tuned_settings,
        partial(draw_differences, rules=TRAINED, baseline="frozen"),
        8,
        lambda shown: 2.0 + 0.75 * len(shown),
    ),
    "deciles": (pretraining_settings, draw_deciles, 10, lambda shown: 4.5),
    "rare_tokens": (
        fine_tuned_settings,
        partial(draw_deciles, rules=FORGETFUL, baseline="frozen"),
        10,
        lambda shown: 2.0 + 2.5 * -(-len(shown) // 3),
    ),
    "beta2": (settings_with_beta2, draw_beta2, 8, lambda shown: 4.5),
    "row_steps": (probed_tables, draw_row_steps, 11, lambda shown: 4.5),
}
