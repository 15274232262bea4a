"""A run: mlx-lm's own steps in mlx-lm's own order, with the token tables among what trains."""

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.cli_ui import rprint
from mlx_lm.tuner.callbacks import TrainingCallback, get_reporting_callbacks
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.utils import print_trainable_parameters

from ember_mlx.finetune import adapter_saving, adapters, checkpoints, run_log_writer, safe_writing
from ember_mlx.finetune.added_tokens import add_asked_tokens
from ember_mlx.finetune.as_given import as_given, naming_as_given
from ember_mlx.finetune.before_loading import check_inputs, no_validation
from ember_mlx.finetune.best import keeps_best, read_best
from ember_mlx.finetune.broken_pipes import outliving_its_readers
from ember_mlx.finetune.build_optimizer import build_optimizer
from ember_mlx.finetune.choices import Choices, choose
from ember_mlx.finetune.chunked_loss import chunked_loss
from ember_mlx.finetune.data import load_data
from ember_mlx.finetune.disk import what_is_kept
from ember_mlx.finetune.display import colours_on_a_terminal_alone
from ember_mlx.finetune.evaluation import evaluate
from ember_mlx.finetune.folder_lock import FolderLock
from ember_mlx.finetune.given import Given, Outcome
from ember_mlx.finetune.history import perplexity
from ember_mlx.finetune.loop import Training
from ember_mlx.finetune.lost_peers import PeerDeadline, reporting_lost_peers
from ember_mlx.finetune.memory_limit import limited_memory, telling_what_helps
from ember_mlx.finetune.options import Options
from ember_mlx.finetune.packing import packed
from ember_mlx.finetune.resume import (
    CONTENTS,
    made_of,
    options_to_agree,
    refuse_changes,
    restore,
    share_position,
    weights_checksum,
)
from ember_mlx.finetune.run_length import asked, batches_an_epoch, passes, settled
from ember_mlx.finetune.samples import Samples
from ember_mlx.finetune.saving import Saving, refuse_full_disk
from ember_mlx.finetune.sharded_tables import ShardedTables, check_modules
from ember_mlx.finetune.streamed import as_it_began, step_of
from ember_mlx.finetune.summary import Result, default_rates, format_result, format_table, what_trains
from ember_mlx.finetune.trainable import make_trainable, shapes_of
from ember_mlx.finetune.watchers import Watcher
from ember_mlx.finetune.where_it_writes import check_adapter_folder, check_what_is_written, resumes_in_place
from ember_mlx.finetune.without_effect import endless_warmups, idle_patience
from ember_mlx.finetune.workers import Workers
from ember_mlx.shared.errors import InputError, reason_of
from ember_mlx.streaming.mean_loss import mean_loss
from ember_mlx.streaming.rows_apart import check_rows_stay_apart

__all__ = ["choose_loss", "run", "run_with", "train_model"]

WORTH_COLLECTING = 2**22  # bytes: a collection can take half a second


def run(
    args: Options,
    training_callback: TrainingCallback | None = None,
    watchers: Sequence[Watcher] = (),
    make_step: Callable | None = None,
) -> Result | None:
    """What ``ember-mlx train`` does: train, test, or both, as ``args`` (from :func:`options.parse`) say.

    Nothing is written before all that can be checked has been. ``training_callback`` hears of every report, beside
    the services of ``--report-to`` (mlx-lm's own ``run`` drops it).

    ``watchers`` look on while it trains. They may measure gradients: with any, only ``--stream`` streams.
    ``make_step(model, optimizer, loss, accumulation)`` makes the step that is taken, one with the call of
    :class:`~ember_mlx.finetune.step.Step`; default: that, or :class:`~ember_mlx.finetune.streamed.Streamed`.

    While it trains in the main thread, SIGINT, SIGTERM, SIGHUP and a pipe that has lost its reader end it between two
    steps, with a checkpoint; whatever else ends it leaves the checkpoints of before.

    Returns:
        What came of the training, or None after a test alone.

    Raises:
        InputError: for anything in ``args``, the data, the model or the checkpoint that cannot be used, when another
            run is writing to the same folder, when the disk did not take what was trained, and, with
            ``--on-nonfinite stop``, for a loss or a gradient that is not finite.
        SystemExit: with several workers, on all but the first, instead of InputError, which is told once.
        PeerLost: when another worker is gone; one that stands still ends the process, with exit code 75.
        Interrupted: (a ``KeyboardInterrupt``) for these, once the run is saved; ``--resume`` goes on.
    """
    return run_with(Given(), args, [training_callback] if training_callback else [], watchers, make_step).result


