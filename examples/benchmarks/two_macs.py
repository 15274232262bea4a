"""For volunteers with two Macs: what several machines must hold, there. It prints one report; send it to us.

    mlx.launch --hostfile hosts.json -- python examples/benchmarks/two_macs.py
    mlx.launch --hostfile hosts.json --backend jaccl -- python examples/benchmarks/two_macs.py
    python examples/benchmarks/two_macs.py --loopback

The first two on two Macs that `mlx.distributed_config` has connected, each with this folder at the same place and one
version of Python and of all packages. The last on one machine, which stands for both. It takes a few minutes, makes its
tiny model itself and leaves nothing behind. Every wait has a limit.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarking import in_fresh_process, machine
from local_processes import Processes, as_shell, prepare, ring

HERE = Path(__file__).parent
SLOW_SECONDS, SLOW_STEPS = 8, 4  # Metal ends a command buffer that waits for more than about 5 s
OTHERS = ("MLX_RANK", "MLX_HOSTFILE", "MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR")  # say who they are
LIMIT = 300  # seconds of a part


class Host:
    """This host's share of the parts; each part is a process of its own, that joins the one of the other host."""

    def __init__(self, folder, limit):
        self.rank, self.folder, self.limit = int(os.environ["MLX_RANK"]), folder, limit
        self.exit_codes, self.alone = {}, {}

    def run(self, name, part, alone=False, **settings):
        """Do a part of two_workers.py; returns its process, which has ended."""
        words = [HERE / "two_workers.py", part, self.folder / name]
        own = [dict.fromkeys(OTHERS)] if alone else [{}]
        process = Processes([*words, *(f"{key}={value}" for key, value in settings.items())], own, self.folder / name)
        start = time.monotonic()
        try:
            [code], _ = process.finish(self.limit)
        except AssertionError:
            code = "none within the limit"
        self.exit_codes[name] = code if isinstance(code, str) else as_shell(code)
        process.seconds = round(time.monotonic() - start, 1)
        return process

    def found(self, process):
        path = process.folder / "found0.json"
        return json.loads(path.read_text()) if path.exists() else None

    def last_lines(self, process):
        return " | ".join(process.said().strip().splitlines()[-2:])[-400:]

    def parts(self):
        """Name of a part -> (holds or fails or seen, what was seen), as the first host sees it."""
        runs = self.run("runs", "runs")
        averages = self.run("averages", "averages")
        slow = self.run("slow", "train", slow=1, seconds=SLOW_SECONDS, more=f"--iters {SLOW_STEPS}")
        killed = self.run("killed", "die")  # last: nothing of the other host answers after it
        if self.rank:
            return {}
        said = [line for line in killed.said().splitlines() if "error:" in line]
        ended = self.exit_codes["killed"] == 75 and len(said) == 1
        went_on = self.exit_codes["slow"] == 0
        return {
            "1  equal weights and state on both": self.judge_runs(runs),
            "2  as one machine would": self.judge_alone(runs),
            "3  averages by dtype": ("seen", self.found(averages) or self.last_lines(averages)),
            "9  the other is killed": (_verdict(ended), f"{killed.seconds} s in all; {' | '.join(said)[-400:]}"),
            f"   steps of {SLOW_SECONDS} s on the other": (
                _verdict(went_on),
                f"{SLOW_STEPS} steps, {slow.seconds} s in all; {'went on' if went_on else self.last_lines(slow)}",
            ),
        }

    def judge_runs(self, process):
        found = self.found(process)
        if found is None:
            return _verdict(False), self.last_lines(process)
        differs = {name: each["equal"] for name, each in found.items() if each["equal"] is not True}
        return _verdict(not differs), differs or f"{', '.join(found)}: equal, {process.seconds} s in all"

    def judge_alone(self, process):
        import numpy as np
        from two_workers import MIXED, compare

        together = self.found(process)
        if together is None:
            return _verdict(False), "there are no two to compare with one"
        alone = self.run("alone", "runs", alone=True, only=MIXED)
        single = self.found(alone)
        if single is None:
            return _verdict(False), self.last_lines(alone)
        updates = [np.load(each.folder / "updates.npz") for each in (process, alone)]
        error, losses = compare(*updates, together[MIXED]["losses"], single[MIXED]["losses"])
        return _verdict(error <= 1e-4 and losses <= 1e-5), f"updates {error:.1e} apart, losses {losses:.1e}"


def _verdict(holds):
    return "holds" if holds else "FAILS"


def backend():
    return "jaccl" if os.environ.get("MLX_IBV_DEVICES") else "ring"


def supervise(limit):
    """One host's process of mlx.launch: it starts the parts, and prints what its host has to tell."""
    with tempfile.TemporaryDirectory() as folder:
        in_fresh_process(prepare, Path(folder))
        here, host = in_fresh_process(machine), Host(Path(folder), limit)
        parts = host.parts()
    lines = [f"host {host.rank}: {json.dumps(here)}", f"host {host.rank}: exit codes {json.dumps(host.exit_codes)}"]
    lines += [f"{verdict:5}  {name}: {seen}" for name, (verdict, seen) in parts.items()]
    head = [f"Report of two_macs.py, by the {backend()}"] if host.rank == 0 else []
    print("\n".join([*head, *lines]), flush=True)
    return all(verdict != "FAILS" for verdict, _ in parts.values())


def loopback(limit):
    """Both hosts on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        processes = Processes([__file__, "--limit", limit], ring(Path(folder), 2), Path(folder))
        codes, _ = processes.finish(6 * limit)
        print("".join(processes.said(rank) for rank in range(2)), end="")
    return not any(codes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loopback", action="store_true", help="both on this machine, over the ring")
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds of a part; more on a machine that is busy")
    args = parser.parse_args()
    if args.loopback:
        sys.exit(not loopback(args.limit))
    if not os.environ.get("MLX_RANK"):
        parser.error("start it by mlx.launch on two hosts, or say --loopback")
    sys.exit(not supervise(args.limit))


if __name__ == "__main__":
    main()
