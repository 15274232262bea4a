"""Peak and time of a streamed training step beside ordinary ones, set up by the flags of train, with random weights.

    python examples/benchmarks/streaming_memory.py --out RESULT.json
    python examples/benchmarks/streaming_memory.py --out RESULT.json --rows 'qwen3-8b/*/streamed'

A row is model/batch x tokens/recipe/way, with /tied after the model, and /keepK and /float32 at the end: `--list` names
the usual ones, by default those of the backend; any other that is named in full runs too. Recipes are flags of
`ember-mlx train`: `stateless` (SinkGD on the body, Ember on the tables), `adamw` (computed in float32, its state in
bfloat16; Ember on the tables), `adam-mini`, `flash-adamw`, `lora` (adapters in all layers and both tables),
`adamw-tables`. keepK is `--keep-inputs K`.

Ways: `streamed`, or `streamed@68`, where a GPU is run at most 68 MB of weights ahead; `checkpointed`, gradients by one
compiled function with mlx-lm's `--grad-checkpoint`, then the update, array by array; `own_step`, the ordinary one of
`train`, checkpointed too. `streamed+checkpointed` is for the time alone: two models in one process take their steps in
turn, since the times of one way differ by twice from process to process. The ratio is that of the first to the last.

Each row is a fresh process with a time limit; the most important come first. Where kernels are compiled at the first
step, run the rows twice, or say `--one-process`. Peaks are those of whole steps; the peaks of the phases are of one
step more, which waits between them. The JSON file is written after each row, and rows that it has already are not run
again. `planned_memory.py --measured RESULT.json` compares the peaks with the plans. On a CPU say `--smoke`.
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


class Trained:
    """One model with its optimizer, and a step of it.

    Args:
        row (str): Which model, batch and recipe.
        way (str): Which step.
        smoke (bool): A tiny one.
    """

    def __init__(self, row, way, smoke):
        import mlx.core as mx
        from mlx.utils import tree_flatten
        from mlx_lm.utils import _get_classes

        from ember_mlx.finetune import options
        from ember_mlx.finetune.build_optimizer import build_optimizer
        from ember_mlx.finetune.choices import choose
        from ember_mlx.finetune.trainable import make_trainable, shapes_of
        from ember_mlx.streaming import StreamedStep

        of = parts_of(row)
        length = max(of["length"] // 16, 1) if smoke else of["length"]
        args = options.parse(words_of(row)) | {"optimizer_config": optimizer_config_of(row)}
        mx.random.seed(SEED)
        config = config_of(row) | (TINY if smoke else {})
        model_class, arguments_class = _get_classes(config)
        self.model = model = model_class(arguments_class.from_dict(config))
        model.set_dtype(getattr(mx, config["torch_dtype"]))
        for _, array in tree_flatten(model.parameters()):
            mx.eval(array)  # one by one: they are drawn in float32
        del array
        choices = choose(args, shapes_of(model))
        make_trainable(model, args, choices)
        model.train()
        self.optimizer = build_optimizer(model, args, choices)
        self.batch = (
            mx.random.randint(0, config["vocab_size"], (of["batch_size"], length + 1)),
            mx.array([[0, length]] * of["batch_size"]),
        )
        mx.eval(model.parameters(), self.optimizer.state, self.batch)
        self.bytes = {
            "weights": sum(array.nbytes for _, array in tree_flatten(model.parameters())),
            "optimizer_state": sum(array.nbytes for _, array in tree_flatten(self.optimizer.state)),
        }
        way, _, ahead = way.partition("@")
        self.streamed = None
        if way == "streamed":
            run_ahead = int(ahead) * 10**6 if ahead else None
            self.streamed = StreamedStep(model, self.optimizer, keep_inputs=of["keep_inputs"], run_ahead=run_ahead)
            self.step = lambda: self.streamed(*self.batch)[0]
        else:
            self.step = {"checkpointed": self._array_by_array, "own_step": self._own_step}[way]()

    def _array_by_array(self):
        """The update is compiled array by array: as one function of all, it takes CUDA minutes to compile."""
        import mlx.core as mx
        import mlx.nn as nn
        from mlx.utils import tree_flatten, tree_unflatten
        from mlx_lm.tuner.trainer import default_loss, grad_checkpoint

        from ember_mlx.streaming.updates import Updates

        model, optimizer = self.model, self.optimizer
        grad_checkpoint(model.layers[0])
        updates = Updates(optimizer, model)
        of_model, held = nn.value_and_grad(model, default_loss), [model.state]
        value_and_grad = mx.compile(lambda *batch: of_model(model, *batch), inputs=held, outputs=held)

        def step():
            (value, _), gradients = value_and_grad(*self.batch)
            updates.begin()
            weights = dict(tree_flatten(model.trainable_parameters()))
            gradients = dict(tree_flatten(gradients))
            for path in gradients:
                new, _ = updates({path: weights[path]}, {path: gradients[path]})[path]
                model.update(tree_unflatten([(path, new)]))
            del weights, gradients, new
            mx.eval(model.parameters(), optimizer.state, value)
            updates.finish()
            return value.item()

        return step

    def _own_step(self):
        from mlx_lm.tuner.trainer import default_loss, grad_checkpoint

        from ember_mlx.finetune.step import Step

        grad_checkpoint(self.model.layers[0])
        step = Step(self.model, self.optimizer, default_loss)
        return lambda: step(self.batch).loss.item()


def layer_class(row):
    """That of a row's layers, before any model of it is made."""
    from mlx_lm.utils import _get_classes

    model_class, arguments_class = _get_classes(config_of(row))
    return type(model_class(arguments_class.from_dict(config_of(row) | TINY)).layers[0])


