"""Several hosts, each a network namespace of this machine, and all that can go wrong between them.

    sudo python examples/benchmarks/machines.py --out RESULT.json [--only cut heal] [--hosts 2]

Linux as root, with iproute2. Each host has a network of its own, behind a router, and a folder of its own: data and
model are there twice, checkpoints only where they were written. The hosts train a tiny model over MLX's ring, on the
CPU. Cables are cut, healed, slowed and made lossy; processes are killed, stopped and signalled. What must hold stands
in each case; a case that does not hold is told, and the exit code is 1.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from benchmarking import SEED, machine, write
from network_hosts import LIMIT, ROOT, Hosts, Run

TIMEOUT = 8  # --peer-timeout


class Campaign:
    """The cases, each a method that returns what it saw and asserts what must hold."""

    def __init__(self, hosts, seed, times=10):
        self.hosts, self.random, self.number, self.times = hosts, random.Random(seed), 0, times
        self.expected, self.more = None, []

    def words(self, iters=16, *more):
        """A run into a new folder on each host."""
        self.number += 1
        given = {"--model": "model", "--data": "data", "--adapter-path": f"adapters{self.number}", "--iters": iters}
        rows = 4 // self.hosts.count * self.hosts.count  # there are four to validate on
        given |= {"--batch-size": rows, "--max-seq-length": 32, "--save-every": 4, "--steps-per-report": 1}
        given |= {"--val-batches": 1, "--steps-per-eval": 1000, "--peer-timeout": TIMEOUT}
        return [str(word) for pair in given.items() for word in pair] + self.more + list(more)

    def adapter(self, rank=0):
        return self.hosts.folders[rank] / f"adapters{self.number}"

    def undisturbed(self):
        """The weights of a run that nobody disturbs."""
        if self.expected is None:
            run = Run(self.hosts, self.words())
            codes, _ = run.finish()
            assert codes == [0] * self.hosts.count, run.said(0)[-500:]
            self.expected = run.weights()
        return self.expected

    def disturbed(self, disturb, *more):
        """Train, disturb at the sixth step, and end as if nothing had been."""
        run = Run(self.hosts, self.words(16, *more))
        run.wait_for_step(6)
        disturb(run)
        codes, _ = run.finish()
        assert codes == [0] * self.hosts.count, run.said(0)[-500:]
        assert run.weights() == self.undisturbed(), "other weights than those of an undisturbed run"
        return "ended with the weights of an undisturbed run"

    def resume(self, words):
        run = Run(self.hosts, [*words, "--resume"])
        codes, _ = run.finish()
        assert codes == [0] * self.hosts.count, run.said(0)[-800:]
        assert run.weights() == self.undisturbed(), "other weights than those of an undisturbed run"
        assert not self.adapter(1).exists(), "host 1 has written an adapter folder"

    def ends_together(self, run, code, within, ranks=None):
        """All exit with that code and one line each at most; nothing is saved after that."""
        codes, seconds = run.finish(within)
        for rank, found in zip(run.processes, codes, strict=True):
            if ranks is None or rank in ranks:
                assert found == code, f"host {rank} exits with {found}: {run.said(rank)[-500:]}"
                assert len(run.lines(rank)) <= 1, run.lines(rank)
                assert "Traceback" not in run.said(rank)
                limit = re.search(r"error: .* waited (\d+) s", run.said(rank))  # 20 mean steps may be more
                assert not limit or seconds <= int(limit[1]) + 5 * run.patience, f"{seconds} s: {limit[0]}"
        return round(seconds, 1)

    def case_equal(self):
        """Own folders: 8 steps, then 16 by --resume, are 16 at once."""
        words = self.words(8)
        assert Run(self.hosts, words).finish()[0] == [0] * self.hosts.count
        words[words.index("--iters") + 1] = "16"
        self.resume([*words, "--resume-with-changes"])
        return "8 + 8 steps are 16, bit for bit, on all hosts"

    def case_kill(self, times=None):
        """SIGKILL of any host at any step: the others exit with 75; --resume ends as if nothing had been."""
        seconds, times = [], times or self.times
        for _ in range(times):
            words, rank = self.words(), self.random.randrange(self.hosts.count)
            run = Run(self.hosts, words)
            run.wait_for_step(self.random.randrange(5, 14))
            run.signal(rank, signal.SIGKILL)
            others = [other for other in range(self.hosts.count) if other != rank]
            seconds.append(self.ends_together(run, 75, TIMEOUT + 5, others))
            self.resume(words)
        return {"times": times, "seconds until all had gone": seconds}

    def case_signals(self):
        """SIGINT, SIGTERM, SIGHUP to one or to all: one step, one checkpoint, the usual exit code; resumed bitwise."""
        told = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            for ranks in ([0], [self.hosts.count - 1], list(range(self.hosts.count))):
                words = self.words()
                run = Run(self.hosts, words)
                run.wait_for_step(6)
                for rank in ranks:
                    run.signal(rank, number)
                told[f"{number.name} to {ranks}"] = self.ends_together(run, 128 + number, LIMIT)
                self.resume(words)
        return told

    def case_cut(self):
        """A cable is cut for good: all exit with 75 within the timeout and 5 seconds."""
        run = Run(self.hosts, words := self.words())
        run.wait_for_step(6)
        self.hosts.link(1, "down")
        try:
            seconds = self.ends_together(run, 75, TIMEOUT + 5)
            told = [line for rank in run.processes for line in run.lines(rank)]
        finally:
            self.hosts.link(1, "up")
        self.resume(words)
        return {"seconds": seconds, "told": told}

    def case_heal(self):
        """A cable is out for 5 seconds: the run goes on."""

        def disturb(run):
            self.hosts.link(1, "down")
            time.sleep(5)
            self.hosts.link(1, "up")

        # TCP tries again after pauses that double: a cable may be back for as long as it was out before it is used.
        return self.disturbed(disturb, "--peer-timeout", "20")

    def case_stop(self):
        """A host stands still for 10 seconds: the run goes on."""

        def disturb(run):
            run.signal(1, signal.SIGSTOP)
            time.sleep(10)
            run.signal(1, signal.SIGCONT)

        return self.disturbed(disturb, "--peer-timeout", "20")

    def case_slow_and_lossy(self):
        """A cable of 30 Mbit/s, and one whose queue overflows: the same weights."""
        expected, told = self.undisturbed(), {}
        for name, queue in {"slow": ["latency", "400ms"], "lossy": ["limit", "4k"]}.items():
            self.hosts.shape("rate", "30mbit", "burst", "4k", *queue)
            try:
                run = Run(self.hosts, self.words())
                codes, seconds = run.finish()
                told[name] = {"seconds": round(seconds, 1), "packets lost": self.hosts.dropped()}
            finally:
                self.hosts.shape()
            assert codes == [0] * self.hosts.count, run.said(0)[-500:]
            assert run.weights() == expected, "other weights than those of an undisturbed run"
        assert told["lossy"]["packets lost"], "no packet was lost"
        return told

    def case_signal_while_cut(self):
        """SIGTERM to one host while a cable is out: it is gone within 30 seconds."""
        run = Run(self.hosts, self.words())
        run.wait_for_step(6)
        self.hosts.link(1, "down")
        try:
            run.signal(0, signal.SIGTERM)
            codes, seconds = run.finish(30)
        finally:
            self.hosts.link(1, "up")
        return {"exit codes": codes, "seconds": round(seconds, 1)}

    def case_refusals(self):
        """A host without data, without the model, with another option: all exit with 2, one line in all."""
        told = self.refused(Run(self.hosts, self.words(), {1: ["--seed", "7"]}))
        for name in ("data", "model"):
            path = self.hosts.folders[1] / name
            path.rename(path.with_suffix(".away"))
            try:
                told |= self.refused(Run(self.hosts, self.words()))
            finally:
                path.with_suffix(".away").rename(path)
        return told

    def refused(self, run):
        """The line that all hosts together said, and the seconds that it took."""
        seconds = self.ends_together(run, 2, 60)
        [line] = [line for rank in run.processes for line in run.lines(rank)]
        return {line: seconds}

    def case_bytes(self):
        """What a host sends in 8 steps, by step: within 10 % of what plan says."""
        return self.bytes_a_step()

    def case_sharded_bytes(self):
        """The same with 32,000 words and 256 tokens, with whole tables and --shard-tables: at most a tenth of them."""
        told = {}
        for name in ("untied", "tied"):
            for folder in self.hosts.folders:
                wide_model(folder, name)
            words = ["--model", name, "--batch-size", "4", "--max-seq-length", "65"]
            whole, sharded = (self.bytes_a_step(*words, *more) for more in ([], ["--shard-tables"]))
            part = sharded["bytes a step"] / whole["bytes a step"]
            told[name] = {"whole tables": whole, "sharded": sharded, "part": round(part, 4)}
            assert part <= 0.1, told
        return told

    def case_sharded(self):
        """With --shard-tables: resumed, killed and cut as without, and resumed bit for bit."""
        self.expected, before = None, self.expected
        self.more = ["--shard-tables"]
        try:
            found = {name: getattr(self, f"case_{name}")() for name in ("equal", "cut")}
            return found | {"kill": self.case_kill(2)}
        finally:
            self.expected, self.more = before, []

    def bytes_a_step(self, *more):
        """What a host sends, and what plan says; within 10 %."""
        run = Run(self.hosts, self.words(12, "--save-every", "1000", *more))
        assert run.finish()[0] == [0] * self.hosts.count, run.said(0)[-500:]
        sent = run.sent_by_steps(0)
        step, planned = (sent[10] - sent[2]) // 8, self.planned_bytes(*more)
        assert abs(step / planned - 1) <= 0.1, f"{step:,} bytes a step, planned {planned:,}"
        return {"bytes a step": step, "planned": planned}

    def planned_bytes(self, *more):
        """What plan says that a host sends in a step."""
        words = self.words(16, *more)
        del words[words.index("--adapter-path") : words.index("--adapter-path") + 2]
        command = [sys.executable, "-m", "ember_mlx", "plan", *words, "--workers", str(self.hosts.count), "--json"]
        own = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=self.hosts.folders[0], env=own, stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout)["network"]["sent"]


def wide_model(folder, name):
    """A model beside that of the other cases, with 32,000 words; their tokenizer uses the first of them."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.models import llama
    from mlx_lm.utils import save

    _, tokenizer, config = load(str(folder / "model"), return_config=True)
    config |= {"vocab_size": 32_000, "tie_word_embeddings": name == "tied"}
    mx.random.seed(0)
    save(folder / name, folder / "model", llama.Model(llama.ModelArgs.from_dict(config)), tokenizer, config)


