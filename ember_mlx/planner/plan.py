"""What a run will take, beside what it would take with another optimizer on the tables, and what to change."""

from collections import Counter
from dataclasses import dataclass, replace

from ember_mlx.planner.architecture import Architecture
from ember_mlx.planner.builder import Run
from ember_mlx.planner.evaluation import DEVICES, peak_memory
from ember_mlx.planner.step import Step
from ember_mlx.shared.errors import InputError

DEFAULT_LAYERS = 16  # mlx-lm's, for LoRA
SHORTEST = 256
ROLES = {
    "auto": ("embedding", "head", "tied"),
    "embedding": ("embedding", "tied"),
    "head": ("head",),
    "none": (),
}


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
    """

    weights: int
    trainable: int
    gradients: int
    optimizer_state: int
    most: Counter
    at_peak: Counter
    peak: int
    is_evaluation: bool


def plan(model: Architecture, run: Run, backend: str) -> Plan:
    """Plan a run on "metal", "cuda" or "cpu". Pure arithmetic: of the order of a second for a large model."""
    step = Step(model, run, backend).build()
    peak = of_step = peak_memory(step.results, step.there, DEVICES[backend])
    if run.evaluation_length > run.length:
        of_evaluation = _evaluation_peak(model, run, backend)
        peak = max(of_step, of_evaluation, key=lambda peak: peak.total)
        peak.most = of_step.most | of_evaluation.most
    return Plan(
        weights=_bytes(step.weights.values()),
        trainable=_bytes(step.weights[name] for name in step.gradients),
        gradients=_bytes(step.gradients.values()),
        optimizer_state=_bytes(array for array in step.there if array.role == "optimizer state"),
        most=_whole(peak.most),
        at_peak=_whole(peak.parts),
        peak=int(peak.total),
        is_evaluation=peak is not of_step,
    )


def _evaluation_peak(model, run, backend):
    """Of the loss alone: nothing is kept for a backward, and all that there is stays.

    Attention is as it is in training, which for Metal's is too much.
    """
    step = Step(model, replace(run, length=run.evaluation_length), backend).build()
    return peak_memory([*step.losses, *step.there], step.there, DEVICES[backend])


def run_of(args, model: Architecture) -> Run:
    """What of ``ember-mlx train``'s options memory depends on, with rows as long as --max-seq-length allows.

    Raises:
        InputError: for what ``train`` would refuse too.
    """
    asked, there = args.num_layers, model.layers
    if asked is not None and asked > there and there:
        raise InputError(f"--num-layers {asked}: the model has {there} layers; use at most that, or -1 for all")
    if asked is None:
        layers = there if args.fine_tune_type == "full" else min(DEFAULT_LAYERS, there)
    else:
        layers = there if asked < 0 else min(asked, there)
    if model.quantization and args.fine_tune_type == "full":
        raise InputError(
            "--fine-tune-type full: the model is quantized, and quantized weights cannot be trained: use lora"
        )
    found = {table.role: table for table in model.tables()}
    chosen = tuple(role for role in found if role in ROLES[args.train_tables])
    if args.train_tables != "none" and not chosen:
        raise InputError(f"--train-tables {args.train_tables}: the embedding is the head too (tied); use auto")
    if asked == 0 and not chosen and args.fine_tune_type != "full":
        raise InputError("--num-layers 0 --train-tables none: nothing is left to train; ask for layers or for tables")
    packed = [found[role].name for role in chosen if found[role].nbytes is not None]
    if packed and not args.dequantize_tables:
        raise InputError(
            f"--train-tables {args.train_tables}: the weights of {' and '.join(packed)} are quantized, and a quantized "
            "table cannot be trained: add --dequantize-tables, or leave the tables frozen with --train-tables none"
        )
    keys = (args.lora_parameters or {}).get("keys")
    return Run(
        batch_size=args.batch_size,
        length=args.max_seq_length - 1,  # the last token is only predicted
        fine_tune_type=args.fine_tune_type,
        layers=layers,
        rank=(args.lora_parameters or {}).get("rank", 8),
        lora_keys=None if keys is None else tuple(keys),
        tables=chosen,
        optimizer=args.optimizer.lower(),
        table_optimizer=args.table_optimizer,
        stochastic_rounding=args.table_rounding != "nearest",
        grad_checkpoint=bool(args.grad_checkpoint),
        chunked_loss=bool(args.chunked_loss),
        accumulate=args.grad_accumulation_steps > 1,
        tables_must_train=args.add_tokens is not None or asked == 0,
    )


def alternatives(run: Run) -> dict[str, Run]:
    """The same run with another optimizer on the tables, and, where they may be, with the tables frozen.

    By the flags that ask for it. Where the run freezes the tables, all of them train beside it, dequantized.
    """
    thawed, flag = (run, "") if run.tables else (replace(run, tables=ROLES["auto"]), "--train-tables auto ")
    names = ("ember", "adamw", "adafactor")
    kinds = {f"{flag}--table-optimizer {name}": replace(thawed, table_optimizer=name) for name in names}
    return kinds if run.tables_must_train else kinds | {"--train-tables none": replace(run, tables=())}


def advice(model: Architecture, run: Run, backend: str, memory: int) -> list[tuple[str, Plan]]:
    """The cheapest changes, one on top of the other, until the run fits: flags, and the plan with them so far.

    A change that saves less than 1 % is left out; of several values of one flag, the last stands. When all are made and
    it still does not fit, the last plan says so.
    """
    changes, now = [], plan(model, run, backend)
    for flags, changed in _changes(run):
        if now.peak <= memory:
            break
        candidate = replace(run, **changed)
        after = plan(model, candidate, backend)
        if after.peak < 0.99 * now.peak:
            run, now = candidate, after
            if changes and changes[-1][0].split()[0] == flags.split()[0]:
                changes.pop()
            changes.append((flags, after))
    return changes


def _changes(run):
    if not run.grad_checkpoint:
        yield "--grad-checkpoint", {"grad_checkpoint": True}
    if not run.chunked_loss:
        yield "--chunked-loss", {"chunked_loss": True}
    if run.stochastic_rounding and run.table_optimizer == "ember":
        yield "--table-rounding nearest", {"stochastic_rounding": False}
    length = max(run.length, run.evaluation_length) + 1
    while length // 2 >= SHORTEST:
        length //= 2
        lengths = {name: min(getattr(run, name), length - 1) for name in ("length", "evaluation_length")}
        yield f"--max-seq-length {length}", lengths
    size = run.batch_size
    while size > 1:
        size //= 2
        yield f"--batch-size {size}", {"batch_size": size}
    if run.fine_tune_type == "full":
        fewer = f" --num-layers {DEFAULT_LAYERS}" if run.layers > DEFAULT_LAYERS else ""
        yield "--fine-tune-type lora" + fewer, {"fine_tune_type": "lora", "layers": min(run.layers, DEFAULT_LAYERS)}
    if run.tables and not run.tables_must_train:
        yield "--train-tables none", {"tables": ()}


def _bytes(arrays):
    return int(sum(array.nbytes for array in arrays))


def _whole(counter):
    return Counter({role: int(nbytes) for role, nbytes in counter.items()})