def run_with(
    given: Given,
    args: Options,
    callbacks: Sequence[TrainingCallback] = (),
    watchers: Sequence[Watcher] = (),
    make_step: Callable | None = None,
) -> Outcome:
    """What :func:`run` does, with a model or rows that are in memory; it raises the same."""
    if not (args.train or args.test):
        raise InputError("train: false and test: false: nothing to do; ask for at least one")
    if mx.get_active_memory() > WORTH_COLLECTING:
        gc.collect()  # the model of a run before lies in circles of references, and would count in the peak of this one
    workers = Workers.join()
    deadline = PeerDeadline(workers, args.peer_timeout)
    with naming_as_given(args.given), colours_on_a_terminal_alone(), reporting_lost_peers(workers), deadline:
        workers.agree(options_to_agree(args))
        with workers.one_outcome():
            check_inputs(args, given.rows, workers)
        with limited_memory(args), FolderLock(Path(args.adapter_path)) as lock:
            with workers.one_outcome():
                if args.train and workers.leads:
                    check_what_is_written(args, lock)
            return _run(given, args, callbacks, watchers, make_step, lock, deadline)


def _run(given, args, callbacks, watchers, make_step, lock, deadline):
    """Load, train and test."""
    workers, result = deadline.workers, None
    np.random.seed(args.seed)
    with workers.one_outcome():
        model, tokenizer, config = given.load(args)
        if args.train:
            tokenizer, added_tokens = add_asked_tokens(args, model, tokenizer, config)
        elif args.adapter_path != "":
            tokenizer = adapters.add_tokens_of(Path(args.adapter_path), model, tokenizer, config)
        rprint("Loading datasets")
        train_set, valid_set, test_set = load_data(args, tokenizer, given.rows)
        train_set = packed(args, train_set)
        if args.train:
            args = settled(args, batches_an_epoch(args, len(train_set)))
        if workers.leads and (services := _reporting_callbacks(args)):  # they record the options
            callbacks = [services, *callbacks]
        if args.train:
            args = as_it_began(args, measured=bool(watchers) or make_step is not None)
            choices = choose(args, shapes_of(model), added_tokens, workers.size)
            samples = _samples(args, tokenizer, valid_set, deadline)
        elif args.adapter_path != "":
            adapters.apply_adapter(model, Path(args.adapter_path), config)
    if args.train:
        result = train_model(
            args, choices, model, train_set, valid_set, callbacks, watchers, samples, make_step, lock, deadline
        )
    if args.test:
        rprint("Testing")
        _test(args, model, test_set, deadline.passed)
    return Outcome(result, model, tokenizer)


