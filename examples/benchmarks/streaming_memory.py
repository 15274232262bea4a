"""Peak and time of a streamed training step beside an ordinary checkpointed one, with random bfloat16 weights.

    python examples/benchmarks/streaming_memory.py --out RESULT.json
    python examples/benchmarks/streaming_memory.py --out RESULT.json --rows 'qwen3-8b/*/streamed'

A row is model/batch x tokens/recipe/way. Recipes: `stateless` (SinkGD on the body, Ember on the tables),
`adamw` (AdamW on the body, computed in float32, its state in bfloat16; Ember on the tables), `lora` (adapters in all
layers and both tables). Ways: `streamed`; `checkpointed`, an ordinary step: gradients by one compiled function with
mlx-lm's `--grad-checkpoint`, then the update, array by array; `own_step`, the one that `ember-mlx train` takes;
`streamed@68`, where a GPU is run at most 68 MB of weights ahead, not 33.

`streamed+checkpointed` is for the time alone: two models in one process take their steps in turn, since the times of
one way differ by twice from process to process. No model is downloaded. Each row is a fresh process with a time limit;
the most important come first. Where kernels are compiled at the first step, run the rows twice. Peaks are those of
whole steps; the peaks of the phases are of one step more, which waits between them. The JSON file is written after
each row, and rows that it has already are not run again. On a CPU say `--smoke`.
"""

import argparse
import fnmatch
import json
import multiprocessing
import statistics
import time
from functools import partial
from pathlib import Path

from benchmarking import SEED, at_least_one, in_fresh_process, in_this_process, machine, write
from training_memory_rows import MODELS

QWEN3_8B = MODELS["qwen3-0.6b"] | {
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
}
SHAPES = {"qwen3-0.6b": MODELS["qwen3-0.6b"], "qwen3-8b": QWEN3_8B}
TINY = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128, "vocab_size": 4096, "head_dim": 16}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
ROWS = [
    "qwen3-0.6b/1x512/stateless/streamed",
    "qwen3-0.6b/1x512/stateless/streamed+checkpointed",
    "qwen3-0.6b/1x512/adamw/streamed",
    "qwen3-8b/1x512/stateless/streamed",
    "qwen3-0.6b/4x1024/stateless/streamed",
    "qwen3-0.6b/1x512/lora/streamed",
    "qwen3-0.6b/1x512/stateless/streamed+own_step",
    "qwen3-0.6b/1x512/stateless/streamed@68",
    "qwen3-0.6b/4x1024/stateless/streamed+checkpointed",
    "qwen3-0.6b/1x512/stateless/checkpointed",
    "qwen3-0.6b/1x512/adamw/checkpointed",
    "qwen3-0.6b/4x1024/stateless/checkpointed",
    "qwen3-0.6b/1x512/lora/checkpointed",
    "qwen3-8b/1x512/stateless/checkpointed",
]
WARM_UP = 2


