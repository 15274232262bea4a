"""A run: mlx-lm's own steps in mlx-lm's own order, with the token tables among what trains."""

import math
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.cli_ui import make_console, rprint
from mlx_lm.tuner.callbacks import TrainingCallback, get_reporting_callbacks
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import TrainingArgs, default_loss, evaluate, iterate_batches, train
from mlx_lm.tuner.utils import print_trainable_parameters

from ember_mlx.errors import InputError
from ember_mlx.finetune import adapters
from ember_mlx.finetune.build_optimizer import build_optimizer
from ember_mlx.finetune.chunked_loss import chunked_loss
from ember_mlx.finetune.data import check_data_folder, load_data
from ember_mlx.finetune.summary import Result, format_result, format_table, what_trains
from ember_mlx.finetune.trainable import choose_tables, make_trainable, refuse_quantized


def run(args, training_callback: TrainingCallback | None = None) -> Result | None:
    """What ``ember-mlx train`` does: train, test, or both, as ``args`` (from :func:`options.parse`) say.

    Nothing is written before all that can be checked has been. ``training_callback`` hears of every report, beside
    the services of ``--report-to`` (mlx-lm's own ``run`` drops it).

    Returns:
        What came of the training, or None after a test alone.

    Raises:
        InputError: for anything in ``args``, the data or the model that cannot be used.
    """
    if not (args.train or args.test):
        raise InputError("train: false and test: false: nothing to do; ask for at least one")
    check_data_folder(args)
    workers = mx.distributed.init().size()
    if args.batch_size % workers:
        raise InputError(f"--batch-size {args.batch_size}: must be a multiple of the {workers} workers")
    if args.train:
        _check_adapter_folder(args)
    np.random.seed(args.seed)
    callbacks = [callback for callback in (_reporting_callbacks(args), training_callback) if callback]
    rprint("Loading pretrained model")
    trust = {"trust_remote_code": args.trust_remote_code}
    model, tokenizer, config = adapters.load_base(args.model, tokenizer_config=trust, **trust)
    rprint("Loading datasets")
    train_set, valid_set, test_set = load_data(args, tokenizer)
    result = None
    if args.train:
        result = train_model(args, model, train_set, valid_set, callbacks)
    elif args.adapter_path != "":
        adapters.apply_adapter(model, Path(args.adapter_path), config)
    if args.test:
        rprint("Testing")
        _test(args, model, test_set)
    return result


def train_model(args, model, train_set, valid_set, callbacks: list[TrainingCallback]) -> Result:
    """Train ``model`` and save what was trained to ``args.adapter_path``."""
    if args.fine_tune_type == "full":
        refuse_quantized(model)
    tables = choose_tables(model, args.train_tables, args.dequantize_tables)
    args.token_tables = [table.path for table in tables]
    mx.random.seed(args.seed)
    make_trainable(model, args, tables)
    if args.resume_adapter_file is not None:
        _resume(model, Path(args.resume_adapter_file))
    optimizer = build_optimizer(model, args, tables)
    trained = what_trains(model, optimizer, tables, args)
    loss = choose_loss(args, model)
    print_trainable_parameters(model)
    rprint(f"\n{format_table(trained)}\n")

    saver = adapters.Saver(Path(args.adapter_path), model, args)
    leader = mx.distributed.init().rank() == 0

    def save(steps_done, checkpoint=True):
        if leader:
            names = ", ".join(saver.save(steps_done, checkpoint))
            make_console().print(f"  [ui.good]save[/ui.good]  [ui.muted]{names}[/ui.muted]")

    batches = Batches(args.save_every, save)
    record = Record(callbacks, optimizer, table_rate=bool(tables))
    mx.reset_peak_memory()
    train(
        model=model,
        optimizer=optimizer,
        train_dataset=CacheDataset(train_set),
        val_dataset=CacheDataset(valid_set),
        args=_training_args(args, saver.scratch),
        loss=loss,
        iterate_batches=batches,
        training_callback=record,
    )
    peak_memory = mx.get_peak_memory()
    save(args.iters, checkpoint=args.iters % args.save_every == 0)
    losses = record.training
    if valid_set:
        losses = [*record.validation, _evaluate_on_first_batches(args, model, loss, valid_set, batches)]
    result = Result(
        loss_name="Validation loss" if valid_set else "Training loss",
        loss_before=losses[0],
        loss_after=losses[-1],
        peak_memory=peak_memory,
        trained=trained,
        files=adapters.run_files(saver.folder) if leader else [],
    )
    rprint(f"\n{format_result(result)}")
    return result


def choose_loss(args, model):
    """mlx-lm's loss, or for ``--chunked-loss`` the same in less memory."""
    return chunked_loss(model) if args.chunked_loss else default_loss


