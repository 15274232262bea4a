"""Two GPUs of one host: what several machines must hold, and what the second GPU brings. MLX by NCCL, PyTorch by NCCL.

    python examples/benchmarks/two_gpus.py --out RESULT.json [--only equal kill] [--backend nccl]

Each part starts fresh processes, one for each GPU, has a time limit of its own, and is written down when it ends; one
that fails does not end the others. What must hold stands in each part. `--backend ring` does the same on CPUs with tiny
shapes, PyTorch by gloo: to try this script. The exit code is 1 if a part does not hold. The parts of most interest
come first; `--seconds 180` starts none after that. MLX compiles kernels when they are first used, and keeps them in
MLX_PTX_CACHE_DIR: the part warm has those of the tiny model compiled before others have limits to their waits.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarking import in_fresh_process, machine, write
from local_processes import ROOT, SIGNALS, Processes, as_shell, free_port, prepare, ring

HERE = Path(__file__).parent
# Two tables: the most that has to be sent. The second leaves a GPU idle while the host launches.
QWEN = ["qwen3-0.6b/untied/lora/16x1024/ember", "qwen3-0.6b/untied/lora/4x1024/ember"]
STEPS = 12  # of a run whose speed is measured: 4 warm up, and the median is that of 7 between the others
SPEED_SECONDS, EQUAL_SECONDS = 120, 30  # of one such run; after which no further run of part equal begins
TINY = ["mini-llama/tied/lora/2x16/ember"]
TARGET = 1.8  # times the tokens a second of one GPU
PEER_TIMEOUT = 10  # seconds; a first step takes some

READ = "import sys, pathlib; from ember_mlx.finetune import checkpoints; checkpoints.read(pathlib.Path(sys.argv[1]))"


class Parts:
    """The parts, each a method that returns what it saw and asserts what must hold."""

    def __init__(self, folder, backend):
        self.folder, self.backend = folder, backend
        self.alone = {}  # row -> what one GPU does
        self.gpus = backend == "nccl"
        self.rows, self.warming = QWEN if self.gpus else TINY, []
        self.patience = 1 if self.gpus else 6  # CPUs may have much else to do

    # Processes

    def environments(self, count):
        """MLX's variables for each of so many workers, as mlx.launch sets them; none for one alone."""
        if not self.gpus:
            return [{"OMP_NUM_THREADS": "1"} | each for each in ring(self.new_folder(), count)] if count > 1 else [{}]
        own = [{"CUDA_VISIBLE_DEVICES": str(rank)} for rank in range(count)]
        if count == 1:
            return own
        # Multicast over NVLink may put GPUs that others share out of service.
        common = {"NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": str(free_port()), "NCCL_NVLS_ENABLE": "0"}
        common["MLX_WORLD_SIZE"] = str(count)
        return [common | each | {"MLX_RANK": str(rank)} for rank, each in enumerate(own)]

    def new_folder(self):
        return Path(tempfile.mkdtemp(dir=self.folder))

    def start(self, part, workers, folder=None, **settings):
        """Workers that do a part of two_workers.py, in a folder of their own."""
        folder = folder or self.new_folder()
        words = [HERE / "two_workers.py", part, folder, *(f"{name}={value}" for name, value in settings.items())]
        return Processes(words, self.environments(workers), folder)

    def found(self, processes, within):
        """What the first worker found, once all are done."""
        processes.succeed(self.patience * within)
        return json.loads((processes.folder / "found0.json").read_text())

    # MLX

    def part_streams(self):
        """The collectives that a run needs work on the stream that MLX chooses."""
        found = self.found(self.start("streams", 2), 40)
        assert found == {"all_sum": 6, "all_max": 1, "all_gather": [[2, 3], [2, 3]]}, found
        return found

    def part_cpu_stream(self):
        """Told, not judged: whether they do on the CPU's, on which mlx-lm asks for them."""
        try:
            return self.found(self.start("streams", 2, cpu=1), 30)
        except AssertionError as error:
            return str(error)[-600:]

    def part_bandwidth(self):
        """Told, not judged: how long a sum of a head of Qwen3-0.6B takes, which bounds what a second GPU can bring."""
        return self.found(self.start("bandwidth", 2), 60)

    def part_averages(self):
        """Test 3: averages by dtype have the bits of MLX's own, in few calls."""
        found = self.found(self.start("averages", 2), 60)
        assert found["bits of MLX"], found
        assert found["calls"] <= found["at most"], found
        return found

    def part_warm(self):
        """The tiny model's kernels are compiled, by one worker."""
        found = self.found(self.start("runs", 1, only="lora"), 120)
        return {"seconds of the run itself": found["lora"]["seconds"]}

    def part_equal(self):
        """Tests 1 and 2: two workers end with equal weights and state, and where one would, to 1e-4 of its updates."""
        import numpy as np
        from two_workers import MIXED, compare

        pair = self.start("runs", 2, seconds=EQUAL_SECONDS if self.gpus else 600)
        alone = self.start("runs", 1, only=MIXED)
        try:
            found, single = self.found(pair, 200), self.found(alone, 60)[MIXED]
        finally:
            pair.end(), alone.end()
        together = found[MIXED]
        ours, theirs = (np.load(each.folder / "updates.npz") for each in (pair, alone))
        error, worst = compare(ours, theirs, together["losses"], single["losses"])
        found["update beside one worker's, relative L2"], found["losses beside one worker's, at most"] = error, worst
        unequal = {name: each for name, each in found.items() if isinstance(each, dict) and each["equal"] is not True}
        assert not unequal, unequal
        assert error <= 1e-4, found
        assert worst <= 1e-5, found
        assert together["steps left out"] == single["steps left out"] > 0, (together, single)
        for each in found.values():
            if isinstance(each, dict):
                del each["losses"]
        return found

    def part_streamed(self):
        """--stream: two workers train what one does, to 1e-4 of its updates; also with --shard-optimizer, by NCCL."""
        import numpy as np
        from two_workers import SHARED_OUT, STREAMED, compare

        alone = self.start("runs", 1, only=STREAMED)
        expected, seen = self.found(alone, 60)[STREAMED], {}
        for name in (STREAMED, SHARED_OUT) if self.gpus else (STREAMED,):
            pair = self.start("runs", 2, only=name)
            found = self.found(pair, 60)[name]
            ours, theirs = (np.load(each.folder / "updates.npz") for each in (pair, alone))
            error, worst = compare(ours, theirs, found["losses"], expected["losses"])
            seen[name] = {"update, relative L2": error, "losses, at most": worst, "peak bytes": found["peak bytes"]}
            assert found["equal"] is True, found
            assert error <= 1e-4, seen
            assert worst <= 1e-5, seen
        return seen | {"peak bytes of one worker": expected["peak bytes"]}

    def part_signals(self):
        """Test 8: whoever hears a signal, both stop at one step with one checkpoint; resuming is as if undisturbed."""
        seen, signals = {}, {"SIGINT": [0], "SIGTERM": [1], "SIGHUP": [0, 1]}
        with ThreadPoolExecutor(5 if self.gpus else 1) as pool:  # most of it is the start of processes
            undisturbed = [pool.submit(self.undisturbed) for _ in range(2)]
            runs = {name: pool.submit(self.signalled, name, ranks) for name, ranks in signals.items()}
        for name, run in runs.items():
            run, codes, seconds = run.result()
            saved = self.checkpoints(run)
            assert codes == [128 + SIGNALS[name]] * 2, f"{name}: exit codes {codes}: {run.said()[-800:]}"
            assert saved[-1] % 4 or saved[-1] > 4, saved
            told = {"exit codes": codes, "seconds": max(seconds), "checkpoints": saved}
            seen[f"{name} to {signals[name]}"] = told
        whole, another = (run.result() for run in undisturbed)
        again = self.start("train", 2, runs["SIGTERM"].result()[0].folder, more="--resume")
        again.succeed(self.patience * 60)
        if self.weights(again) == self.weights(whole):
            return seen | {"resumed": "the weights of an undisturbed run, bit for bit"}
        # A GPU adds up some gradients in any order: two undisturbed runs differ, too.
        apart, own = (self.apart(each, whole) for each in (again, another))
        seen |= {"resumed, relative L2 beside an undisturbed run": apart, "two undisturbed runs": own}
        assert 0 < apart <= 4 * own, f"resuming ends with other weights than an undisturbed run: {seen}"
        return seen

    def apart(self, ours, theirs):
        """How far the saved weights of two runs lie from each other, relative L2."""
        import numpy as np
        from safetensors.torch import load_file  # numpy has no bfloat16

        a, b = (load_file(each.folder / "adapter0" / "adapters.safetensors") for each in (ours, theirs))
        squares = [[(a[name].double() - b[name].double()).square().sum().item(), b[name].double().square().sum().item()]
                   for name in b]  # fmt: skip
        return float(np.sqrt(np.divide(*np.sum(squares, axis=0))))

    def undisturbed(self):
        """A run to its end."""
        run = self.start("train", 2)
        run.succeed(self.patience * 60)
        return run

    def signalled(self, name, ranks):
        """A run of which these workers get the signal after six steps; its exit codes, and seconds from then."""
        run = self.start("train", 2)
        try:
            run.wait_for("step 6", self.patience * 60)
            for rank in ranks:
                run.running[rank].send_signal(SIGNALS[name])
            codes, seconds = run.finish(self.patience * 30)
        finally:
            run.end()
        return run, [as_shell(code) for code in codes], seconds

    def part_kill(self):
        """Test 9: when one is killed the other exits with 75, in one line, and nothing is saved after that."""
        run = self.start("train", 2, seconds="0.2", more=f"--peer-timeout {PEER_TIMEOUT}")
        try:
            run.wait_for("step 10", self.patience * 60)
            run.running[1].kill()
            files = self.files(run)
            codes, seconds = run.finish(PEER_TIMEOUT + 60)
        finally:
            run.end()
        told = run.errors(0)
        assert codes[0] == 75, f"exit code {codes[0]}: {run.said()[-800:]}"
        assert len(told) == 1, told
        assert self.files(run) == files, "files were written after that"
        limit = re.search(r"waited (\d+) s", told[0])  # 20 mean steps, where a slow first step makes that more
        limit = int(limit[1]) if limit else PEER_TIMEOUT
        assert seconds[0] <= limit + 5, f"{seconds[0]} s: {told[0]}"
        newest = self.folder_of(run) / f"step-{self.checkpoints(run)[-1]:07}"
        subprocess.run([sys.executable, "-c", READ, newest], env=self.plain(), check=True, timeout=self.patience * 60)
        return {"exit code": 75, "seconds": seconds[0], "line": told[0], "newest checkpoint, which reads": newest.name}

    def part_speed(self):
        """The second GPU brings 1.8 times the tokens a second, each having as many rows as one had alone."""
        return self.speed()

    def part_speed_sharded(self):
        """The same with --shard-tables."""
        from two_workers import has_option

        if not has_option("--shard-tables"):
            return {"skipped": "this release has no --shard-tables"}
        return self.speed("--shard-tables")

    def warm_speed(self):
        """Beside the other parts, one worker's run that compiles the kernels of the models whose speed is measured."""
        self.warming = [self.start("speed", 1, row=row, steps=2) for row in self.rows]

    def speed(self, *flags):
        found = {}
        while self.warming:
            self.warming.pop().succeed(SPEED_SECONDS)
        for row in self.rows:
            settings = {"row": row, "steps": STEPS if self.gpus else 4}
            if row not in self.alone:
                self.alone[row] = self.found(self.start("speed", 1, **settings), SPEED_SECONDS)
                print(f"  {row}, one worker: {self.alone[row]}", flush=True)
            alone = self.alone[row]
            both = self.found(self.start("speed", 2, **settings, more=" ".join(flags)), SPEED_SECONDS)
            found[row] = {"one": alone, "two": both, "times": both["tokens a second"] / alone["tokens a second"]}
            print(f"  {row} {' '.join(flags)}: {found[row]['times']:.2f} times, {found[row]}", flush=True)
        least = min(each["times"] for each in found.values())
        assert not self.gpus or least >= TARGET, f"{least:.2f} times: {json.dumps(found)}"
        return found

    # PyTorch

    def part_torch(self):
        """Ranks agree, refuse together and wait for nobody for ever; streamed steps of two are those of one."""
        return self.tests("test_ranks.py", within=90)

    def part_fsdp2(self):
        """Tables and weights on two ranks, by fully_shard and by slices, against one rank and the float64 oracle."""
        return self.tests("test_sharding.py", "-k", "not 3", within=120)

    def tests(self, name, *words, within):
        """Tests of cuda_ref, which use the GPUs where there are two."""
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "--import-mode=importlib", "-q", *words]
        with open(self.new_folder() / "said", "w+") as said:
            done = subprocess.run(
                [*command, ROOT / "tests" / "cuda_ref" / name], env=self.plain(), stdout=said, stderr=said,
                cwd=ROOT, timeout=self.patience * within, check=False,
            )  # fmt: skip
            said.seek(0)
            told = said.read()
        assert not done.returncode, told[-3000:]
        return told.strip().splitlines()[-1]

    # What a run leaves behind

    def folder_of(self, run):
        return run.folder / "adapter0" / "checkpoints"

    def checkpoints(self, run):
        """The steps of the first worker's; the other has none."""
        assert not (run.folder / "adapter1" / "checkpoints").exists(), "the second worker has saved"
        return sorted(int(path.name.split("-")[1]) for path in self.folder_of(run).iterdir())

    def weights(self, run):
        """The sum of all weights at the end, which must be one."""
        told = {line for rank in (0, 1) for line in run.said(rank).splitlines() if line.startswith("weights ")}
        assert len(told) == 1, told
        return told.pop()

    def files(self, run):
        return {str(path): path.stat().st_mtime_ns for path in run.folder.glob("adapter*/**/*") if path.is_file()}

    def plain(self):
        return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


