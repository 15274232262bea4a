"""What a step hands to an NVIDIA GPU: its kernels, by time and by number, and where the GPU waits for the host.

    python examples/benchmarks/kernels_of_a_step.py qwen3-0.6b/1x512/stateless/streamed ...

Rows are those of streaming_memory.py, with one way each. PyTorch's profiler asks CUPTI for every kernel of the process,
so for MLX's, too. It makes launches slower: the times of steps without it come first. A streamed step is traced once
more with a wait after each phase. Without an NVIDIA GPU steps are tiny and have no kernels: to try this script.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from mlx_training_memory import unpatched
from streaming_memory import Trained, layer_class
from streaming_rows import parts_of
from torch.profiler import ProfilerActivity, profile

ON_A_GPU = torch.cuda.is_available()
STEPS, WARM_UP = 12, 4
MOST, GAPS, WIDTH = 12, 6, 110
OF_A_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


def traced(function):
    """When it began and ended, in ns, and its kernels: (begin, length, name), by their beginning."""
    import mlx.core as mx

    mx.synchronize()
    with profile(activities=[ProfilerActivity.CUDA if ON_A_GPU else ProfilerActivity.CPU]) as profiler:
        begun = time.time_ns()
        function()
        mx.synchronize()
        ended = time.time_ns()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        told = json.loads(path.read_text())
    since = told.get("baseTimeNanoseconds", 0)
    events = [each for each in told["traceEvents"] if each.get("cat") in OF_A_GPU]
    return begun, ended, sorted((each["ts"] * 1e3 + since, each["dur"] * 1e3, short(each["name"])) for each in events)


def short(name):
    return name.replace("void ", "").replace("mlx::core::cu::", "").replace("__nv_bfloat16", "bf16")[:WIDTH]


def gaps_of(kernels, begun, ended):
    """When the GPU does nothing: (length, when, the kernel before, the one after)."""
    gaps, free, before = [], begun, "the beginning"
    for start, length, name in [*kernels, (ended, 0, "the end")]:
        if start > free:
            gaps.append((start - free, free - begun, before, name))
        if start + length > free:
            free, before = start + length, name
    return gaps


def tell(what, kernels, begun, ended):
    times, launches = Counter(), Counter(name for *_, name in kernels)
    for _, length, name in kernels:
        times[name] += length
    gaps = gaps_of(kernels, begun, ended)
    busy = ended - begun - sum(length for length, *_ in gaps)
    print(f"\n{what}: {(ended - begun) / 1e6:.1f} ms, the GPU works for {busy / 1e6:.1f}, {len(kernels)} kernels")
    for title, most in (("by time", times), ("by number", launches)):
        print(f"  {title}")
        for name, _ in most.most_common(MOST):
            print(f"  {times[name] / 1e6:9.2f} ms {launches[name]:6} x {name}")
    print("  the GPU waits, longest first: ms, at ms")
    for length, at, before, after in sorted(gaps, reverse=True)[:GAPS]:
        print(f"  {length / 1e6:9.2f} {at / 1e6:8.1f}  {before[: WIDTH // 2]} -> {after[: WIDTH // 2]}", flush=True)


def measure(row):
    import mlx.core as mx

    (way,) = parts_of(row)["way"].split("+")
    with unpatched(layer_class(row)):
        one, seconds = Trained(row, way, not ON_A_GPU), []
        for _ in range(WARM_UP + STEPS):
            start = time.perf_counter()
            one.step()
            seconds.append(time.perf_counter() - start)
        print(f"\n{row}: {statistics.median(seconds[WARM_UP:]) * 1e3:.1f} ms, the median of {STEPS} steps")
        begun, ended, kernels = traced(one.step)
        tell("The step", kernels, begun, ended)
        if not one.streamed:
            return
        ends = {}

        def note(phase):
            mx.synchronize()
            ends[phase] = time.time_ns()

        one.streamed.on_phase = note
        begun, _, kernels = traced(one.step)
        for phase, ended in ends.items():
            tell(f"Its {phase}", [each for each in kernels if begun <= each[0] < ended], begun, ended)
            begun = ended


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", metavar="ROW", help="such as qwen3-0.6b/4x1024/stateless/streamed")
    for row in parser.parse_args().rows:
        measure(row)


if __name__ == "__main__":
    main()
