"""``ember-mlx fuse``: mlx_lm.fuse, whose ``--adapter-path`` takes token tables too; it overwrites only if asked."""

import json
import sys
from pathlib import Path

from mlx_lm.fuse import parse_arguments

from ember_mlx.commands.mlx_lm_command import run_mlx_lm
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.replacing import replaced

__all__ = ["main"]


def main(arguments: list[str]):
    """Merge an adapter into an ordinary model folder."""
    if {"-h", "--help"} & set(arguments):
        print("ember-mlx fuse also takes --overwrite: replace the model that --save-path holds\n")
    theirs = [argument for argument in arguments if argument != "--overwrite"]
    with replaced(sys, "argv", ["ember-mlx fuse", *theirs]):
        args = parse_arguments()
    folder = Path(args.save_path)
    if folder.resolve() == Path(args.model).resolve():
        raise InputError(f"--save-path {folder}: is the model itself; give another path")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--save-path {folder}: is a file; give a folder")
    if folder.exists() and any(folder.iterdir()) and "--overwrite" not in arguments:
        raise InputError(f"--save-path {folder}: is there already; give another path, or --overwrite")
    run_mlx_lm("fuse", theirs)
    # mlx-lm loads every model*.safetensors that it finds, those of an earlier, larger model too.
    shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()
    for path in folder.glob("model*.safetensors"):
        if path.name not in shards:
            path.unlink()
    print(f"The fused model is in {folder}")
