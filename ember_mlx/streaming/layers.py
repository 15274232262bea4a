"""One call of a unit, and its gradients: made again from its inputs, outside any trace, nothing evaluated yet.

Units of equal structure share one compiled function, with all their arrays as its arguments.
"""

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from ember_mlx.streaming.call_tree import build, flatten, is_float, signature
from ember_mlx.streaming.glue import distinct
from ember_mlx.streaming.units import Call, put_back_random_state
from ember_mlx.streaming.weights import Weights, exchange, structure

__all__ = ["Layers"]


class Layers:
    """The units of one model as functions of their arrays and inputs.

    Args:
        units: The units, by path.
        weights: The model's trainable weights.
        without: Paths of trainable weights that others answer for.
    """

    def __init__(self, units: dict[str, nn.Module], weights: Weights, without: set[str]):
        self.units = units
        owned = [path for path in weights.places if path not in without]
        self.names = {unit: [path for path in owned if path.startswith(f"{unit}.")] for unit in units}
        self._weights = weights
        self._structures = {}
        self._compiled = {}
        self._calls = {}

    def call(self, call: Call, own_call: partial, arguments: tuple, keywords: dict) -> object:
        """What a unit makes of its arguments: as it is the first time, then by a compiled function if it can be one."""
        what, places, _ = self._structure(call.path)
        key = what, signature(call.spec), self.units[call.path].training
        if self._calls.get(key):
            function, out_spec = self._calls[key]
            return build(out_spec, iter(function([holder[name] for holder, name in places], call.inputs)))
        result = own_call(*arguments, **keywords)
        if key not in self._calls:
            out_spec, _, _ = flatten(result)
            self._calls[key] = None
            # A compiled function would draw the same each time, and would not see what an object brings.
            if key[1] is not None and signature(out_spec) is not None and call.key is mx.random.state[0]:
                function = mx.compile(_outputs(self.units[call.path], own_call.func, places, call.spec))
                self._calls[key] = function, out_spec
        return result

    def float_outputs(self, call: Call) -> list[int]:
        """Numbers of the outputs that have gradients."""
        return [j for j, output in enumerate(call.outputs) if is_float(output)]

    def vjp(self, call: Call, wanted: list[int], cotangents: list[mx.array]) -> tuple[list[mx.array], list[mx.array]]:
        """Gradients of a unit's trainable weights and of the wanted inputs of a call, lazy.

        Args:
            call: The call. Dropout draws again what it drew.
            wanted: Numbers of inputs.
            cotangents: One for each of ``float_outputs``.
        """
        what, places, trained = self._structure(call.path)
        outputs = self.float_outputs(call)
        key = what, signature(call.spec), trained, tuple(wanted), tuple(outputs)
        # A compiled function would draw the same each time, and would not see what an object brings.
        compiles = key[1] is not None and call.key is call.key_after
        function = self._compiled.get(key) if compiles else None
        if function is None:
            function = _gradients(self.units[call.path], places, trained, call.spec, wanted, outputs)
            if compiles:
                function = self._compiled[key] = mx.compile(function)
        put_back_random_state(call.key)
        return function([holder[name] for holder, name in places], call.inputs, cotangents)

    def _structure(self, path):
        """The structure of a unit, the places of its arrays, and which of them are trained, in the order of names."""
        if path not in self._structures:
            what, places = structure(self.units[path])
            numbers = {(id(holder), key): i for i, (holder, key) in enumerate(places)}
            trained = [self._weights.places[name] for name in self.names[path]]
            self._structures[path] = what, places, tuple(numbers[id(holder), key] for holder, key in trained)
        return self._structures[path]


def _outputs(unit, own_call, places, spec):
    def outputs(arrays, inputs):
        before = exchange(places, arrays)
        try:
            arguments, keywords = build(spec, iter(inputs))
            return flatten(own_call(unit, *arguments, **keywords))[1]
        finally:
            exchange(places, before)

    return outputs


def _gradients(unit, places, trained, spec, wanted, float_outputs):
    own = type(unit)

    def gradients(arrays, inputs, cotangents):
        def forward(*primals):
            now, leaves = list(arrays), list(inputs)
            for i, primal in zip(trained, primals, strict=False):
                now[i] = primal
            for j, primal in zip(wanted, primals[len(trained) :], strict=True):
                leaves[j] = primal
            exchange(places, now)
            arguments, keywords = build(spec, iter(leaves))
            _, _, objects = flatten((arguments, keywords))
            result = own.__call__(unit, *arguments, **keywords)
            outputs = [leaf for tree in (result, *objects) for leaf in flatten(tree)[1]]
            return distinct([outputs[j] for j in float_outputs])

        before = [holder[key] for holder, key in places]
        try:
            primals = [*(arrays[i] for i in trained), *(inputs[j] for j in wanted)]
            _, gradients = mx.vjp(forward, primals, cotangents)
        finally:
            exchange(places, before)
        return list(gradients[: len(trained)]), list(gradients[len(trained) :])

    return gradients
