"""The report as one HTML page: pictures embedded, nothing to load from anywhere, light and dark."""

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ember_mlx.geometry.sampling import MEMORY_SHARE
from ember_mlx.geometry.verdict import MATRICES, NO, PARTLY, UNKNOWN, YES
from ember_mlx.plots.style import THEMES
from ember_mlx.shared.units import format_bytes

__all__ = ["html"]

MARKS = {YES: "✓", PARTLY: "~", NO: "✗", UNKNOWN: "?"}
TITLES = {
    YES: "Ember suits",
    PARTLY: "Ember may suit: compare first",
    NO: "Ember does not suit",
    UNKNOWN: "Not enough to tell",
}


def html(found: dict, drawn: dict[str, list[Path]]) -> str:
    """The page, by ``page.html.jinja``.

    Args:
        found (dict): The report.
        drawn (dict): Name of each picture -> its two PNG files, light and dark.
    """
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"bytes": format_bytes, "loss": _loss}
    return environment.get_template("page.html.jinja").render(
        found
        | {
            "title": TITLES[found["verdict"]["suits"]],
            "marks": MARKS,
            "matrices": MATRICES,
            "memory_share": MEMORY_SHARE,
            "themes": THEMES,
            "samples": _first_and_last(found["samples"]),
            "pictures": {name: _embedded(*files) for name, files in drawn.items()},
            "tables": [table | _rows(table) for table in found["tables"]],
            "token_classes": [
                (name, f"{one['tokens']:,}", f"{one['share_of_text']:.1%}", f"{one['seen']:,}")
                for name, one in found["tokens"].items()
            ],
        }
    )


def _embedded(light, dark):
    return {name: base64.b64encode(file.read_bytes()).decode() for name, file in (("light", light), ("dark", dark))}


def _first_and_last(samples):
    """Of each prompt: the prompt, and the answers at the first and the last validation, with their steps; or None."""
    if not samples:
        return None
    first, last = samples[0], samples[-1]
    pairs = zip(first["samples"], last["samples"], strict=True)
    rows = [(one["prompt"], one["answer"], other["answer"]) for one, other in pairs]
    return {"steps": (first["step"], last["step"]), "rows": rows}


def _rows(table):
    """The cells of a table's three lists: all rows by class, the rows that moved most, the largest steps."""
    classes = [(name, one["learning_rates"], one["of_their_size"]) for name, one in table["rows_moved"].items()]
    return {
        "by_class": [
            (name, f"{rates['count']:,}", f"{rates['median']:.1f}", f"{sizes['median']:.2%}")
            for name, rates, sizes in classes
            if rates["count"]
        ],
        "moved_most": [
            (
                row["text"],
                row["class"],
                f"{row['in_the_text']:,}",
                f"{row['learning_rates']:.1f}",
                f"{row['of_its_size']:.1%}",
            )
            for row in table["rows_moved_most"]
        ],
        "largest_steps": [
            (
                row["text"],
                row["class"],
                f"{row['update']:,}",
                _last_seen(row["last_seen"]),
                f"{row['learning_rates']:.1f}",
            )
            for row in table["largest_steps"]
        ],
    }


def _last_seen(gap):
    return f"{gap} before" if gap[0].isdigit() else gap


def _loss(value):
    return "unknown" if value is None else f"{value:.3f}"