def train_model(
    args: Options,
    choices: Choices,
    model: nn.Module,
    train_set: Sequence,
    valid_set: Sequence,
    callbacks: Sequence[TrainingCallback],
    watchers: Sequence[Watcher],
    samples: Samples | None,
    make_step: Callable | None,
    lock: FolderLock,
    deadline: PeerDeadline,
) -> Result:
    """Train ``model`` and save what was trained to ``args.adapter_path``."""
    workers = deadline.workers
    own_made_of = made_of(model, train_set, valid_set, workers.size)
    contents = {"--add-tokens": choices.added_tokens} | {shown: own_made_of[name] for name, shown in CONTENTS.items()}
    for name, fact in contents.items():  # one by one: other rows have other tokens
        workers.agree({name: fact})
    with workers.one_outcome():
        _set_what_trains(args, choices, model)
        if args.shard_tables:
            check_modules(model, choices.tables)
        if args.packing:
            check_rows_stay_apart(model, args.max_seq_length - 1)
        kept = what_is_kept(args, bool(choices.tables), keeps_best(args, bool(choices.tables), bool(len(valid_set))))
        optimizer = build_optimizer(model, args, choices)
        trained = what_trains(model, optimizer, args, choices)
        asked_to_stream = args.stream
        args = args | choices.as_options()  # what the records of the run say of it
        whole = nullcontext
        if make_step is None:
            args, make_step, whole = step_of(args, model, optimizer, asked_to_stream, choices.not_streamed)
        loss = choose_loss(args, model)
    if workers.size > 1:
        workers.agree({"weights that train (--resume-adapter-file)": weights_checksum(model.trainable_parameters())})

    rows = [len(train_set), len(valid_set)]
    start, saving, log = _begin(args, model, optimizer, own_made_of, kept, rows, lock, workers)
    print_trainable_parameters(model)
    rprint(f"\n{format_table(trained)}")
    if rates := default_rates(trained, args):
        rprint(rates)
    rprint(f"\n{passes(args, len(train_set))}\n")
    if choices.warning:
        rprint(as_given(choices.warning, args.given))
    sharded = None
    if args.shard_tables:
        sharded = ShardedTables(model, optimizer, choices.tables, workers, loss, chunked=bool(args.chunked_loss))
        rprint(f"{sharded}\n")
        loss, make_step, whole = sharded.loss, sharded.step, sharded.whole
    if samples:
        watchers = [*watchers, samples]
    if log:
        callbacks, watchers = [*callbacks, log], [*watchers, log]
        if samples:
            samples.listeners.append(log.on_samples)
    training = Training(
        args, model, optimizer, choices.tables, saving, callbacks, watchers, start, make_step, deadline, whole
    )
    idle = idle_patience(args, start.step if start else 0, training.history.validations.waited)
    for line in [*endless_warmups(args), *([idle] if idle else [])]:
        rprint(f"{as_given(line, args.given)}\n")
    valid_rows = CacheDataset(valid_set)  # tokenized once for all validations
    with telling_what_helps(args):  # by now it is known whether it streams
        peak_memory = training.train(loss, train_set, valid_rows)

    loss_before, loss_after = training.losses(loss, valid_rows)
    if sharded:
        sharded.make_whole()
    if log:
        log.end(training.steps_done, loss_after if valid_set else None)
    saved = adapter_saving.run_files(Path(args.adapter_path)) if workers.leads else []
    result = Result(
        loss_name="Validation loss" if valid_set else "Training loss",
        loss_before=loss_before,
        loss_after=loss_after,
        peak_memory=None if start and start.step == args.iters else peak_memory,
        trained=trained,
        files=[path for path in saved if path.is_file()],
        samples=samples.taken if samples else [],
        best=saving.best and saving.best.found,
        peak_worker=training.peak_worker if workers.size > 1 else None,
    )
    if workers.leads:
        saving.record(result.to_json() | {"steps": training.steps_done})
    with outliving_its_readers():
        rprint(f"\n{format_result(result)}")
        training.nonfinite.report()
        for failed in saving.failed:
            rprint(f"Not saved: {failed}. What was trained is saved.")
    return result


def _samples(args, tokenizer, valid_set, deadline):
    """What answers ``--sample-prompts``, or None."""
    if args.sample_prompts is None:
        return None
    if not len(valid_set):
        raise no_validation(args)
    return Samples(args, tokenizer, deadline)