def body(recipe):
    """The optimizer of what is no table."""
    import mlx.core as mx
    from mlx.optimizers import Adam, AdamW

    from ember_mlx.optimizers.sinkgd import SinkGD

    class Float32AdamW(AdamW):
        """AdamW, computed in float32 and kept in the dtype of the weights."""

        def apply_single(self, gradient, parameter, state):
            in_float32 = {name: value.astype(mx.float32) for name, value in state.items()}
            decayed = parameter.astype(mx.float32) * (1 - self.learning_rate * self.weight_decay)
            new = Adam.apply_single(self, gradient.astype(mx.float32), decayed, in_float32)
            state.update({name: value.astype(parameter.dtype) for name, value in in_float32.items()})
            return new.astype(parameter.dtype)

    return {"stateless": partial(SinkGD, passes=2), "adamw": Float32AdamW, "lora": AdamW}[recipe](1e-4)


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
        from mlx_lm.tuner.utils import linear_to_lora_layers
        from mlx_lm.utils import _get_classes

        from ember_mlx import Ember, PairedOptimizer
        from ember_mlx.streaming import StreamedStep

        name, batch, recipe, _ = row.split("/")
        batch_size, length = map(int, batch.split("x"))
        length = max(length // 16, 1) if smoke else length
        mx.random.seed(SEED)
        config = SHAPES[name] | {"tie_word_embeddings": False} | (TINY if smoke else {})
        model_class, arguments_class = _get_classes(config)
        self.model = model = model_class(arguments_class.from_dict(config))
        model.set_dtype(mx.bfloat16)
        for _, array in tree_flatten(model.parameters()):
            mx.eval(array)  # one by one: they are drawn in float32
        del array
        if recipe == "lora":
            model.freeze()
            linear_to_lora_layers(model, config["num_hidden_layers"], {"rank": 8, "scale": 20.0, "dropout": 0.0})
            model.model.embed_tokens.unfreeze()
            model.lm_head.unfreeze()
        model.train()
        self.optimizer = PairedOptimizer(model, tables=Ember(1e-4, rounding="stochastic"), rest=body(recipe))
        self.batch = (
            mx.random.randint(0, config["vocab_size"], (batch_size, length + 1)),
            mx.array([[0, length]] * batch_size),
        )
        mx.eval(model.parameters(), self.optimizer.state, self.batch)
        self.bytes = {
            "weights": sum(array.nbytes for _, array in tree_flatten(model.parameters())),
            "optimizer_state": sum(array.nbytes for _, array in tree_flatten(self.optimizer.state)),
        }
        way, _, ahead = way.partition("@")
        self.streamed = None
        if way == "streamed":
            self.streamed = StreamedStep(model, self.optimizer, run_ahead=int(ahead) * 10**6 if ahead else None)
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


def measure(row, steps, smoke):
    """Peaks, phases and seconds of one row, or the seconds of several ways in turn."""
    import mlx.core as mx
    from mlx_lm.models import qwen3

    ways = row.split("/")[-1].split("+")
    own_call = qwen3.TransformerBlock.__call__
    trained = []
    for way in ways:
        trained.append(Trained(row, way, smoke))
        trained[-1].first_seconds = _seconds(trained[-1].step)
        qwen3.TransformerBlock.__call__ = own_call  # mlx-lm's checkpointing patches the class, and a trace keeps it
    mx.clear_cache()
    if len(trained) > 1:
        rounds = [[_seconds(one.step) for one in trained] for _ in range(WARM_UP + steps)][WARM_UP:]
        medians = [statistics.median(each) for each in zip(*rounds, strict=True)]
        return {
            "seconds": dict(zip(ways, medians, strict=True)),
            "ratio": round(medians[0] / medians[1], 4),
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument(
        "--rows", nargs="+", default=["*"], metavar="PATTERN", help="such as 'qwen3-8b/*', or any row in full"
    )
    parser.add_argument("--list", action="store_true", help="name the rows and end")
    parser.add_argument("--limit", type=at_least_one, default=150, help="seconds for a row, then it is given up")
    parser.add_argument("--steps", type=at_least_one, default=15)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to try this script where there is no GPU")
    args = parser.parse_args()
    rows = [row for row in ROWS if any(fnmatch.fnmatch(row, pattern) for pattern in args.rows)]
    rows += [row for row in args.rows if row not in rows and row.count("/") == 3 and "*" not in row]
    if args.list:
        print("\n".join(rows))
        return
    if args.out is None:
        parser.error("--out FILE is where the results go; or --list")
    report = json.loads(args.out.read_text()) if args.out.exists() else {"rows": {}}
    report["machine"] = in_fresh_process(machine) | {"steps": args.steps, "smoke": args.smoke}
    write(args.out, report)
    for row in rows:
        if report["rows"].get(row, {"error": ""}).keys().isdisjoint({"error"}):
            continue
        print(f"{time.strftime('%H:%M:%S')} {row}", flush=True)
        result = report["rows"][row] = within(args.limit, measure, row, args.steps, args.smoke)
        write(args.out, report)
        if "error" in result:
            print(f"{row:40} {result['error']}", flush=True)
            continue
        if "ratio" in result:
            times = ", ".join(f"{way} {seconds * 1e3:.1f} ms" for way, seconds in result["seconds"].items())
            print(f"{row:40} {times}: {result['ratio']:.3f} x", flush=True)
            continue
        ratio = f"{result['peak_memory'] / 1e9:8.3f} GB = {result['peak_over_weights']:.3f} x weights"
        print(f"{row:40} {ratio}, {result['seconds'] * 1e3:8.1f} ms a step", flush=True)
        for phase, of in result["phases"].items():
            print(f"{'':40} {phase:10} {of['peak'] / 1e9:8.3f} GB {of['seconds'] * 1e3:8.1f} ms", flush=True)


if __name__ == "__main__":
    main()
