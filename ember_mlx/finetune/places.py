"""Where the arrays of a model or of an optimizer's state stand: what a step takes out and puts in, without a walk."""

from collections.abc import Container, Mapping
from typing import Any

import mlx.core as mx

__all__ = ["Places"]


class Places:
    """The places in a tree whose dicts and lists stay, while the arrays in them change.

    A walk over the tree costs milliseconds of each step, in which a GPU has nothing to do.

    Args:
        tree: Dicts, modules and lists, with arrays.
        only (container of str, optional): The paths that count, as ``mlx.utils.tree_flatten`` makes them.
    """

    def __init__(self, tree: Any, only: Container[str] | None = None):
        found = {path: place for path, *place in _found(tree, "") if only is None or path in only}
        self.names = list(found)
        self._places = list(found.values())

    def arrays(self) -> dict[str, mx.array]:
        """What stands there now, by path."""
        return {name: container[key] for name, (container, key) in zip(self.names, self._places, strict=True)}

    def put(self, arrays: Mapping[str, mx.array]) -> None:
        """Put arrays there, by path."""
        for name, (container, key) in zip(self.names, self._places, strict=True):
            container[key] = arrays[name]


def _found(tree, prefix):
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, mx.array):
            yield f"{prefix}{key}", tree, key
        elif isinstance(value, dict | list):
            yield from _found(value, f"{prefix}{key}.")
