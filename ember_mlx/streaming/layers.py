"""The gradients of one call of a unit: made again from its inputs, outside any trace, nothing evaluated yet."""

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ember_mlx.streaming.call_tree import build, flatten, is_float, signature
from ember_mlx.streaming.glue import distinct
from ember_mlx.streaming.units import put_back_random_state

__all__ = ["Layers"]


class Layers:
    """The units of one model as functions of their weights and inputs.

    Args:
        units (dict): The units, by path.
        without (set): Paths of trainable weights that others answer for.
    """

    def __init__(self, units, without=frozenset()):
        self.units = units
        self.names = {
            path: [name for name, _ in tree_flatten(unit.trainable_parameters()) if f"{path}.{name}" not in without]
            for path, unit in units.items()
        }
        self._compiled = {}

    def float_outputs(self, call):
        return [j for j, output in enumerate(call.outputs) if is_float(output)]

    def vjp(self, call, wanted, cotangents):
        """Gradients of a unit's trainable weights and of the wanted inputs of a call, lazy, in two lists.

        Args:
            call (Call): The call. Dropout draws again what it drew.
            wanted (list): Numbers of inputs.
            cotangents (list): One for each of ``float_outputs``.
        """
        unit, names = self.units[call.path], self.names[call.path]
        parameters = dict(tree_flatten(unit.trainable_parameters()))
        weights = [parameters[name] for name in names]
        outputs = self.float_outputs(call)
        what = signature(call.spec)
        function = None
        if what is not None and call.key is call.key_after:  # a compiled function would draw the same each time
            what = (call.path, what, tuple(wanted), tuple(outputs))
            function = self._compiled.get(what)
        if function is None:
            function = _gradients(unit, names, call.spec, wanted, outputs)
            if what is not None and call.key is call.key_after:
                function = self._compiled[what] = mx.compile(function)
        put_back_random_state(call.key)
        try:
            return function(weights, call.inputs, cotangents)
        finally:
            unit.update(tree_unflatten(list(zip(names, weights, strict=True))))


def _gradients(unit, names, spec, wanted, float_outputs):
    own = type(unit)

    def gradients(weights, inputs, cotangents):
        def forward(*primals):
            unit.update(tree_unflatten(list(zip(names, primals, strict=False))))
            leaves = list(inputs)
            for j, primal in zip(wanted, primals[len(names) :], strict=True):
                leaves[j] = primal
            arguments, keywords = build(spec, iter(leaves))
            _, _, objects = flatten((arguments, keywords))
            result = own.__call__(unit, *arguments, **keywords)
            outputs = [leaf for tree in (result, *objects) for leaf in flatten(tree)[1]]
            return distinct([outputs[j] for j in float_outputs])

        _, gradients = mx.vjp(forward, [*weights, *(inputs[j] for j in wanted)], cotangents)
        return list(gradients[: len(names)]), list(gradients[len(names) :])

    return gradients
