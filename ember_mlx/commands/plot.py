"""``ember-mlx plot``: one or several runs, from their logs, in one picture."""

import argparse
from pathlib import Path

from ember_mlx.finetune import run_log
from ember_mlx.finetune.run_names import name_runs
from ember_mlx.plots.style import (
    THEMES,
    check_path,
    literal,
    picture_paths,
    save_light_and_dark,
    save_picture,
    thousands,
    units,
)
from ember_mlx.shared.command_line import describe
from ember_mlx.shared.errors import InputError

__all__ = ["END", "PANELS", "main", "plot_runs"]

HELP = {
    "runs and picture": {
        "files": ("FILE", "Logs of runs, finished or not. Required."),
        "out": ("PNG", "The picture; an existing file is replaced. Required."),
        "theme": (None, "Colours; both writes NAME-light.png and NAME-dark.png."),
    }
}
EPILOG = """\
examples:
  ember-mlx plot run.jsonl --out run.png
      one run
  ember-mlx plot ember.jsonl adamw.jsonl --out compared.png --theme both
      two runs, which the legend tells apart by the options in which they differ"""
PANELS = (  # title, what is on the axis, the logs' list, the key in it
    ("Training loss", "nats a token", "train", "train_loss"),
    ("Validation loss", "nats a token", "validation", "validation_loss"),
    ("Step over weights, tables", "ratio of norms", "train", "update_ratio_tables"),
    ("Step over weights, the rest", "ratio of norms", "train", "update_ratio_body"),
    ("Peak memory", "", "train", "peak_memory"),
    ("Speed", "tokens a second", "train", "tokens_per_second"),
)
PANEL_HEIGHT = 2.7  # inches
MARKERS = 8  # on a line
END = "after the last step, on the batches of the first validation"


def main(arguments: list[str]) -> None:
    """Draw logs of runs into a picture."""
    parser = argparse.ArgumentParser(
        prog="ember-mlx plot",
        description="Draw logs of `ember-mlx train --log-jsonl FILE`, one run or several: losses, how far each step "
        "moves the weights, peak memory and speed.",
        epilog=EPILOG,
    )
    parser.add_argument("files", nargs="+")
    parser.add_argument("--out", required=True)
    parser.add_argument("--theme", choices=[*THEMES, "both"], default="light")
    args = describe(parser, HELP).parse_args(arguments)
    out = check_path(args.out)
    logs = [_read(path) for path in args.files]
    _refuse_own_input(out, args.theme, args.files)
    pictures = plot_runs(logs, out, args.theme)
    for log in logs:
        if log.unfinished:
            print(f"{log.path}: the last line is cut off, and was left out")
    print("\n".join(f"The picture is in {path}" for path in pictures))


def plot_runs(logs: list[run_log.Log], out: Path, theme: str = "light") -> list[Path]:
    """Draw the runs into a PNG, or for the theme "both" into two; their paths.

    Raises:
        InputError: without matplotlib, and for more runs than can be told apart.
    """
    most = len(THEMES["light"].lines)
    if len(logs) > most:
        raise InputError(f"{len(logs)} runs: at most {most} can be told apart in one picture; draw fewer")
    names = [literal(name) for name in name_runs(logs)]
    panels = [panel for panel in PANELS if any(_points(log, *panel[2:])[0] for log in logs)]
    size = {"height": 0.6 + 0.25 * (len(logs) + 1) + PANEL_HEIGHT * ((len(panels) + 1) // 2)}

    def draw(figure, theme):
        for i, panel in enumerate(panels, 1):
            axes = figure.add_subplot((len(panels) + 1) // 2, 2, i)
            _draw_panel(axes, logs, names, *panel)
            if panel[2] == "validation":
                _draw_ends(axes, logs, theme)
        entries = [axes.get_legend_handles_labels() for axes in figure.axes]
        figure.legend(*max(entries, key=lambda entry: len(entry[1])), loc="outside upper left")

    if theme == "both":
        return save_light_and_dark(out, draw, **size)
    return [save_picture(out, draw, theme, **size)]


def _refuse_own_input(out, theme, files):
    written = picture_paths(out) if theme == "both" else [out]
    for path in files:
        if Path(path).resolve() in [each.resolve() for each in written]:
            raise InputError(f"--out {out}: would replace the log {path}; give another name")


def _read(path):
    log = run_log.read(path)
    if not any(_points(log, *panel[2:])[0] for panel in PANELS):
        raise InputError(f"log {path}: nothing to draw yet; try again after --steps-per-report steps")
    return log


def _draw_panel(axes, logs, names, title, label, events, key):
    for i, (log, name) in enumerate(zip(logs, names, strict=True)):
        steps, values = _points(log, events, key)
        # Every n-th point by number: by distance along the line, as elsewhere, a noisy one would be all markers.
        every = len(steps) // MARKERS + 1
        # Without a point, too: the next line keeps its colour.
        axes.plot(steps, values, label=name, markevery=(i * every // len(logs), every))
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter(thousands())
    axes.set_ylabel(label)
    if key.startswith("update_ratio"):
        axes.set_yscale("log")
    elif key in ("peak_memory", "tokens_per_second"):
        axes.yaxis.set_major_formatter(units("B") if key == "peak_memory" else thousands())
        axes.set_ylim(0, 1.1 * axes.dataLim.ymax or 1)


def _draw_ends(axes, logs, theme):
    """The losses after the last step, each a star in the colour of its run, and a label for them all."""
    star = {"linestyle": "none", "marker": "*", "markersize": 14, "markeredgecolor": theme.background}
    star |= {"markevery": 1, "zorder": 3}  # every one, and over the lines
    for log, line in zip(logs, list(axes.lines), strict=True):
        axes.plot(*_points(log, "end", "validation_loss"), color=line.get_color(), **star)
    if any(_points(log, "end", "validation_loss")[0] for log in logs):
        axes.plot([], [], color=theme.text, label=END, **star)


def _points(log, events, key):
    """Steps and values, without missing ones; a ratio of 0, of a step left out, has no logarithm."""
    rows = [row for row in getattr(log, events) if row[key] is not None and (row[key] > 0 or "ratio" not in key)]
    return [row["step"] for row in rows], [row[key] for row in rows]
