"""A bfloat16 weight with an int8 rest: 24 bits that take the small steps which 16 round away.

The format is FlashOptim's (arXiv 2602.23349). With ``low`` the weight to the nearest bfloat16 and ``h`` half a unit in
its last place, the rest is the integer nearest to ``127 (w - low) / h``, and back ``w = low + h rest / 127``. At a
learning rate of 1e-5 almost no bfloat16 weight of a usual size moves to nearest; with the rest the steps add up. Its
resolution is 1.5e-5 of a weight: at 1e-7 it fails too.
"""

import mlx.core as mx
from mlx.optimizers import MultiOptimizer, Optimizer
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from ember_mlx.optimizers.body import Tree
from ember_mlx.optimizers.in_float32 import kernel_of_its_own
from ember_mlx.shared.ember_options import check_word
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.float_formats import SMALLEST_NORMAL

__all__ = ["WEIGHTS", "SplitWeights", "check_some_are_bfloat16", "half_unit", "join", "split"]

WEIGHTS = ("bf16+int8",)
STEPS = 127  # of the rest, to either side
# Of a bfloat16 number, 0.53 to 1.06 units in its last place: rounded up to nearest, that is its upper neighbour.
NEXT = 1 + 2.0**-8 + 2.0**-12


def split(w: mx.array) -> tuple[mx.array, mx.array]:
    """The weights ``w``, float32, as bfloat16 and its rest, int8: each in the shape of ``w``.

    The rest is 0 where a weight is not finite, is beyond the largest bfloat16, or is too small for half a unit to be a
    normal float32 (under 2^-118). MLX fuses 11 operations in a row at the most: there are no more in any of the three.
    """
    low = kernel_of_its_own(w.astype(mx.bfloat16))
    half = kernel_of_its_own(half_unit(low).astype(mx.bfloat16))  # a power of two
    over = w + (-low).astype(mx.float32)  # by -low: MLX would else keep low in float32 for its two uses
    part = mx.abs(over) / half  # at most 1, of what is to have a rest
    rest = mx.sign(over) * mx.floor(STEPS * mx.where(part <= 1, part, 0) + 0.5)  # half away from zero
    return low, rest.astype(mx.int8)


def join(low: mx.array, rest: mx.array) -> mx.array:
    """The float32 weights of ``low``, bfloat16, and ``rest``, int8."""
    value = low.astype(mx.float32)
    return mx.where(rest == 0, value, value + half_unit(low) * rest.astype(mx.float32) / STEPS)


def half_unit(low: mx.array) -> mx.array:
    """Half the distance from each bfloat16 to its neighbour away from zero, float32.

    From its neighbour, not from its bits: MLX fuses no reading of bits with the operations around it.
    """
    value = low.astype(mx.float32)
    unit = mx.abs((value * NEXT).astype(mx.bfloat16).astype(mx.float32) - value)
    return mx.maximum(unit / 2, SMALLEST_NORMAL)


class SplitWeights(Optimizer):
    """Any optimizer, with bfloat16 weights that keep an int8 rest: 1 byte a weight more, in its state.

    The optimizer inside sees the float32 weights that ``join`` gives. The model's weights stay bfloat16, and what is
    saved of it is plain bfloat16. The rest lies in the optimizer's state, as ``rest`` beside what the optimizer keeps
    of that weight. It starts as 0, also where a loaded state has none. Parameters of other dtypes pass as they are.

    Args:
        optimizer (Optimizer): Any that keeps its state by path, Ember and MLX's own included.
        weights (str): The format, ``"bf16+int8"``; there is no other.

    Raises:
        InputError: (a ``ValueError``) for another format; for an optimizer of several or one that splits weights
            itself; where no parameter is bfloat16, so that the option means nothing; for a loaded ``rest`` that is not
            of its weight.

    Example:
        >>> optimizer = SplitWeights(Ember(1e-5))
        >>> optimizer.update(model, gradients)
    """

    def __init__(self, optimizer: Optimizer, weights: str = "bf16+int8"):
        name = type(optimizer).__name__
        check_word("SplitWeights", "weights", weights, WEIGHTS)
        if not isinstance(optimizer, Optimizer):
            raise InputError(f"SplitWeights({optimizer!r}): must be an mlx.optimizers.Optimizer, made")
        if isinstance(optimizer, MultiOptimizer):
            raise InputError(f"SplitWeights({name}): split the weights of each optimizer in it: {name} holds several")
        if hasattr(optimizer, "weights"):  # as of FlashAdamW, whose state has a rest of its own
            raise InputError(f"SplitWeights({name}): {name} splits weights itself: take it with weights='bf16+int8'")
        self.optimizer = optimizer
        self.weights = weights
        self._initialized = False
        self._schedulers = optimizer._schedulers

    def init(self, parameters: Tree) -> None:
        check_some_are_bfloat16("SplitWeights", tree_flatten(parameters))
        self.optimizer.init(tree_map(_float32, parameters))
        tree_map_with_path(_start_rest, parameters, self.state)
        self._initialized = True

    def apply_gradients(self, gradients: Tree, parameters: Tree) -> Tree:
        parameters = tree_map(lambda _, parameter: parameter, gradients, parameters)
        if not self._initialized:
            self.init(parameters)
        exact = tree_map(_exact, parameters, self.state)
        return tree_map(_kept, self.optimizer.apply_gradients(gradients, exact), self.state)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        """One array, where the optimizer inside looks at one at a time."""
        inside = {name: array for name, array in state.items() if name != "rest"}
        new = self.optimizer.apply_single(gradient, _exact(parameter, state), inside)
        state.update(inside)
        return _kept(new, state)

    @property
    def state(self) -> Tree:
        return self.optimizer.state

    @state.setter
    def state(self, state: Tree) -> None:
        self._initialized = False
        self.optimizer.state = state


def check_some_are_bfloat16(optimizer: str, parameters: list[tuple[str, mx.array]]) -> None:
    """Raise InputError where none of the (path, parameter) pairs is bfloat16."""
    if parameters and all(parameter.dtype != mx.bfloat16 for _, parameter in parameters):
        path, parameter = parameters[0]
        raise InputError(
            f"{optimizer}(weights='bf16+int8'): no parameter is bfloat16 ({path} is {parameter.dtype}), so "
            "there is nothing to split. Leave the option out, as with LoRA, or train a model in bfloat16"
        )


def _float32(parameter):
    return parameter.astype(mx.float32) if parameter.dtype == mx.bfloat16 else parameter


def _start_rest(path, parameter, state):
    if parameter.dtype != mx.bfloat16:
        return
    rest = state.setdefault("rest", mx.zeros(parameter.shape, mx.int8))
    if rest.shape != parameter.shape or rest.dtype != mx.int8:
        raise InputError(
            f"SplitWeights: the state has a rest of shape {rest.shape} and dtype {rest.dtype} for {path} of shape "
            f"{parameter.shape}, which needs its shape and int8; load the state of this model"
        )


def _exact(parameter, state):
    return kernel_of_its_own(join(parameter, state["rest"])) if "rest" in state else parameter


def _kept(new, state):
    if "rest" in state:
        new, state["rest"] = split(new)
    return new
