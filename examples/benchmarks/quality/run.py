"""The quality benchmark: does a model train as well with Ember on its token tables?

    python examples/benchmarks/quality/make_text.py .gpu/q                      # once: text and vocabulary
    python examples/benchmarks/quality/run.py .gpu/q --out results/new.jsonl --seconds 540
    python examples/benchmarks/quality/draw.py                                  # tables and pictures

One process a GPU (or ``--workers`` on a CPU) takes run after run, the most important first; ``plan.py`` says which.
Every finished run is one line in ``--out``. Runs that are in ``--out`` or in a ``--results`` folder are not done again,
so a campaign can be cut off at any moment and continued on another machine.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import platform
import subprocess
import sys
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from statistics import median

import numpy as np
import torch
from plan import BASELINE, PHASES, SETTINGS, Phase, Run, tuned_rates, wanted
from table_rules import TABLE_RULES
from training import Trainer

HERE = Path(__file__).parent
DEFAULT_PHASES = [name for name in PHASES if name != "smollm2"]  # which needs --smollm2
FIRST_GUESS = 60.0  # seconds a run of a setting takes that none has been timed of, compilation included


def main():
    args = parse()
    settings, phases = SETTINGS, [phase for name in args.phases for phase in PHASES[name]]
    if args.smoke:
        settings, phases = smoke_plan()
        write_random_tokens(args.data)
    args.bases.mkdir(parents=True, exist_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.smollm2:
        convert_smollm2(args.smollm2, args.bases / "smollm2.pt")
    if args.out.exists() and not args.out.read_bytes().endswith(b"\n"):  # cut off in the middle of a line
        with args.out.open("a") as file:
            file.write("\n")
    results = read_results([args.out, *sorted(args.results.glob("*.jsonl"))])
    facts = {**machine_facts(), "commit": args.commit or git_commit()}
    campaign = Campaign(args, settings, phases, results, facts)
    campaign.run()
    left = len(list(wanted(campaign.losses, campaign.phases, settings)))
    print(f"{campaign.finished} runs finished, {campaign.failed} failed; {left} runs are known to be left", flush=True)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that make_text.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are added to this file")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of results of earlier campaigns")
    parser.add_argument("--bases", type=Path, default=Path("/tmp/quality_bases"), help="weights to fine-tune")
    parser.add_argument("--smollm2", type=Path, help="folder with SmolLM2-135M's model.safetensors")
    parser.add_argument(
        "--phases", nargs="+", choices=PHASES, default=DEFAULT_PHASES, help="in the order of importance"
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="no run is begun that would not end by then")
    parser.add_argument("--workers", type=int, default=torch.cuda.device_count() or 1, help="default: one a GPU")
    parser.add_argument("--runs", type=int, default=10**9, help="at most this many")
    parser.add_argument("--commit", help="of the code, for the results, where git cannot tell")
    parser.add_argument("--smoke", action="store_true", help="try it: tiny models, random tokens in a new folder")
    return parser.parse_args()


class Campaign:
    """Hands runs to worker processes and writes down what comes back."""

    def __init__(self, args, settings, phases, results, facts):
        self.args, self.settings, self.phases, self.facts = args, settings, phases, facts
        self.losses = {Run(**result["run"]).key(): loss_of(result) for result in results}
        text = args.data / "text.json"  # says which text it is
        self.text = json.loads(text.read_text())["sha256"]["train"][:12] if text.exists() else "unknown"
        self.seconds = {}  # setting -> durations seen in this campaign
        self.begun, self.given = set(), 0
        self.finished = self.failed = 0
        self.start = time.monotonic()

    def run(self):
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        workers = {}
        for number in range(self.args.workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, number, self.args, self.settings))
            process.start()
            theirs.close()
            workers[ours] = process
        idle, busy = list(workers), {}
        while idle or busy:
            for connection in list(idle):
                task = self.next_run(busy.values())
                if task is None:
                    break
                idle.remove(connection)
                connection.send(task)
                busy[connection] = task
            if not busy:
                break
            for connection in wait(list(busy)):
                task = busy.pop(connection)
                try:
                    result = connection.recv()
                except EOFError:
                    result = {"error": "the worker ended"}
                else:
                    idle.append(connection)
                self.note(task, result)
        for connection, process in workers.items():
            connection.close()  # which ends the worker
            process.join()

    def next_run(self, in_progress):
        """(run, path to keep the weights at or None), the most important that ends in time; None for none."""
        if self.given >= self.args.runs:
            return None
        left = self.args.seconds - (time.monotonic() - self.start)
        candidates = [(run, keep) for run, keep in self.bases() if keep not in [keep for _, keep in in_progress]]
        candidates += [(run, None) for run in wanted(self.losses, self.phases, self.settings)]
        for run, keep in candidates:
            start = self.settings[run.setting].start
            if (run.key(), keep) in self.begun or (start and not (self.args.bases / f"{start}.pt").exists()):
                continue
            if median(self.seconds.get(run.setting, [FIRST_GUESS])) < left:
                self.begun.add((run.key(), keep))
                self.given += 1
                return run, keep
        return None

    def bases(self):
        """Runs whose weights the fine-tuning settings begin with: AdamW on everything at its best rate."""
        for name in dict.fromkeys(self.settings[s].start for phase in self.phases for s in phase.settings):
            keep = self.args.bases / f"{name}.pt"
            if name in self.settings and not keep.exists():
                body, rate = tuned_rates(name, BASELINE, self.losses, self.settings)
                if rate is not None:
                    yield Run(name, BASELINE, rate, body, seed=1), keep

    def note(self, task, result):
        run, _ = task
        label = f"{run.setting} {run.optimizer} {run.rate} (body {run.body_rate}) seed {run.seed}"
        if "error" in result:
            self.failed += 1
            print(f"FAILED {label}: {result['error']}", file=sys.stderr, flush=True)
            return
        self.finished += 1
        times = self.seconds.setdefault(run.setting, [])
        times.append(result["seconds"])
        del times[: len(times) > 3]  # the first ones compile
        if run.key() in self.losses:
            return  # done again for its weights only
        line = {"run": dataclasses.asdict(run), **result, **self.facts, "text": self.text}
        with self.args.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.losses[run.key()] = loss_of(result)
        elapsed = time.monotonic() - self.start
        print(f"{elapsed:6.0f} s  {label}: {result['valid_loss']}  ({result['seconds']} s)", flush=True)


def work(connection, number, args, settings):
    """A worker: trains what it is sent until the connection closes. A run that fails is reported and left."""
    device = f"cuda:{number % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    trainer = Trainer(device, args.data, args.bases)
    while True:
        try:
            run, keep = connection.recv()
        except EOFError:
            return
        try:
            connection.send(trainer.train(run, settings[run.setting], keep))
        except Exception:  # out of memory, say; the next run may do better
            connection.send({"error": traceback.format_exc()})


def read_results(paths):
    """The lines of all files; the last of a file may have been cut off."""
    found = []
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                print(f"{path}: a line is not whole and is left out", file=sys.stderr)
    return found


def loss_of(result):
    return float("inf") if result["valid_loss"] is None else result["valid_loss"]


def machine_facts():
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none: CPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def git_commit():
    """The commit of the checkout, or "unknown" where there is no git."""
    with contextlib.suppress(OSError):
        git = subprocess.run(["git", "-C", HERE, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        return git.stdout.strip() or "unknown"
    return "unknown"


def convert_smollm2(folder, path):
    """The weights of a Hugging Face checkpoint as the benchmark keeps them; the names are the same."""
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    torch.save({name: weight.float() for name, weight in state.items() if name != "lm_head.weight"}, path)


def write_random_tokens(folder):
    """Token ids below 512 by Zipf's law, where there are no files yet."""
    folder.mkdir(parents=True, exist_ok=True)
    random, frequencies = np.random.default_rng(0), 1 / np.arange(1, 513)
    for name, count in (("train", 40_000), ("valid", 2_000)):
        for data in ("text", "wikisql"):
            ids = random.choice(512, count, p=frequencies / frequencies.sum()).astype(np.uint16)
            with contextlib.suppress(FileExistsError), (folder / f"{data}_{name}.u16").open("xb") as file:
                file.write(ids.tobytes())


def smoke_plan():
    """Settings and phases that take seconds on a CPU; every optimizer is in them."""
    settings = {}
    for name in ("untied-4k", "tied-4k", "own-wikisql"):
        full = SETTINGS[name]
        shape = dataclasses.replace(full.shape, vocabulary=512, width=16, layers=1, heads=2, hidden=32)
        start = "untied-4k" if full.start else None
        settings[name] = dataclasses.replace(full, shape=shape, batch=2, length=16, steps=40, warmup=4, start=start)
    phases = [
        Phase(("untied-4k", "tied-4k"), ("ember", "adamw", "frozen"), apart=True, probes=("ember",)),
        Phase(("own-wikisql",), tuple(TABLE_RULES), seeds=(1,)),
    ]
    return settings, phases


if __name__ == "__main__":
    main()
