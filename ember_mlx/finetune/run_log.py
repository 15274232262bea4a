"""The log of a run, ``--log-jsonl FILE``: one JSON object a line. What is in it, and reading it.

- ``{"event": "start", "step": 0, "format": 1, "options": {...}, "versions": {...}}``: the run's options, and what it
  ran with. A run that was resumed appends another such line, with the steps of its checkpoint: what the lines before
  it tell of later steps is told again, and counts no more.
- ``{"event": "validation", "step": 0, "validation_loss": 2.1, "perplexity": 8.17}``, after so many steps: nats a token,
  and e to that power. Where tables train, all are of the same batches; mlx-lm draws others.
- ``{"event": "samples", "step": 0, "samples": [{"prompt": "...", "answer": "..."}]}``: the answers to
  ``--sample-prompts`` at that validation.
- ``{"event": "train", "step": 10, ...}`` every ``--steps-per-report``, and after the last step: see ``TRAIN``.
- ``{"event": "end", "step": 100, "validation_loss": 1.2, "perplexity": 3.32}`` after the last step, over the batches of
  the first validation.

Of two lines of one event and step the later one counts. Logs of older releases lack the perplexity. null stands for
what there is not: no tables train, a loss that is no number.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from ember_mlx.finetune import safe_reading
from ember_mlx.shared.errors import InputError

__all__ = ["FORMAT", "LARGEST", "TRAIN", "Log", "read"]

FORMAT = 1
NUMBER = (int, float, type(None))
EVENT = {"event": str, "step": int}
TRAIN = {
    "train_loss": NUMBER,  # nats a token, the mean since the report before or the resumption
    "learning_rate": NUMBER,  # of all that is no table, in this step
    "table_learning_rate": NUMBER,
    "tokens_per_second": NUMBER,
    "trained_tokens": NUMBER,
    "peak_memory": NUMBER,  # bytes, since the start or the resumption
    "update_ratio_tables": NUMBER,  # ||w_new - w|| / ||w|| over all tables, in the last step that changed weights
    "update_ratio_body": NUMBER,  # the same for everything else that trains
}
TYPES = {
    "start": EVENT | {"format": int, "options": dict, "versions": dict},
    "train": EVENT | TRAIN,
    "validation": EVENT | {"validation_loss": NUMBER, "perplexity": NUMBER},
    "samples": EVENT | {"samples": [{"prompt": str, "answer": str}]},
    "end": EVENT | {"validation_loss": NUMBER, "perplexity": NUMBER},
}
LARGEST = 1e300  # of what a run counts and measures


@dataclass
class Log:
    """What counts of a log.

    ``options`` and ``versions`` are those of the last start. ``train``, ``validation``, ``samples`` and ``end`` hold
    the objects of these events, as in the file, in the order of their steps. ``unfinished`` says that the last line was
    cut off: it is not among them.
    """

    path: Path
    options: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    train: list[dict] = field(default_factory=list)
    validation: list[dict] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)
    end: list[dict] = field(default_factory=list)
    unfinished: bool = False


def read(path: str | Path) -> Log:
    """Read a log, also that of a run which is under way or was killed.

    Raises:
        InputError: when this file does not exist, and for a line that is not of such a log, with its number. Only the
            last one, if it has no end of line, may be anything.
    """
    path = Path(path)
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except (OSError, ValueError) as error:
        raise InputError(f"log {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not lines:
        raise InputError(f"log {path}: it has no line; give the FILE of `ember-mlx train --log-jsonl FILE`")
    log = Log(path, unfinished=bool(rest))
    rows = {}
    for number, line in enumerate(lines, 1):
        row = _parse(line, f"log {path} line {number}")
        if row["event"] == "start":
            rows = {key: kept for key, kept in rows.items() if kept["step"] <= row["step"]}
            log.options, log.versions = row["options"], row["versions"]
        elif number == 1:
            raise InputError(f"log {path} line 1: is not the start of a log; give one with its first line")
        else:
            rows[row["event"], row["step"]] = row
    for row in sorted(rows.values(), key=lambda row: row["step"]):
        getattr(log, row["event"]).append(row)
    return log


def _parse(line, where):
    try:
        row = json.loads(line, parse_constant=safe_reading.no_constant)
    except (RecursionError, ValueError) as error:
        raise InputError(f"{where}: is not JSON ({error}); fix or remove that line") from error
    event = row.get("event") if isinstance(row, dict) else None
    if not isinstance(event, str) or event not in TYPES:
        raise InputError(f"{where}: is not of such a log: its event must be one of {', '.join(TYPES)}")
    if event == "start" and row.get("format") != FORMAT:
        raise InputError(f"{where}: is of format {row.get('format')!r}; this release reads format {FORMAT}")
    if event in ("validation", "end"):
        row.setdefault("perplexity", None)
    safe_reading.check_types(row, TYPES[event], where)
    numbers = [value for value in row.values() if isinstance(value, int | float)]
    if row["step"] < 0 or not all(-LARGEST < number < LARGEST for number in numbers):
        raise InputError(f"{where}: has a number that cannot be; fix or remove that line")
    return row
