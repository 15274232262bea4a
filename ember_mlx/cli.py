"""The command line: which command, and errors in one line."""

import os
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from unittest import mock

USAGE = """\
ember-mlx: fine-tune language models with mlx-lm and train their token tables too, with the Ember optimizer

  ember-mlx train     train: the options of mlx_lm.lora, and --train-tables, --table-learning-rate, ...
  ember-mlx generate  write text: the options of mlx_lm.generate; --adapter-path takes token tables too
  ember-mlx fuse      merge an adapter into an ordinary model folder: the options of mlx_lm.fuse, and --overwrite
  ember-mlx demo      fine-tune the model that comes with the package; nothing to download
  ember-mlx --version

ember-mlx COMMAND --help tells the options of each."""


def main():
    """Entry point. Exit code 0; 2 for bad input, with one line that says what and what to do."""
    arguments = sys.argv[1:]
    command = arguments[0] if arguments else "--help"
    commands = {"train": train, "generate": generate, "fuse": fuse, "demo": demo}
    if command in ("-h", "--help"):
        print(USAGE)
    elif command in ("-v", "--version"):
        print(version("ember-mlx"))
    elif command in commands:
        _run(command, commands[command], arguments[1:])
    else:
        sys.exit(_one_line("ember-mlx", f"{command} is none of its commands: {', '.join(commands)}"))


def train(arguments):
    from ember_mlx.finetune import options
    from ember_mlx.finetune.run import run

    run(options.parse(arguments))


def generate(arguments):
    _mlx_lm_command("generate", arguments)


def fuse(arguments):
    from mlx_lm.fuse import parse_arguments

    from ember_mlx.errors import InputError

    theirs = [argument for argument in arguments if argument != "--overwrite"]
    with _argv("fuse", theirs):
        save_path = Path(parse_arguments().save_path)
    if save_path.exists() and theirs == arguments and (save_path.is_file() or any(save_path.iterdir())):
        raise InputError(f"--save-path {save_path}: is there already; give another path, or --overwrite")
    _mlx_lm_command("fuse", theirs)


def demo(arguments):
    from ember_mlx.demo import main as run_demo

    run_demo(arguments)


def _mlx_lm_command(name, arguments):
    """mlx-lm's own command with our ``load`` in the place of its own: the one thing it cannot do is load tables."""
    from ember_mlx.finetune.adapters import load

    module = import_module(f"mlx_lm.{name}")
    with mock.patch.object(module, "load", load), _argv(name, arguments):
        module.main()


def _argv(command, arguments):
    return mock.patch.object(sys, "argv", [f"ember-mlx {command}", *arguments])


def _run(command, function, arguments):
    # As mlx_lm.lora sets it, for the tokenizers' threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        extras = "pip install 'ember-mlx[cpu]', or [cuda12] or [cuda13] with an NVIDIA GPU"
        sys.exit(_one_line(f"ember-mlx {command}", f"mlx has no backend here ({error}): {extras}"))
    from ember_mlx.errors import InputError

    try:
        function(arguments)
    except InputError as error:
        sys.exit(_one_line(f"ember-mlx {command}", str(error)))


def _one_line(what, message):
    print(f"{what}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
