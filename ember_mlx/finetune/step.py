"""One training step: loss and gradients, a judgement of them, and the update in place.

The judgement comes before anything changes. So a bad step changes nothing, bit for bit, and no old copy is kept: MLX
reuses the memory of the old weights and of the old optimizer state for the new. float16 weights and Adafactor may
overflow from finite gradients: there old copies are kept until the new weights are judged.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.utils import average_gradients
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ember_mlx.finetune.watchers import Measurement, StepResult, Update
from ember_mlx.optimizers.guarded import (
    GuardedOptimizer,
    all_finite,
    clip_by_norm,
    fill,
    norm_is_safe,
    norm_of,
    spoil_gradients_of_nonfinite,
    squares_of,
)
from ember_mlx.optimizers.paired import PairedOptimizer

__all__ = ["Step", "evaluate_paced"]

LAYER = re.compile(r"\.(\d+)\.")


class Step:
    """The ordinary step. Another kind has the same call; a loop takes either.

    Args:
        model (Module): What trains; frozen and unfrozen already.
        optimizer (GuardedOptimizer or PairedOptimizer): Made of ``model``. With ``skip_nonfinite`` bad steps are left
            out; with ``clip_grad_norm`` the norm that is judged clips, too.
        loss (callable): mlx-lm's kind: ``loss(model, tokens, lengths)`` gives the mean and the number of tokens.
        accumulation (int): How many batches make one update.
        reduce (callable): Gradients of this machine -> gradients of all.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: GuardedOptimizer | PairedOptimizer,
        loss: Callable,
        accumulation: int = 1,
        reduce: Callable = average_gradients,
    ):
        self.model = model
        self.optimizer = optimizer
        self.accumulated = None
        # A loss that is not finite must be seen by all machines, and in all that is accumulated: it spoils gradients.
        value_and_grad = nn.value_and_grad(model, spoil_gradients_of_nonfinite(loss))
        held = [model.state, mx.random.state]

        @partial(mx.compile, inputs=held, outputs=held)
        def gradients_of(batch, accumulated, last):
            (value, tokens), gradients = value_and_grad(model, *batch)
            if accumulated is not None:
                gradients = tree_map(lambda x, y: x + y, gradients, accumulated)
            if not last:
                return value, tokens, gradients, None
            gradients = reduce(gradients)
            if accumulation > 1:
                gradients = tree_map(lambda x: x / accumulation, gradients)
            return value, tokens, gradients, squares_of(gradients) if self._judges else None

        self._gradients_of = gradients_of
        self._updates = {}  # by the names of what is measured

    @property
    def _judges(self):
        return self.optimizer.skip_nonfinite or self.optimizer.clip_grad_norm is not None

    def __call__(
        self, batch: tuple[mx.array, ...], last_of_accumulation: bool = True, measurements: Iterable[Measurement] = ()
    ) -> StepResult:
        """Take one batch; update the weights if it is the last that is accumulated."""
        loss, tokens, gradients, squares = self._gradients_of(batch, self.accumulated, last_of_accumulation)
        self.accumulated = None
        if not last_of_accumulation:
            self.accumulated = gradients
            mx.eval(loss, tokens, gradients, mx.random.state)
            return StepResult(loss, tokens, updated=False, nonfinite=False, measurements={})
        norm = self._judge(loss, tokens, gradients, squares) if self._judges else None
        mx.eval(loss, tokens, norm, mx.random.state)
        if self.optimizer.skip_nonfinite and not norm_is_safe(norm.item()):
            self.optimizer.count_nonfinite()
            return StepResult(loss, tokens, updated=False, nonfinite=True, measurements={})
        old = dict(tree_flatten(self._changing())) if self.optimizer.guard.judges_outcome else None
        update = self._compiled_update(tuple(measurements))
        weights, readings = update(
            self.model.trainable_parameters(), gradients, norm, {each.name: each.inputs for each in measurements}
        )
        self.model.update(weights)
        del gradients, weights  # now the new weights alone hold what they are made of
        if old is not None and not self._is_finite():
            self._put_back(old)
            self.optimizer.count_nonfinite()
            return StepResult(loss, tokens, updated=False, nonfinite=True, measurements={})
        del old
        evaluate_paced(tree_flatten(self.model.trainable_parameters()), tree_flatten(self.optimizer.state))
        mx.eval(readings)
        return StepResult(loss, tokens, updated=True, nonfinite=False, measurements=readings)

    @staticmethod
    def _judge(loss, tokens, gradients, squares):
        """The global norm. All gradients are held until it is known, but nothing else is for long."""
        mx.eval(loss, tokens)
        evaluate_paced(tree_flatten(gradients), [])
        if mx.default_device().type == mx.DeviceType.cpu:  # a GPU's kernel needs no scratch
            for each in squares:
                mx.eval(each)
        return norm_of(squares)

    def _compiled_update(self, measurements):
        """The update as one compiled function. The measures are those of the first call with these names."""
        names = tuple(each.name for each in measurements)
        if names not in self._updates:
            held = [self.optimizer.state]
            measures = {each.name: each.measure for each in measurements}

            @partial(mx.compile, inputs=held, outputs=held)
            def update(weights, gradients, norm, inputs):
                if self.optimizer.clip_grad_norm is not None:
                    gradients = clip_by_norm(gradients, norm, self.optimizer.clip_grad_norm)
                new = self.optimizer.apply_unguarded(gradients, weights)
                seen = Update(*(dict(tree_flatten(tree)) for tree in (weights, gradients, new)))
                readings = {name: measure(seen, **inputs[name]) for name, measure in measures.items()}
                return tree_unflatten(list(seen.new.items())), readings

            self._updates[names] = update
        return self._updates[names]

    def _changing(self):
        return {"weights": self.model.trainable_parameters(), "state": self.optimizer.state}

    def _is_finite(self):
        return all(all_finite([array]).item() for _, array in tree_flatten(self.model.trainable_parameters()))

    def _put_back(self, old):
        changing = self._changing()
        fill(changing, old)
        self.model.update(changing["weights"])


def evaluate_paced(weights: list[tuple[str, mx.array]], state: list[tuple[str, mx.array]]) -> None:
    """Evaluate layer by layer from the last, then what is in no layer from the smallest; each waits for the one before.

    So the gradient of a layer is freed as its weights are updated, and of the new arrays few are under way at a time. A
    weight and its state are evaluated together: what both are made of would live until the later one.
    """
    layers, outside, rest = {}, {path: [array] for path, array in weights if not LAYER.search(path)}, []
    for name, array in weights + state:
        number = LAYER.search(name)
        if number:
            layers.setdefault(int(number[1]), []).append(array)
        elif name not in outside:
            owner = next((path for path in outside if f".{path}." in name), None)
            (rest if owner is None else outside[owner]).append(array)
    groups = [layers[number] for number in sorted(layers, reverse=True)]
    groups += [rest, *sorted(outside.values(), key=lambda group: group[0].size)]
    ahead = mx.default_device().type == mx.DeviceType.gpu  # a CPU gains nothing by it, and its peak would vary
    before = []
    for group in groups:
        mx.async_eval(group)
        mx.eval(before if ahead else group)
        before = group
    mx.eval(before)
