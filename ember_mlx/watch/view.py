"""What the page shows of runs: names, states, curves of a bounded number of points, answers and options."""

from typing import Any

from ember_mlx.finetune.run_names import name_runs
from ember_mlx.watch.following import ENDED, NO_LOG, RUNNING, STOPPED, WAITING, RunFile, is_number

__all__ = ["PANELS", "thinned", "view"]

# Key of the curve, title, unit, how its axis is scaled, event and key of the record.
PANELS = (
    ("train_loss", "Training loss", "nats a token", "linear", "train", "train_loss"),
    ("validation_loss", "Validation loss", "nats a token", "linear", "validation", "validation_loss"),
    ("learning_rate", "Learning rate", "", "from 0", "train", "learning_rate"),
    ("table_learning_rate", "Learning rate of the tables", "", "from 0", "train", "table_learning_rate"),
    ("tokens_per_second", "Speed", "tokens a second", "from 0", "train", "tokens_per_second"),
    ("peak_memory", "Peak memory", "B", "from 0", "train", "peak_memory"),
    ("update_ratio_tables", "Step over weights, tables", "ratio of norms", "log", "train", "update_ratio_tables"),
    ("update_ratio_body", "Step over weights, the rest", "ratio of norms", "log", "train", "update_ratio_body"),
)
MOST_POINTS = 600  # of a curve; a chart is hardly as many pixels wide
MOST_PROMPTS, MOST_ANSWERS, LONGEST_TEXT = 50, 10, 4000
SAYS = {
    WAITING: "waiting for {path}, which has no line yet",
    RUNNING: "running",
    ENDED: "ended",
    STOPPED: "stopped before its last step; no process writes its log",
    NO_LOG: "{problem}",
}


def view(runs: list[RunFile]) -> dict[str, Any]:
    """All that the page draws, ready for JSON; its size does not grow with the length of the runs."""
    # A run that has not begun has no options, and would be told from others by the lack of them.
    begun = all(run.options for run in runs)
    names = name_runs(runs) if begun else [str(run.path) for run in runs]
    return {"runs": [_view_run(run, name) for run, name in zip(runs, names, strict=True)]}


def thinned(points: list[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """At most so many points, the lowest and the highest of each stretch, and the last one; peaks stay."""
    if len(points) <= most:
        return points
    stretches = (most - 1) // 2
    kept, values = {len(points) - 1}, [value for _, value in points]
    for i in range(stretches):
        stretch = range(i * len(points) // stretches, (i + 1) * len(points) // stretches)
        kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return [points[at] for at in sorted(kept)]


def _view_run(run, name):
    rows = {}
    for (event, _), row in sorted(run.rows.items(), key=lambda item: item[0][1]):
        rows.setdefault(event, []).append(row)
    curves = {key: _points(rows.get(event, ()), field) for key, _, _, _, event, field in PANELS}
    steps = [step for _, step in run.rows]
    iters = run.options.get("iters")
    return {
        "name": name,
        "path": str(run.path),
        "state": run.state,
        "trouble": run.trouble and f"cannot be read ({run.trouble}); this is what it held before",
        "says": SAYS[run.state].format(path=run.path.absolute(), problem=run.problem),
        "step": max(steps, default=0),
        "iters": iters if is_number(iters) else None,
        "latest": {key: points[-1][1] for key, points in curves.items() if points},
        "curves": {key: thinned(points) for key, points in curves.items()},
        "end": _points(rows.get("end", ()), "validation_loss")[-1:],
        "samples": _samples(run),
        "options": {key.replace("_", "-"): _words(value) for key, value in run.options.items()},
        "versions": {key: _words(value) for key, value in run.versions.items()},
        "skipped": run.skipped[:3],
        "skipped_in_all": len(run.skipped),
    }


def _points(rows, field):
    """Steps and values, without missing ones; a ratio of 0, of a step left out, has no logarithm."""
    points = [(row["step"], row.get(field)) for row in rows]
    return [point for point in points if is_number(point[1]) and (point[1] > 0 or "ratio" not in field)]


def _samples(run):
    """The prompts in the order of the file, each with its newest answers first."""
    prompts = {}
    for (step, prompt), answer in run.samples.items():
        prompts.setdefault(prompt, []).append((step, _cut(answer)))
    shown = list(prompts.items())[:MOST_PROMPTS]
    return [
        {"prompt": _cut(prompt), "answers": sorted(answers, reverse=True)[:MOST_ANSWERS]} for prompt, answers in shown
    ]


def _words(value):
    try:
        return _cut("" if value is None else str(value))
    except RecursionError:  # lists in lists, deeper than Python writes them
        return "…"


def _cut(text):
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"