def measure(row, steps, smoke):
    """Peaks, phases and seconds of one row, or the seconds of several ways in turn.

    Raises RuntimeError if the process still holds arrays of a row before.
    """
    import mlx.core as mx

    gc.collect()
    mx.clear_cache()
    if mx.get_active_memory() > LEFT_OVER:
        raise RuntimeError(f"{mx.get_active_memory():,} bytes of earlier rows are left: measure it in a fresh process")
    ways, trained = parts_of(row)["way"].split("+"), []
    for way in ways:
        with unpatched(layer_class(row)):  # checkpointing patches the class, and the first trace keeps it
            one = Trained(row, way, smoke)
            one.first_seconds = _seconds(one.step)
        trained.append(one)
    mx.clear_cache()
    if len(trained) > 1:
        rounds = [[_seconds(one.step) for one in trained] for _ in range(WARM_UP + steps)][WARM_UP:]
        medians = [statistics.median(each) for each in zip(*rounds, strict=True)]
        return {
            "seconds": dict(zip(ways, medians, strict=True)),
            "ratio": round(medians[0] / medians[-1], 4),
            "rounds": [[round(seconds, 5) for seconds in each] for each in rounds],
            "first_seconds": {way: round(one.first_seconds, 3) for way, one in zip(ways, trained, strict=True)},
        }
    (one,) = trained
    seconds, peaks, losses = [], [], []
    for _ in range(WARM_UP + steps):
        mx.reset_peak_memory()
        start = time.perf_counter()
        losses.append(round(one.step(), 4))
        seconds.append(time.perf_counter() - start)
        peaks.append(mx.get_peak_memory())
    return {
        "peak_memory": max(peaks),
        "peak_over_weights": round(max(peaks) / one.bytes["weights"], 4),
        "seconds": round(statistics.median(seconds[WARM_UP:]), 4),
        "first_seconds": round(one.first_seconds, 3),
        "bytes": one.bytes,
        "peaks": peaks,
        "phases": _phases(one) if one.streamed else {},
        "losses": losses,
    }


def _seconds(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _phases(one):
    """Of one step more, which waits between them: each phase's peak, what is alive at its end, and its seconds."""
    import mlx.core as mx

    phases, started = {}, time.perf_counter()

    def note(phase):
        nonlocal started
        now = time.perf_counter()
        phases[phase] = {"peak": mx.get_peak_memory(), "active": mx.get_active_memory(), "seconds": now - started}
        mx.reset_peak_memory()
        started = time.perf_counter()

    mx.reset_peak_memory()
    one.streamed.on_phase = note
    one.step()
    return phases


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
    parser.add_argument("--steps", type=at_least_one, default=15)
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
        if row in report["rows"] and "error" not in report["rows"][row]:
            continue
        print(f"{time.strftime('%H:%M:%S')} {row}", flush=True)
        asked = measure, row, args.steps, args.smoke
        result = report["rows"][row] = in_this_process(*asked) if args.one_process else within(args.limit, *asked)
        write(args.out, report)
        print(f"{row:48} {_said(result)}", flush=True)


def _said(result):
    if "error" in result:
        return result["error"]
    if "ratio" in result:
        times = ", ".join(f"{way} {seconds * 1e3:.1f} ms" for way, seconds in result["seconds"].items())
        return f"{times}: {result['ratio']:.3f} x"
    ratio = f"{result['peak_memory'] / 1e9:8.3f} GB = {result['peak_over_weights']:.3f} x weights"
    phases = [
        f"\n{'':48} {phase:10} {of['peak'] / 1e9:8.3f} GB {of['seconds'] * 1e3:8.1f} ms"
        for phase, of in result["phases"].items()
    ]
    return f"{ratio}, {result['seconds'] * 1e3:8.1f} ms a step{''.join(phases)}"


if __name__ == "__main__":
    main()