class Batches:
    """mlx-lm's ``iterate_batches``; between two steps its loop asks for a batch, and there the run is saved.

    Args:
        save_every (int): Save after every that many steps.
        save (callable): Called with the number of steps done.
    """

    def __init__(self, save_every, save):
        self.save_every = save_every
        self.save = save
        self.first_evaluation = None  # NumPy's random state, from which an evaluation draws its batches

    def __call__(self, dataset, batch_size, max_seq_length, loop=False, **options):
        if not loop:
            self.first_evaluation = self.first_evaluation or np.random.get_state()
            yield from iterate_batches(dataset, batch_size, max_seq_length, loop=False, **options)
            return
        for steps_done, batch in enumerate(iterate_batches(dataset, batch_size, max_seq_length, loop=True, **options)):
            if steps_done and steps_done % self.save_every == 0:
                self.save(steps_done)
            yield batch


class Record(TrainingCallback):
    """Keeps the losses, adds the tables' learning rate, and hands both on to other callbacks."""

    def __init__(self, callbacks, optimizer, table_rate):
        self.callbacks = callbacks
        self.optimizer = optimizer
        self.table_rate = table_rate
        self.validation, self.training = [], []

    def on_train_loss_report(self, train_info):
        _refuse_non_finite("training", train_info["train_loss"], train_info["iteration"])
        self.training.append(train_info["train_loss"])
        if self.table_rate:
            train_info["table_learning_rate"] = self.optimizer.table_learning_rate.item()
        for callback in self.callbacks:
            callback.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info):
        _refuse_non_finite("validation", val_info["val_loss"], val_info["iteration"])
        self.validation.append(val_info["val_loss"])
        for callback in self.callbacks:
            callback.on_val_loss_report(val_info)


def _refuse_non_finite(which, loss, iteration):
    """Before the next save: a NaN never leaves the weights again."""
    if not math.isfinite(loss):
        raise InputError(
            f"the {which} loss is {loss} at iteration {iteration}; the weights are not saved. Lower the learning "
            "rates, or look for rows with nothing to learn: with --mask-prompt, prompts as long as --max-seq-length"
        )


def _check_adapter_folder(args):
    if not args.adapter_path:
        raise InputError("--adapter-path '': give a folder to save to")
    folder = Path(args.adapter_path)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"--adapter-path {folder}: {there} is no folder that can be written to; give another path")
    if adapters.run_files(folder) and not args.overwrite:
        raise InputError(
            f"--adapter-path {folder}: already holds another run; give another path, or --overwrite to replace it with "
            "the first save of this one"
        )


def _reporting_callbacks(args):
    try:
        return get_reporting_callbacks(
            args.report_to, project_name=args.project_name, log_dir=args.adapter_path, config=vars(args)
        )
    except (ImportError, ValueError) as error:
        raise InputError(f"--report-to {args.report_to}: {error}") from error


def _resume(model, path):
    """Trained weights of an earlier run, its tables beside them included."""
    tables = path.with_name(path.name.replace(adapters.ADAPTERS, adapters.TABLES))
    rprint(f"Loading fine-tuned weights from {path}")
    if not path.is_file():
        raise InputError(f"--resume-adapter-file {path}: there is no such file; give an {adapters.ADAPTERS}")
    for file in (path, tables) if tables != path and tables.exists() else (path,):
        weights = adapters.read_arrays(file)
        # What this run does not train, it would not save either.
        trainable = model.trainable_parameters()
        remedy = "use the --fine-tune-type, --train-tables and --num-layers of the run that wrote it"
        adapters.load_weights(model, weights, trainable, f"--resume-adapter-file {file}", remedy)


def _training_args(args, adapter_file):
    return TrainingArgs(
        batch_size=args.batch_size,
        iters=args.iters,
        val_batches=args.val_batches,
        steps_per_report=args.steps_per_report,
        steps_per_eval=args.steps_per_eval,
        steps_per_save=args.iters + 1,  # Batches saves: mlx-lm would put tables where its own loader refuses them
        adapter_file=adapter_file,
        max_seq_length=args.max_seq_length,
        grad_checkpoint=args.grad_checkpoint,
        grad_accumulation_steps=args.grad_accumulation_steps,
        clear_cache_threshold=args.clear_cache_threshold,
    )


def _evaluate_on_first_batches(args, model, loss, valid_set, batches):
    """The loss after the last step, on the batches of the first validation: mlx-lm draws others each time."""
    random_state = np.random.get_state()
    np.random.set_state(batches.first_evaluation)
    mean = _evaluate(args, model, loss, valid_set, args.val_batches)
    np.random.set_state(random_state)  # a test that follows draws what mlx-lm would
    return mean


def _test(args, model, test_set):
    """mlx-lm's test, whose function takes no loss."""
    loss = _evaluate(args, model, choose_loss(args, model), test_set, args.test_batches)
    rprint(f"Test loss {loss:.3f}, Test ppl {math.exp(loss):.3f}.")


def _evaluate(args, model, loss, rows, num_batches):
    return evaluate(
        model=model,
        dataset=CacheDataset(rows),
        batch_size=args.batch_size,
        num_batches=num_batches,
        max_seq_length=args.max_seq_length,
        loss=loss,
        iterate_batches=iterate_batches,
        clear_cache_threshold=args.clear_cache_threshold,
    )
