"""Where the arrays of a module stand: they are read and replaced without a walk through the module.

A walk costs as much as the arithmetic of a small layer, and a step would make a dozen of them for each layer.
"""

from collections.abc import Hashable
from types import MappingProxyType

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

__all__ = ["Place", "Weights", "exchange", "structure"]

Place = tuple[dict | list, str | int]
"""What holds an array, and under which key."""


class Weights:
    """The trainable weights of a model by path; to set one is to put it into the model.

    Args:
        model: The model. No module of it may be replaced, frozen or unfrozen afterwards.
    """

    def __init__(self, model: nn.Module):
        places = {}
        for path, _ in tree_flatten(model.trainable_parameters()):
            *parts, last = path.split(".")
            holder = model
            for part in parts:
                holder = holder[int(part)] if isinstance(holder, list) else holder[part]
            places[path] = holder, int(last) if isinstance(holder, list) else last
        self.places = MappingProxyType(places)

    def first_trainable(self) -> mx.array | None:
        """The first that is not frozen now; None if all are."""
        now = (
            holder[key] for holder, key in self.places.values() if key not in getattr(holder, "_no_grad", frozenset())
        )
        return next(now, None)

    def __getitem__(self, path: str) -> mx.array:
        holder, key = self.places[path]
        return holder[key]

    def __setitem__(self, path: str, array: mx.array) -> None:
        holder, key = self.places[path]
        holder[key] = array


def exchange(places: list[Place], arrays: list[mx.array]) -> list[mx.array]:
    """Put arrays into their places; what was there."""
    before = [holder[key] for holder, key in places]
    for (holder, key), array in zip(places, arrays, strict=True):
        holder[key] = array
    return before


def structure(module: nn.Module) -> tuple[Hashable, list[Place]]:
    """All of a module but its arrays, hashable, and the places of its arrays, private ones too.

    Modules of equal structures are one function of their arrays and inputs. What cannot be compared is equal to itself.
    """
    places = []
    return _structure(module, places), places


def _structure(value, places):
    if isinstance(value, dict):
        items = tuple((key, _item(value, key, item, places)) for key, item in value.items())
        attributes = (
            tuple((key, _constant(item)) for key, item in vars(value).items()) if hasattr(value, "__dict__") else ()
        )
        return type(value), items, attributes
    if isinstance(value, list):
        return list, tuple(_item(value, i, item, places) for i, item in enumerate(value))
    return _constant(value)


def _item(holder, key, item, places):
    if isinstance(item, mx.array):
        places.append((holder, key))
        return mx.array
    return _structure(item, places)


def _constant(value):
    if isinstance(value, set):
        return frozenset(value)
    if isinstance(value, tuple):
        return tuple(_constant(item) for item in value)
    # Python has 1 == 1.0 == True, and an array's comparison is an array.
    comparable = isinstance(value, Hashable) and not isinstance(value, mx.array)
    return (type(value), value) if comparable else ("itself", id(value))
