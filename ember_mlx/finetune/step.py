"""One training step: loss and gradients, a judgement of them, and the update in place.

The judgement comes before anything changes. So a bad step changes nothing, bit for bit, and no old copy is kept: MLX
reuses the memory of the old weights and of the old optimizer state for the new. float16 weights and Adafactor may
overflow from finite gradients: there old copies are kept until the new weights are judged.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import cache, partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from ember_mlx.finetune.batches import rows_to_send
from ember_mlx.finetune.leaving_head import LeavingHead
from ember_mlx.finetune.one_behind import OneBehind
from ember_mlx.finetune.places import Places
from ember_mlx.finetune.watchers import Measurement, StepResult, Update
from ember_mlx.finetune.workers import Averages, Workers
from ember_mlx.optimizers.guarded import (
    GuardedOptimizer,
    all_finite,
    clip_by_norm,
    norm_is_safe,
    norm_of,
    spoil_gradients_of_nonfinite,
    squares_of,
)
from ember_mlx.optimizers.paired import PairedOptimizer
from ember_mlx.token_tables import find_token_tables

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
        reduce (callable): Gradients of this machine by name, and the rows of arrays that are enough -> their
            :class:`~ember_mlx.finetune.workers.Averages` over all.
        head_first (bool): Evaluate what leaves the head before the layers' gradients begin, so that they are made
            without the logits. For a loss that runs the model as it is, with all logits at once.

    Of several workers' batches (:func:`~ember_mlx.finetune.batches.own_part`) an untied embedding sends only the rows
    that occur in an update, where these are fewer than all. Large gradients are sent while others are made. A GPU is
    handed nothing that waits for the network: macOS ends a command that waits 5 seconds for a slower machine.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: GuardedOptimizer | PairedOptimizer,
        loss: Callable,
        accumulation: int = 1,
        reduce: Callable = Averages,
        *,
        head_first: bool = False,
    ):
        self.model = model
        self.optimizer = optimizer
        self.accumulated = None
        self._rows = [] if accumulation > 1 else None  # of an embedding, that the accumulated batches look up
        # A loss that is not finite must be seen by all machines, and in all that is accumulated: it spoils gradients.
        value_and_grad = nn.value_and_grad(model, spoil_gradients_of_nonfinite(loss))
        held = [model.state, mx.random.state]
        several = Workers.join().size > 1
        leaving_head = LeavingHead(model).noted if head_first else partial(nullcontext, ())

        def judged(gradients):
            if accumulation > 1:
                gradients = tree_map(lambda x: x / accumulation, gradients)
            return gradients, self._squares_of(gradients) if self._judges else None

        @partial(mx.compile, inputs=held, outputs=held)
        def gradients_of(batch, accumulated, last):
            with leaving_head() as left:
                (value, tokens), gradients = value_and_grad(model, *batch[:3])
            gradients = dict(tree_flatten(gradients))
            if accumulated is not None:
                gradients = tree_map(lambda x, y: x + y, gradients, accumulated)
            return value, tokens, [*left], *(judged(gradients) if last and not several else (gradients, None))

        self._gradients_of = gradients_of
        self._judged = mx.compile(judged) if several else None
        self._reduce = reduce
        self._table_rows = self._looked_up_by_tokens()
        self._weights = Places(model, dict(tree_flatten(model.trainable_parameters())))
        self._state = Places({"state": optimizer.state})
        lookups = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
        weights = self._weights.arrays()
        shapes = {path: array.shape for path, array in weights.items()}
        self._gradient_groups = cache(lambda tokens: gradient_groups(shapes, lookups, tokens))
        self._update_groups = update_groups({path: array.size for path, array in weights.items()}, self._state.names)
        self._updates = {}  # by the names of what is measured

    @property
    def _judges(self):
        return self.optimizer.skip_nonfinite or self.optimizer.clip_grad_norm is not None

    def __call__(
        self, batch: tuple[mx.array, ...], last_of_accumulation: bool = True, measurements: Iterable[Measurement] = ()
    ) -> StepResult:
        """Take one batch; update the weights if it is the last that is accumulated."""
        if self._rows is not None and len(batch) > 3:
            batch = (*batch[:3], *self._rows_of_all(batch[3], last_of_accumulation))
        loss, tokens, left, gradients, squares = self._gradients_of(batch, self.accumulated, last_of_accumulation)
        self.accumulated = None
        if not last_of_accumulation:
            self.accumulated = gradients
            _evaluate_head(loss, tokens, left)
            evaluate_paced(self._grouped(gradients, batch))
            return StepResult(loss, tokens, updated=False, nonfinite=False, measurements={})
        mx.async_eval(loss, tokens, mx.random.state)  # while it is computed, all below is laid out, and not yet begun
        own = averages = None
        if self._judged:
            own, averages = gradients, self._reduce(gradients, self._rows_to_send(batch))
            gradients, squares = self._judged(averages.means)
        norm = norm_of(squares) if self._judges else None
        weights, state = self._weights.arrays(), self._state.arrays()
        update = self._compiled_update(tuple(measurements))
        new, readings = update(weights, gradients, norm, {each.name: each.inputs for each in measurements})
        _evaluate_head(loss, tokens, left)
        if own:
            self._exchange(own, averages, batch)
        groups = self._grouped(gradients, batch)
        if squares:
            on_cpu = mx.default_device().type == mx.DeviceType.cpu  # where each of them needs scratch
            groups += [*([each] for each in squares if on_cpu), [norm]]
        evaluate_paced(groups)
        # Rates are not judged: options.py and, over a schedule, build_optimizer.py refuse unsafe ones before a run.
        if self.optimizer.skip_nonfinite and not norm_is_safe(norm.item()):
            return self._left_out(weights, state, loss, tokens)
        self._weights.put(new)
        del gradients, groups, norm, squares  # now the new weights alone hold what they are made of
        if self.optimizer.judges_outcome and not self._is_finite():
            return self._left_out(weights, state, loss, tokens)
        del weights, state
        new |= self._state.arrays()
        evaluate_paced([*self._exchanged(), *([new[name] for name in group] for group in self._update_groups)])
        mx.eval(readings)
        return StepResult(loss, tokens, updated=True, nonfinite=False, measurements=readings)

    def _exchange(self, own, averages, batch):
        """Evaluate gradients, sums and means, and let go of all that are not means."""
        evaluated, alone = OneBehind(), {names[0]: names for names in averages.sums if len(names) == 1}
        for paths in self._gradient_groups(batch[0].size):
            evaluated(*(own[path] for path in paths))
            for path in paths:
                del own[path]
                if path in alone:
                    mx.async_eval(averages.sums[alone[path]])  # which no GPU waits for
        evaluated.finish()
        del evaluated
        mx.eval(list(averages.sums.values()))
        averages.sums.clear()
        mx.eval(averages.means)
        averages.means.clear()

    def _grouped(self, gradients, batch):
        return [[gradients[path] for path in group] for group in self._gradient_groups(batch[0].size)]

    def _rows_to_send(self, batch):
        """Of the embedding that tokens look up, the rows that have a gradient, where these are fewer than all."""
        rows = batch[3] if len(batch) > 3 else mx.array([])
        return {name: rows for name, number in self._table_rows.items() if 0 < rows.size < number}

    def _rows_of_all(self, rows, last):
        """For the last of some batches the rows of all, in one array; as many as a power of two, to compile few."""
        self._rows.append(np.array(rows))
        if not last:
            return []
        every, self._rows = np.concatenate(self._rows), []
        return [mx.array(rows_to_send(every, 1 << (every.size - 1).bit_length()))]

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
                tree = self.model.trainable_parameters()
                trees = [tree_map_with_path(lambda path, _, of=of: of[path], tree) for of in (gradients, weights)]
                new = dict(tree_flatten(self.optimizer.apply_unguarded(*trees)))
                seen = Update(weights, gradients, new)
                return new, {name: measure(seen, **inputs[name]) for name, measure in measures.items()}

            self._updates[names] = update
        return self._updates[names]

    def _left_out(self, weights, state, loss, tokens):
        """The result of a step that changes nothing: everything is again what it was."""
        self._weights.put(weights)
        self._state.put(state)
        self.optimizer.count_nonfinite()
        return StepResult(loss, tokens, updated=False, nonfinite=True, measurements={})

    def _looked_up_by_tokens(self):
        return _looked_up_by_tokens(self.model)

    def _exchanged(self):
        return []

    def _squares_of(self, gradients):
        return squares_of(gradients)

    def _is_finite(self):
        return all(all_finite([array]).item() for _, array in tree_flatten(self.model.trainable_parameters()))


def _looked_up_by_tokens(model):
    """The table that trains and whose gradient has only rows of the batch's tokens, with its rows, if there is one.

    A head has gradients in all rows, so a tied table has. Of several embeddings one may be looked up by other numbers.
    """
    lookups = [table for table in find_token_tables(model) if table.role != "head"]
    trained = dict(tree_flatten(model.trainable_parameters()))
    if len(lookups) != 1 or lookups[0].role == "tied" or lookups[0].path not in trained:
        return {}
    return {lookups[0].path: lookups[0].shape[0]}


def gradient_groups(shapes: Mapping[str, tuple[int, ...]], lookups: set[str], tokens: int) -> list[list[str]]:
    """In the order of the backward pass: head and final norm, the layers from the last, the embeddings in ``lookups``.

    So the logits and each layer's activations are freed as soon as its gradients are there. With fewer ``tokens`` in
    the batch than the model is wide, the head's gradient is larger than that of the logits, and waits for the layers'.
    """
    layers, outside = _by_layer(shapes)
    head = [path for path in outside if path not in lookups]
    embeddings = [path for path in outside if path in lookups]
    width = max((shapes[path][-1] for path in head if len(shapes[path]) == 2), default=0)
    return [*layers, head, embeddings] if tokens < width else [head, *layers, embeddings]


def update_groups(sizes: Mapping[str, int], state: Iterable[str]) -> list[list[str]]:
    """Layer by layer from the last, then what is in no layer from the smallest; ``sizes`` are those of the weights.

    A weight and its state are one group: what both are made of would live until the later one.
    """
    layers, outside = _by_layer([*sizes, *state])
    owners, rest = {path: [path] for path in outside if path in sizes}, []
    for name in outside:
        if name not in owners:
            owner = next((path for path in owners if f".{path}." in name), None)
            (rest if owner is None else owners[owner]).append(name)
    return [*layers, rest, *sorted(owners.values(), key=lambda group: sizes[group[0]])]


def _evaluate_head(loss, tokens, left):
    """The loss first: handed to a device together, both passes take more. Then what leaves the head, held no longer."""
    mx.eval(loss, tokens, mx.random.state)
    mx.eval(left)
    left.clear()


def _by_layer(names):
    """Those of each layer, from the last, and the others."""
    layers, outside = {}, []
    for name in names:
        number = LAYER.search(name)
        (layers.setdefault(int(number[1]), []) if number else outside).append(name)
    return [layers[number] for number in sorted(layers, reverse=True)], outside


def evaluate_paced(groups: list[list[mx.array]]) -> None:
    """Evaluate group after group, and wait for all: so what a group needs is freed before much more is under way."""
    evaluated = OneBehind()
    for group in groups:
        evaluated(*group)
    evaluated.finish()
