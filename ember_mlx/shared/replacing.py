"""Another value in a module, for a while; or a module that cannot be found."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["replaced", "torch_hidden"]


@contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """``module.name`` is ``value`` for as long as the block runs."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def torch_hidden() -> Iterator[None]:
    """For the imports of a process without PyTorch: transformers, which mlx-lm imports, would take it along.

    That is two seconds, and nothing of it is used. A PyTorch that is already imported stays.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # so that it is not found
    try:
        yield
    finally:
        del sys.modules["torch"]
