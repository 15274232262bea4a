"""What a model does between its units, differentiated by running it again with the recorded outputs in their place.

A replay computes nothing of the units; of the glue, MLX computes what the wanted cotangents need.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ember_mlx.streaming.call_tree import build, flatten, is_float
from ember_mlx.streaming.units import Recording, calls_go_to, put_back_random_state
from ember_mlx.streaming.weights import Weights

__all__ = ["Glue", "distinct", "heard"]


class _ReachedError(Exception):
    """A replay came to the call that it was to stop at, which had these arrays."""


class Glue:
    """The glue of one model, with the names of the trainable weights in it.

    Args:
        units (dict): Its units, by path.
        weights (Weights): The model's trainable weights.
        names (list): Paths of those outside the units.
    """

    def __init__(self, units: dict[str, nn.Module], weights: Weights, names: list[str]):
        self.units = units
        self.names = names
        self._weights = weights

    def vjp(
        self,
        recording: Recording,
        pick: Callable[[object], list[mx.array]],
        cotangents: list[mx.array],
        stop_at: int | None = None,
    ) -> dict[str | tuple[int, int], mx.array]:
        """Cotangents of the outputs of calls, by (call, output), and of the glue's weights, by name.

        Only what the picked arrays do depend on is in the dict.

        Args:
            recording (Recording): The forward pass.
            pick (callable): From the result of the run, or from the arguments of call ``stop_at``, the arrays.
            cotangents (list): Theirs.
            stop_at (int, optional): The number of a call.
        """
        calls = recording.calls[:stop_at]
        places = [(i, j) for i, call in enumerate(calls) for j, a in enumerate(call.outputs) if is_float(a)]
        weights = [self._weights[name] for name in self.names]
        reached = set()

        def function(*primals):
            for name, weight in zip(self.names, primals, strict=False):
                self._weights[name] = heard(weight, lambda _, name=name: reached.add(name))
            outputs = [list(call.outputs) for call in recording.calls[:stop_at]]
            for (i, j), array in zip(places, primals[len(weights) :], strict=True):
                outputs[i][j] = heard(array, lambda _, at=(i, j): reached.add(at))
            return distinct(pick(self._replay(recording, outputs, stop_at)))

        primals = [*weights, *(calls[i].outputs[j] for i, j in places)]
        try:
            _, gradients = mx.vjp(function, primals, cotangents)
        finally:
            for name, weight in zip(self.names, weights, strict=True):
                self._weights[name] = weight
        return {key: g for key, g in zip([*self.names, *places], gradients, strict=True) if key in reached}

    def depends(self, recording: Recording, stop_at: int, inputs: list[int]) -> list[int]:
        """Which of the numbered inputs of a call depend on a weight or an earlier call by way of glue."""
        call = recording.calls[stop_at]
        return [
            j
            for j in inputs
            if self.vjp(recording, lambda leaves, j=j: [leaves[j]], [mx.zeros_like(call.inputs[j])], stop_at)
        ]

    def _replay(self, recording, outputs, stop_at):
        number = 0
        put_back_random_state(recording.key)

        def stand_in(path, own_call, arguments, keywords):
            nonlocal number
            i, number = number, number + 1
            _, leaves, objects = flatten((arguments, keywords))
            if i == stop_at:
                raise _ReachedError(*leaves)
            call = recording.calls[i]
            put_back_random_state(call.key_after)
            arrays = iter(outputs[i])
            result = build(call.out_spec, arrays)
            for item, (kind, _, attributes) in zip(objects, call.object_specs, strict=True):
                build((kind, item, attributes), arrays)
            return result

        with calls_go_to(self.units, stand_in):
            try:
                return recording.run()
            except _ReachedError as reached:
                return reached.args


def distinct(arrays: list[mx.array]) -> list[mx.array]:
    """``mx.vjp`` counts the cotangent of an array that it is given twice only once."""
    return [heard(array, lambda _: None) for array in arrays]


def heard(array: mx.array, hear: Callable[[mx.array], object]) -> mx.array:
    """The same array; ``hear`` is called with the cotangent that arrives at it."""

    @mx.custom_function
    def same(array):
        return array

    @same.vjp
    def tell(_primal, cotangent, _output):
        hear(cotangent)
        return cotangent

    return same(array)
