"""One optimizer step on one table on a CUDA GPU: time, speed beside the floor, and scratch memory.

    python examples/benchmarks/cuda_table_step.py --out examples/benchmarks/results/cuda_table_step_h100.json

The floor is four passes over the table (the gradient read twice, the weights read and written) at the bandwidth of a
large copy, measured in the same run. A step is timed on the GPU alone: the queue is filled while a sleep runs, and the
L2 cache is overwritten before each step. Times are medians; scratch is the peak of a step above what was allocated
before it, in tables of the weights' dtype.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path

import torch
from benchmarking import SEED, machine, write

from cuda_ref import Ember

SHAPES = [(151_936, 1024), (128_256, 4096), (50_257, 768)]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CYCLES_ASLEEP = 2_000_000  # about a millisecond: longer than Python needs to queue a step


class PlainEmber(torch.optim.Optimizer):
    """The rule as one would write it down: whole tables in float32, and the second moment as a table."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "beta2": 0.999, "eps": 1e-8})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                self._step_table(w, self.state[w], group["lr"], group["beta2"], group["eps"])

    def _step_table(self, w, state, lr, beta2, eps):
        if not state:
            state["r"] = torch.zeros(len(w), device=w.device)
            state["c"] = torch.zeros(w.shape[1], device=w.device)
            state["t"] = 0
        state["t"] += 1
        g = w.grad.to(torch.float32, copy=True)
        r = state["r"].mul_(beta2).add_(g.square().mean(dim=1), alpha=1 - beta2)
        c = state["c"].mul_(beta2).add_(g.square().mean(dim=0), alpha=1 - beta2)
        v_hat = torch.outer(r, c) / (c.mean().clamp(min=1e-30) * (1 - beta2 ** state["t"]))
        w.add_(g.div_(v_hat.sqrt_().add_(eps)), alpha=-lr)


OPTIMIZERS = {
    "Ember, Triton": partial(Ember, lr=1e-3, implementation="triton"),
    "Ember, eager": partial(Ember, lr=1e-3, implementation="eager"),
    "Ember, plain operations": partial(PlainEmber, lr=1e-3),
    "AdamW, fused": partial(torch.optim.AdamW, lr=1e-3, fused=True),
    "Adafactor": partial(torch.optim.Adafactor, lr=1e-3),
}


def milliseconds(function, repeats):
    """The median time of the function on the GPU."""
    cache = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cache.zero_()
        torch.cuda._sleep(CYCLES_ASLEEP)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth(repeats):
    """Bytes a second that a large copy reads and writes."""
    source = torch.randint(-128, 128, (2 * 2**30,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source), repeats) * 1e3


def measure(name, shape, dtype, bandwidth, repeats):
    torch.manual_seed(SEED)
    w = torch.nn.Parameter(torch.randn(shape, device="cuda", dtype=dtype) * 0.02)
    w.grad = torch.randn(shape, device="cuda", dtype=dtype) * torch.rand(shape[0], 1, device="cuda", dtype=dtype)
    optimizer = OPTIMIZERS[name]([w])
    for _ in range(3):
        optimizer.step()
    state = sum(value.nbytes for value in optimizer.state[w].values() if torch.is_tensor(value))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    scratch = torch.cuda.max_memory_allocated() - before
    time = milliseconds(optimizer.step, repeats)
    floor = 4 * w.nbytes / bandwidth * 1e3
    return {
        "optimizer": name,
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": round(time, 4),
        "floor_milliseconds": round(floor, 4),
        "speed_of_floor": round(floor / time, 3),
        "scratch_tables": round(scratch / w.nbytes, 4),
        "state_bytes": state,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "cuda_table_step.py: error: no CUDA device here; this measures NVIDIA GPUs\n")

    here = machine("cuda")
    bandwidth = copy_bandwidth(args.repeats)
    here |= {"cuda": torch.version.cuda, "copy_bytes_per_second": round(bandwidth), "repeats": args.repeats}
    report = {"machine": here, "rows": []}
    print(f"{here['device']}: a copy moves {bandwidth / 1e12:.2f} TB/s")
    print(f"{'table':>16} {'dtype':>9}  {'optimizer':<24} {'ms':>7} {'of floor':>8} {'scratch':>8} {'state':>12}")
    for shape in SHAPES:
        for dtype in DTYPES.values():
            for name in OPTIMIZERS:
                row = measure(name, shape, dtype, bandwidth, args.repeats)
                report["rows"].append(row)
                write(args.out, report)
                print(
                    f"{shape[0]:>9} x {shape[1]:<4} {row['dtype']:>9}  {name:<24} {row['milliseconds']:>7.3f} "
                    f"{row['speed_of_floor']:>8.2f} {row['scratch_tables']:>8.3f} {row['state_bytes']:>12,}",
                    flush=True,
                )
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
