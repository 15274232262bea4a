"""What a run is refused for before its model is loaded, so that a slip of the pen costs a second and no download."""

from importlib.util import find_spec
from pathlib import Path

from mlx_lm.cli_ui import rprint
from mlx_lm.tuner.callbacks import SUPPORT_CALLBACK

from ember_mlx.finetune import adapters, checkpoints
from ember_mlx.finetune.added_tokens import read_tokens
from ember_mlx.finetune.as_given import as_given
from ember_mlx.finetune.best import keeps_best
from ember_mlx.finetune.build_optimizer import check_rates
from ember_mlx.finetune.data import Rows, check_data_folder, may_validate
from ember_mlx.finetune.options import Options, defaults
from ember_mlx.finetune.run_length import batches_an_epoch, settled
from ember_mlx.finetune.samples import read_prompts
from ember_mlx.finetune.workers import Workers
from ember_mlx.shared.errors import InputError, did_you_mean

__all__ = ["check_inputs", "check_resumed", "no_validation"]


def check_inputs(args: Options, rows: Rows | None, workers: Workers) -> None:
    """Check what the run reads and whom it asks, as far as that needs no model; all workers call this.

    Args:
        args: The run's.
        rows: Those in memory, which take the place of ``--data``.
        workers: All that train together.

    Raises:
        InputError: for the first that cannot be used.
    """
    trained = check_data_folder(args, rows)
    if args.train:
        batches = None if args.packing or trained is None else batches_an_epoch(args, trained)
        if args.epochs is None or batches:  # else the tokens say how far a schedule goes
            check_rates(settled(args, batches), tables=args.train_tables != "none")
        _check_files(args, workers)
        if rows is None and not may_validate(args):
            keeps_best(args, tables=False, validates=False)
            if args.sample_prompts is not None:
                raise no_validation(args)
    _check_workers(args, workers)
    if workers.leads:
        _check_services(args.report_to)


def check_resumed(args: Options) -> None:
    """Raises InputError where ``--resume`` finds no checkpoint; of a good one, the index alone is read."""
    folder = Path(args.adapter_path)
    if args.resume is not None and not checkpoints.options_of(folder, args.resume):
        checkpoints.find(folder, args.resume, lambda _: None)


def no_validation(args: Options) -> InputError:
    """What is said of ``--sample-prompts`` where no validation rows exist."""
    return InputError(
        f"--sample-prompts {args.sample_prompts}: they are answered at each validation, and no validation rows "
        "exist: add a valid.jsonl, or --valid-fraction"
    )


def _check_files(args, workers):
    if args.sample_prompts is not None and workers.leads:
        read_prompts(args.sample_prompts)  # again, with the tokenizer, when there is one
    if args.add_tokens is not None:
        read_tokens(Path(args.add_tokens))
    if args.resume_adapter_file is not None and args.resume is None:
        adapters.check_file(Path(args.resume_adapter_file))


def _check_workers(args, workers):
    if args.train and args.shard_tables and workers.size == 1:
        raise InputError("--shard-tables: is for several workers; start them with mlx.launch, or leave it out")
    if args.batch_size % workers.size:
        raise InputError(f"--batch-size {args.batch_size}: must be a multiple of the {workers.size} workers")
    if args.train and args.shard_optimizer:
        workers.refuse_without_sum_scatter("--shard-optimizer")
    if workers.size == 1 and args.peer_timeout != defaults()["peer_timeout"]:
        line = f"Warning: --peer-timeout {args.peer_timeout}: no effect: it is for several workers"
        rprint(as_given(line, args.given))


def _check_services(report_to):
    for name in filter(None, map(str.strip, (report_to or "").lower().split(","))):  # as mlx-lm reads it
        where = f"--report-to {report_to}: {name}"
        if name not in SUPPORT_CALLBACK:
            hint = did_you_mean(name, SUPPORT_CALLBACK) or f"; the services are {', '.join(SUPPORT_CALLBACK)}"
            raise InputError(f"{where} is no service of mlx-lm's{hint}")
        if find_spec(name) is None:
            raise InputError(f"{where} is not installed; pip install {name}, or leave it out")
