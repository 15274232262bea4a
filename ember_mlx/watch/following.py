"""A run's log, read as it grows. :mod:`ember_mlx.finetune.run_log` says what is in it.

That module refuses a log with a line that it cannot read. Here a page is to stay up while a run goes on, so such a line
is left out and named, and records of kinds that are not shown are left alone.
"""

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from ember_mlx.finetune.run_log import FORMAT, LARGEST
from ember_mlx.shared.errors import InputError

__all__ = ["ENDED", "NO_LOG", "RUNNING", "STOPPED", "WAITING", "RunFile", "is_number"]

WAITING, RUNNING, ENDED, STOPPED, NO_LOG = "waiting", "running", "ended", "stopped", "no log"
QUIET = 30.0  # seconds without a line before it is asked whether the run still holds its log
ANSWERS = ("answer", "completion", "response", "output", "text")  # what a record may call the model's answer


class RunFile:
    """What a log holds so far.

    ``options`` and ``versions`` are those of its last start. ``rows`` are the records that count, by event and step,
    ``samples`` the answers by step and prompt, ``skipped`` the numbers of lines that are no records, and ``changes``
    counts the reads that found something new. ``problem`` says why the file is no log, and ``trouble`` why it could not
    be read the last time.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.changes, self.trouble = 0, ""
        self._known_free = None
        self._forget()

    def check(self) -> None:
        """Refuse what will never be a log; a file that does not exist yet is waited for.

        Raises:
            InputError: for a folder, a file that cannot be read, and one that begins otherwise.
        """
        try:
            if self.path.exists() and not self.path.is_file():
                raise InputError(f"{self.path}: is not a file; give the FILE of `ember-mlx train --log-jsonl FILE`")
            self.read_more()
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{self.path}: cannot be read ({reason}); give another file") from error
        if self.state == NO_LOG:
            raise InputError(f"{self.path}: {self.problem}")

    def read_more(self) -> None:
        """Take the lines that are whole and new; read all anew where the file was replaced.

        Raises:
            OSError: when the file is there and cannot be read.
        """
        try:
            if self.problem:
                if _fingerprint(self._stat) == _fingerprint(os.stat(self.path)):
                    return
                self._forget()
            with open(self.path, "rb") as file:
                same_start = file.read(len(self._first_line)) == self._first_line
                file.seek(self._end - len(self._last_line))
                data = file.read()
                if not same_start or not data.startswith(self._last_line):
                    self._forget()
                    file.seek(0)
                    data = file.read()
                self._stat = os.fstat(file.fileno())
                self._look_who_writes(file)
        except FileNotFoundError:
            if self._lines:
                self._forget()
            return
        *lines, _ = data[len(self._last_line) :].split(b"\n")
        for line in lines:
            self._lines += 1
            self._take(line)
            if self.problem:
                break
            self._end, self._last_line = self._end + len(line) + 1, line + b"\n"
            self._first_line = self._first_line or self._last_line
        if lines:
            self.changes += 1

    @property
    def state(self) -> str:
        """One of WAITING, RUNNING, ENDED, STOPPED and NO_LOG."""
        if self.problem:
            return NO_LOG
        if not self._lines:
            return WAITING
        if self.ended:
            return ENDED
        return STOPPED if self._known_free == _fingerprint(self._stat) else RUNNING

    def _forget(self):
        self.options, self.versions, self.rows, self.samples, self.skipped = {}, {}, {}, {}, []
        self.ended, self.problem = False, ""
        self._end, self._first_line, self._last_line, self._lines, self._stat = 0, b"", b"", 0, None
        self.changes += 1

    def _take(self, line):
        row = _record(line)
        if self._lines == 1 and (row is None or row["event"] != "start" or row.get("format") != FORMAT):
            self.problem = f"is no log of format {FORMAT}; give the FILE of `ember-mlx train --log-jsonl FILE`"
        elif row is None:
            self.skipped.append(self._lines)
        elif row["event"] == "start":
            # What the lines before it tell of later steps is told again.
            self.rows = {key: kept for key, kept in self.rows.items() if key[1] <= row["step"]}
            self.samples = {key: kept for key, kept in self.samples.items() if key[0] <= row["step"]}
            self.options, self.versions = _dictionary(row.get("options")), _dictionary(row.get("versions"))
            self.ended = False
        else:
            self.ended = self.ended or row["event"] == "end"
            self.rows[row["event"], row["step"]] = row
            # A record may be one answer, or hold a list of them.
            lists = [value for value in row.values() if isinstance(value, list)]
            for one in [row, *(one for found in lists for one in found if isinstance(one, dict))]:
                answer = next((one[key] for key in ANSWERS if isinstance(one.get(key), str)), None)
                if isinstance(one.get("prompt"), str) and answer is not None:
                    self.samples[row["step"], one["prompt"]] = answer

    def _look_who_writes(self, file):
        """A run holds a lock on its log. Asking takes that lock for a moment: a free file is not asked twice."""
        if time.time() - self._stat.st_mtime < QUIET or self._known_free == _fingerprint(self._stat):
            return
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)
            self._known_free = _fingerprint(self._stat)
        except OSError:  # held, or a file system that knows no locks
            pass


def is_number(value: Any) -> bool:
    """Whether a record's value can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def _record(line):
    try:
        row = json.loads(line)
    except (RecursionError, ValueError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("event"), str):
        return None
    return row if type(row.get("step")) is int and 0 <= row["step"] < LARGEST else None


def _dictionary(value):
    return value if isinstance(value, dict) else {}


def _fingerprint(stat):
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
