"""What stands between gradients and weights: clipping by the global norm, and the refusal of NaN and infinity.

A step with a NaN or an infinity in it changes nothing: not the weights, not the optimizer's state, not its step counter
or its schedules, bit for bit. What goes in is judged: the gradients by their global norm, and the learning rates. Up to
SAFE_NORM no second moment and no sum of squares overflows in float32, and up to SAFE_RATE no product with a rate. So
state and new weights are finite if the weights were within SAFE_NORM. With float16 weights and with Adafactor that does
not hold, so the new weights are judged too. What grows beyond that, over many steps, is refused when it is saved
(finetune/safe_writing.py).

`ember-mlx train` judges first and then updates in place (finetune/step.py); it refuses rates before the first step.
Inside somebody's own ``mx.compile`` there are no branches: there both outcomes are computed and one is selected.
"""

from collections.abc import Callable, Iterable

import mlx.core as mx
from mlx.optimizers import Adafactor, MultiOptimizer, Optimizer
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from ember_mlx import kernels
from ember_mlx.kernels.norms import ARRAYS
from ember_mlx.optimizers.body import Tree
from ember_mlx.optimizers.ember import blocks
from ember_mlx.shared.ember_options import check_switch
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.float_formats import ROUNDS_TO_INFINITY, SMALLEST_NORMAL

__all__ = [
    "COUNT",
    "SAFE_NORM",
    "SAFE_RATE",
    "Guard",
    "GuardedOptimizer",
    "all_finite",
    "applied_if",
    "check_clip_grad_norm",
    "clip_by_norm",
    "fill",
    "global_norm",
    "norm_is_safe",
    "norm_of",
    "rates_are_safe",
    "safe_norms",
    "selected",
    "spoil_gradients_of_nonfinite",
    "squares_of",
    "sum_is_safe",
]

SAFE_NORM = 1e18  # its square is 1e36, of 3e38 in float32
SAFE_RATE = 1e10
COUNT = "nonfinite_steps"
SMALL = 2**16  # elements
LEAST_OF_KERNEL = 64
SCRATCH = 2**17  # elements
FLAG_BYTES = 4  # what Metal asks of the address of a kernel's constant input; flags are views into one array
NEIGHBOURS = 16  # arrays: about those of one layer's adapters


