"""What a layer is called with and what it returns, as trees of arrays: tuples, lists, dicts, objects such as caches.

A layer may hand on state in an object (shared keys and values). Its attributes are then part of the tree: before the
call they are inputs, after it outputs.
"""

from collections.abc import Hashable, Iterator

import mlx.core as mx
import mlx.nn as nn

__all__ = ["build", "flatten", "is_float", "signature"]

_PLAIN = (str, bytes, int, float, bool, type(None), mx.Dtype)


def flatten(tree: object) -> tuple[tuple, list[mx.array], list[object]]:
    """A tree's structure, its arrays in order, and the objects in it.

    Returns:
        ``(spec, leaves, objects)``: :func:`build` makes the tree again from ``spec`` and as many arrays.
    """
    leaves, objects = [], []
    return _walk(tree, leaves, objects), leaves, objects


def _walk(tree, leaves, objects):
    if isinstance(tree, mx.array):
        leaves.append(tree)
        return ("array",)
    if isinstance(tree, list | tuple):
        return ("list", type(tree), tuple(_walk(item, leaves, objects) for item in tree))
    if type(tree) is dict:
        return ("dict", tuple((key, _walk(item, leaves, objects)) for key, item in tree.items()))
    if isinstance(tree, (*_PLAIN, nn.Module)) or callable(tree) or not hasattr(tree, "__dict__"):
        return ("constant", tree)
    objects.append(tree)
    return ("object", tree, tuple((key, _walk(item, leaves, objects)) for key, item in vars(tree).items()))


def build(spec: tuple, leaves: Iterator[mx.array]) -> object:
    """The tree again, from an iterator over its arrays. An object gets its attributes back and stays itself."""
    kind = spec[0]
    if kind == "array":
        return next(leaves)
    if kind == "list":
        items = [build(item, leaves) for item in spec[2]]
        return spec[1](*items) if hasattr(spec[1], "_fields") else spec[1](items)
    if kind == "dict":
        return {key: build(item, leaves) for key, item in spec[1]}
    if kind == "constant":
        return spec[1]
    vars(spec[1]).update({key: build(item, leaves) for key, item in spec[2]})
    return spec[1]


def signature(spec: tuple) -> Hashable | None:
    """What of a structure a compiled function depends on, hashable; None where an object makes it change by itself."""
    kind = spec[0]
    if kind == "array":
        return spec
    if kind in ("list", "dict"):
        parts = spec[-1] if kind == "list" else tuple(item for _, item in spec[1])
        names = spec[1] if kind == "list" else tuple(key for key, _ in spec[1])
        inner = tuple(signature(part) for part in parts)
        return None if None in inner else (kind, names, inner)
    return spec if kind == "constant" and isinstance(spec[1], _PLAIN) else None


def is_float(array: mx.array) -> bool:
    """Whether it has a gradient."""
    return mx.issubdtype(array.dtype, mx.floating)
