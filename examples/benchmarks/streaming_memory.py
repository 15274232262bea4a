"""Peak, what is held, and time of training steps: recipes of train, streamed and ordinary, beside mlx-lm's own AdamW.

    python examples/benchmarks/streaming_memory.py --out RESULT.json
    python examples/benchmarks/streaming_memory.py --out RESULT.json --rows 'qwen3-8b/*/streamed'
    python examples/benchmarks/streaming_memory.py --out RESULT.json --rows recipes --gpus 4 --seconds 380 --one-process

A row is model/batch x tokens/recipe/way, with /tied after the model, and /keepK and /float32 at the end: `--list` names
the usual ones, by default those of the backend; `recipes` are those of the table of recipes; any other that is named in
full runs too. Weights are random, in the shapes of real models. Recipes are flags of `ember-mlx train`: `stateless`
(SinkGD of two passes on the body, Ember on the tables), `adamw` (computed in float32, its state in bfloat16; Ember on
the tables), `adam-mini`, `adam-mini-int8`, `flash-adamw`, `adamw-everywhere` (on the tables too), `lora` (adapters in
all layers and both tables, these by Ember), `lora-adamw` (by AdamW). keepK is `--keep-inputs K`.

Ways: `streamed`, or `streamed@68`, where a GPU is run at most 68 MB of weights ahead; `ordinary` and
`ordinary-checkpointed`, the step of `train` without and with `--grad-checkpoint`; `mlx-lm` and `mlx-lm-checkpointed`,
the loop of `mlx_lm.lora` with its AdamW, which tells its own times; `checkpointed`, gradients by one compiled function,
then the update, array by array. `streamed+checkpointed` is for the time alone: two models in one process take their
steps in turn, since the times of one way differ by twice from process to process. The ratio is that of the first to the
last.

The most important rows come first, and each has a time limit. Each is a fresh process; with `--one-process` those of a
GPU share one, with imports and compiled kernels, as long as nothing is left of the rows before. With `--gpus N` rows
run on N GPUs, each alone on its own. Where kernels are compiled at the first step, set MLX_PTX_CACHE_DIR. Peaks are
those of whole steps; the peaks of the phases are of one step more, which waits between them. `held` is what is there
between two steps. The JSON file is written after each row, and rows that it has already are not run again.
`planned_memory.py --measured RESULT.json` compares the peaks with the plans. On a CPU say `--smoke`.
"""

import argparse
import contextlib
import fnmatch
import gc
import io
import itertools
import json
import statistics
import time
from pathlib import Path

from benchmarking import at_least_one, in_fresh_process, machine, write
from mlx_training_memory import Prepared, refuse_left_over, unpatched
from row_workers import Worker, measured
from streaming_rows import (
    ADAMW_ALONE,
    ON_A_CPU,
    ON_A_GPU,
    ROW,
    TABLE_OF_RECIPES,
    TINY,
    config_of,
    optimizer_config_of,
    parts_of,
    words_of,
)

WARM_UP = 2


