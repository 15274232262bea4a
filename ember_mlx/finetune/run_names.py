"""What several runs are called beside each other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

__all__ = ["Run", "name_runs"]

# Where a run is and how it is watched; these say nothing of what was tried.
NOT_OF_THE_RUN = {
    *("adapter_path", "log_jsonl", "overwrite", "resume", "report_to", "project_name", "config"),
    *("streaming_notes", "memory_limit", "peer_timeout"),
}
LONGEST_NAME = 90  # of a legend in two columns, in characters


class Run(Protocol):
    """What has options, and a file that tells of it."""

    path: Path
    options: dict


def name_runs(logs: Sequence[Run]) -> list[str]:
    """The options in which the runs differ, if these are short and tell them apart; otherwise the files."""
    options = [{key: value for key, value in log.options.items() if key not in NOT_OF_THE_RUN} for log in logs]
    keys = sorted(set().union(*options))
    differing = [key for key in keys if any(run.get(key) != options[0].get(key) for run in options)]
    names = [", ".join(f"{key.replace('_', '-')} {run.get(key)}" for key in differing) for run in options]
    if len(set(names)) == len(logs) > 1 and max(map(len, names)) <= LONGEST_NAME:
        return names
    paths = [str(log.path) for log in logs]
    return [f"./{path}" if path.startswith("_") else path for path in paths]  # matplotlib hides labels like _this
