"""Peaks of streamed training steps set up as `ember-mlx train` does it, to compare with its plans; random weights.

    python examples/benchmarks/streaming_peaks.py --out RESULT.json
    python examples/benchmarks/streaming_peaks.py --out RESULT.json --rows 'qwen3-8b/*/streamed'

A row is model/batch x tokens/recipe/way, with /tied after the model, and /keepK and /float32 at the end: `--list` names
the usual ones, by default those of the backend; any other that is named in full runs too. Recipes are flags of
`ember-mlx train`: `stateless` (SinkGD on the body, Ember on the tables), `adamw` (AdamW on the body, computed in
float32, its state in bfloat16; Ember on the tables), `adam-mini`, `lora` (adapters in all layers and both tables),
`adamw-tables`. Ways: `streamed`, and `checkpointed`, an ordinary step: gradients by one compiled function with mlx-lm's
`--grad-checkpoint`, then the update. keepK is `--keep-inputs K`. No model is downloaded.

Each row is a fresh process with a time limit; the rows that are to be compared follow one another. Where compiling
takes long, as it does on CUDA, say `--one-process`. Peaks are those of whole steps; the peaks of the phases are of one
step more, which waits between them. The JSON file is written after each row, and rows that it has already are not run
again. `planned_memory.py --measured RESULT.json` compares the peaks with the plans; it needs no GPU.
"""

import argparse
import fnmatch
import gc
import json
import multiprocessing
import statistics
import time
from pathlib import Path

from benchmarking import SEED, at_least_one, in_fresh_process, in_this_process, machine, write
from mlx_training_memory import LEFT_OVER, unpatched
from streaming_rows import ON_A_CPU, ON_A_GPU, ROW, TINY, config_of, optimizer_config_of, parts_of, words_of

WARM_UP = 2


def measure(row, steps, smoke):
    """Peaks, phases and seconds of one row, after the first two steps.

    Raises RuntimeError if the process still holds arrays of a row before.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    from ember_mlx.finetune import options
    from ember_mlx.finetune.build_optimizer import build_optimizer
    from ember_mlx.finetune.choices import choose
    from ember_mlx.finetune.trainable import make_trainable, shapes_of
    from ember_mlx.streaming import StreamedStep

    gc.collect()
    mx.clear_cache()
    if mx.get_active_memory() > LEFT_OVER:
        raise RuntimeError(f"{mx.get_active_memory():,} bytes of earlier rows are left: measure it in a fresh process")
    of = parts_of(row)
    length = max(of["length"] // 16, 1) if smoke else of["length"]
    args = options.parse(words_of(row)) | {"optimizer_config": optimizer_config_of(row)}
    mx.random.seed(SEED)
    config = config_of(row) | (TINY if smoke else {})
    model_class, arguments_class = _get_classes(config)
    model = model_class(arguments_class.from_dict(config))
    model.set_dtype(getattr(mx, config["torch_dtype"]))
    for _, array in tree_flatten(model.parameters()):
        mx.eval(array)  # one by one: they are drawn in float32
    del array
    choices = choose(args, shapes_of(model))
    make_trainable(model, args, choices)
    model.train()
    optimizer = build_optimizer(model, args, choices)
    batch = mx.random.randint(0, config["vocab_size"], (of["batch_size"], length + 1))
    lengths = mx.array([[0, length]] * of["batch_size"])
    mx.eval(model.parameters(), optimizer.state, batch, lengths)
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    state = sum(array.nbytes for _, array in tree_flatten(optimizer.state))

    mx.clear_cache()
    seconds, peaks, losses, phases = [], [], [], {}
    with unpatched(type(model.layers[0])):
        if of["way"] == "streamed":
            step = StreamedStep(model, optimizer, keep_inputs=of["keep_inputs"])
        else:
            step = checkpointed(model, optimizer)
        for _ in range(WARM_UP + steps):
            mx.reset_peak_memory()
            start = time.perf_counter()
            loss, _ = step(batch, lengths)
            seconds.append(time.perf_counter() - start)
            peaks.append(mx.get_peak_memory())
            losses.append(round(loss, 4))
    if of["way"] == "streamed":
        started = time.perf_counter()

        def note(phase):
            nonlocal started
            now = time.perf_counter()
            phases[phase] = {"peak": mx.get_peak_memory(), "active": mx.get_active_memory(), "seconds": now - started}
            mx.reset_peak_memory()
            started = time.perf_counter()

        mx.reset_peak_memory()
        step.on_phase = note
        step(batch, lengths)
    return {
        "peak_memory": max(peaks[1:]),
        "peak_over_weights": round(max(peaks[1:]) / weights, 4),
        "seconds": round(statistics.median(seconds[WARM_UP:]), 4),
        "first_seconds": round(seconds[0], 3),
        "bytes": {"weights": weights, "optimizer_state": state},
        "peaks": peaks,
        "phases": phases,
        "losses": losses,
    }


def checkpointed(model, optimizer):
    """An ordinary step. The update is compiled array by array: as one function of all, it takes CUDA minutes."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.tuner.trainer import default_loss, grad_checkpoint

    from ember_mlx.streaming.updates import Updates

    grad_checkpoint(model.layers[0])
    updates = Updates(optimizer, model)
    of_model, held = nn.value_and_grad(model, default_loss), [model.state]
    value_and_grad = mx.compile(lambda *batch: of_model(model, *batch), inputs=held, outputs=held)

    def step(*batch):
        (value, tokens), gradients = value_and_grad(*batch)
        updates.begin()
        weights = dict(tree_flatten(model.trainable_parameters()))
        gradients = dict(tree_flatten(gradients))
        for path in gradients:
            new, _ = updates({path: weights[path]}, {path: gradients[path]})[path]
            model.update(tree_unflatten([(path, new)]))
        del weights, gradients, new
        mx.eval(model.parameters(), optimizer.state, value, tokens)
        updates.finish()
        return value.item(), tokens.item()

    return step


