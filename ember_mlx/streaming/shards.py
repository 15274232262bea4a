"""The body's optimizer state, a part of its rows on each machine: the first stage of ZeRO (Rajbhandari et al., 2020).

Of each gradient a machine receives the mean of its own rows, steps these rows with its own part of the state, and all
machines receive the new rows. That sends as much as the mean of whole gradients does. It is exact for optimizers that
step each element by itself. Weights whose first axis the machines do not divide keep a whole state on each.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
from mlx.optimizers import SGD, AdaDelta, Adagrad, Adam, Adamax, AdamW, Lion, RMSprop

from ember_mlx.optimizers.ember import Ember
from ember_mlx.optimizers.rounded import StochasticRounding
from ember_mlx.shared.errors import InputError
from ember_mlx.streaming.machines import buckets
from ember_mlx.streaming.updates import Updates
from ember_mlx.streaming.weights import Weights

__all__ = ["Group", "Shards"]

BY_ELEMENT = (SGD, RMSprop, Adagrad, AdaDelta, Adam, AdamW, Adamax, Lion)
STRIDE = 0x9E3779B9  # between the seeds of the machines' stochastic rounding


@dataclass(frozen=True)
class Group:
    """This machine among those that train together.

    Args:
        rank, count: Which of how many.
        sum_scatter (callable): (count * n, ...) -> of the sum over the machines the part of this rank, (n, ...).
        all_gather (callable): (n, ...) -> those of all by rank, (count * n, ...).
    """

    rank: int
    count: int
    sum_scatter: Callable[[mx.array], mx.array]
    all_gather: Callable[[mx.array], mx.array]


class Shards:
    """The weights whose state is shared out, and their step. The state is cut at :meth:`cut`, the first step.

    Args:
        group: The machines.
        updates, weights: Of the model.
        together: Bytes of gradients that go over the wire at a time.

    Raises:
        InputError: for an optimizer of the body that looks at more than one element, and for float16 weights, which
            are judged by what a step makes of all of them.
    """

    def __init__(self, group: Group, updates: Updates, weights: Weights, together: float):
        self._group, self._updates, self._weights, self._together = group, updates, weights, together
        self._cut = False
        self._paths = []
        for path in weights.places:
            leaf, weight = updates.leaf(path), weights[path]
            inner = leaf.optimizer if isinstance(leaf, StochasticRounding) else leaf
            if isinstance(leaf, Ember):
                continue
            if type(inner) not in BY_ELEMENT or weight.dtype == mx.float16:
                what = "float16" if type(inner) in BY_ELEMENT else type(inner).__name__
                raise InputError(
                    f"its state cannot be shared out: {what}, which trains {path}, needs whole arrays; use adamw, "
                    "adam, lion or sgd, and bfloat16 or float32"
                )
            if weight.ndim and weight.shape[0] % group.count == 0:
                self._paths.append(path)

    def cut(self) -> None:
        """Keep of each state the rows of this machine; once."""
        if self._cut:
            return
        self._cut = True
        for path in self._paths:
            state = self._updates.state(path)
            for name in self._names(path, self._weights[path].shape):
                state[name] = mx.contiguous(self._own(state[name]))  # a copy: else the whole would stay
                mx.eval(state[name])
        self._turn_seeds()

    def step(self, gradients: dict[str, mx.array]) -> None:
        """Step the weights whose state is shared out; their gradients are taken from the dict."""
        shared = {path: gradients.pop(path) for path in [*gradients] if path in self._paths}
        for some in buckets(shared, self._together):
            self._step(some)

    def _step(self, some):
        group, paths = self._group, list(some)
        dtype = some[paths[0]].dtype
        sums = mx.stack([gradient.sum() for gradient in some.values()])  # of all machines: all judge alike
        columns = [gradient.reshape(group.count, -1) for gradient in some.values()]
        joined = mx.concatenate([*columns, mx.broadcast_to(sums, (group.count, sums.size))], axis=1)
        some.clear()
        del columns, sums
        mx.eval(joined)
        total = group.sum_scatter(joined)
        mx.eval(total)
        del joined
        weights = {path: self._own(self._weights[path]) for path in paths}
        sizes = [array.size for array in weights.values()]
        *parts, sums = self._split((total / group.count).astype(dtype), sizes)
        means = {path: part.reshape(weights[path].shape) for path, part in zip(paths, parts, strict=True)}
        stepped = self._updates(weights, means, sums=dict(zip(paths, sums.reshape(-1), strict=True)))
        new = mx.concatenate([stepped[path][0].reshape(1, -1) for path in paths], axis=1)
        mx.eval(new, [state for _, state in stepped.values()])
        del total, parts, sums, means, stepped, weights
        every = group.all_gather(new)
        mx.eval(every)
        for path, part in zip(paths, self._split(every, sizes), strict=False):
            self._weights[path] = part.reshape(self._weights[path].shape)
        mx.eval([self._weights[path] for path in paths])

    def _split(self, joined, sizes):
        """The columns of each array, and what is left."""
        return mx.split(joined, list(itertools.accumulate(sizes)), axis=1)

    def _own(self, array):
        n = array.shape[0] // self._group.count
        return array[self._group.rank * n : (self._group.rank + 1) * n]

    def _names(self, path, shape):
        """What of a weight's state has its shape."""
        state = self._updates.state(path)
        return [name for name, array in state.items() if isinstance(array, mx.array) and array.shape == shape]

    def _turn_seeds(self):
        """Rows of other machines are not rounded by the same bits; twice is not at all."""
        for path in self._paths:
            state = self._updates.state(path)
            if "seed" in state:
                state["seed"] = state["seed"] ^ mx.array(self._group.rank * STRIDE % 2**32, mx.uint32)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within, the first machine has the whole state, for a checkpoint. All machines call this together."""
        if not self._cut:
            yield
            return
        parts = {}
        self._turn_seeds()
        for path in self._paths:
            state, weight = self._updates.state(path), self._weights[path]
            for name in self._names(path, self._own(weight).shape):
                every = self._group.all_gather(state[name])
                mx.eval(every)  # one after another, and let go of elsewhere
                parts[path, name] = state[name]
                if self._group.rank == 0:
                    state[name] = every
        try:
            yield
        finally:
            for (path, name), part in parts.items():
                self._updates.state(path)[name] = part
            self._turn_seeds()
