"""Hosts of one machine, as network namespaces, and a run of `ember-mlx train` on all of them, for machines.py.

Linux as root, with iproute2.
"""

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 150  # seconds, of every wait here
# The command line, with a pause in each step, so that there is a time to disturb it, and at its end the sum of all
# weights that train.
TRAIN = """import signal, sys, time
for number in (signal.SIGINT, signal.SIGHUP):  # which a shell's "&" and nohup let a process ignore
    signal.signal(number, signal.SIG_DFL)
from ember_mlx.shared.replacing import torch_hidden
with torch_hidden():
    from ember_mlx import cli
    from ember_mlx.finetune import run, step
    from ember_mlx.finetune.resume import weights_checksum
train, take = run.train_model, step.Step.__call__
def train_model(args, choices, model, *rest):
    result = train(args, choices, model, *rest)
    print("weights", weights_checksum(model.trainable_parameters()), file=sys.stderr)
    return result
taken = []
def paused(*arguments, **keywords):
    time.sleep(0.1)
    taken.append(take(*arguments, **keywords))
    sent = next((line.split()[9] for line in open("/proc/net/dev") if "wire:" in line), None)
    print("sent", sent, file=sys.stderr)
    print("step", len(taken), file=sys.stderr, flush=True)
    return taken[-1]
run.train_model, step.Step.__call__ = train_model, paused
cli.main()"""


class Hosts:
    """So many namespaces around one that routes between them; ``folders`` has each one's own.

    ``patience`` times as long is waited for a run: more than 1 on a machine with much else to do.
    """

    def __init__(self, count, folder, patience=1):
        self.count, self.patience = count, patience
        self.names = [f"ember{os.getpid()}h{rank}" for rank in range(count)]
        self.switch = f"ember{os.getpid()}s"
        self.folders = [folder / f"host{rank}" for rank in range(count)]

    def __enter__(self):
        self.ip("netns", "add", self.switch)
        forward = ["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]
        subprocess.run(["ip", "netns", "exec", self.switch, *forward], check=True)
        for rank, name in enumerate(self.names):
            self.ip("netns", "add", name)
            self.ip("link", "add", "wire", "netns", name, "type", "veth", "peer", f"port{rank}", "netns", self.switch)
            self.ip("addr", "add", f"10.77.{rank}.254/24", "dev", f"port{rank}", inside=self.switch)
            self.ip("addr", "add", f"{self.address(rank)}/24", "dev", "wire", inside=name)
            self.ip("link", "set", f"port{rank}", "up", inside=self.switch)
            for device in ("lo", "wire"):
                self.ip("link", "set", device, "up", inside=name)
            self.ip("route", "add", "default", "via", f"10.77.{rank}.254", inside=name)
        return self

    def __exit__(self, *error):
        for name in (*self.names, self.switch):
            subprocess.run(["ip", "netns", "del", name], check=False)

    def ip(self, *words, inside=None):
        subprocess.run(["ip", *(["-n", inside] if inside else []), *words], check=True)

    def address(self, rank):
        return f"10.77.{rank}.1"

    def link(self, rank, state):
        """Plug a host's cable in, "up", or out, "down"."""
        self.ip("link", "set", f"port{rank}", state, inside=self.switch)

    def shape(self, *bucket):
        """Rate and queue of every host's cable, in the words of tc-tbf; none is a good cable.

        A queue of few packets loses some. tc-netem, which could lose them at random, is not in every kernel.
        """
        for name in self.names:
            words = ["add", "dev", "wire", "root", "tbf", *bucket] if bucket else ["del", "dev", "wire", "root"]
            subprocess.run(["ip", "netns", "exec", name, "tc", "qdisc", *words], check=True)

    def dropped(self):
        """Packets that the queues of all hosts have lost since :meth:`shape`."""
        told = [subprocess.run(["ip", "netns", "exec", name, "tc", "-s", "qdisc", "show", "dev", "wire"],
                               capture_output=True, text=True, check=True).stdout for name in self.names]  # fmt: skip
        return sum(int(count) for text in told for count in re.findall(r"dropped (\d+)", text))


class Run:
    """One run on all hosts, started; ``own`` has further words for a host, by its rank."""

    def __init__(self, hosts, words, own=None):
        self.folders, self.patience = hosts.folders, hosts.patience
        addresses = [[f"{hosts.address(rank)}:{29_500 + random.randrange(2000)}"] for rank in range(hosts.count)]
        self.began, self.processes = time.monotonic(), {}
        for rank, folder in enumerate(hosts.folders):
            (folder / "hosts.json").write_text(json.dumps(addresses))
            known = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(folder / "hosts.json"), "PYTHONPATH": str(ROOT)}
            known |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
            words_here = [*words, *(own or {}).get(rank, [])]
            with open(folder / "said", "w") as said:
                self.processes[rank] = subprocess.Popen(
                    ["ip", "netns", "exec", hosts.names[rank], sys.executable, "-c", TRAIN, "train", *words_here],
                    cwd=folder, env=os.environ | known, stdout=said, stderr=said,
                )  # fmt: skip

    def said(self, rank):
        return (self.folders[rank] / "said").read_text()

    def wait_for_step(self, step):
        """Until the first host has taken it."""
        end = time.monotonic() + LIMIT * self.patience
        while not re.search(rf"^step {step}$", self.said(0), re.MULTILINE):
            if time.monotonic() > end or self.processes[0].poll() is not None:
                raise AssertionError(f"step {step} was never reached: {self.said(0)[-500:]}")
            time.sleep(0.02)

    def sent_by_steps(self, rank):
        """Bytes that had left a host after each step."""
        return [int(sent) for sent in re.findall(r"^sent (\d+)$", self.said(rank), re.MULTILINE)]

    def signal(self, rank, number):
        self.processes[rank].send_signal(number)  # "ip netns exec" becomes the command

    def finish(self, within=LIMIT):
        """Exit codes by rank, and seconds until the last; AssertionError for one that is not gone in time."""
        start, within = time.monotonic(), within * self.patience
        try:
            for rank, process in self.processes.items():
                try:
                    process.wait(max(within - (time.monotonic() - start), 0.01))
                except subprocess.TimeoutExpired:
                    raise AssertionError(
                        f"host {rank} is not gone after {within} s: {self.said(rank)[-500:]}"
                    ) from None
        finally:
            for process in self.processes.values():
                process.kill()
                process.wait()
        return [process.returncode for process in self.processes.values()], time.monotonic() - start

    def weights(self):
        """The sums of the hosts' weights at the end, one if they are equal."""
        sums = {
            (re.findall(r"^weights (.*)$", self.said(rank), re.MULTILINE) or ["none"])[-1] for rank in self.processes
        }
        assert len(sums) == 1, f"the hosts end with different weights: {sums}"
        return sums.pop()

    def lines(self, rank):
        """The lines of errors that a host said."""
        return [line for line in self.said(rank).splitlines() if "error:" in line or "Traceback" in line]
