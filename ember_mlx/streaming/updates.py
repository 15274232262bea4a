"""Optimizers that look at one array at a time: the counter and the schedules once a step, then weight after weight.

MLX's ``apply_gradients`` steps the counter at each call, so it is taken apart here. A gradient with a NaN or an
infinity in it changes neither its weight nor the weight's state, and is named at the end of the step.
"""

from functools import partial

import mlx.core as mx
from mlx.optimizers import SGD, Adafactor, MultiOptimizer, Optimizer
from mlx.utils import tree_flatten

from ember_mlx.optimizers.guarded import GuardedOptimizer, all_finite, norm_is_safe
from ember_mlx.optimizers.paired import PairedOptimizer
from ember_mlx.optimizers.rounded import StochasticRounding
from ember_mlx.optimizers.split_weights import SplitWeights
from ember_mlx.shared.errors import InputError

__all__ = ["Updates"]


class Updates:
    """One optimizer, weight by weight.

    Args:
        optimizer (Optimizer): Any of MLX's whose update of an array looks at that array alone, a ``MultiOptimizer`` of
            such, or a :class:`ember_mlx.PairedOptimizer`. Its state is made if it is not there.
        model (Module): The model; what is trainable now is what is trained.

    Raises:
        InputError: (a ``ValueError``) for an optimizer that needs all gradients at once.
    """

    def __init__(self, optimizer, model):
        if not isinstance(optimizer, Optimizer):
            raise InputError(f"StreamedStep(optimizer={optimizer!r}): must be an mlx.optimizers.Optimizer, made")
        trainable = dict(tree_flatten(model.trainable_parameters()))
        self.optimizer = optimizer
        self._of = {path: _leaf_of(optimizer, path, weight) for path, weight in trainable.items()}
        for path, leaf in self._of.items():
            if not _looks_at_one_array(leaf):
                raise InputError(
                    f"StreamedStep: {type(leaf).__name__}, which trains {path}, needs all gradients at once; "
                    "take an optimizer that looks at one array at a time, or train with an ordinary step"
                )
        if not isinstance(optimizer, GuardedOptimizer | PairedOptimizer):
            optimizer.init(model.trainable_parameters())
        self._leaves = list({id(leaf): leaf for leaf in self._of.values()}.values())
        self._functions = {id(leaf): mx.compile(partial(_applied, leaf)) for leaf in self._leaves}
        self._unread = {id(leaf): _unread(leaf) for leaf in self._leaves}
        self._finite = {}
        self._shared = {}

    @property
    def clip_grad_norm(self):
        return getattr(self.optimizer, "clip_grad_norm", None)

    def leaf(self, path) -> Optimizer:
        """The optimizer that trains the weight."""
        return self._of[path]

    def state(self, path) -> dict:
        """The state of the weight, wherever it stands in the optimizer's."""
        state = self._of[path].state
        if path in state:
            return state[path]
        for part in path.split("."):
            state = state[int(part)] if isinstance(state, list | tuple) else state[part]
        return state

    def begin(self):
        """As ``apply_gradients`` begins."""
        self._finite = {}
        for leaf in self._leaves:
            for name, schedule in leaf._schedulers.items():
                leaf.state[name] = schedule(leaf.step)
            leaf.state["step"] = leaf.step + 1
            self._shared[id(leaf)] = {name: value for name, value in leaf.state.items() if isinstance(value, mx.array)}

    def __call__(self, weights, gradients, scale=None):
        """New weights and what is new of their states, by path, lazy; the states are updated.

        One compiled function an optimizer does it array by array: a GPU then compiles a kernel once for all layers.

        Args:
            weights, gradients (dict): By path, of the same paths.
            scale (array, optional): What the gradients are multiplied by.
        """
        results = {}
        for path, gradient in gradients.items():
            leaf, state = self._of[path], self.state(path)
            unread = self._unread[id(leaf)]
            read = {name: value for name, value in state.items() if name not in unread}
            weight, new, finite = self._functions[id(leaf)](
                gradient, weights[path], read, self._shared[id(leaf)], scale
            )
            state.update(new)
            self.note(path, finite)
            results[path] = weight, list(new.values())
        return results

    def note(self, path, finite):
        """Whether the gradient of a weight was finite: False, and it was not stepped."""
        self._finite[path] = finite

    def finish(self) -> list[str]:
        """The weights that were not stepped for their gradients, first the one that the backward pass met first."""
        if not self._finite:
            return []
        refused = []
        if not _all(list(self._finite.values())).item():
            refused = [path for path, finite in self._finite.items() if not finite.item()]
        self._finite = {}
        if refused:
            self.count()
        return refused

    def count(self):
        """Count a step with a NaN or an infinity, where the optimizer counts them."""
        if getattr(self.optimizer, "skip_nonfinite", False):
            self.optimizer.count_nonfinite()

    def arrays(self):
        """What a step has changed that belongs to no single weight."""
        own = [value for leaf in self._leaves for value in leaf.state.values() if isinstance(value, mx.array)]
        return [*own, *(value for value in self.optimizer.state.values() if isinstance(value, mx.array))]


