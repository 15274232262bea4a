"""Where a run writes: what lies in its adapter folder and its log is looked at before a model is loaded."""

import os
from pathlib import Path

from ember_mlx.finetune import adapter_saving, checkpoints, run_log_writer
from ember_mlx.finetune.before_loading import check_resumed
from ember_mlx.finetune.folder_lock import FolderLock
from ember_mlx.finetune.options import Options, defaults
from ember_mlx.finetune.safe_writing import existing_parent
from ember_mlx.shared.errors import InputError

__all__ = ["check_adapter_folder", "check_what_is_written", "resumes_in_place"]


def check_what_is_written(args: Options, lock: FolderLock) -> None:
    """Refuse what the run would replace unasked, and what another one is writing to; the locks that exist are taken.

    Raises:
        InputError: for these, and where ``--resume`` finds no checkpoint.
    """
    check_adapter_folder(args)
    check_resumed(args)
    if args.log_jsonl:
        run_log_writer.check(args, resumes_in_place(args))
        if Path(args.log_jsonl).exists():
            lock.hold(Path(args.log_jsonl), f"--log-jsonl {args.log_jsonl}")
    lock.take(make=False)


def check_adapter_folder(args: Options) -> None:
    """Raises InputError for an ``--adapter-path`` that cannot be written to, or holds what the run would replace."""
    if not args.adapter_path:
        raise InputError("--adapter-path '': give a folder to save to")
    folder = Path(args.adapter_path)
    parent = existing_parent(folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"--adapter-path {folder}: {parent} is no folder that can be written to; give another path")
    saved = checkpoints.in_folder(folder)
    if resumes_in_place(args):
        if args.overwrite:
            raise InputError(
                f"--overwrite: --resume continues the run in --adapter-path {folder}; leave one of them out"
            )
    elif (adapter_saving.run_files(folder) or saved) and not args.overwrite:
        which = f"{folder} (the default)" if args.adapter_path == defaults()["adapter_path"] else folder
        if args.resume is not None:
            check_resumed(args)  # first: what is no checkpoint goes on nowhere
            own = checkpoints.adapter_folder_of(Path(args.resume)) or checkpoints.run_folder_of(Path(args.resume))
            than = f" than that of --resume {args.resume}"
            go_on = f", or --adapter-path {own} to go on with that run in its own folder" if own else ""
        else:
            than = ""
            go_on = ", or --resume to continue it" if saved else ""
        raise InputError(
            f"--adapter-path {which}: already holds another run{than}; give another path, or --overwrite to replace it "
            f"with the first save of this one{go_on}"
        )


def resumes_in_place(args: Options) -> bool:
    """Whether the run goes on in the folder of its checkpoint, and does not branch off into another one."""
    if args.resume is None or args.resume is True:
        return args.resume is True
    whole = checkpoints.adapter_folder_of(Path(args.resume))
    if whole:
        return whole.resolve() == Path(args.adapter_path).resolve()
    folder = Path(args.resume).resolve()
    in_it = folder.parent == (Path(args.adapter_path) / checkpoints.FOLDER).resolve()
    return in_it and checkpoints.NAME.fullmatch(folder.name) is not None
