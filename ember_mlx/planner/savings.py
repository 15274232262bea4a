"""What ``train`` switches on by itself where a run would not fit the machine: the same training in less memory."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_lm.cli_ui import rprint

from ember_mlx.finetune import checkpoints
from ember_mlx.finetune.memory_limit import NO_LIMIT
from ember_mlx.finetune.optimizer_names import canonical, settings
from ember_mlx.finetune.options import Options, flag
from ember_mlx.finetune.workers import Workers
from ember_mlx.planner import machine
from ember_mlx.planner.architecture import Architecture, read_architecture
from ember_mlx.planner.graph import Run
from ember_mlx.planner.inputs import find_config, read_inputs, with_rows_of_data
from ember_mlx.planner.operations import operations
from ember_mlx.planner.plan import plan
from ember_mlx.planner.streaming import streamed_runs
from ember_mlx.shared.errors import InputError, reason_of
from ember_mlx.shared.units import in_units

__all__ = ["Saving", "cheapest_savings", "savings", "with_savings"]

# Beside it, each has a flag of its own against it, but --grad-checkpoint, which is mlx-lm's.
AGAINST = {"grad_checkpoint": "--no-auto-savings", "chunked_loss": "--no-chunked-loss", "stream": "--no-stream"}


@dataclass(frozen=True)
class Saving:
    """An option that is switched on.

    Args:
        option (str): Its name.
        before, peak (int): Bytes that the run is planned to take without it and with it.
        time (float): What a step takes with it, as a multiple of without; by its operations alone.
    """

    option: str
    before: int
    peak: int
    time: float


def with_savings(options: Options, given: Collection[str]) -> Options:
    """The options of a run that trains, with what :func:`savings` switches on; it is said here.

    Several workers must take the same step, whatever the memory of each: of them, the first only warns. A run that is
    resumed must take the steps that it took: it has what its checkpoint has, whatever the memory of this machine.
    """
    workers = Workers.join()
    if not workers.leads:
        return options
    if options.auto_savings and options.resume is not None and workers.size == 1:
        options |= _as_before(options, given)
    may_switch = workers.size == 1 and options.resume is None
    asked = options if may_switch else options | {"auto_savings": False}
    switched_on, lines = savings(asked, given, workers.size)
    for line in lines:
        rprint(line)
    return options | switched_on


def savings(options: Options, given: Collection[str], workers: int = 1) -> tuple[dict[str, bool], list[str]]:
    """What to switch on so that a run fits this machine, and what ``train`` says of it, a line each.

    The last line warns of a run that does not fit, whatever is switched on. Nothing is raised: a run that cannot be
    planned can be tried.

    Args:
        options: The run's.
        given: The names of the options that the user has given, which stay as they are.
        workers: How many share each batch.
    """
    try:
        return _savings(options, given, workers)
    except InputError:
        why = _why_no_plan(options)
    # A fault in a plan is no reason not to train.
    except Exception as error:
        why = f"{type(error).__name__}: {reason_of(error)}"
    return {}, [f"Not planned, so that nothing is switched on to save memory: {why}"] if why else []


def cheapest_savings(
    model: Architecture, run: Run, backend: str, peak: int, available: int, allowed: Collection[str]
) -> list[Saving]:
    """The savings with which a run fits, those that cost the least time; where none do, those with the lowest peak.

    Args:
        model, run, backend: What is planned.
        peak: Bytes that it takes as it is.
        available: Bytes that it may take.
        allowed: The options that may be switched on: "grad_checkpoint", "chunked_loss" and "stream", which includes
            both.
    """
    best, lowest = [], peak
    for names in _sets(model, run, allowed):
        if lowest <= available:
            break
        found, before, now = [], run, peak
        for name in names:
            after = replace(before, **{name: True})
            time = operations(model, after, backend) / operations(model, before, backend)
            found.append(Saving(name, now, plan(model, after, backend).peak, time))
            before, now = after, found[-1].peak
        if now < lowest:
            best, lowest = found, now
    return best


def _sets(model, run, allowed) -> Iterable[tuple[str, ...]]:
    """What to try, the least time first. A streamed step took 1.13 to 1.55 times a checkpointed one."""
    if run.stream:
        return
    kinds = [name for name in ("grad_checkpoint", "chunked_loss") if name in allowed and not getattr(run, name)]
    kinds.sort(key=lambda name: operations(model, replace(run, **{name: True})))
    yield from ((name,) for name in kinds)
    if len(kinds) > 1:
        yield tuple(kinds)
    if "stream" in allowed and any(flags == "--stream" for flags, _ in streamed_runs(model, run)):
        yield ("stream",)


def _savings(options, given, workers):
    backend = machine.backend()
    available, source = machine.limited(options, *machine.memory(None, backend))
    inputs = read_inputs(options, workers)
    if plan(inputs.model, inputs.run, backend).peak <= available:
        return {}, []  # however long the rows are: they need not be read, which may take seconds
    longest, inputs = inputs, with_rows_of_data(options, inputs)
    peak = plan(inputs.model, inputs.run, backend).peak
    allowed = _allowed(options, given, inputs.model)
    found = cheapest_savings(inputs.model, inputs.run, backend, peak, available, allowed)
    has = f"{source} {in_units(available)}"
    lines = [_in_words(saving, has) for saving in found]
    if lines and inputs.run == longest.run:
        lines.insert(0, f"Planned {inputs.assumptions[-1]}")  # or the data has such rows
    peak = found[-1].peak if found else peak
    if peak > available:
        even_so = " even so" if found else ""
        ends = "" if options.memory_limit == NO_LIMIT else "a step that takes more ends the run; "
        tokens = f"{inputs.run.batch_size} x {max(inputs.run.length, inputs.run.evaluation_length)}"
        lines.append(
            f"Warning: with batches of {tokens} tokens this run is predicted to take {in_units(peak)}{even_so}, and "
            f"{has}: {ends}`ember-mlx plan` with the same flags names what to change"
        )
    return {saving.option: True for saving in found}, lines


def _as_before(options, given):
    """What the checkpoint of ``--resume`` was made with, of what is not given; it is said here."""
    before = checkpoints.options_of(Path(options.adapter_path), options.resume)
    found = {name: True for name in sorted(AGAINST) if name not in given and before.get(name) is True}
    if found:
        rprint(f"Switched on: {' and '.join(map(flag, found))}, as in the run that is resumed")
    return found


def _allowed(options, given, model):
    """Those that the user has not decided on, and that change nothing of the training; none for mlx-lm's own run."""
    if not options.auto_savings or options.train_tables == "none":
        return set()
    allowed = set(AGAINST) - set(given)
    if model.whole_head:
        allowed -= {"chunked_loss", "stream"}
    optimizer = canonical(options.optimizer)
    if settings(options, optimizer).get("weights") is not None and not optimizer.startswith("flash"):
        allowed.discard("stream")  # others split all weights at once
    lora = options.lora_parameters
    if options.fine_tune_type != "full" and lora.get("dropout"):
        allowed.discard("grad_checkpoint")  # a layer that is computed again would draw other numbers
        if lora.get("keys") is not None:
            allowed -= {"chunked_loss", "stream"}  # which take no head with dropout
    return allowed


def _in_words(saving, has):
    return (
        f"Switched on: {flag(saving.option)}, since this run is planned to take {in_units(saving.before)}, and {has}: "
        f"{in_units(saving.before - saving.peak)} less, and by its operations a step takes about {saving.time:.2f} "
        f"times as long. {AGAINST[saving.option]} turns it off"
    )


def _why_no_plan(options):
    """Why the model cannot be planned, if train may still load it; of all else train says itself what is wrong."""
    try:
        config, path = find_config(options.model)
    except InputError:
        return None
    try:
        read_architecture(config, path.name)
    except InputError as error:
        return str(error)
    return None
