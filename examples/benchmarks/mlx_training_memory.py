"""Peak memory and step time of a training step, for the shapes of real models with random weights.

    python examples/benchmarks/mlx_training_memory.py --out RESULT.json --rows 'qwen3-0.6b/untied/*/1x512/*'
    python examples/benchmarks/mlx_training_memory.py --draw FOLDER RESULT.json...

A row is model/tying/type/batch x tokens/optimizer of the tables, then /chunked with `--chunked-loss` and /checkpoint
with `--grad-checkpoint`, /nearest with `--body-rounding nearest`, and /unguarded without the guard against NaN and
infinity: `--list` names those of the usual grid, the most telling first; any other that is named in full runs too. The
weights are bfloat16, the body is trained by AdamW, LoRA stands in all layers. Each row is a fresh process; its peak is
that of all its steps, its time the median after the warm-up. The JSON file is written after each row, and rows that it
has already are not run again. On a CPU say `--smoke`: tiny shapes.

Where time is short, say `--one-process`: all rows share imports and compiled kernels, and a row is only measured if
nothing is left of those before. `--fast` is for memory alone (two steps, no times). `--jobs 4` runs rows side by side:
the GPU is slower then, MLX runs further ahead of it, and peaks are up to 40 % higher than they would be alone.
"""

import argparse
import contextlib
import gc
import statistics
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from benchmarking import SEED, at_least_one, in_fresh_process, in_this_process, machine, write
from row_workers import LEFT_OVER
from training_memory_pictures import draw
from training_memory_rows import ROW, TINY, asked_rows, config_of, read_report, words_of

WARM_UP = 2


class Prepared:
    """A model with random weights and all that a step of ``ember-mlx train`` takes, set up as that does it.

    Args:
        config (dict): The model's config.json, with the dtype of its weights.
        args (Options): Those of the run.
        batch_size, length (int): Of the batch, whose tokens are random.
    """

    def __init__(self, config, args, batch_size, length):
        import mlx.core as mx
        from mlx.utils import tree_flatten
        from mlx_lm.utils import _get_classes

        from ember_mlx.finetune.build_optimizer import build_optimizer
        from ember_mlx.finetune.choices import choose
        from ember_mlx.finetune.run import choose_loss
        from ember_mlx.finetune.trainable import make_trainable, shapes_of

        self.args = args
        mx.random.seed(SEED)
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
        self.loss = choose_loss(args, model)
        tokens = mx.random.randint(0, config["vocab_size"], (batch_size, length + 1))
        self.batch = tokens, mx.array([[0, length]] * batch_size)
        self.tokens = batch_size * length
        mx.eval(model.parameters(), self.optimizer.state, self.batch)


def refuse_left_over():
    """Raise RuntimeError if the process still holds arrays of a row before."""
    import mlx.core as mx

    gc.collect()
    mx.clear_cache()
    left = mx.get_active_memory()
    if left > LEFT_OVER:
        raise RuntimeError(f"{left:,} bytes of earlier rows are left: measure it in a fresh process")


