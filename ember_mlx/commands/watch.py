"""``ember-mlx watch``: a page of runs that are under way."""

import argparse
import webbrowser
from pathlib import Path

from ember_mlx.plots.style import THEMES
from ember_mlx.shared.command_line import describe
from ember_mlx.shared.errors import InputError
from ember_mlx.watch.following import WAITING, RunFile
from ember_mlx.watch.server import PORT, PageServer

__all__ = ["main"]

HELP = {
    "runs and page": {
        "files": ("FILE", "Logs of runs, under way or not, or of a run that is still to begin. Required."),
        "port": ("N", f"Where the page is served; 0 takes any that is free. Default: {PORT}, or the next free one."),
        "open": (None, "Open the page in the browser."),
    }
}
EPILOG = """\
examples:
  ember-mlx watch run.jsonl --open
      while `ember-mlx train --log-jsonl run.jsonl` goes on, or before it begins
  ember-mlx watch ember.jsonl adamw.jsonl
      two runs beside each other"""


def main(arguments: list[str]) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        InputError: for a file that is no log, one that is given twice, more runs than can be told apart, and a port
            that is taken.
    """
    parser = argparse.ArgumentParser(
        prog="ember-mlx watch",
        description="Show runs of `ember-mlx train --log-jsonl FILE` on a page, as they go on: losses, rates, speed, "
        "memory, answers and options. It is served on this machine alone, and needs no network. Ctrl-C ends it.",
        epilog=EPILOG,
    )
    parser.add_argument("files", nargs="+")
    parser.add_argument("--port", type=int)
    parser.add_argument("--open", action="store_true")
    args = describe(parser, HELP).parse_args(arguments)
    runs = _runs(args.files)
    if args.port is not None and not 0 <= args.port <= 65535:
        raise InputError(f"--port {args.port}: must be from 0 to 65535")
    with PageServer(runs, args.port) as server:
        try:
            for run in runs:
                if run.state == WAITING:
                    what = "has no line yet" if Path(run.path).exists() else "does not exist yet"
                    print(f"{run.path} {what}; the page waits for it")
            print(f"The page is at {server.url}; Ctrl-C ends it", flush=True)
            if args.open and not webbrowser.open(server.url):
                print("No browser could be opened; open that address yourself", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:  # the way to end it, so no error
            print()


def _runs(files):
    most = len(THEMES["light"].lines)
    if len(files) > most:
        raise InputError(f"{len(files)} runs: at most {most} can be told apart on one page; give fewer")
    runs = [RunFile(path) for path in files]
    for run in runs:
        run.check()
    paths = [Path(path).resolve() for path in files]
    twice = next((path for i, path in enumerate(paths) if path in paths[:i]), None)
    if twice:
        raise InputError(f"{twice}: is given twice; give it once")
    return runs
