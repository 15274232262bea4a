"""What a run will take, beside what it would take with another optimizer on the tables, and what to change."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Any

from ember_mlx.finetune.choices import DEFAULT_LAYERS, choose, refuse_frozen_rows
from ember_mlx.finetune.optimizer_names import planned
from ember_mlx.planner.architecture import Architecture
from ember_mlx.planner.evaluation import DEVICES, peak_memory, with_cache
from ember_mlx.planner.graph import Run
from ember_mlx.planner.network import Traffic, traffic
from ember_mlx.planner.operations import operations
from ember_mlx.planner.step import build_step
from ember_mlx.planner.streaming import streamed_phases, streamed_runs
from ember_mlx.shared.command_line import flag
from ember_mlx.shared.errors import InputError

__all__ = ["Plan", "advice", "alternatives", "plan", "run_of"]

SHORTEST = 256


@dataclass(frozen=True)
class Plan:
    """Bytes that a run takes.

    Args:
        weights, trainable (int): Of all parameters, adapters included, and of those that train.
        gradients, optimizer_state (int): Of what trains.
        most (Counter): The most that arrays of each role take at any moment of a step: "activations", "logits",
            "scratch" and the above.
        at_peak (Counter): The same at the worst moment.
        peak (int): At that moment, in all.
        is_evaluation (bool): Whether that moment is one of validation.
        phases (dict[str, int]): Of a streamed step, the peak of each phase.
        evaluation (int, optional): The peak of validation, where it may be the higher one.
        operations (float): Multiplications of a step, for one token.
        traffic (Traffic, optional): What is sent, by one of several workers.
    """

    weights: int
    trainable: int
    gradients: int
    optimizer_state: int
    most: Counter
    at_peak: Counter
    peak: int
    is_evaluation: bool
    phases: dict[str, int]
    evaluation: int | None
    operations: float
    traffic: Traffic | None


def plan(model: Architecture, run: Run, backend: str) -> Plan:
    """Plan a run on "metal", "cuda" or "cpu". Pure arithmetic: of the order of a second for a large model."""
    step = build_step(model, run, backend)
    phases, of_evaluation = {}, None
    if run.stream:
        phases = streamed_phases(model, run, backend, step)
        peak = of_step = _worst(phases.values())
    else:
        # Streamed steps are planned closer without.
        device = with_cache(DEVICES[backend])
        graph = step.results, step.existing, device, step.evaluations, step.waits, step.late
        peak = of_step = peak_memory(*graph)
    if run.evaluation_length > run.length or run.stream:
        of_evaluation = _evaluation_peak(model, run, backend)
        peak = _worst([of_step, of_evaluation])
    return Plan(
        weights=_bytes(step.weights.values()),
        trainable=_bytes(step.weights[name] for name in step.gradients),
        gradients=_bytes(step.gradients.values()),
        optimizer_state=_bytes(array for array in step.existing if array.role == "optimizer state"),
        most=_whole(peak.most),
        at_peak=_whole(peak.parts),
        peak=int(peak.total),
        is_evaluation=peak.total > of_step.total,
        phases={name: int(phase.total) for name, phase in phases.items()},
        evaluation=None if of_evaluation is None else int(of_evaluation.total),
        operations=operations(model, run, backend),
        traffic=traffic(step) if run.workers > 1 else None,
    )


def _worst(peaks):
    """The highest of some peaks, with the most of each role in any of them."""
    worst = max(peaks, key=lambda peak: peak.total)
    return replace(worst, most=reduce(or_, (peak.most for peak in peaks)))


def _evaluation_peak(model, run, backend):
    """Of the loss alone: nothing is kept for a backward, and all that there is stays. Of a streamed run it is paced.

    Attention is as it is in training, which for Metal's is too much.
    """
    length = max(run.length, run.evaluation_length)
    chunked = run.chunked_loss or (run.stream and not model.whole_head)
    step = build_step(model, replace(run, length=length, chunked_loss=chunked), backend)
    results = [*step.losses, *step.existing]
    parts = [*step.parts, results] if run.stream else [results]
    waits = range(len(parts)) if backend == "cpu" else None
    return peak_memory(results, step.existing, DEVICES[backend], parts, waits)


def run_of(options: Any, model: Architecture, workers: int = 1) -> Run:
    """What of ``ember-mlx train``'s options memory depends on, with rows as long as --max-seq-length allows.

    Args:
        options: The run's.
        model: What trains.
        workers: How many share each batch; the run is that of one.

    Raises:
        InputError: for what ``train`` would refuse too: for most, both ask
            :func:`ember_mlx.finetune.choices.choose`.
    """
    if options.batch_size % workers:
        raise InputError(f"--workers {workers}: must divide --batch-size {options.batch_size}")
    choices = choose(options, model.shapes(), workers=workers)
    if workers == 1 and options.shard_tables:
        raise InputError("--shard-tables: is for several workers; add --workers N, or leave it out")
    lora = choices.lora_parameters or {}
    keys = lora.get("keys")
    return Run(
        batch_size=options.batch_size // workers,
        length=options.max_seq_length - 1,  # the last token is only predicted
        fine_tune_type=options.fine_tune_type,
        layers=choices.num_layers,
        rank=lora.get("rank", 8),
        lora_keys=None if keys is None else tuple(keys),
        tables=tuple(table.role for table in choices.tables),
        optimizer=planned(options),
        table_optimizer=options.table_optimizer,
        stochastic_rounding=options.table_rounding != "nearest",
        grad_checkpoint=bool(options.grad_checkpoint),
        chunked_loss=bool(options.chunked_loss),
        micro_batches=options.grad_accumulation_steps,
        stream=choices.stream,
        keep_inputs=options.keep_inputs or 1,
        norm_pass=options.clip_grad_norm is not None,
        body_rounding=choices.body_rounding,
        workers=workers,
        shard_optimizer=options.shard_optimizer and workers > 1,
        shard_tables=options.shard_tables,
    )


def alternatives(options: Any, model: Architecture, run: Run) -> dict[str, Run]:
    """The same run with another optimizer on the tables, and with the tables frozen, by the flags that ask for it.

    Each is planned as ``train`` runs it, so it may stream or not where the run does; what ``train`` refuses is left
    out. Where the run freezes the tables, all of them train beside it, dequantized.

    Args:
        options, model: As for :func:`run_of`.
        run: The one of these options, with rows as long as they are.
    """
    thawed, flag = ({}, "") if run.tables else ({"train_tables": "auto"}, "--train-tables auto ")
    names = ("ember", "adamw", "adafactor")
    asked = {f"{flag}--table-optimizer {name}": thawed | {"table_optimizer": name} for name in names}
    asked["--train-tables none"] = {"train_tables": "none", "shard_tables": False}
    runs = {flags: _changed(options | changes, model, run) for flags, changes in asked.items()}
    return {flags: other for flags, other in runs.items() if other is not None}


def advice(options: Any, model: Architecture, run: Run, backend: str, memory: int) -> list[tuple[str, Plan]]:
    """The cheapest changes, one on top of the other, until the run fits: flags, and the plan with them so far.

    A change that saves less than 1 % is left out; of several values of one flag, the last stands. When all are made and
    it still does not fit, the last plan says so.

    Args:
        options, model, run: As for :func:`alternatives`.
        backend: Where it trains.
        memory: Bytes that it may take.
    """
    changes, now = [], plan(model, run, backend)
    for flags, changes_of_it in _changes(options, model, run):
        if now.peak <= memory:
            break
        candidate = _changed(options | changes_of_it, model, run)
        if candidate in (None, run):
            continue
        after = plan(model, candidate, backend)
        if after.peak < 0.99 * now.peak:
            options, run, now = options | changes_of_it, candidate, after
            if changes and changes[-1][0].split()[0] == flags.split()[0]:
                changes.pop()
            changes.append((flags, after))
    return changes


def _changed(options, model, run):
    """The run of other options, with rows as long as they were or may be; None where ``train`` refuses it."""
    try:
        refuse_frozen_rows(options)
        other = run_of(options, model, run.workers)
    except InputError:
        return None
    lengths = {name: min(getattr(run, name), other.length) for name in ("length", "evaluation_length")}
    return replace(other, **lengths)


def _changes(options, model, run):
    if not (run.grad_checkpoint or run.stream):
        yield "--grad-checkpoint", {"grad_checkpoint": True}
    if not (run.chunked_loss or run.stream):
        yield "--chunked-loss", {"chunked_loss": True}
    for flags, other in streamed_runs(model, run):
        yield flags, {"stream": True} if flags == "--stream" else {"keep_inputs": other.keep_inputs}
    yield from _fewer_rows_at_a_time(options, run)
    if run.stochastic_rounding and run.table_optimizer == "ember" and not run.stream:
        yield "--table-rounding nearest", {"table_rounding": "nearest"}
    length = max(run.length, run.evaluation_length) + 1
    while length // 2 >= SHORTEST:
        length //= 2
        yield f"--max-seq-length {length}", {"max_seq_length": length}
    if run.batch_size % 2 == 0:
        yield _accumulating(options, 1)  # fewer rows a step: where what is accumulated takes more than it saves
    size = run.batch_size
    while size > 1:
        size //= 2
        yield f"--batch-size {size * run.workers}", {"batch_size": size * run.workers}
    if run.fine_tune_type == "full":
        flags, of_lora = "--fine-tune-type lora", {"fine_tune_type": "lora"}
        if run.layers > DEFAULT_LAYERS:
            flags, of_lora = f"{flags} --num-layers {DEFAULT_LAYERS}", of_lora | {"num_layers": DEFAULT_LAYERS}
        if run.stream and options.stream is None:  # lora does not by itself
            flags, of_lora = f"{flags} --stream", of_lora | {"stream": True}
        yield flags, of_lora
    if run.tables:
        yield "--train-tables none", {"train_tables": "none"}


def _fewer_rows_at_a_time(options, run):
    """As many rows a step and as many steps: halves alone, so that every worker keeps as many rows as the others.

    On a GPU short rows take longer so, which operations do not show: it comes after all that is the same training.
    """
    size, times = run.batch_size, 1
    while size % 2 == 0:
        size, times = size // 2, times * 2
        flags, changes = _accumulating(options, times)
        yield f"--batch-size {size * run.workers} {flags}", changes | {"batch_size": size * run.workers}


def _accumulating(options, times):
    """So many times the batches a step; ``--iters`` counts batches."""
    changes = {"grad_accumulation_steps": options.grad_accumulation_steps * times}
    if options.epochs is None:
        changes["iters"] = options.iters * times
    return " ".join(f"{flag(name)} {value}" for name, value in changes.items()), changes


def _bytes(arrays):
    return int(sum(array.nbytes for array in arrays))


def _whole(counter):
    return Counter({role: int(nbytes) for role, nbytes in counter.items()})
