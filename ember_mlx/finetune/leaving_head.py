"""The gradients that leave a model's head, as results of their own: once they are there, the logits are done with."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ember_mlx.streaming.glue import heard
from ember_mlx.streaming.head_module import find_head
from ember_mlx.streaming.units import calls_go_to

__all__ = ["LeavingHead"]


class LeavingHead:
    """Notes the gradients by the head's input, and by its weights that train; of a tied table, the head's part.

    Args:
        model (Module): What trains. Of one whose head cannot be had (see ``find_head``) nothing is noted.
    """

    def __init__(self, model: nn.Module):
        try:
            self._head = find_head(model)
        except Exception:  # also what a model raises that one token alone does not suit: it trains all the same
            self._head = None

    @contextmanager
    def noted(self) -> Iterator[list[mx.array]]:
        """Within, a backward pass puts them into the list, to the bit what it goes on with.

        Where those of the weights are larger than the logits (B, T, V), which they let go of, the list stays empty.
        """
        left = []
        if self._head is None:
            yield left
            return
        module = self._head.module

        def call(_path, own_call, arguments, keywords):
            if not arguments:  # the hidden states have a name that only the model knows
                return own_call(**keywords)
            hidden, *rest = arguments
            own = tree_flatten(module.trainable_parameters())
            logits = hidden.size // hidden.shape[-1] * self._head.vocabulary
            if sum(weight.size for _, weight in own) > logits:
                return own_call(*arguments, **keywords)
            module.update(tree_unflatten([(name, heard(weight, left.append)) for name, weight in own]))
            try:
                return own_call(heard(hidden, left.append), *rest, **keywords)
            finally:
                module.update(tree_unflatten(own))

        with calls_go_to({"head": module}, call, self._head.method):
            yield left
