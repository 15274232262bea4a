"""Two hosts, each a network namespace with a cable of its own: a cable is cut, and neither waits for ever."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ember_mlx.finetune import checkpoints

TIMEOUTS = (2, 10, 50)  # a host that other processes keep waiting may come too late before any cable is cut
BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


def can_make_namespaces():
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"ember{os.getpid()}try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    return made and subprocess.run(["ip", "netns", "del", name], check=False).returncode == 0


@pytest.mark.skipif(not can_make_namespaces(), reason="needs Linux, root and iproute2")
def test_a_cut_cable_ends_both_hosts_and_nothing_is_saved_after_it(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import machines
    import network_hosts

    monkeypatch.setattr(network_hosts, "TRAIN", network_hosts.TRAIN.replace("sleep(0.1)", "sleep(0.02)"))
    with machines.prepared(2, patience=2) as hosts:
        campaign = machines.Campaign(hosts, 0)
        for timeout in TIMEOUTS:
            monkeypatch.setattr(machines, "TIMEOUT", timeout)
            run = network_hosts.Run(hosts, campaign.words(1000))  # of steps that never end
            try:
                run.wait_for_step(12)  # the limit is 20 mean steps, if that is more, and the first is slow
                break
            except AssertionError:
                if 75 not in run.finish()[0] or timeout == TIMEOUTS[-1]:
                    raise
        hosts.link(1, "down")
        campaign.ends_together(run, 75, 60)
        last = max(int(line.split()[1]) for line in run.said(0).splitlines() if line.startswith("step "))
        saved = [path.name for path in checkpoints.in_folder(campaign.adapter(0))]
        assert saved[-1] == f"step-{last - last % 4:07}"
        assert not campaign.adapter(1).exists()
