"""What processes that tests start find in their environment, and scripts that are run without one of their own."""

import os
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent


def without_torch(**variables: str) -> dict[str, str]:
    """This environment and those variables, for a process that needs no PyTorch: it finds none, and starts sooner."""
    path = [str(HERE / "without_torch"), variables.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))]
    return os.environ | variables | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def run_here(script: Path, *arguments: object, monkeypatch, capsys) -> str:
    """What a script prints, run as by ``python SCRIPT ARGUMENTS`` in this process, which has imported what it imports.

    For scripts that measure no memory, and that change nothing for good.
    """
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    monkeypatch.syspath_prepend(script.parent)
    capsys.readouterr()
    runpy.run_path(str(script), run_name="__main__")
    return capsys.readouterr().out