def cases(campaign):
    return {name.removeprefix("case_"): getattr(campaign, name) for name in dir(campaign) if name.startswith("case_")}


@contextmanager
def prepared(count, patience=1):
    """The hosts, each with model and data of its own."""
    from interrupted_runs import prepare

    with tempfile.TemporaryDirectory() as folder, Hosts(count, Path(folder), patience) as hosts:
        for rank, own in enumerate(hosts.folders):
            own.mkdir()
            if rank == 0:
                prepare(own)
            else:
                for name in ("model", "data"):
                    shutil.copytree(hosts.folders[0] / name, own / name)
        yield hosts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write; --only adds to it")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=cases(Campaign(None, 0)), metavar="CASE")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--times", type=int, default=10, help="how often a host is killed")
    parser.add_argument("--patience", type=int, default=1, metavar="TIMES", help="wait so many times as long for a run")
    args = parser.parse_args()
    before = json.loads(args.out.read_text())["cases"] if args.only and args.out.exists() else {}
    report = {"machine": machine("cpu") | {"seed": args.seed}, "hosts": args.hosts, "cases": before}
    with prepared(args.hosts, args.patience) as hosts:
        campaign = Campaign(hosts, args.seed, args.times)
        for name, case in cases(campaign).items():
            if args.only and name not in args.only:
                continue
            start = time.monotonic()
            try:
                told = {"holds": True, "seen": case()}
            except (AssertionError, ValueError) as error:  # ValueError: more than one line
                told = {"holds": False, "seen": str(error)}
            told |= {"must hold": " ".join(case.__doc__.split()), "seconds": round(time.monotonic() - start, 1)}
            told["date"] = report["machine"]["date"]  # those of --only keep theirs
            report["cases"][name] = told
            print(f"{'holds' if told['holds'] else 'FAILS'}  {name}: {told['seen']}", flush=True)
            write(args.out, report)
    sys.exit(not all(told["holds"] for told in report["cases"].values()))


if __name__ == "__main__":
    main()
