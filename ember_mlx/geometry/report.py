"""The numbers of a report, as JSON takes them."""

import math

import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ember_mlx.finetune.build_optimizer import peak, table_learning_rate
from ember_mlx.finetune.run_length import updates
from ember_mlx.finetune.summary import Result
from ember_mlx.geometry import measures, verdict
from ember_mlx.geometry.observer import Observer
from ember_mlx.geometry.recorder import COLD
from ember_mlx.geometry.sampling import CLASSES
from ember_mlx.shared.environment import environment

__all__ = ["build", "to_text"]

ROWS_LISTED = 12


def build(
    observer: Observer, result: Result, timed: tuple[np.ndarray, int], tokenizer: TokenizerWrapper, command: str
) -> dict:
    """Everything that was measured, and the verdict.

    Args:
        observer (Observer): Of a run that is over.
        result (Result): Its result.
        timed (tuple): The same run's first updates without measuring: seconds a position of each, and the peak memory
            in bytes.
        tokenizer: Has ``decode``.
        command (str): What the user typed.
    """
    args, rng = observer.args, observer.rng
    numbers = {
        "command": command,
        **environment(),
        "run": {
            "model": str(args.model),
            "data": str(args.data),
            "iters": args.iters,
            "updates": observer.updates,
            "left_out": observer.nonfinite,
            "batch_size": args.batch_size,
            "fine_tune_type": args.fine_tune_type,
            "table_learning_rate": _learning_rate(args),
            "row_floor": args.table_row_floor or None,
            "beta2": observer.beta2,
            "step_limit": observer.step_limit,
            "cold_updates": observer.cold_updates,
            "seed": args.seed,
            "loss_name": result.loss_name,
            "loss_before": result.loss_before,
            "loss_after": result.loss_after,
            "peak_memory": result.peak_memory,
        },
        "tokens": _tokens(observer),
        "tables": [_table(record, observer, tokenizer, rng) for record in observer.tables.values()],
        "hidden": _hidden(observer, rng),
        "cost": _cost(observer, timed),
        "samples": result.samples,
    }
    return _as_json(numbers | {"verdict": verdict.judge(numbers)})


def to_text(found: dict) -> str:
    """The verdict for the terminal."""
    judged = found["verdict"]
    lines = [judged["words"], ""]
    lines += [f"- {finding['claim']}: {finding['answer']}. {finding['words']}" for finding in judged["findings"]]
    return "\n".join(lines)


def _learning_rate(args):
    """The tables'; of a schedule, its peak."""
    rate = table_learning_rate(args)
    return peak(rate, updates(args)) if callable(rate) else rate


def _tokens(observer):
    """How the text is spread over the classes of tokens, and how many of each were in a batch at all."""
    seen, total = observer.history.last_seen > 0, max(observer.counts.sum(), 1)
    return {
        name: {
            "tokens": int((observer.classes == kind).sum()),
            "share_of_text": float(observer.counts[observer.classes == kind].sum() / total),
            "seen": int((seen & (observer.classes == kind)).sum()),
        }
        for kind, name in enumerate(CLASSES)
    }


def _table(record, observer, tokenizer, rng):
    table, sample = record.table, record.sample
    state = observer.optimizer.tables.state[table.path]
    rate = _learning_rate(observer.args)
    rows_moved, row_sizes = record.rows_moved(dict(tree_flatten(observer.model.trainable_parameters()))[table.path])
    most = np.argsort(-rows_moved)[:ROWS_LISTED]
    classes = observer.classes[: len(rows_moved)]

    def describe(token):
        return {
            "token": int(token),
            "text": repr(tokenizer.decode([int(token)])),
            "class": CLASSES[observer.classes[token]],
            "in_the_text": int(observer.counts[token]),
        }

    return {
        "path": table.path,
        "role": table.role,
        "shape": list(table.shape),
        "dtype": str(table.dtype).rpartition(".")[2],
        "measured": {
            "rows": len(sample.rows),
            "columns": len(sample.block_columns),
            "rows_of_the_columns": len(sample.block_rows),
            "rows_followed": len(sample.path_rows),
            "tokens_of_a_batch": sample.batch_tokens,
        },
        "second_moment": record.second_moment(state["r"], state["c"], rng),
        "successive_gradients": record.successive.summary(),
        "gradients_when_seen_again": record.seen_again.summary(),
        "random_cosine": 1 / math.sqrt(table.shape[1]),
        "paths": _paths(record.paths.shares(rng), observer.classes[sample.path_rows]),
        "steps": {gap: histogram.summary() for gap, histogram in record.steps.items()},
        "steps_above_cold": {"learning_rates": COLD, "share": record.share_of_steps_above(COLD)},
        "largest_steps": [
            describe(token) | {"learning_rates": size, "update": update, "last_seen": gap}
            for size, token, update, gap in record.largest_steps
        ],
        "rows_moved_most": [
            describe(token)
            | {
                "learning_rates": float(rows_moved[token] / rate),
                "of_its_size": float(rows_moved[token] / max(row_sizes[token], 1e-30)),
            }
            for token in most
        ],
        "rows_moved": {
            name: {
                "learning_rates": measures.summary(rows_moved[classes == kind] / rate),
                "of_their_size": measures.summary((rows_moved / np.maximum(row_sizes, 1e-30))[classes == kind]),
            }
            for kind, name in enumerate(CLASSES)
        },
    }


def _hidden(observer, rng):
    """The same of the rows of other matrices, together, and which they were."""
    cosines = [rows.cosines[0] for rows in observer.hidden.values()]
    together = measures.Histogram(cosines[0].edges) if cosines else None
    for histogram in cosines:
        together.counts += histogram.counts
    paths = [path for weights in observer.hidden_paths.values() for path in weights.shares(rng)]
    return {
        "kind": "hidden" if observer.args.fine_tune_type == "full" else "adapter",
        "matrices": [
            {"path": path, "columns": rows.before.shape[1], "rows": rows.before.shape[0]}
            for path, rows in observer.hidden.items()
        ],
        "successive_gradients": together.summary() if cosines else {"count": 0},
        "paths": _path_summary(paths),
    }


def _paths(rows, classes):
    return {
        name: _path_summary([row for row, of_class in zip(rows, classes, strict=True) if of_class == kind])
        for kind, name in enumerate(CLASSES)
    }


def _path_summary(rows):
    """Quantiles over the rows; NaN rows, of too few moves, are left out and counted."""
    columns = {
        name: np.array([row[name] for row in rows])
        for name in ("share", "walk_share", "straightness", "walk_straightness")
    }
    found = {name: measures.summary(values) for name, values in columns.items()}
    moves = [row["moves"] for row in rows]
    return found | {"too_few_moves": len(rows) - found["share"]["count"], "moves": float(np.median(moves or [0]))}


def _cost(observer, timed):
    memory = observer.memory()
    without, peak_without = timed
    # The quickest update of either, with the same batches: compiling, and whatever else the machine does, only adds.
    fastest, fastest_without = observer.watch.seconds_a_position().min(axis=0), without.min(axis=0)
    clock, cpu = (fastest / fastest_without - 1).tolist()
    return {
        "memory": memory,
        "peak_memory": {"without": peak_without, "with": observer.watch.peak_memory},
        "seconds_a_position": {"without": float(fastest_without[0]), "with": float(fastest[0])},
        "extra_time": {"clock": clock, "cpu": cpu},
        "timed_updates": len(without),
        "seconds_between_steps": observer.seconds,
    }


def _as_json(value):
    """JSON has no NaN; it stands for what could not be measured, and becomes null."""
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
