"""The quality benchmark: does a model train as well with Ember on its token tables?

    python examples/benchmarks/quality/make_text.py .gpu/q                      # once: text and vocabulary
    python examples/benchmarks/quality/run.py .gpu/q --out results/new.jsonl --seconds 540
    python examples/benchmarks/quality/draw.py                                  # tables and pictures

One process a GPU takes run after run, the most important first; ``plan.py`` says which. With more ``--workers`` than
GPUs they take turns on them: while one prepares a run, another trains. Every finished run is one line in ``--out``.
Runs that are in ``--out`` or in a ``--results`` folder are not done again, so a campaign can be cut off at any moment
and continued on another machine.

A worker whose run fails is replaced, since an error may have spoiled its GPU context for every later run.
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
from collections import Counter
from multiprocessing.connection import wait
from pathlib import Path
from statistics import median

import numpy as np
import torch
from body_rules import BODY_RULES
from plan import BASELINE, ONE_RATE, PHASES, SETTINGS, TUNING_SEED, Phase, Run, tuned_rates, wanted
from table_rules import TABLE_RULES
from training import Trainer

HERE = Path(__file__).parent
MOST_FAILURES = 3  # of an optimizer in a setting, in a row: more would fail too, and every one costs a new worker


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
    end_last_line(args.out)
    earlier = read_results(sorted(args.results.glob("*.jsonl")))
    if args.again:
        earlier = [line for line in earlier if line["run"]["seed"] == TUNING_SEED]
    results = [*read_results([args.out]), *earlier]
    facts = {**machine_facts(), "commit": args.commit or git_commit()}
    campaign = Campaign(args, settings, phases, results, facts)
    campaign.run()
    left = len(list(wanted(campaign.losses, campaign.phases, settings)))
    ended = f"{campaign.finished} runs finished, {campaign.failed} failed"
    print(f"{ended}; {left} runs are known to be left", flush=True)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder that make_text.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are added to this file")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of results of earlier campaigns")
    parser.add_argument("--again", action="store_true", help="of --results only the tuning runs count")
    parser.add_argument("--bases", type=Path, default=Path("/tmp/quality_bases"), help="weights to fine-tune")
    parser.add_argument(
        "--smollm2", type=Path, help="folder with SmolLM2-135M's model.safetensors; without, its settings wait for "
        "smollm2.pt in --bases",
    )  # fmt: skip
    parser.add_argument(
        "--phases", nargs="+", choices=PHASES, default=list(PHASES), help="in the order of importance; default: all"
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="no run is begun that would not end by then")
    parser.add_argument(
        "--first-guess", type=float, default=60.0, help="seconds of a run, in a setting of which none has been timed"
    )
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
        self.failures = Counter()  # (setting, body, optimizer) -> how many in a row
        self.start = time.monotonic()

    def run(self):
        numbers = {self.hire(number): number for number in range(self.args.workers)}  # by connection
        idle, busy = list(numbers), {}
        while idle or busy:
            while idle and (task := self.next_run(busy.values())):
                busy[idle[0]] = task
                with contextlib.suppress(OSError):  # if the worker is dead, recv says so
                    idle.pop(0).send(task)
            if not busy:
                break
            for connection in wait(list(busy)):
                task = busy.pop(connection)
                try:
                    result = connection.recv()
                except (EOFError, OSError) as error:
                    result = {"error": f"the worker ended: {error!r}"}
                if "error" in result:
                    number = numbers.pop(connection)
                    connection.close()
                    connection = self.hire(number)
                    numbers[connection] = number
                idle.append(connection)
                self.note(task, result)
        for connection in numbers:
            connection.close()  # which ends the worker

    def hire(self, number):
        """The connection to a new worker."""
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        ours, theirs = context.Pipe()
        context.Process(target=work, args=(theirs, number, self.args, self.settings)).start()
        theirs.close()
        return ours

    def next_run(self, in_progress):
        """(run, path to keep the weights at or None), the most important that ends in time; None for none."""
        if self.given >= self.args.runs:
            return None
        left = self.args.seconds - (time.monotonic() - self.start)
        candidates = [(run, None) for run in wanted(self.losses, self.phases, self.settings)]
        candidates += [(run, keep) for run, keep in self.bases() if keep not in [keep for _, keep in in_progress]]
        for run, keep in candidates:
            start = self.settings[run.setting].start
            hopeless = self.failures[run.setting, run.body, run.optimizer] >= MOST_FAILURES
            if (run.key(), keep) in self.begun or hopeless or (start and not self.path_of(start).exists()):
                continue
            if median(self.seconds.get(run.setting, [self.args.first_guess])) < left:
                self.begun.add((run.key(), keep))
                self.given += 1
                return run, keep
        return None

    def bases(self):
        """Runs whose weights the fine-tuning settings begin with: AdamW on everything at its best rate."""
        for name in dict.fromkeys(self.settings[s].start for phase in self.phases for s in phase.settings):
            keep = self.path_of(name)
            if name in self.settings and not keep.exists():
                body, rate = tuned_rates(name, BASELINE, self.losses, self.settings)
                if rate is not None:
                    yield Run(name, BASELINE, rate, body, seed=1), keep

    def path_of(self, start):
        return self.args.bases / f"{start}.pt"

    def note(self, task, result):
        run, keep = task
        label = f"{run.setting} {run.optimizer} {run.rate} (body {run.body} {run.body_rate}) seed {run.seed}"
        if "error" in result:
            self.failed += 1
            self.failures[run.setting, run.body, run.optimizer] += 1
            self.begun.discard((run.key(), keep))
            print(f"FAILED {label}: {result['error']}", file=sys.stderr, flush=True)
            return
        self.finished += 1
        self.failures[run.setting, run.body, run.optimizer] = 0
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
    """A worker: trains what it is sent until the connection closes or a run fails, which is reported."""
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
        except Exception:
            connection.send({"error": traceback.format_exc()})
            return


def end_last_line(path):
    """A campaign that was cut off may have left half a line, which the next must not go on with."""
    if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
        with path.open("a") as file:
            file.write("\n")


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
        for data in ("text", "wikisql", "smollm2_wikisql"):
            ids = random.choice(512, count, p=frequencies / frequencies.sum()).astype(np.uint16)
            with contextlib.suppress(FileExistsError), (folder / f"{data}_{name}.u16").open("xb") as file:
                file.write(ids.tobytes())


def smoke_plan():
    """Settings and phases that take seconds on a CPU; every optimizer is in them. What is fine-tuned is untied-4k."""
    names, settings = ("untied-4k", "tied-4k", "own-wikisql", "smollm2-wikisql-lora"), {}
    for name in names:
        full = SETTINGS[name]
        sizes = {"vocabulary": 512, "width": 16, "layers": 2, "heads": 2, "key_value_heads": None, "hidden": 32}
        sizes |= {"tied": name == "tied-4k", "lora_layers": min(1, full.shape.lora_layers), "rope_base": 10_000.0}
        settings[name] = dataclasses.replace(
            full, shape=dataclasses.replace(full.shape, **sizes), batch=2, length=16, steps=40, warmup=4,
            others=("text",) if full.start else (), start="untied-4k" if full.start else None,
            like=full.like if full.like in names else None,
        )  # fmt: skip
    recipes = [(body, body if body in (ONE_RATE, "frozen") else "ember") for body in BODY_RULES]
    phases = [
        Phase(("untied-4k", "tied-4k"), ("ember", "adamw", "frozen"), apart=True, probes=("ember",)),
        Phase(("own-wikisql",), tuple(TABLE_RULES), seeds=(1,)),
        Phase(("own-wikisql",), (), seeds=(1,), recipes=tuple(recipes)),
        Phase(("smollm2-wikisql-lora",), ("ember", "adamw", "ember-bf16", "frozen"), seeds=(1,)),
    ]
    return settings, phases


if __name__ == "__main__":
    main()
