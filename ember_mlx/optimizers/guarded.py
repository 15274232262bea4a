"""What stands between gradients and weights: clipping by the global norm, and the refusal of NaN and infinity.

A step with a NaN or an infinity in it changes nothing: not the weights, not the optimizer's state, not its step counter
or its schedules, bit for bit. Both outcomes are computed and one is selected, since a compiled step has no branches;
the selection is fused into the update, which reads the old values anyway.
"""

import math

import mlx.core as mx
from mlx.optimizers import MultiOptimizer, Optimizer
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from ember_mlx import kernels
from ember_mlx.optimizers.ember import mean_squares
from ember_mlx.shared.errors import InputError

__all__ = ["GuardedOptimizer", "all_finite", "clip_by_norm", "global_norm", "spoil_gradients_of_nonfinite"]

COUNT = "nonfinite_steps"
SMALL = 2**16  # elements
NEIGHBOURS = 16  # arrays: about those of one layer's adapters


def all_finite(arrays):
    """Whether no array holds a NaN or an infinity, a bool array: one reading of each, and no scratch of large ones.

    A sum keeps every NaN and every infinity, on every backend. It can overflow by itself only where float32 and
    bfloat16 numbers are near 1e30 and more; float16 overflows soon, so there the two extremes are looked at.

    LoRA has hundreds of small arrays. Neighbours of one shape are added up first, which ``mx.compile`` makes one kernel
    of, where as many reductions would take longer than the numbers in them. Neighbours alone: a sum over all layers
    would have MLX compute them all together, and recompute all that ``--grad-checkpoint`` has let go at once.
    """
    small, rest = {}, []
    for place, array in enumerate(arrays):
        if array.size < SMALL:
            small.setdefault((place // NEIGHBOURS, array.shape), []).append(array.astype(mx.float32))
        else:
            rest.append(array)
    numbers = [_added_up(alike).sum() for alike in small.values()]
    for array in rest:
        numbers += [array.max(), array.min()] if array.dtype == mx.float16 else [array.sum()]
    return mx.isfinite(sum(number.astype(mx.float32) for number in numbers))


def global_norm(gradients):
    """The L2 norm over all arrays of a tree, float32 whatever their dtypes.

    Within 1e-6, or 2e-5 over a million rows on the CPU, for elements from about 1e-18 to 1e16; infinite well above. It
    is not finite if any element is not. The GPU kernel reads each gradient once and makes nothing of its size.
    """
    row_sums = []
    for _, gradient in tree_flatten(gradients):
        rows = gradient.reshape(-1, gradient.shape[-1] if gradient.ndim else 1)
        row_sums.append(mean_squares(rows)[0] * rows.shape[1])
    row_sums = mx.concatenate(row_sums)
    # The squares of a row fit into float32 where those of all rows together may not.
    scale = mx.maximum(row_sums.max(), 1e-30)
    return mx.sqrt(scale) * mx.sqrt((row_sums / scale).sum())


def clip_by_norm(gradients, norm, max_norm):
    """The gradients, scaled so that their global norm is at most ``max_norm``, each in its own dtype."""
    scale = mx.minimum(max_norm / (norm + 1e-6), 1.0)
    return tree_map(lambda gradient: (gradient * scale).astype(gradient.dtype), gradients)


def spoil_gradients_of_nonfinite(loss):
    """The same loss function, whose gradients are NaN where its value is NaN or infinite.

    An optimizer sees gradients alone, and those of an infinite loss may be finite.

    Args:
        loss (callable): Returns the loss, a scalar array, or a tuple that begins with it, as ``nn.value_and_grad``
            takes them.
    """

    def spoiling(*arguments):
        returned = loss(*arguments)
        value, *more = returned if isinstance(returned, tuple) else (returned,)
        factor = mx.where(mx.isfinite(value), 1.0, mx.nan).astype(value.dtype)
        value = value * mx.stop_gradient(factor)
        return (value, *more) if isinstance(returned, tuple) else value

    return spoiling


class GuardedOptimizer(Optimizer):
    """Any MLX optimizer, with clipping and the non-finite guard before it.

    Args:
        parameters (dict): What it will train; the state is made at once.
        rest (Optimizer): The optimizer. It is called so since :class:`ember_mlx.PairedOptimizer` adds one for tables.
        skip_nonfinite (bool): Let a step whose gradients hold a NaN or an infinity change nothing, and count it.
        clip_grad_norm (float, optional): Scale all gradients together to at most this global norm, which is computed
            in float32.

    With ``skip_nonfinite``, ``nonfinite_steps`` is the number of such steps, a uint32 array, and part of ``state``.
    Inside ``mx.compile`` nothing can be raised: read it between the steps, where it is known at no cost, to stop or to
    report. Gradients that were accumulated, or averaged over machines, are judged as the sum that arrives: one NaN
    among them, and the step is none, on every machine alike. For the loss, see :func:`spoil_gradients_of_nonfinite`.

    Raises:
        InputError: (a ``ValueError``) for a norm that is not above 0, and when an assigned state does not fit name by
            name. A counter of skipped steps may be missing in it, or be too much.
    """

    def __init__(self, parameters, rest, skip_nonfinite=False, clip_grad_norm=None):
        check_clip_grad_norm(f"{type(self).__name__}(clip_grad_norm={clip_grad_norm!r})", clip_grad_norm)
        self.rest = rest
        self.skip_nonfinite = skip_nonfinite
        self.clip_grad_norm = clip_grad_norm
        self._state = {"rest": rest.state}
        if skip_nonfinite:
            self._state[COUNT] = mx.array(0, mx.uint32)
        if clip_grad_norm is not None:
            for dtype in {array.dtype for _, array in tree_flatten(parameters)}:
                kernels.usable(kernels.statistics, dtype)  # tried now: a first step may be one that MLX traces
        self.init(parameters)

    def init(self, parameters):
        """Make the state of ``parameters``; what is there already stays. Done when the optimizer is made."""
        self.rest.init(parameters)

    def apply_gradients(self, gradients, parameters):
        if self.clip_grad_norm is not None:
            norm = global_norm(gradients)
            gradients = clip_by_norm(gradients, norm, self.clip_grad_norm)
        if not self.skip_nonfinite:
            return self._apply(gradients, parameters)
        old, old_state = dict(tree_flatten(parameters)), dict(tree_flatten(self._state))
        updated = self._apply(gradients, parameters)
        witnesses = self._witnesses(gradients) if self.clip_grad_norm is None else [norm]
        finite = all_finite(witnesses)
        state = {}
        for name, array in tree_flatten(self._state):
            if name not in old_state:
                raise InputError(
                    f"skip_nonfinite: the optimizer first makes {name} in a step, so there is nothing to go back to: "
                    "make it in init_single"
                )
            state[name] = mx.where(finite, array, old_state[name]) if array is not old_state[name] else array
        state[COUNT] = old_state[COUNT] + mx.logical_not(finite)
        fill(self._state, state)
        return tree_map_with_path(lambda path, array: mx.where(finite, array, old[path]), updated)

    def _apply(self, gradients, parameters):
        return self.rest.apply_gradients(gradients, parameters)

    def _witnesses(self, gradients):
        """Arrays of which one is not finite if the gradients are not. Asked for after the step."""
        return [gradient for _, gradient in tree_flatten(gradients)]

    @property
    def nonfinite_steps(self):
        """The number of steps that changed nothing, an mx.array; None without ``skip_nonfinite``."""
        return self._state.get(COUNT)

    @property
    def state(self):
        return self._state

    @state.setter
    def state(self, state):
        own, new = dict(tree_flatten(self._state)), dict(tree_flatten(state))
        if COUNT in own:
            new.setdefault(COUNT, own[COUNT])  # from a run without the guard
        else:
            new.pop(COUNT, None)
        where = f"{type(self).__name__}.state"
        for name in own | new:
            if name not in own or name not in new:
                raise InputError(
                    f"{where}: {name} is {'missing' if name in own else 'not of this optimizer'}: assign a state saved "
                    "from the same model with the same trainable parameters and optimizers"
                )
            if own[name].shape != new[name].shape or own[name].dtype != new[name].dtype:
                raise InputError(
                    f"{where}: {name} has shape {new[name].shape} and dtype {new[name].dtype}, which must be "
                    f"{own[name].shape} and {own[name].dtype}: assign the state of this model"
                )
        # In place, name by name: a compiled step holds these very containers.
        fill(self._state, new)

    @property
    def step(self):
        """The number of steps done, an mx.array."""
        return _steps_done(self.rest)

    @property
    def learning_rate(self):
        return self.rest.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.rest.learning_rate = learning_rate


def check_clip_grad_norm(where, clip_grad_norm):
    if clip_grad_norm is None:
        return
    number = isinstance(clip_grad_norm, int | float) and not isinstance(clip_grad_norm, bool)
    if not number or not 0 < clip_grad_norm < math.inf:
        raise InputError(f"{where}: must be a finite number above 0, usually 1.0; leave it out not to clip")


def _added_up(arrays):
    """Pair by pair: a long chain is too deep to be fused."""
    while len(arrays) > 1:
        pairs = [a + b for a, b in zip(arrays[::2], arrays[1::2], strict=False)]
        arrays = pairs + arrays[2 * len(pairs) :]
    return arrays[0]


def _steps_done(optimizer):
    """MultiOptimizer has no counter of its own; its parts count alike."""
    return _steps_done(optimizer.optimizers[0]) if isinstance(optimizer, MultiOptimizer) else optimizer.step


def fill(container, arrays, prefix=""):
    """Put arrays into nested dicts and lists, each at its path."""
    for key, value in container.items() if isinstance(container, dict) else enumerate(container):
        name = f"{prefix}{key}"
        if isinstance(value, mx.array):
            container[key] = arrays[name]
        elif isinstance(value, dict | list):
            fill(value, arrays, f"{name}.")
