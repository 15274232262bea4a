"""The command line: which command, and errors in one line."""

import json
import os
import shlex
import sys
import warnings
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

USAGE = """\
ember-mlx: fine-tune language models with mlx-lm and train their token tables too, with the Ember optimizer

  ember-mlx train     train: the options of mlx_lm.lora, and --train-tables, --table-learning-rate, --resume, ...
  ember-mlx plan      how much memory that will take, by the same flags: nothing is loaded or trained
  ember-mlx generate  write text: the options of mlx_lm.generate; --adapter-path takes token tables too
  ember-mlx fuse      merge an adapter into an ordinary model folder: the options of mlx_lm.fuse, and --overwrite
  ember-mlx geometry  train and measure whether Ember suits the model and the data: the options of train, and --out
  ember-mlx plot      draw runs that were logged with train --log-jsonl: losses, memory, how far each step moves
  ember-mlx demo      fine-tune the model that comes with the package; nothing to download
  ember-mlx parity    compare every implementation that runs here, MLX's and PyTorch's, with a float64 oracle
  ember-mlx --version

ember-mlx COMMAND --help tells the options of each."""


def main():
    """Entry point. Exit code 0; 2 for bad input, with a line that says what to do; 128 + the signal if stopped."""
    arguments = sys.argv[1:]
    command = arguments[0] if arguments else "--help"
    commands = {function.__name__: function for function in (train, plan, generate, fuse, demo, geometry, plot, parity)}
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
    from ember_mlx.finetune.output import outliving_its_readers
    from ember_mlx.finetune.run import run
    from ember_mlx.finetune.stop_signals import Interrupted

    try:
        run(options.parse(arguments))
    except Interrupted as stopped:
        with outliving_its_readers():
            print(stopped, file=sys.stderr)
            if stopped.checkpoint:
                words = options.command_to_resume(arguments, stopped.resume_words)
                print(f"To go on:\n  {shlex.join(['ember-mlx', 'train', *words])}", file=sys.stderr)
        sys.exit(stopped.exit_code)


def plan(arguments):
    from ember_mlx.plan_command import main as run_plan

    run_plan(arguments)


def generate(arguments):
    _mlx_lm_command("generate", arguments)


def fuse(arguments):
    from mlx_lm.fuse import parse_arguments

    from ember_mlx.errors import InputError

    if {"-h", "--help"} & set(arguments):
        print("ember-mlx fuse also takes --overwrite: replace the model that --save-path holds\n")
    theirs = [argument for argument in arguments if argument != "--overwrite"]
    with _replaced(sys, "argv", ["ember-mlx fuse", *theirs]):
        args = parse_arguments()
    folder = Path(args.save_path)
    if folder.resolve() == Path(args.model).resolve():
        raise InputError(f"--save-path {folder}: is the model itself; give another path")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--save-path {folder}: is a file; give a folder")
    if folder.exists() and any(folder.iterdir()) and "--overwrite" not in arguments:
        raise InputError(f"--save-path {folder}: is there already; give another path, or --overwrite")
    _mlx_lm_command("fuse", theirs)
    # mlx-lm loads every model*.safetensors that it finds, those of an earlier, larger model too.
    shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()
    for path in folder.glob("model*.safetensors"):
        if path.name not in shards:
            path.unlink()
    print(f"The fused model is in {folder}")


def plot(arguments):
    from ember_mlx.plot_runs import main as run_plot

    run_plot(arguments)


def demo(arguments):
    from ember_mlx.demo import main as run_demo

    run_demo(arguments)


def geometry(arguments):
    from ember_mlx.geometry.command import main as run_geometry

    run_geometry(arguments)


def parity(arguments):
    from ember_mlx.parity.command import main as run_parity

    sys.exit(run_parity(arguments))


def _mlx_lm_command(name, arguments):
    """mlx-lm's own command with our ``load`` in the place of its own: the one thing it cannot do is load tables."""
    from ember_mlx.finetune.adapters import load

    module = import_module(f"mlx_lm.{name}")
    with _replaced(module, "load", load), _replaced(sys, "argv", [f"ember-mlx {name}", *arguments]):
        module.main()


@contextmanager
def _replaced(module, name, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _run(command, function, arguments):
    # As mlx_lm.lora sets it, for the tokenizers' threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if command != "parity":  # which says itself what it can do without
        _require_mlx(command)
    from ember_mlx.errors import InputError

    try:
        # In one line, too: where in the library it arose is nothing to the user of a command.
        with _replaced(warnings, "formatwarning", lambda text, *_: f"ember-mlx {command}: warning: {text}\n"):
            function(arguments)
    except (InputError, OSError) as error:  # OSError: a folder that cannot be written, a disk that is full
        sys.exit(_one_line(f"ember-mlx {command}", str(error)))
    except KeyboardInterrupt as interrupt:
        _one_line(f"ember-mlx {command}", "interrupted; what was saved before is kept")
        sys.exit(getattr(interrupt, "exit_code", 130))


def _require_mlx(command):
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        extras = "pip install 'ember-mlx[cpu]', or [cuda12] or [cuda13] with an NVIDIA GPU"
        sys.exit(_one_line(f"ember-mlx {command}", f"mlx has no backend here ({error}): {extras}"))


def _one_line(what, message):
    print(f"{what}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
