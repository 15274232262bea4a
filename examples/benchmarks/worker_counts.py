"""The rows of a batch on one worker, two and four: 1 x 4, 2 x 2 and 4 x 1 train the same, over MLX's ring.

    python examples/benchmarks/worker_counts.py --out RESULT.json [--patience 4]

Rows of very different lengths, with --mask-prompt: two of three batches have nothing to learn for some worker, or for
all. 20 steps, all on the CPU of this machine. The exit code is 1 where updates are more than 1e-4 apart, losses more
than 1e-5, or other steps are left out. A second run begins on two workers with --shard-tables, is resumed on four and
ends on one, beside one that one worker takes at once with whole tables.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from benchmarking import in_fresh_process, machine, write
from local_processes import Processes, prepare, ring
from safetensors.numpy import load_file

HERE = Path(__file__).parent
LIMIT = 150  # seconds of a run
COUNTS = (1, 2, 4)
FARTHEST, LOSSES_APART = 1e-4, 1e-5  # relative


def environments(folder, count):
    """MLX's variables for each of so many workers; none for one alone."""
    return [{"OMP_NUM_THREADS": "1"} | each for each in (ring(folder, count) if count > 1 else [{}])]


def trained(folder, count, patience):
    """What so many workers found, and the updates of the first."""
    from two_workers import MIXED

    own = folder / f"workers{count}"
    Processes(
        [HERE / "two_workers.py", "runs", own, f"only={MIXED}"], environments(folder, count), own
    ).succeed(patience * LIMIT)  # fmt: skip
    return json.loads((own / "found0.json").read_text())[MIXED], np.load(own / "updates.npz")


def resumed(folder, patience):
    """How far 8 steps of two workers, 6 of four and 6 of one are from 20 of one: the updates, relative L2."""
    from two_workers import SHARDED

    parts = [
        ("alone", 1, "lora", "--iters 20"),
        ("moved", 2, SHARDED, "--iters 8"),
        ("moved", 4, SHARDED, "--iters 14 --resume --resume-with-changes"),
        ("moved", 1, "lora", "--iters 20 --resume --resume-with-changes"),
    ]
    for name, count, run, more in parts:
        words = [HERE / "two_workers.py", "train", folder / name, f"name={run}", "seconds=0", f"more={more}"]
        Processes(words, environments(folder, count), folder / name).succeed(patience * LIMIT)
    begun = load_file(folder / "model" / "model.safetensors")
    alone, moved = (
        load_file(folder / name / "adapter0" / "adapters.safetensors")
        | load_file(folder / name / "adapter0" / "token_tables.safetensors")
        for name in ("alone", "moved")
    )
    names = [name for name in alone if not name.endswith("lora_a")]  # which begins at random
    apart = sum(np.square(moved[name] - alone[name]).sum() for name in names)
    return float(np.sqrt(apart / sum(np.square(alone[name] - begun.get(name, 0)).sum() for name in names)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--patience", type=int, default=1, metavar="TIMES", help="wait so many times as long for a run")
    args = parser.parse_args()
    report = {"machine": in_fresh_process(machine, "cpu"), "allowed": {"updates": FARTHEST, "losses": LOSSES_APART}}
    with tempfile.TemporaryDirectory() as folder:
        in_fresh_process(prepare, Path(folder))
        found = {count: trained(Path(folder), count, args.patience) for count in COUNTS}
        moved = resumed(Path(folder), args.patience)
    from two_workers import BATCH, ITERS, compare

    alone, updates = found[1]
    report |= {"steps": ITERS, "steps left out by one worker": alone["steps left out"], "runs": {}}
    for count, (together, theirs) in found.items():
        if count > 1:
            apart, losses = compare(theirs, updates, together["losses"], alone["losses"])
            same = together["equal"] is True and together["steps left out"] == alone["steps left out"] > 0
            holds = same and apart <= FARTHEST and losses <= LOSSES_APART
            told = {"holds": bool(holds), "updates, relative L2": apart, "losses, at most": losses}
            report["runs"][f"{count} x {BATCH // count}"] = told | {"steps left out": together["steps left out"]}
    told = {"holds": moved <= FARTHEST, "updates, relative L2": moved}
    report["runs"]["--shard-tables on 2, resumed on 4 and then on 1"] = told
    write(args.out, report)
    print(json.dumps(report["runs"], indent=1))
    sys.exit(not all(told["holds"] for told in report["runs"].values()))


if __name__ == "__main__":
    main()
