"""Optimizers that look at one array at a time: the counter and the schedules once a step, then weight after weight.

MLX's ``apply_gradients`` steps the counter at each call, so it is taken apart here. A gradient with a NaN or an
infinity in it changes neither its weight nor the weight's state, and is named at the end of the step.
"""

import itertools
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import SGD, Adafactor, MultiOptimizer, Optimizer
from mlx.utils import tree_flatten

from ember_mlx.optimizers.guarded import GuardedOptimizer, all_finite, safe_norms, selected, sum_is_safe
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
        InputError: (a ``ValueError``) for an optimizer that needs all gradients at once, and one inside another that
            clips by a norm of its own.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module):
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
        # Of each weight and its state.
        self.nbytes = {
            path: sum(array.nbytes for _, array in tree_flatten((weight, self.state(path))))
            for path, weight in trainable.items()
        }
        self._leaves = list({id(leaf): leaf for leaf in self._of.values()}.values())
        self._functions = {
            (id(leaf), together): mx.compile(partial(_applied, leaf, together))
            for leaf, together in itertools.product(self._leaves, (False, True))
        }
        self._unread = {id(leaf): _unread(leaf) for leaf in self._leaves}
        self._finite = {}
        self._shared = {}

    @property
    def clip_grad_norm(self) -> float | None:
        """What the optimizer clips the global norm to."""
        return getattr(self.optimizer, "clip_grad_norm", None)

    def leaf(self, path: str) -> Optimizer:
        """The optimizer that trains the weight."""
        return self._of[path]

    def state(self, path: str) -> dict:
        """The state of the weight, wherever it stands in the optimizer's."""
        state = self._of[path].state
        if path in state:
            return state[path]
        for part in path.split("."):
            state = state[int(part)] if isinstance(state, list | tuple) else state[part]
        return state

    def begin(self) -> None:
        """As ``apply_gradients`` begins."""
        self._finite = {}
        for leaf in self._leaves:
            for name, schedule in leaf._schedulers.items():
                leaf.state[name] = schedule(leaf.step)
            leaf.state["step"] = leaf.step + 1
            self._shared[id(leaf)] = {name: value for name, value in leaf.state.items() if isinstance(value, mx.array)}

    def __call__(
        self,
        weights: dict[str, mx.array],
        gradients: dict[str, mx.array],
        scale: mx.array | None = None,
        sums: dict[str, mx.array] | None = None,
        *,
        together: bool = False,
    ) -> dict[str, tuple[mx.array, list[mx.array]]]:
        """New weights and what is new of their states, by path, lazy; the states are updated.

        All of a layer's are built by one call, and each may be evaluated by itself.

        Args:
            weights, gradients (dict): By path, of the same paths.
            scale (array, optional): What the gradients are multiplied by.
            sums (dict, optional): Of the whole gradients, which are then judged, where these are parts.
            together (bool): Whether all gradients may be there at one time: then they are judged with fewer kernels.
        """
        by_leaf, results = {}, {}
        for path in gradients:
            by_leaf.setdefault(id(self._of[path]), []).append(path)
        for leaf, paths in by_leaf.items():
            unread = self._unread[leaf]
            states = [self.state(path) for path in paths]
            triples = [
                (gradients[path], weights[path], {name: state[name] for name in state if name not in unread})
                for path, state in zip(paths, states, strict=True)
            ]
            totals = None if sums is None else [sums[path] for path in paths]
            applied = self._functions[leaf, together](triples, self._shared[leaf], scale, totals)
            for path, state, (weight, new, finite) in zip(paths, states, applied, strict=True):
                state.update(new)
                self.note(path, finite)
                results[path] = weight, list(new.values())
        return results

    def note(self, path: str, finite: mx.array) -> None:
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

    def count(self) -> None:
        """Count a step with a NaN or an infinity, where the optimizer counts them."""
        if getattr(self.optimizer, "skip_nonfinite", False):
            self.optimizer.count_nonfinite()

    def arrays(self) -> list[mx.array]:
        """What a step has changed that belongs to no single weight."""
        own = [value for leaf in self._leaves for value in leaf.state.values() if isinstance(value, mx.array)]
        return [*own, *(value for value in self.optimizer.state.values() if isinstance(value, mx.array))]


def _applied(leaf, together, triples, shared, scale, totals):
    """The updates of some arrays as a function of all that they read; layers of equal shapes share what is compiled."""
    own = {name: leaf.state[name] for name in shared}
    leaf.state.update(shared)
    try:
        if scale is not None:
            triples = [((gradient * scale).astype(gradient.dtype), *others) for gradient, *others in triples]
        judged = totals or [gradient for gradient, *_ in triples]
        safe = safe_norms(judged) if together and not totals else [sum_is_safe(each) for each in judged]
        return [_applied_to_one(leaf, *triple, finite) for triple, finite in zip(triples, safe, strict=True)]
    finally:
        leaf.state.update(own)


def _applied_to_one(leaf, gradient, weight, state, finite):
    new = dict(state)
    may_overflow = weight.dtype == mx.float16 or isinstance(_inner(leaf), Adafactor)  # of finite gradients
    if _selects_by_itself(leaf) and not may_overflow:
        updated = leaf.apply_single_if(finite, gradient, weight, new)
    else:
        updated = leaf.apply_single(gradient, weight, new).astype(weight.dtype)
        if may_overflow:
            finite = finite & all_finite([updated])
        updated = selected(finite, updated, weight, new, state)
    changed = {name: value for name, value in new.items() if value is not state.get(name)}
    return updated, changed, finite


def _selects_by_itself(leaf):
    """Whether its ``apply_single_if`` is of the step that it takes: a subclass may have a step of its own."""
    owner = next(each for each in type(leaf).__mro__ if "apply_single" in vars(each))
    return "apply_single_if" in vars(owner) and "apply_single" not in vars(leaf)


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


def _leaf_of(optimizer, path, weight):
    if isinstance(optimizer, PairedOptimizer):
        return _leaf_of(_part(optimizer.side_of(path)), path, weight)
    if isinstance(optimizer, GuardedOptimizer):
        return _leaf_of(_part(optimizer.optimizer), path, weight)
    if isinstance(optimizer, MultiOptimizer):
        filters = zip(optimizer.optimizers, optimizer.filters, strict=True)
        return _leaf_of(_part(next(part for part, takes in filters if takes(path, weight))), path, weight)
    return optimizer


def _part(optimizer):
    """An optimizer inside another: only the outermost clips here, so a clip norm of its own is refused."""
    clip = getattr(optimizer, "clip_grad_norm", None)
    if clip is not None:
        raise InputError(
            f"StreamedStep: {type(optimizer).__name__}(clip_grad_norm={clip}) stands inside another optimizer, where "
            "it would not clip: give clip_grad_norm to the outermost"
        )
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