def all_finite(arrays: Iterable[mx.array]) -> mx.array:
    """Whether no array holds a NaN or an infinity, a bool array; exact, and without scratch of large ones.

    The largest and the smallest element tell: NaN is either, on every backend. A sum would overflow by itself.

    LoRA has hundreds of small arrays. Of neighbours of one shape the extremes are taken element by element first, which
    ``mx.compile`` makes one kernel of, where as many reductions would take longer than the numbers in them. Neighbours
    alone: over all layers MLX would compute them all together, and recompute all that ``--grad-checkpoint`` let go.
    """
    small, extremes = {}, []
    for place, array in enumerate(arrays):
        if array.size < SMALL:
            small.setdefault((place // NEIGHBOURS, array.shape), []).append(array.astype(mx.float32))
        else:
            extremes += [array.max(), array.min()]
    for alike in small.values():
        extremes += [_in_pairs(mx.maximum, alike).max(), _in_pairs(mx.minimum, alike).min()]
    return mx.isfinite(mx.stack([each.astype(mx.float32) for each in extremes])).all()


def global_norm(gradients: Tree) -> mx.array:
    """The L2 norm over all arrays of a tree, float32 whatever their dtypes.

    Within 1e-6, or 2e-5 over a million rows on the CPU, for elements from about 1e-18 to 1e16; infinite well above. It
    is not finite if any element is not. The GPU kernel takes several gradients at once, reads each once and makes
    nothing of its size; elsewhere small neighbours are added up first, as in :func:`all_finite`.
    """
    return norm_of(squares_of(gradients))


def squares_of(gradients: Tree) -> list[mx.array]:
    """Sums of squares, (n,) float32 each, that :func:`norm_of` makes the global norm of; see :func:`global_norm`.

    Without a kernel each large gradient needs scratch for a moment: who evaluates them in turn needs that of one alone.
    """
    small, for_kernel, sums = {}, {}, []
    for place, (_, gradient) in enumerate(tree_flatten(gradients)):
        if gradient.size >= LEAST_OF_KERNEL and kernels.usable(kernels.norms, gradient.dtype):
            for_kernel.setdefault(gradient.dtype, []).append(gradient.reshape(-1, gradient.shape[-1]))
        elif gradient.size < SMALL:
            squares = mx.square(gradient.astype(mx.float32))
            small.setdefault((place // NEIGHBOURS, gradient.shape), []).append(squares)
        else:
            sums.append(_squares_of_rows(gradient.reshape(-1, gradient.shape[-1])))
    for arrays in for_kernel.values():
        sums += [kernels.norms.sums_of_squares(arrays[i : i + ARRAYS]) for i in range(0, len(arrays), ARRAYS)]
    for alike in small.values():
        rows = _in_pairs(mx.add, alike)
        sums.append(rows.sum(axis=-1).reshape(-1) if rows.ndim else rows.reshape(1))
    return sums


def _squares_of_rows(rows):
    """Block after block: a CPU runs ahead, so several blocks of float32 squares exist at a time."""
    sums = []
    for some in blocks(rows, max(SCRATCH // rows.shape[1], 1)):
        block = mx.depends(rows[some], sums[-1:]) if sums else rows[some]
        sums.append(mx.square(block.astype(mx.float32)).sum(axis=1))
    return mx.concatenate(sums)


def norm_of(squares: list[mx.array]) -> mx.array:
    """The root of the sum of all :func:`squares_of` gradients."""
    sums = mx.concatenate(squares)
    # The squares of a row fit into float32 where those of all rows together may not.
    scale = mx.maximum(sums.max(), 1e-30)
    return mx.sqrt(scale) * mx.sqrt((sums / scale).sum())


def norm_is_safe(norm: float | mx.array) -> bool | mx.array:
    """Whether gradients of this global norm, a number or an array, may update weights; NaN is not."""
    return norm <= SAFE_NORM


def safe_norms(gradients: list[mx.array]) -> list[mx.array]:
    """Of each gradient whether its norm is safe, bool arrays (); with few kernels where a GPU has one for several.

    What shares a kernel is needed at one time: all these gradients are there together.
    """
    safe, alike = [None] * len(gradients), {}
    for place, gradient in enumerate(gradients):
        if gradient.ndim and gradient.size and kernels.usable(kernels.norms, gradient.dtype):
            alike.setdefault(gradient.dtype, []).append(place)
        else:
            safe[place] = sum_is_safe(gradient)
    for places in alike.values():
        for first in range(0, len(places), ARRAYS):
            some = places[first : first + ARRAYS]
            arrays = [gradients[place].reshape(-1, gradients[place].shape[-1]) for place in some]
            flags = norm_is_safe(mx.sqrt(kernels.norms.largest_sums(arrays, FLAG_BYTES)))
            for place, flag in zip(some, mx.split(flags, len(some)), strict=True):
                safe[place] = flag[:1].reshape(())  # by an index it would be a kernel
    return safe


def sum_is_safe(gradient: mx.array) -> mx.array:
    """Whether a gradient is finite, a bool array (), and so are the squares of its elements, without scratch.

    Its sum keeps every NaN and infinity, and makes nothing of its size. Only float16 overflows in a sum by itself.
    """
    wide = gradient.astype(mx.float32) if gradient.dtype == mx.float16 else gradient
    return norm_is_safe(mx.abs(wide.sum().astype(mx.float32)))


def selected(
    finite: mx.array, updated: mx.array, parameter: mx.array, new: dict[str, mx.array], state: dict[str, mx.array]
) -> mx.array:
    """``updated`` if ``finite``, else ``parameter``; so it becomes of ``new``, made of ``state``. Both are computed."""
    for name, value in new.items():
        if value is not state.get(name):
            new[name] = mx.where(finite, value, state[name])
    return mx.where(finite, updated, parameter)


def applied_if(
    finite: mx.array, apply_single: Callable, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]
) -> mx.array:
    """What ``apply_single`` gives where ``finite``; else it changes nothing, ``state`` included. Both are computed."""
    new = dict(state)
    updated = selected(finite, apply_single(gradient, parameter, new), parameter, new, state)
    state.update(new)
    return updated


def rates_are_safe(state: Tree) -> mx.array:
    """Whether every learning rate in an optimizer's state may scale an update, a bool array; NaN may not."""
    rates = [array for name, array in tree_flatten(state) if name.rpartition(".")[2] == "learning_rate"]
    safe = [rate.astype(mx.float32) <= SAFE_RATE for rate in rates]
    return mx.stack(safe).all() if safe else mx.array(True)


def clip_by_norm(gradients: Tree, norm: mx.array, max_norm: float) -> Tree:
    """The gradients, scaled so that their global norm is at most ``max_norm``, each in its own dtype."""
    scale = mx.minimum(max_norm / (norm + 1e-6), 1.0)
    return tree_map(lambda gradient: (gradient * scale).astype(gradient.dtype), gradients)


def spoil_gradients_of_nonfinite(loss: Callable) -> Callable:
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


class Guard(Optimizer):
    """Clipping and the non-finite guard: what :class:`GuardedOptimizer` and ``PairedOptimizer`` share.

    A subclass gives ``apply_unguarded(gradients, parameters)``, the update alone, of gradients that are judged and
    clipped already.

    Args:
        parameters (dict): What it trains.
        parts (dict): Name in ``state`` -> the optimizers that do.
        skip_nonfinite (bool): See :class:`GuardedOptimizer`.
        clip_grad_norm (float, optional): See :class:`GuardedOptimizer`.
    """

    def __init__(
        self, parameters: dict, parts: dict[str, Optimizer], skip_nonfinite: bool, clip_grad_norm: float | None
    ):
        check_switch(type(self).__name__, "skip_nonfinite", skip_nonfinite)
        check_clip_grad_norm(f"{type(self).__name__}(clip_grad_norm={clip_grad_norm!r})", clip_grad_norm)
        self.skip_nonfinite = skip_nonfinite
        self.clip_grad_norm = clip_grad_norm
        dtypes = {array.dtype for _, array in tree_flatten(parameters)}
        # Where finite gradients may come to an infinity, the new weights are judged too, and old ones kept until then.
        self.judges_outcome = skip_nonfinite and (mx.float16 in dtypes or any(map(_has_adafactor, parts.values())))
        if skip_nonfinite or clip_grad_norm is not None:
            kernels.try_all(kernels.norms, parameters)
        self._state = {name: part.state for name, part in parts.items()}
        if skip_nonfinite:
            self._state[COUNT] = mx.array(0, mx.uint32)

    @property
    def nonfinite_steps(self) -> mx.array | None:
        """The number of steps that changed nothing, an mx.array; None without ``skip_nonfinite``."""
        return self._state.get(COUNT)

    def count_nonfinite(self) -> None:
        """For a loop that judges by itself: one more step that changed nothing."""
        self._state[COUNT] = self._state[COUNT] + 1

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """The parameters after one step, or as they were."""
        if not self.skip_nonfinite and self.clip_grad_norm is None:
            return self.apply_unguarded(gradients, parameters)
        norm = global_norm(gradients)
        if self.clip_grad_norm is not None:
            gradients = clip_by_norm(gradients, norm, self.clip_grad_norm)
        if not self.skip_nonfinite:
            return self.apply_unguarded(gradients, parameters)
        state = self._state
        old, old_state = dict(tree_flatten(parameters)), dict(tree_flatten(state))
        updated = self.apply_unguarded(gradients, parameters)
        finite = norm_is_safe(norm) & rates_are_safe(state)
        if self.judges_outcome:
            finite = finite & all_finite([array for _, array in tree_flatten(updated)])
        selected = {}
        for name, array in tree_flatten(state):
            if name not in old_state:
                raise InputError(
                    f"skip_nonfinite: the optimizer first makes {name} in a step, so there is nothing to go back to: "
                    "make it in init_single"
                )
            selected[name] = mx.where(finite, array, old_state[name]) if array is not old_state[name] else array
        selected[COUNT] = old_state[COUNT] + mx.logical_not(finite)
        fill(state, selected)
        return tree_map_with_path(lambda path, array: mx.where(finite, array, old[path]), updated)

    @property
    def state(self) -> dict:
        """That of the parts, and the number of steps that changed nothing."""
        return self._state

    @state.setter
    def state(self, state: dict) -> None:
        """Put ``state``, nested or flat, into the own by name: a compiled step holds these very containers."""
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
        fill(self._state, new)


class GuardedOptimizer(Guard):
    """Any MLX optimizer, with clipping and the non-finite guard before it.

    Args:
        parameters (dict): What it will train; the state is made at once.
        optimizer (Optimizer): The optimizer.
        skip_nonfinite (bool): Let a step whose gradients hold a NaN or an infinity, or are so large that their squares
            overflow, change nothing, and count it. float16 weights that overflow are such a step too.
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

    def __init__(
        self,
        parameters: dict,
        optimizer: Optimizer,
        skip_nonfinite: bool = False,
        clip_grad_norm: float | None = None,
    ):
        super().__init__(parameters, {"rest": optimizer}, skip_nonfinite, clip_grad_norm)
        self.optimizer = optimizer
        self.init(parameters)

    def init(self, parameters: dict) -> None:
        """Make the state of ``parameters``; what is there already stays. Done when the optimizer is made."""
        self.optimizer.init(parameters)

    def apply_unguarded(self, gradients: dict, parameters: dict) -> dict:
        """The update alone, of gradients that are judged and clipped already."""
        return self.optimizer.apply_gradients(gradients, parameters)

    @property
    def step(self) -> mx.array:
        """The number of steps done."""
        return _steps_done(self.optimizer)

    @property
    def learning_rate(self) -> mx.array:
        return self.optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: float | mx.array) -> None:
        self.optimizer.learning_rate = learning_rate


def check_clip_grad_norm(where: str, clip_grad_norm: float | None) -> None:
    """Raises InputError for a norm that is no finite number above 0; ``where`` is the call or the flag."""
    if clip_grad_norm is None:
        return
    number = isinstance(clip_grad_norm, int | float) and not isinstance(clip_grad_norm, bool)
    if not number or not SMALLEST_NORMAL <= clip_grad_norm < ROUNDS_TO_INFINITY:
        raise InputError(f"{where}: must be a finite number above 0, usually 1.0; leave it out not to clip")


def _in_pairs(combine, arrays):
    """Pair by pair: a long chain is too deep to be fused."""
    while len(arrays) > 1:
        pairs = [combine(a, b) for a, b in zip(arrays[::2], arrays[1::2], strict=False)]
        arrays = pairs + arrays[2 * len(pairs) :]
    return arrays[0]


def _has_adafactor(optimizer):
    """Its moment of a row of zeros is 1e-30; over a mean of all rows from 1e8 on that may be 0, and 0 / 0 follows."""
    parts = [*getattr(optimizer, "optimizers", ()), getattr(optimizer, "optimizer", None)]
    return isinstance(optimizer, Adafactor) or any(part is not None and _has_adafactor(part) for part in parts)


def _steps_done(optimizer):
    """MultiOptimizer has no counter of its own; its parts count alike."""
    return _steps_done(optimizer.optimizers[0]) if isinstance(optimizer, MultiOptimizer) else optimizer.step


def fill(container: dict | list, arrays: dict[str, mx.array], prefix: str = "") -> None:
    """Put arrays into nested dicts and lists, each at its path."""
    for key, value in container.items() if isinstance(container, dict) else enumerate(container):
        name = f"{prefix}{key}"
        if isinstance(value, mx.array):
            container[key] = arrays[name]
        elif isinstance(value, dict | list):
            fill(value, arrays, f"{name}.")
