"""What processes that tests start find in their environment, and scripts that are run without one of their own."""

import ctypes
import os
import runpy
import sys
from pathlib import Path

EVERY_PROCESS = str(Path(__file__).with_name("every_process"))


def python_path(*folders: str | Path) -> str:
    """PYTHONPATH with these folders, and before them the one whose ``sitecustomize.py`` runs in every process."""
    return os.pathsep.join([EVERY_PROCESS, *map(str, folders)])


def with_quick_products(library: Path) -> None:
    """In this process, which has not imported MLX, and those it starts: products of two libraries differ in bits."""
    assert "mlx.core" not in sys.modules, "MLX was imported before tests/conftest.py, and keeps its own products"
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    os.environ["EMBER_TESTS_PRODUCTS"] = str(library)
    os.environ["PYTHONPATH"] = python_path(*filter(None, [os.environ.get("PYTHONPATH")]))


def without_torch(*folders: str | Path, **variables: str) -> dict[str, str]:
    """The environment of a process that needs no PyTorch, finds none, and starts sooner; folders are for PYTHONPATH."""
    path = python_path(*folders, *filter(None, [os.environ.get("PYTHONPATH")]))
    return os.environ | variables | {"PYTHONPATH": path, "EMBER_TESTS_WITHOUT_TORCH": "1"}


def run_here(script: Path, *arguments: object, monkeypatch, capsys) -> str:
    """What a script prints, run as by ``python SCRIPT ARGUMENTS`` in this process, which has imported what it imports.

    For scripts that measure no memory, and that change nothing for good.
    """
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    monkeypatch.syspath_prepend(script.parent)
    capsys.readouterr()
    runpy.run_path(str(script), run_name="__main__")
    return capsys.readouterr().out