class Trained(Prepared):
    """One model with its optimizer, and a step of it.

    Args:
        row (str): Which model, batch and recipe.
        way (str): Which step.
        smoke (bool): A tiny one.
    """

    def __init__(self, row, way, smoke):
        import mlx.optimizers as optim
        from mlx.utils import tree_flatten

        from ember_mlx.finetune import options
        from ember_mlx.streaming import StreamedStep

        of = parts_of(row)
        length = max(of["length"] // 16, 1) if smoke else of["length"]
        args = options.parse(words_of(row)) | {"optimizer_config": optimizer_config_of(row)}
        super().__init__(config_of(row) | (TINY if smoke else {}), args, of["batch_size"], length)
        model, by_mlx_lm = self.model, way.startswith("mlx-lm")
        if by_mlx_lm and of["recipe"] in ADAMW_ALONE:
            self.optimizer = None  # its state goes first; it is in a cycle
            gc.collect()
            self.optimizer = optim.AdamW(learning_rate=args.learning_rate)
            self.optimizer.init(model.trainable_parameters())
        self.bytes = {
            "weights": sum(array.nbytes for _, array in tree_flatten(model.parameters())),
            "optimizer_state": sum(array.nbytes for _, array in tree_flatten(self.optimizer.state)),
        }
        way, _, ahead = way.partition("@")
        self.streamed = None
        if by_mlx_lm:
            self.take = self._mlx_lm(way.endswith("checkpointed"))
            return
        self.take = self._take_steps
        if way == "streamed":
            run_ahead = int(ahead) * 10**6 if ahead else None
            self.streamed = StreamedStep(model, self.optimizer, keep_inputs=of["keep_inputs"], run_ahead=run_ahead)
            self.step = lambda: self.streamed(*self.batch)[0]
        else:
            self.step = self._array_by_array() if way == "checkpointed" else self._ordinary(way)

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

    def _ordinary(self, way):
        from mlx_lm.tuner.trainer import default_loss, grad_checkpoint

        from ember_mlx.finetune.step import Step

        if way.endswith("checkpointed"):
            grad_checkpoint(self.model.layers[0])
        step = Step(self.model, self.optimizer, default_loss, head_first=True)
        return lambda: step(self.batch).loss.item()

    def _take_steps(self, count, note):
        """So many steps; ``note(loss, seconds)`` is called after each."""
        for _ in range(count):
            start = time.perf_counter()
            loss = self.step()
            note(loss, time.perf_counter() - start)

    def _mlx_lm(self, checkpoints):
        """As ``_take_steps``, by mlx-lm's own loop, which measures its steps itself."""
        from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, train

        class Enough(Exception):
            pass

        def take(count, note):
            class Noting(TrainingCallback):
                def on_train_loss_report(self, info):
                    nonlocal left
                    note(info["train_loss"], tokens / info["tokens_per_second"])
                    left -= 1
                    if not left:
                        raise Enough  # or it would save

            tokens, left = self.tokens, count
            args = TrainingArgs(iters=count + 1, steps_per_report=1, grad_checkpoint=checkpoints)
            same_batch = {"iterate_batches": lambda **_: itertools.repeat(self.batch)}
            with contextlib.suppress(Enough), contextlib.redirect_stdout(io.StringIO()):
                train(self.model, self.optimizer, None, None, args, training_callback=Noting(), **same_batch)

        return take


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

    refuse_left_over()
    ways = parts_of(row)["way"].split("+")
    if len(ways) > 1:
        return in_turn(row, ways, steps, smoke)
    steps_taken = []

    def note(loss, seconds):
        mx.synchronize()
        if not steps_taken:
            mx.clear_cache()
        steps_taken.append((loss, seconds, mx.get_peak_memory(), mx.get_active_memory()))
        mx.reset_peak_memory()

    with unpatched(layer_class(row)):  # mlx-lm's checkpointing patches the class
        one = Trained(row, *ways, smoke)
        one.take(1 + WARM_UP + steps, note)
        (_, first_seconds, *_), *later = steps_taken
        losses, seconds, peaks, held = zip(*later, strict=True)
        phases = _phases(one) if one.streamed else {}
    median = statistics.median(seconds[WARM_UP:])
    return {
        "peak_memory": max(peaks),
        "peak_over_weights": round(max(peaks) / one.bytes["weights"], 4),
        "held": max(held),
        "seconds": round(median, 4),
        "tokens_per_second": round(one.tokens / median, 1),
        "first_seconds": round(first_seconds, 3),
        "bytes": one.bytes,
        "peaks": peaks,
        "all_seconds": [round(each, 4) for each in seconds],
        "phases": phases,
        "losses": [round(loss, 4) for loss in losses],
    }


def in_turn(row, ways, steps, smoke):
    """The seconds of several ways, each with a model of its own: they take their steps in turn."""
    trained = []
    for way in ways:
        with unpatched(layer_class(row)):  # checkpointing patches the class, and the first trace keeps it
            one = Trained(row, way, smoke)
            one.first_seconds = _seconds(one.step)
        trained.append(one)
    rounds = [[_seconds(one.step) for one in trained] for _ in range(WARM_UP + steps)][WARM_UP:]
    medians = [statistics.median(each) for each in zip(*rounds, strict=True)]
    return {
        "seconds": dict(zip(ways, medians, strict=True)),
        "ratio": round(medians[0] / medians[-1], 4),
        "rounds": [[round(seconds, 5) for seconds in each] for each in rounds],
        "first_seconds": {way: round(one.first_seconds, 3) for way, one in zip(ways, trained, strict=True)},
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


def asked_rows(patterns, usual):
    """The usual rows that fit a pattern, and those that are named in full."""
    known = list(dict.fromkeys([*usual, *ON_A_GPU, *ON_A_CPU, *TABLE_OF_RECIPES]))
    chosen = []
    for pattern in patterns:
        found = {"*": usual, "recipes": TABLE_OF_RECIPES}.get(pattern) or fnmatch.filter(known, pattern)
        if not found and not ROW.fullmatch(pattern):
            raise SystemExit(f"--rows {pattern}: no usual row, and no name of one in full (see --help)")
        chosen += found or [pattern]
    return list(dict.fromkeys(chosen))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument(
        "--rows",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="such as 'qwen3-8b/*'; or recipes, their table",
    )
    parser.add_argument("--list", action="store_true", help="name the rows and end")
    parser.add_argument("--limit", type=at_least_one, default=150, help="seconds for a row, then it is given up")
    parser.add_argument(
        "--seconds", type=at_least_one, default=86_400, help="for all rows; what is then undone stays undone"
    )
    parser.add_argument("--steps", type=at_least_one, default=15)
    parser.add_argument("--gpus", type=at_least_one, default=1, help="on how many rows run, each alone on its own")
    parser.add_argument("--one-process", action="store_true", help="rows one after another in one process a GPU")
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
    how = {"steps": args.steps, "smoke": args.smoke, "one_process": args.one_process, "gpus": args.gpus}
    report["machine"] = here | how
    write(args.out, report)
    rows = [row for row in rows if "error" in report["rows"].get(row, {"error": "not measured"})]
    numbers = range(args.gpus) if args.gpus > 1 else [None]
    workers = [Worker(measure, (args.steps, args.smoke), gpu, args.one_process) for gpu in numbers]
    for row, result in measured(rows, workers, args.limit, args.seconds):
        report["rows"][row] = result
        write(args.out, report)
        print(f"{time.strftime('%H:%M:%S')} {row:56} {_said(result)}", flush=True)


def _said(result):
    if "error" in result:
        return result["error"]
    if "ratio" in result:
        times = ", ".join(f"{way} {seconds * 1e3:.1f} ms" for way, seconds in result["seconds"].items())
        return f"{times}: {result['ratio']:.3f} x"
    ratio = f"{result['peak_memory'] / 1e9:8.3f} GB = {result['peak_over_weights']:.3f} x weights"
    speed = f"{result['seconds'] * 1e3:8.1f} ms a step, {result['tokens_per_second']:8.0f} tokens/s"
    phases = [
        f"\n{'':65} {phase:10} {of['peak'] / 1e9:8.3f} GB {of['seconds'] * 1e3:8.1f} ms"
        for phase, of in result["phases"].items()
    ]
    return f"{ratio}, {result['held'] / 1e9:8.3f} held, {speed}{''.join(phases)}"


if __name__ == "__main__":
    main()
