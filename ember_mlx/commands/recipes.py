"""``ember-mlx recipes``: list the recipes that come with the package, and copy one for ``train --config``."""

import argparse
from pathlib import Path

from ember_mlx.recipes import RECIPES
from ember_mlx.shared.command_line import describe, in_any_case
from ember_mlx.shared.errors import InputError, did_you_mean
from ember_mlx.shared.text_tables import text_table

__all__ = ["main"]

EPILOG = """\
examples:
  ember-mlx recipes
      what there is, and what each needs
  ember-mlx recipes first-lora
      copies it to first-lora.yaml; then: ember-mlx train --config first-lora.yaml --model MODEL --data DATA"""
HELP = {
    "recipes": {
        "name": ("NAME", "The recipe to copy. Default: list all."),
        "save_path": ("FILE", "Where to copy it to. Default: NAME.yaml in this folder."),
        "overwrite": (None, "Replace that file."),
    }
}


def main(arguments: list[str]) -> None:
    """What ``ember-mlx recipes`` does.

    Raises:
        InputError: for a name that no recipe has, and for a file that exists.
    """
    parser = argparse.ArgumentParser(
        prog="ember-mlx recipes",
        description="Files of options for `ember-mlx train --config`, with a reason for each value.",
        epilog=EPILOG,
    )
    parser.add_argument("name", nargs="?", type=in_any_case(RECIPES))
    parser.add_argument("--save-path")
    parser.add_argument("--overwrite", action="store_true")
    own = describe(parser, HELP).parse_args(arguments)
    if own.name is not None:
        _copy(own.name, own.save_path, own.overwrite)
    elif own.save_path is not None or own.overwrite:
        raise InputError(f"NAME is required to copy a recipe; the recipes are {', '.join(RECIPES)}")
    else:
        print(text_table(("recipe", "what it is", "needs"), [(name, *_summary(name)) for name in RECIPES]))


def _summary(name):
    """What a recipe is and needs: its first two lines, without their first words."""
    first, second = RECIPES[name].read_text("utf-8").splitlines()[:2]
    return first.partition(": ")[2], second.partition(": ")[2]


def _copy(name, save_path, overwrite):
    if name not in RECIPES:
        hint = did_you_mean(name, RECIPES) or f"; the recipes are {', '.join(RECIPES)}"
        raise InputError(f"NAME {name}: is no recipe{hint}")
    path = Path(f"{name}.yaml" if save_path is None else save_path)
    if path.is_dir():
        raise InputError(f"--save-path {path}: is a folder; give the name of a file in it")
    if path.exists() and not overwrite:
        raise InputError(f"--save-path {path}: already exists; give another file, or --overwrite")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--save-path {path}: {path.parent} is no folder; give a path in one that exists")
    path.write_bytes(RECIPES[name].read_bytes())
    print(f"{path}: its first lines say what it needs; ember-mlx train --config {path} --model MODEL --data DATA")
