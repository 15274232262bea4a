"""What the guard against NaN and infinity costs a training step: time and peak memory, with it and without.

    python examples/benchmarks/guard_cost.py --out RESULT.json
    python examples/benchmarks/guard_cost.py --out RESULT.json --rows qwen3-0.6b/untied/{lora,full}/1x512/{ember,adamw}

A row is one of mlx_training_memory.py: model/tying/type/batch x tokens/optimizer of the tables. All rows run in one
process, and in each the kinds of step take turns on one model, in an order that is drawn anew each round:

- off: neither guard nor clipping. Here, too, the gradients of all layers exist before the first update.
- stop, skip: ``--on-nonfinite``. The norm of all gradients is computed, and judged before the first update.
- clip: ``--clip-grad-norm`` without the guard, which needs that norm too.
- mlx-lm: the step of ``mlx_lm.lora``, with the same optimizer.

Times are medians. On a CPU give the two mini models, or say `--smoke`: tiny shapes.
"""

import argparse
import random
import statistics
import time
from functools import partial
from pathlib import Path

from benchmarking import SEED, at_least_one, in_this_process, machine, write
from mlx_training_memory import prepare, unpatched
from training_memory_rows import ROW

KINDS = ("off", "stop", "skip", "clip", "mlx-lm")
ROWS = [f"mini-qwen3/untied/{kind}/1x512/{tables}" for kind in ("lora", "full") for tables in ("ember", "adamw")]
CLIP = 1e6  # above the norm: the steps stay those of the others


def measure(row, rounds, warm_up, smoke):
    """Median seconds and largest peak of each kind of step, and both over those of "off"."""
    import mlx.core as mx
    from mlx_lm.tuner.trainer import grad_checkpoint

    made = prepare(row, smoke)
    order, seconds, peaks = random.Random(SEED), {kind: [] for kind in KINDS}, {kind: [] for kind in KINDS}
    with unpatched(type(made.model.layers[0])):
        if made.args.grad_checkpoint:
            grad_checkpoint(made.model.layers[0])
        steps = {kind: step_of(kind, made) for kind in KINDS}
        for number in range(warm_up + rounds):
            for kind in order.sample(KINDS, len(KINDS)):
                mx.clear_cache()
                mx.reset_peak_memory()
                start = time.perf_counter()
                loss = steps[kind]()
                mx.synchronize()
                if number >= warm_up:
                    seconds[kind].append(time.perf_counter() - start)
                    peaks[kind].append(mx.get_peak_memory())
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    return {
        kind: {
            "seconds": round(medians[kind], 5),
            "peak_memory": max(peaks[kind]),
            "seconds_over_off": round(statistics.median(map(float.__truediv__, seconds[kind], seconds["off"])), 4),
            "peak_over_off": round(max(peaks[kind]) / max(peaks["off"]), 4),
        }
        for kind in KINDS
    } | {"loss": round(loss, 4)}


def step_of(kind, made):
    """A call that takes one step of that kind and returns its loss."""
    from ember_mlx.finetune.nonfinite import NonfiniteSteps
    from ember_mlx.finetune.step import Step

    if kind == "mlx-lm":
        return mlx_lm_step(made)
    optimizer = made.optimizer
    step = Step(made.model, optimizer, made.loss, head_first=not made.args.chunked_loss)
    after = NonfiniteSteps(optimizer, kind, lambda: False, lambda: None) if kind in ("stop", "skip") else None

    def take():
        optimizer.skip_nonfinite, optimizer.clip_grad_norm = after is not None, CLIP if kind == "clip" else None
        result = step(made.batch)
        if after:
            after(1, result)
        return result.loss.item()

    return take


def mlx_lm_step(made):
    """That of mlx_lm.tuner.trainer.train, which is a closure there."""
    import mlx.core as mx
    import mlx.nn as nn

    model, optimizer = made.model, made.optimizer
    value_and_grad = nn.value_and_grad(model, made.loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch):
        (value, tokens), gradients = value_and_grad(model, *batch)
        optimizer.update(model, gradients)
        return value, tokens

    def take():
        optimizer.skip_nonfinite, optimizer.clip_grad_norm = False, None
        value, tokens = step(made.batch)
        mx.eval(state, value, tokens)
        return value.item()

    return take


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW")
    parser.add_argument("--rounds", type=at_least_one, default=20, help="steps of each kind")
    parser.add_argument("--warm-up", type=at_least_one, default=3, help="rounds before those that count")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to try this script")
    args = parser.parse_args()
    for row in args.rows:
        if not ROW.fullmatch(row) or row.endswith("/unguarded"):
            parser.error(f"--rows {row}: must be such as {ROWS[0]}")
    report = {"machine": machine() | {"rounds": args.rounds, "smoke": args.smoke}, "rows": {}}
    write(args.out, report)
    for row in args.rows:
        report["rows"][row] = result = in_this_process(measure, row, args.rounds, args.warm_up, args.smoke)
        write(args.out, report)
        print(row, result.get("error", ""))
        for kind in KINDS if "error" not in result else ():
            of = result[kind]
            print(
                f"  {kind:8} {of['seconds'] * 1e3:9.2f} ms  {of['peak_memory'] / 1e9:8.4f} GB   "
                f"{of['seconds_over_off']:.3f} x  {of['peak_over_off']:.3f} x", flush=True
            )  # fmt: skip


if __name__ == "__main__":
    main()