def _set_what_trains(args, choices, model):
    """Make trainable what was chosen, with the weights of ``--resume-adapter-file``."""
    mx.random.seed(args.seed)
    make_trainable(model, args, choices)
    if args.resume_adapter_file is not None and args.resume is None:
        adapters.refuse_other_tokens(Path(args.resume_adapter_file), choices.added_tokens)
        rprint(f"Loading fine-tuned weights from {args.resume_adapter_file}")
        adapters.load_file(model, Path(args.resume_adapter_file))


def _begin(args, model, optimizer, own_made_of, kept, rows, lock, workers):
    """Go on from a checkpoint if that is asked for, and take the adapter folder; returns position, saving and log."""
    start = resumed = log = None
    in_place = resumes_in_place(args)
    with workers.one_outcome():
        if workers.leads:
            if args.resume is not None:
                start, resumed = _go_on(args, model, optimizer, own_made_of, rows[0])
                if in_place and not kept.best and (old := read_best(Path(args.adapter_path) / adapters.BEST)):
                    why = "--no-keep-best" if args.keep_best is False else "that takes --keep-best"
                    rprint(f"{adapters.BEST}/ is of step {old.step} and is not kept up: {why}")
            disk = refuse_full_disk(args, model, optimizer, kept)
            if not (in_place and start.step == args.iters):
                rprint(f"Disk: at most {disk}")
            safe_writing.make_folder(Path(args.adapter_path))
            lock.take(make=True)
            check_adapter_folder(args)  # again: until now, in a new folder, another run may have been and gone
        steps_done = start.step if start else 0
        saving = Saving(args, model, optimizer, own_made_of, rows, kept, resumed, in_place, steps_done)
        if args.log_jsonl and workers.leads:
            safe_writing.make_folder(Path(args.log_jsonl).absolute().parent)
            lock.hold(Path(args.log_jsonl), f"--log-jsonl {args.log_jsonl}")
            log = run_log_writer.RunLogWriter(args, steps_done, goes_on=in_place)
    if args.resume is not None:
        start = share_position(workers, start, model, optimizer)
    return start, saving, log


def _go_on(args, model, optimizer, own_made_of, rows):
    """Put everything as the checkpoint has it; its position and its folder."""
    checkpoint = checkpoints.find(Path(args.adapter_path), args.resume, rprint)
    refuse_changes(args, checkpoint, own_made_of, model, optimizer)
    position = restore(args, checkpoint, own_made_of, model, optimizer, batches_an_epoch(args, rows))
    if position.step == args.iters:
        more = "--iters" if args.epochs is None else "--epochs"
        rprint(
            f"Nothing is left to train: step {position.step} of {checkpoint.folder} is the last of {asked(args)}; "
            f"--resume with a higher {more} continues"
        )
    else:
        rprint(f"Resuming after step {position.step}, from {checkpoint.folder}")
    return position, checkpoint.folder


def choose_loss(args: Options, model: nn.Module) -> Callable:
    """mlx-lm's loss, or for ``--chunked-loss`` the same in less memory.

    With ``--stream`` it is for validation alone, whose logits would be the peak: in less memory where that can be.
    """
    if not (args.stream or args.chunked_loss):
        return mean_loss
    try:
        return chunked_loss(model, for_validation=bool(args.stream))
    except InputError:
        if args.chunked_loss:
            raise
        return mean_loss


def _reporting_callbacks(args):
    try:
        return get_reporting_callbacks(
            args.report_to, project_name=args.project_name, log_dir=args.adapter_path, config=vars(args)
        )
    # Whatever the client of the service raises: no account, no connection.
    except Exception as error:
        raise InputError(f"--report-to {args.report_to}: {reason_of(error)}; log in there, or leave it out") from error


def _test(args, model, test_set, between_batches):
    """mlx-lm's test, whose function takes no loss."""
    loss = choose_loss(args, model)
    loss = evaluate(args, model, loss, CacheDataset(test_set), args.test_batches, between_batches)
    rprint(f"Test loss {loss:.3f} nats a token; perplexity {perplexity(loss):.3f}.")
