"""Make the recorded files of the parity suite: ``python -m ember_mlx.parity.record streams`` or ``results``.

``streams``: the gradients of both token tables in a real training run. The bundled model (untied, 4096 x 128, float32)
is trained for 64 steps on its own data, 8 prompts and completions a step, the tables by Ember and the body by AdamW,
both at 5e-4. Kept are the gradients of 40 tokens by 24 of the 128 features, the first ones, exactly as they came. The
tokens, by how often the 64 batches hold them: the 10 most frequent; 8 around the middle of those that occur; 8 of the
rarest; 8 that first occur after half of the steps; 6 that never do.

``results``: what implementations make of every stream and dtype on this machine after 1, 10 and 1000 steps (64 of the
real streams), exactly, for machines that do not have them. Run it on a GPU; without ``--implementation``, those that
need the GPU are recorded.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from ember_mlx.parity import recorded, suite
from ember_mlx.parity.implementations import Implementation, implementations, select
from ember_mlx.parity.recorded import Recording
from ember_mlx.shared.environment import device, environment
from ember_mlx.shared.errors import InputError

__all__ = ["main", "record_results", "record_streams"]

STEPS = 64
BATCH_SIZE = 8
LEARNING_RATE = 5e-4
COLUMNS = 24
SEED = 0


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ember_mlx.parity.record", description=__doc__.split("\n\n")[0])
    what = parser.add_subparsers(dest="what", required=True)
    streams = what.add_parser("streams", help="gradients of a real training run; needs MLX and mlx-lm")
    streams.add_argument("--out", type=Path, default=recorded.REAL_STREAMS)
    results = what.add_parser("results", help="what implementations make of the streams here")
    results.add_argument("--out", type=Path, default=recorded.RESULTS)
    results.add_argument("--implementation", nargs="+", metavar="NAME", help="default: those that need a GPU")
    args = parser.parse_args(arguments)
    try:
        if args.what == "streams":
            record_streams(args.out)
        else:
            names = args.implementation or [one.name for one in implementations() if _on_gpu(one)]
            if not names:
                raise InputError("results: no GPU here; name what to record with --implementation")
            record_results(select(names)[0], args.out)
    except InputError as error:
        parser.error(str(error))
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


def _on_gpu(implementation):
    return not implementation.missing and implementation.name in ("mlx cuda", "torch eager cuda", "triton")


def record_results(chosen: list[Implementation], path: Path) -> None:
    """Record each of them along the small and the real streams; each result is within its tolerances, or InputError."""
    about = environment() | {"seed": suite.SEED}
    about |= {"learning_rate": suite.LEARNING_RATE, "weight_decay": suite.WEIGHT_DECAY}
    recordings = []
    for implementation in chosen:
        results = {}
        for case in suite.cases():
            if case.shape == suite.ODD:  # stochastic rounding too: what is right there is known to the bit
                continue
            # Of the real ones the last step alone: the file is to stay small.
            steps = case.steps if case.shape == suite.SMALL else case.steps[-1:]
            for dtype in implementation.dtypes:
                settings = case.shape, dtype, suite.LEARNING_RATE, suite.WEIGHT_DECAY
                tables = implementation.make(*settings, **suite.RULES[case.rule])
                expected = suite.Expected(case, dtype)
                for t, before, stepped, _ in suite.follow(tables, replace(case, steps=steps), expected):
                    first = t + 1 - len(before)
                    _check(implementation, case, dtype, expected.compare(first, stepped, before))
                    made = stepped._asdict() | {"before": before}
                    results[case.name, case.shape, dtype, t] = {part: values[-1] for part, values in made.items()}
        recordings.append(Recording(implementation.name, about | {"device": device(implementation.name)}, results))
        print(f"{implementation.name}: {len(results)} results", flush=True)
    recorded.write_results(path, recordings)


def _check(implementation, case, dtype, comparisons):
    for quantity, numbers in comparisons:
        if not numbers["of_allowed"] <= 1:
            raise InputError(
                f"{implementation.name} fails the suite, so it is not recorded: {quantity} of {case.name}, {dtype}: "
                f"{numbers}"
            )


def record_streams(path: Path) -> None:
    """Train the bundled model and keep a part of the gradients of its tables."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.optimizers import AdamW
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.datasets import CacheDataset, CompletionsDataset
    from mlx_lm.tuner.trainer import default_loss, iterate_batches

    from ember_mlx import Ember, PairedOptimizer, find_token_tables
    from ember_mlx.demo import MODEL
    from ember_mlx.demo.corpus import finetuning_pairs
    from ember_mlx.finetune.base_models import load_base

    mx.set_default_device(mx.cpu)
    model, tokenizer, _ = load_base(MODEL)
    model.set_dtype(mx.float32)
    model.train()
    optimizer = PairedOptimizer(model, tables=Ember(LEARNING_RATE), rest=AdamW(LEARNING_RATE, bias_correction=True))
    pairs, _ = finetuning_pairs()
    data = CacheDataset(CompletionsDataset(pairs, tokenizer, "prompt", "completion", mask_prompt=False))
    batches = iterate_batches(data, BATCH_SIZE, max_seq_length=128, loop=True, seed=SEED)
    loss_and_gradients = nn.value_and_grad(model, default_loss)
    tables = {table.role: table.path for table in find_token_tables(model)}

    losses, kept, occurrences = [], {role: [] for role in tables}, []
    for _, (tokens, lengths) in zip(range(STEPS), batches, strict=False):
        (loss, _), gradients = loss_and_gradients(model, tokens, lengths)
        optimizer.update(model, gradients)
        mx.eval(loss, model.parameters(), optimizer.state)
        flat = dict(tree_flatten(gradients))
        for role, table in tables.items():
            kept[role].append(np.array(flat[table])[:, :COLUMNS])
        texts = [row[:end] for row, (_, end) in zip(np.array(tokens), np.array(lengths), strict=True)]  # no padding
        occurrences.append(np.bincount(np.concatenate(texts), minlength=len(kept["embedding"][-1])))
        losses.append(loss.item())
    rows = _rows(np.stack(occurrences))
    about = environment() | {"losses": losses, "tokens": rows.tolist(), "columns": [0, COLUMNS]}
    about |= {"seed": SEED, "learning_rate": LEARNING_RATE, "batch_size": BATCH_SIZE, "model": "ember_mlx/demo/model"}
    streams = {f"real {role}": np.stack(gradients)[:, rows] for role, gradients in kept.items()}
    np.savez_compressed(path, about=np.array(json.dumps(about)), **streams)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats a token")


def _rows(occurrences):
    """The tokens that are kept, from how often each occurs in each step, (T, V)."""
    total = occurrences.sum(axis=0)
    first = np.argmax(occurrences > 0, axis=0)
    by_frequency = np.argsort(-total, kind="stable")
    seen = by_frequency[: np.count_nonzero(total)]
    early, late = seen[first[seen] < STEPS // 2], seen[first[seen] >= STEPS // 2]
    middle = len(early) // 2
    groups = (early[:10], early[middle : middle + 8], early[-8:], late[:8], by_frequency[len(seen) :][:6])
    return np.concatenate(groups)


if __name__ == "__main__":
    main()
