"""Processes of this machine that work together, for two_gpus.py and two_macs.py: started, watched, ended in time."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Processes:
    """One process for each environment, in a folder; what each says goes to a file of its own.

    Args:
        words: After ``python``.
        environments: Of each process, what is added to this one's, or with None taken from it.
        folder: Made if it is not there.
    """

    def __init__(self, words, environments, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.running = folder, []
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        for number, own in enumerate(environments):
            with open(self._file(number), "w") as said:
                environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | own
                environment = {name: value for name, value in environment.items() if value is not None}
                command = [sys.executable, *map(str, words)]
                self.running.append(subprocess.Popen(command, env=environment, stdout=said, stderr=said))

    def _file(self, number):
        return self.folder / f"said{number}.txt"

    def said(self, number=0):
        """All that a process has said so far."""
        return self._file(number).read_text(errors="replace")

    def wait_for(self, pattern, within):
        """Until the first process says this on a line of its own."""
        end = time.monotonic() + within
        while not re.search(rf"^{pattern}$", self.said(), re.MULTILINE):
            assert self.running[0].poll() is None, f"it ended before it said {pattern!r}: {self.said()[-800:]}"
            assert time.monotonic() < end, f"it did not say {pattern!r} within {within} s: {self.said()[-800:]}"
            time.sleep(0.02)

    def finish(self, within):
        """Exit codes and seconds, one for each; AssertionError for one that is not gone in time. None outlives this."""
        start, codes, seconds = time.monotonic(), [None] * len(self.running), [None] * len(self.running)
        try:
            while None in codes and time.monotonic() - start < within:
                for number, process in enumerate(self.running):
                    if codes[number] is None and process.poll() is not None:
                        codes[number], seconds[number] = process.returncode, round(time.monotonic() - start, 1)
                time.sleep(0.02)
        finally:
            self.end()
        late = [number for number, code in enumerate(codes) if code is None]
        assert not late, f"process {late[0]} was not gone after {within} s: {self.said(late[0])[-800:]}"
        return codes, seconds

    def succeed(self, within):
        """Wait for all of them to exit with 0."""
        codes, _ = self.finish(within)
        told = "\n".join(self.said(number)[-1500:] for number, code in enumerate(codes) if code)
        assert not any(codes), f"exit codes {codes}: {told}"

    def end(self):
        for process in self.running:
            process.kill()
            process.wait()

    def errors(self, number):
        """The lines in which a process told of an error."""
        return [line for line in self.said(number).splitlines() if "error:" in line or "Traceback" in line]


def free_port():
    """A port that nobody uses, below those that the system gives to others' connections."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as found:
            if found.connect_ex(("127.0.0.1", port)):
                return port


def ring(folder, count):
    """MLX's variables for each of so many workers of this machine, over the ring; the hosts stand in a file there."""
    hosts = folder / f"hosts{count}.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{free_port()}"] for _ in range(count)]))
    return [{"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)} for rank in range(count)]


def prepare(folder):
    """What two_workers.py trains, for a process of its own: MLX is not to start in this one."""
    from two_workers import prepare

    prepare(folder)


def as_shell(code):
    """An exit code as a shell shows it: 143 for a death by SIGTERM."""
    return 128 - code if code < 0 else code


SIGNALS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGHUP}