def within(seconds, function, *arguments):
    """What ``function`` returns in a process of its own, which is ended after that time."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, *arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else {"error": f"timed out after {seconds} s"}
    except EOFError:
        return {"error": "the process was killed, as it is when memory runs out"}
    finally:
        process.kill()
        process.join()


def _send(sender, function, *arguments):
    sender.send(in_this_process(function, *arguments))


def measured(args, row):
    """What ``measure`` returns, in a process of its own or in this one."""
    if not args.one_process:
        return within(args.limit, measure, row, args.steps, args.smoke)
    return in_this_process(measure, row, args.steps, args.smoke)


def asked_rows(patterns, usual):
    """The usual rows that fit a pattern, and those that are named in full."""
    known = list(dict.fromkeys([*usual, *ON_A_GPU, *ON_A_CPU]))
    chosen = []
    for pattern in patterns:
        found = fnmatch.filter(usual if pattern == "*" else known, pattern)
        if not found and not ROW.fullmatch(pattern):
            raise SystemExit(f"--rows {pattern}: no usual row, and no name of one in full (see --help)")
        chosen += found or [pattern]
    return list(dict.fromkeys(chosen))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="PATTERN", help="such as 'qwen3-8b/*'")
    parser.add_argument("--list", action="store_true", help="name the rows and end")
    parser.add_argument("--limit", type=at_least_one, default=150, help="seconds for a row, then it is given up")
    parser.add_argument("--steps", type=at_least_one, default=5)
    parser.add_argument("--one-process", action="store_true", help="rows one after another in this process, no limit")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to try this script where there is no GPU")
    args = parser.parse_args()
    here = in_fresh_process(machine)
    rows = asked_rows(args.rows, ON_A_CPU if here["backend"] == "cpu" and not args.smoke else ON_A_GPU)
    if args.list:
        print("\n".join(rows))
        return
    if args.out is None:
        parser.error("--out FILE is where the results go; or --list")
    report = json.loads(args.out.read_text()) if args.out.exists() else {"rows": {}}
    report["machine"] = here | {"steps": args.steps, "smoke": args.smoke, "one_process": args.one_process}
    write(args.out, report)
    for row in rows:
        if "peak_memory" in report["rows"].get(row, {}):
            continue
        print(f"{time.strftime('%H:%M:%S')} {row}", flush=True)
        result = report["rows"][row] = measured(args, row)
        write(args.out, report)
        if "error" in result:
            print(f"{row:48} {result['error']}", flush=True)
            continue
        ratio = f"{result['peak_memory'] / 1e9:8.3f} GB = {result['peak_over_weights']:.3f} x weights"
        print(f"{row:48} {ratio}, {result['seconds'] * 1e3:8.1f} ms a step", flush=True)
        for phase, of in result["phases"].items():
            print(f"{'':48} {phase:10} {of['peak'] / 1e9:8.3f} GB {of['seconds'] * 1e3:8.1f} ms", flush=True)


if __name__ == "__main__":
    main()
