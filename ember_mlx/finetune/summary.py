"""What a run reports: what trains before it, and what came of it after."""

import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from ember_mlx.finetune import adapters
from ember_mlx.finetune.best import Best
from ember_mlx.finetune.build_optimizer import peak
from ember_mlx.finetune.choices import Choices
from ember_mlx.finetune.history import perplexity
from ember_mlx.finetune.mlx_lm_internals import rate_schedule
from ember_mlx.finetune.options import Options, flag
from ember_mlx.finetune.run_length import updates
from ember_mlx.optimizers import SplitWeights
from ember_mlx.optimizers.guarded import GuardedOptimizer
from ember_mlx.optimizers.rounded import StochasticRounding
from ember_mlx.shared.text_tables import is_narrow, text_table
from ember_mlx.shared.units import format_bytes

__all__ = ["Result", "Trained", "default_rates", "format_result", "format_table", "what_trains"]

ROUNDED = ", stochastic rounding"
ITS_OWN = "its own"
STATES = ("optimizer state", "Adam would keep")


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
    """What came of a run.

    Losses are nats a token, over the validation batches or, without a set, those of the first and the last report of
    the training; ``loss_before`` is None where these are one. ``samples`` has the answers to ``--sample-prompts``:
    ``{"step": ..., "samples": [{"prompt": ..., "answer": ...}, ...]}`` for each validation.
    ``peak_memory`` is in bytes, None where no step was left to take. ``best`` is what ``best/`` holds, if it is kept.
    ``peak_worker`` is the one of several workers that had the peak.
    """

    loss_name: str
    loss_before: float | None
    loss_after: float
    peak_memory: int | None
    trained: list[Trained]
    files: list[Path]
    samples: list[dict[str, Any]] = field(default_factory=list)
    best: Best | None = None
    peak_worker: int | None = None

    @property
    def perplexity_before(self) -> float | None:
        """e^loss_before."""
        return None if self.loss_before is None else perplexity(self.loss_before)

    @property
    def perplexity_after(self) -> float:
        """e^loss_after."""
        return perplexity(self.loss_after)

    def to_json(self) -> dict[str, str | float | None]:
        """The losses; JSON has no NaN and no infinity, which are None in it."""
        losses = {"loss_before": self.loss_before, "loss_after": self.loss_after}
        finite = {name: loss if loss is not None and math.isfinite(loss) else None for name, loss in losses.items()}
        return {"loss_name": self.loss_name} | finite

    @property
    def table_state_bytes(self) -> int:
        """Bytes of optimizer state that were kept for the token tables."""
        return sum(line.state_bytes for line in self.trained if line.table)


def what_trains(model: nn.Module, optimizer: GuardedOptimizer, options: Options, choices: Choices) -> list[Trained]:
    """A line for each token table and one for the rest."""
    parameters = dict(tree_flatten(model.trainable_parameters()))
    bits = sorted({module.bits for module in model.modules() if hasattr(module, "bits")})
    lines = []
    for table in choices.tables:
        rows, columns = table.shape
        dequantized = ", dequantized" if table.module_path in choices.dequantize else ""
        lines.append(
            Trained(
                table.path,
                f"{table.module_path} ({table.role}, {rows} x {columns} {_dtype(table.dtype)}{dequantized})",
                _name(optimizer.tables)
                + (f", row floor {options.table_row_floor:g}" if options.table_row_floor else "")
                + (ROUNDED if choices.table_rounding == "stochastic" else ""),
                _rate(optimizer.tables, options),
                rows * columns,
                sum(array.nbytes for array in optimizer.tables.state[table.path].values()),
                2 * parameters.pop(table.path).nbytes,
            )
        )
    if parameters:
        body = optimizer.rest if choices.tables else optimizer.optimizer
        lines.append(
            Trained(
                None,
                _body(options, choices, bits),
                _name(body),
                _rate(body, options),
                sum(parameter.size for parameter in parameters.values()),
                sum(array.nbytes for _, array in tree_flatten(body.state) if array.ndim),
                2 * sum(parameter.nbytes for parameter in parameters.values()),
            )
        )
    return lines


def format_table(lines: list[Trained]) -> str:
    """A table of what trains, with the total in the last row; on a narrow terminal a row has two lines."""
    total = _total(lines)
    sizes = [_sizes(line) for line in (*lines, total)]
    if is_narrow():
        # A table's shape gives its parameters.
        cells = [f"{line.what}\n  {line.optimizer}, {line.learning_rate}" for line in lines]
        cells.append(f"in all, {total.parameters:,} parameters")
        rows = [(cell, *nbytes) for cell, (_, *nbytes) in zip(cells, sizes, strict=True)]
        return text_table(("trains\n  optimizer, learning rate", *STATES), rows, right=(1, 2), total=True)
    rows = [
        (line.what, line.optimizer, line.learning_rate, *of_line)
        for line, of_line in zip((*lines, total), sizes, strict=True)
    ]
    header = ("trains", "optimizer", "learning rate", "parameters", *STATES)
    return text_table(header, rows, right=(3, 4, 5), total=True)