def _applied(leaf, gradient, weight, state, shared, scale):
    """The update of one array as a function of all that it reads, so that ``mx.compile`` may fuse it."""
    if scale is not None:
        gradient = (gradient * scale).astype(gradient.dtype)
    finite = _is_safe(gradient)
    new = dict(state)
    own = {name: leaf.state[name] for name in shared}
    leaf.state.update(shared)
    try:
        updated = leaf.apply_single(gradient, weight, new).astype(weight.dtype)
    finally:
        leaf.state.update(own)
    if weight.dtype == mx.float16 or isinstance(_inner(leaf), Adafactor):  # there finite gradients may overflow
        finite = finite & all_finite([updated])
    changed = {
        name: mx.where(finite, value, state[name]) for name, value in new.items() if value is not state.get(name)
    }
    return mx.where(finite, updated, weight), changed, finite


def _all(flags):
    """Of 16 at a time in one kernel; to put hundreds into one array is a kernel each."""
    while len(flags) > 1:
        groups = [flags[i : i + 16] for i in range(0, len(flags), 16)]
        groups[-1] += [flags[0]] * (16 - len(groups[-1]))  # one function, of 16
        flags = [_all_of(group) for group in groups]
    return flags[0]


@mx.compile
def _all_of(flags):
    while len(flags) > 1:
        flags = [mx.logical_and(one, other) for one, other in zip(flags[::2], flags[1::2], strict=True)]
    return flags[0]


def _is_safe(gradient):
    """A sum keeps every NaN and infinity, and an element whose square would overflow. It makes nothing of their size.

    Only float16 overflows in a sum by itself.
    """
    wide = gradient.astype(mx.float32) if gradient.dtype == mx.float16 else gradient
    return norm_is_safe(mx.abs(wide.sum().astype(mx.float32)))


def _leaf_of(optimizer, path, weight):
    if isinstance(optimizer, PairedOptimizer):
        return _leaf_of(optimizer.side_of(path), path, weight)
    if isinstance(optimizer, GuardedOptimizer):
        return _leaf_of(optimizer.optimizer, path, weight)
    if isinstance(optimizer, MultiOptimizer):
        filters = zip(optimizer.optimizers, optimizer.filters, strict=True)
        return _leaf_of(next(part for part, takes in filters if takes(path, weight)), path, weight)
    return optimizer


def _unread(leaf):
    """State that MLX makes and no step reads: to give it to a compiled function would be to have it."""
    inner = _inner(leaf)
    return ("v",) if isinstance(inner, SGD) and inner.momentum <= 0 else ()


def _inner(leaf):
    return leaf.optimizer if isinstance(leaf, StochasticRounding) else leaf


def _looks_at_one_array(leaf):
    """Whether it keeps MLX's own way through a tree, array by array, or says that it does."""
    if isinstance(leaf, StochasticRounding | SplitWeights):
        return _looks_at_one_array(leaf.optimizer)
    own = type(leaf).apply_gradients
    return own is Optimizer.apply_gradients or getattr(type(leaf), "one_array_at_a_time", False)