def prepare(row, smoke):
    """What a row is measured with, where nothing of those before is left."""
    from ember_mlx.finetune import options

    refuse_left_over()
    of = ROW.fullmatch(row).groupdict()
    batch_size, length = int(of["batch_size"]), int(of["length"])
    config = config_of(row) | {"torch_dtype": "bfloat16"} | (TINY if smoke else {})
    made = Prepared(config, options.parse(words_of(row)), batch_size, max(length // 16, 1) if smoke else length)
    made.optimizer.skip_nonfinite = not of["unguarded"]
    made.logits = made.tokens * config["vocab_size"] * 2
    return made


def measure(row, warm_up, steps, smoke):
    """Take a few steps; the time is the median of ``steps`` after the first ``warm_up``, or None for no warm-up."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.trainer import grad_checkpoint

    from ember_mlx.finetune.step import Step

    made = prepare(row, smoke)
    model, optimizer = made.model, made.optimizer
    sizes = {
        "weights": sum(array.nbytes for _, array in tree_flatten(model.parameters())),
        "gradients": sum(array.nbytes for _, array in tree_flatten(model.trainable_parameters())),
        "optimizer_state": sum(array.nbytes for _, array in tree_flatten(optimizer.state) if array.ndim),
        "logits": made.logits,
    }
    mx.clear_cache()
    seconds, peaks, losses = [], [], []
    with unpatched(type(model.layers[0])):
        if made.args.grad_checkpoint:
            grad_checkpoint(model.layers[0])
        step = Step(model, optimizer, made.loss, head_first=not made.args.chunked_loss)
        for _ in range(warm_up + steps):
            mx.reset_peak_memory()
            start = time.perf_counter()
            losses.append(step(made.batch).loss.item())
            mx.clear_cache()  # as the loop does
            seconds.append(time.perf_counter() - start)
            peaks.append(mx.get_peak_memory())
    return {
        "peak_memory": max(peaks),
        "peaks": peaks,
        "seconds": round(statistics.median(seconds[warm_up:]), 4) if warm_up else None,
        "bytes": sizes,
        "losses": [round(value, 4) for value in losses],
    }


@contextlib.contextmanager
def unpatched(layer):
    """Undo what mlx-lm's ``grad_checkpoint`` does to the class of the layers, which all later models have too."""
    call = layer.__call__
    try:
        yield
    finally:
        layer.__call__ = call


def measured(rows, arguments, args):
    """Of each row its name and what ``measure`` returns, as they are done."""
    if args.one_process:
        yield from ((row, in_this_process(measure, row, *arguments)) for row in rows)
        return
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(in_fresh_process, measure, row, *arguments): row for row in rows}
        yield from ((running[done], done.result()) for done in as_completed(running))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="PATTERN", help="such as 'smollm2-135m/*/chunked'")
    parser.add_argument("--list", action="store_true", help="name the rows and end")
    parser.add_argument("--steps", type=at_least_one, default=5)
    parser.add_argument("--fast", action="store_true", help="memory alone: two steps, no times")
    parser.add_argument("--jobs", type=at_least_one, default=1, help="with --fast: how many rows to run side by side")
    parser.add_argument("--one-process", action="store_true", help="rows one after another in this process")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to try this script where there is no GPU")
    parser.add_argument(
        "--draw", nargs="+", type=Path, metavar=("FOLDER", "RESULT.json"), help="draw the pictures of results and end"
    )
    args = parser.parse_args()
    if args.jobs > 1 and not args.fast:
        parser.error(f"--jobs {args.jobs}: must be 1, or more with --fast: side by side, times mean nothing")
    if args.one_process and args.jobs > 1:
        parser.error(f"--one-process: runs one row after another; leave out --jobs {args.jobs}")
    rows = asked_rows(args.rows)
    if args.list:
        print("\n".join(rows))
        return
    if args.draw:
        folder, *results = args.draw
        if not results:
            parser.error(f"--draw {folder}: also give the JSON files to draw from")
        draw([read_report(path) for path in results], folder)
        return
    if args.out is None:
        parser.error("--out FILE is where the results go; or --list, or --draw")
    report = read_report(args.out) if args.out.exists() else {"machine": {}, "rows": {}}
    warm_up, steps = (0, 2) if args.fast else (WARM_UP, args.steps)
    how = {"steps": steps, "smoke": args.smoke, "jobs": args.jobs, "one_process": args.one_process}
    here = in_fresh_process(machine) | how
    before = report["machine"]
    changed = [fact for fact in ("device", "smoke") if before.get(fact, here[fact]) != here[fact]]
    if changed:
        said = ", ".join(f"{fact}: {before[fact]} and not {here[fact]}" for fact in changed)
        raise SystemExit(f"--out {args.out}: has rows of another kind ({said}); give another file")
    report["machine"] = here
    write(args.out, report)
    rows = [row for row in rows if "peak_memory" not in report["rows"].get(row, {})]
    for row, result in measured(rows, (warm_up, steps, args.smoke), args):
        report["rows"][row] = result
        write(args.out, report)
        print(f"{row:48} {_said(result)}", flush=True)


def _said(result):
    if "error" in result:
        return result["error"]
    time_of_step = f" {result['seconds'] * 1e3:9.1f} ms a step" if result["seconds"] else ""
    return f"{result['peak_memory'] / 1e9:8.3f} GB{time_of_step}"


if __name__ == "__main__":
    main()