def default_rates(lines: list[Trained], options: Options) -> str:
    """Which learning rates nobody has given, in a line; "" where there are none, and for a run that is resumed.

    They differ by optimizer, and a resumed run has those that it had.
    """
    body, tables = "learning_rate", "table_learning_rate"
    used = {tables if line.table else body for line in lines if line.learning_rate != ITS_OWN}
    replaced = {tables: options.table_lr_schedule, body: options.lr_schedule}
    left = [name for name in replaced if name in used and name not in options.given and not replaced[name]]
    if not left or options.resume is not None:
        return ""
    return "By default: " + " and ".join(f"{flag(name)} {getattr(options, name):g}" for name in left)


def format_result(result: Result) -> str:
    """Losses, memory and the files of a run, in lines; losses alone where no step was left to take."""
    if result.peak_memory is None:
        return "\n".join([f"{_losses(result)}.", *_best(result)])
    total = _total(result.trained)
    memory = f"optimizer state {format_bytes(total.state_bytes)}"
    if total.state_bytes != total.adam_bytes:
        memory += f", where Adam would keep {format_bytes(total.adam_bytes)}"
    whose = "" if result.peak_worker is None else f", of worker {result.peak_worker}"
    lines = [
        f"{_losses(result)}.",
        f"Peak memory {format_bytes(result.peak_memory)}{whose}; {memory}.",
        *(f"  {path} ({format_bytes(path.stat().st_size)})" for path in result.files),
        *_best(result),
    ]
    return "\n".join(lines)


def _best(result):
    if not result.files or result.loss_name != "Validation loss":
        return
    if result.best is None:
        if result.loss_before is not None and not result.loss_after < result.loss_before:
            yield f"No validation loss was lower than before training: best/ is not kept{_lower_rates(result.trained)}"
        return
    folder, loss, step = result.files[0].parent, result.best.validation_loss, result.best.step
    if loss == result.loss_after:
        yield f"The last validation loss is the lowest: use it with --adapter-path {shlex.quote(str(folder))}"
        return
    best = shlex.quote(str(folder / adapters.BEST))
    yield f"The lowest validation loss was {loss:.3f}, after step {step}: use it with --adapter-path {best}"


def _lower_rates(trained):
    """What to try; an optimizer with a rate of its own leaves the flag alone."""
    asked = [line for line in trained if line.learning_rate != ITS_OWN]
    flags = ["--learning-rate"] if any(not line.table for line in asked) else []
    flags += ["--table-learning-rate"] if any(line.table for line in asked) else []
    if not flags:
        return ""
    return f"; try lower rates ({', '.join(flags)})" if len(flags) > 1 else f"; try a lower {flags[0]}"


def _losses(result):
    if result.loss_before is None:
        return f"{result.loss_name} {result.loss_after:.3f} nats a token, in the only report (no validation set)"
    before, after = f"{result.loss_name} {result.loss_before:.3f}", f"{result.loss_after:.3f}"
    if result.loss_name != "Validation loss":
        return f"{before} in the first report, {after} in the last, in nats a token"
    return (
        f"{before} before, {after} after, in nats a token, on the same batches; perplexity "
        f"{result.perplexity_before:,.4g} before, {result.perplexity_after:,.4g} after"
    )


def _total(lines):
    sums = [sum(getattr(line, field) for line in lines) for field in ("parameters", "state_bytes", "adam_bytes")]
    return Trained(None, "in all", "", "", *sums)


def _sizes(line):
    return f"{line.parameters:,}", format_bytes(line.state_bytes), format_bytes(line.adam_bytes)


def _body(options, choices, bits):
    layers = f"{choices.num_layers} {'layer' if choices.num_layers == 1 else 'layers'}"
    if options.fine_tune_type == "full":
        return f"the rest ({layers}, norms)"
    of_bits = f" of {' and '.join(map(str, bits))} bits" if bits else ""
    return f"{options.fine_tune_type} in {layers}{of_bits}, rank {choices.lora_parameters['rank']}"


def _name(optimizer):
    if isinstance(optimizer, StochasticRounding):
        return _name(optimizer.optimizer) + ROUNDED
    name = type(optimizer).__name__
    return f"{name}({_name(optimizer.optimizer)})" if isinstance(optimizer, SplitWeights) else name


def _rate(optimizer: optim.Optimizer, options):
    inside = optimizer.optimizer if isinstance(optimizer, SplitWeights | StochasticRounding) else optimizer
    if getattr(inside, "relative_step", False):  # Adafactor as mlx-lm makes it: it leaves --learning-rate alone
        return ITS_OWN
    schedule = rate_schedule(inside)
    return f"up to {peak(schedule, updates(options)):.3g}" if schedule else f"{optimizer.learning_rate.item():.3g}"


def _dtype(dtype: mx.Dtype):
    return str(dtype).rpartition(".")[2]