ORDER = ["warm", "bandwidth", "speed_sharded", "speed", "kill", "signals", "equal", "streamed", "fsdp2", "streams",
         "averages", "torch", "cpu_stream"]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write; --only adds to it")
    parser.add_argument("--only", nargs="+", choices=ORDER, metavar="PART", help=", ".join(ORDER))
    parser.add_argument("--backend", choices=["nccl", "ring"], default="nccl")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no part after so many")
    args, begun = parser.parse_args(), time.monotonic()
    before = json.loads(args.out.read_text())["parts"] if args.only and args.out.exists() else {}
    here = in_fresh_process(machine, None if args.backend == "nccl" else "cpu")
    report = {"machine": here, "backend": args.backend, "parts": before}
    with tempfile.TemporaryDirectory() as folder:
        in_fresh_process(prepare, Path(folder))
        parts = Parts(Path(folder), args.backend)
        if "speed" in (args.only or ORDER):
            parts.warm_speed()
        for name in args.only or ORDER:
            if time.monotonic() - begun > args.seconds:
                print(f"not begun: {name}", flush=True)
                continue
            part, start = getattr(parts, f"part_{name}"), time.monotonic()
            try:
                told = {"holds": True, "seen": part()}
            except (
                AssertionError,
                LookupError,
                OSError,
                RuntimeError,
                ValueError,
                subprocess.SubprocessError,
            ) as error:
                told = {"holds": False, "seen": f"{type(error).__name__}: {error}"}
            told |= {"must hold": " ".join(part.__doc__.split()), "commit": here["commit"]}
            told["seconds"] = round(time.monotonic() - start, 1)
            report["parts"][name] = told
            print(f"{'holds' if told['holds'] else 'FAILS'}  {name} ({told['seconds']} s): {told['seen']}", flush=True)
            write(args.out, report)
        for each in parts.warming:
            each.end()
    sys.exit(not all(told["holds"] for told in report["parts"].values()))


if __name__ == "__main__":
    main()
