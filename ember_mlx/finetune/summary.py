"""What a run says of itself: what trains before it, and what came of it after."""

from dataclasses import dataclass
from pathlib import Path

import mlx.optimizers as optim
from mlx.utils import tree_flatten

from ember_mlx.finetune.build_optimizer import peak, updates
from ember_mlx.shared.units import format_bytes


@dataclass(frozen=True)
class Trained:
    """One line of the table: parameters that one optimizer trains; a token table by its path, or the rest, by None.

    ``state_bytes`` is what the optimizer keeps for them, ``adam_bytes`` what MLX's Adam would: two arrays of each
    parameter's shape and dtype.
    """

    table: str | None
    what: str
    optimizer: str
    learning_rate: str
    parameters: int
    state_bytes: int
    adam_bytes: int


@dataclass(frozen=True)
class Result:
    """What came of a run. Losses are nats a token, over the validation batches or, without a set, the training's."""

    loss_name: str
    loss_before: float
    loss_after: float
    peak_memory: int
    trained: list[Trained]
    files: list[Path]

    @property
    def table_state_bytes(self) -> int:
        """Bytes of optimizer state that were kept for the token tables."""
        return sum(line.state_bytes for line in self.trained if line.table)


def what_trains(model, optimizer, tables, args) -> list[Trained]:
    """A line for each token table and one for the rest."""
    parameters = dict(tree_flatten(model.trainable_parameters()))
    lines = []
    for table in tables:
        rows, columns = table.shape
        lines.append(
            Trained(
                table.path,
                f"{table.module_path} ({table.role}, {rows} x {columns} {_dtype(table.dtype)})",
                type(optimizer.tables).__name__
                + (", stochastic rounding" if args.table_rounding == "stochastic" else ""),
                _rate(optimizer.tables, args),
                rows * columns,
                sum(array.nbytes for array in optimizer.tables.state[table.path].values()),
                2 * parameters.pop(table.path).nbytes,
            )
        )
    if parameters:
        body = optimizer.rest if tables else optimizer.optimizer
        lines.append(
            Trained(
                None,
                _body(args),
                type(body).__name__,
                _rate(body, args),
                sum(parameter.size for parameter in parameters.values()),
                sum(array.nbytes for _, array in tree_flatten(body.state) if array.ndim),
                2 * sum(parameter.nbytes for parameter in parameters.values()),
            )
        )
    return lines


def format_table(lines: list[Trained]) -> str:
    rows = [["trains", "optimizer", "learning rate", "parameters", "optimizer state", "Adam would keep"]]
    for line in lines:
        sizes = [f"{line.parameters:,}", format_bytes(line.state_bytes), format_bytes(line.adam_bytes)]
        rows.append([line.what, line.optimizer, line.learning_rate, *sizes])
    total = _total(lines)
    rows.append(["in all", "", "", f"{total[0]:,}", format_bytes(total[1]), format_bytes(total[2])])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = (str.ljust, str.ljust, str.ljust, str.rjust, str.rjust, str.rjust)
    text = ["  ".join(place(cell, width) for place, cell, width in zip(left, row, widths, strict=True)) for row in rows]
    text.insert(1, "-" * len(text[0]))
    return "\n".join(line.rstrip() for line in text)


def format_result(result: Result) -> str:
    files = "\n".join(f"  {path} ({format_bytes(path.stat().st_size)})" for path in result.files)
    same = ", on the same batches" if result.loss_name == "Validation loss" else ""
    _, kept, adam = _total(result.trained)
    return (
        f"{result.loss_name} {result.loss_before:.3f} before, {result.loss_after:.3f} after, in nats a token{same}.\n"
        f"Peak memory {format_bytes(result.peak_memory)}; optimizer state {format_bytes(kept)}, where Adam would keep "
        f"{format_bytes(adam)}.\n{files}"
    )


def _total(lines):
    return [sum(getattr(line, field) for line in lines) for field in ("parameters", "state_bytes", "adam_bytes")]


def _body(args):
    layers = "layer" if args.num_layers == 1 else "layers"
    if args.fine_tune_type == "full":
        return f"the rest ({args.num_layers} {layers}, norms)"
    return f"{args.fine_tune_type} in {args.num_layers} {layers}, rank {args.lora_parameters['rank']}"


def _rate(optimizer: optim.Optimizer, args):
    schedule = optimizer._schedulers.get("learning_rate")
    return f"up to {peak(schedule, updates(args)):.3g}" if schedule else f"{optimizer.learning_rate.item():.3g}"


def _dtype(dtype):
    return str(dtype).rpartition(".")[2]
