"""The command line: which command, and errors in one line."""

import os
import signal
import sys
import warnings
from contextlib import contextmanager, nullcontext
from importlib import import_module

from ember_mlx.shared.environment import version_of
from ember_mlx.shared.errors import InputError, did_you_mean
from ember_mlx.shared.replacing import replaced, torch_hidden

USAGE = """\
ember-mlx: fine-tune language models with mlx-lm, token tables included, with the Ember optimizer

  ember-mlx train     fine-tune: the options of mlx_lm.lora, and those of the token tables
  ember-mlx plan      predict the memory of that run, by the same flags; nothing is loaded or trained
  ember-mlx data      show what it will learn from: rows, lengths, and what is learned in them
  ember-mlx generate  write text: the options of mlx_lm.generate; --adapter-path takes token tables too
  ember-mlx chat      chat in the terminal: the options of mlx_lm.chat
  ember-mlx server    serve a model and its adapters to other programs: the options of mlx_lm.server
  ember-mlx fuse      merge an adapter into a model that stock mlx-lm loads
  ember-mlx export    write it for Hugging Face's peft, llama.cpp or Ollama
  ember-mlx geometry  train and measure whether Ember suits the model and the data
  ember-mlx plot      draw the runs that train --log-jsonl recorded
  ember-mlx watch     show such runs on a page, live
  ember-mlx recipes   files of options for train --config, with a reason for each value
  ember-mlx demo      fine-tune the model that comes with the package; nothing to download
  ember-mlx parity    compare every implementation that runs here with a float64 oracle
  ember-mlx --version

`ember-mlx COMMAND --help` lists the options of each."""


__all__ = ["COMMANDS", "main"]

COMMANDS = (
    "train",
    "plan",
    "data",
    "generate",
    "chat",
    "server",
    "fuse",
    "export",
    "demo",
    "geometry",
    "plot",
    "watch",
    "recipes",
    "parity",
)
TOGETHER = ("train", "plan", "chat", "server")
"""Those that know of the other workers of mlx.launch. Every other command is done by the first alone."""


def main() -> None:
    """Entry point. Exit code 0; 2 for bad input, with a line that says what to do; 128 + the signal if stopped."""
    # Python has None for what a shell has closed (>&-); a file that the run opens must not be taken for it.
    sys.stdin, sys.stdout, sys.stderr = (
        open(os.devnull, mode) if stream is None else stream  # noqa: SIM115
        for stream, mode in ((sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w"))
    )
    for stream in (sys.stdout, sys.stderr):
        # A file's name or a token may hold what the terminal's encoding does not have.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        _dispatch(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has what it wanted
        from ember_mlx.finetune.broken_pipes import lead_nowhere

        lead_nowhere(sys.stdout)
        sys.exit(128 + signal.SIGPIPE)


def _dispatch(arguments):
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE)
    elif command in ("-v", "--version"):
        print(version_of("ember-mlx"))
    elif command in COMMANDS:
        _run(command, arguments[1:])
    else:
        hint = did_you_mean(command, COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
        sys.exit(_one_line("ember-mlx", f"unknown command {command!r}{hint}"))


def _run(command, arguments):
    # As mlx_lm.lora sets it, for the tokenizers' threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if command != "parity":  # which says itself what it can do without
        _require_mlx(command)
    rank = os.environ.get("MLX_RANK")
    if rank and command not in TOGETHER:
        if rank != "0":  # told, since the variable may be left over
            print(f"ember-mlx {command}: left to the first worker; this one has MLX_RANK={rank}", file=sys.stderr)
            return
        from ember_mlx.finetune.workers import ANNOUNCES

        for name in ANNOUNCES:  # it waits for nobody
            os.environ.pop(name, None)
    try:
        with (
            # Several workers keep the signals' own actions, which need not wait until a collective returns to Python.
            nullcontext() if os.environ.get("MLX_RANK") else _stoppable(),
            # In one line, too: where in the library it arose is nothing to the user of a command.
            replaced(warnings, "formatwarning", lambda text, *_: f"ember-mlx {command}: warning: {text}\n"),
        ):
            with nullcontext() if command == "parity" else torch_hidden():
                module = import_module(f"ember_mlx.commands.{command}")
            exit_code = module.main(arguments)
        if exit_code:
            sys.exit(exit_code)
    except BrokenPipeError:  # an OSError that main() ends without a word
        raise
    except (InputError, OSError) as error:  # OSError: a folder that cannot be written, a disk that is full
        sys.exit(_one_line(f"ember-mlx {command}", str(error)))
    except KeyboardInterrupt as interrupt:
        left = getattr(interrupt, "left", "what was saved before is kept")
        _one_line(f"ember-mlx {command}", f"interrupted; {left}")
        sys.exit(getattr(interrupt, "exit_code", 130))


@contextmanager
def _stoppable():
    """SIGTERM and SIGHUP raise what Ctrl-C does, with a shell's exit code, unless ignored."""

    def stop(number, frame):
        interrupt = KeyboardInterrupt()
        interrupt.exit_code = 128 + number
        raise interrupt

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _require_mlx(command):
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        extras = "in the checkout, pip install '.[cpu]', or '.[cuda12]' or '.[cuda13]' with an NVIDIA GPU"
        sys.exit(_one_line(f"ember-mlx {command}", f"mlx has no backend here ({error}): {extras}"))


def _one_line(what, message):
    print(f"{what}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
