"""A training step that never holds a whole gradient: every weight is stepped inside the backward pass.

The model runs once as it is, and hooks keep what each layer took and gave. Backwards, one layer is made again at a
time, outside any trace; its cotangent is evaluated, then weight after weight its gradient is made, used and let go of.
Of the head and the embedding, rows are stepped in blocks.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten

from ember_mlx.optimizers.ember import Ember
from ember_mlx.optimizers.guarded import check_clip_grad_norm
from ember_mlx.shared.ember_options import check_switch
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.sizes_in_memory import bytes_ahead
from ember_mlx.streaming.backward import Backward
from ember_mlx.streaming.checks import (
    check_batches,
    check_differentiable,
    check_ids,
    check_keep_inputs,
    check_model,
    extremes_of,
    refuse_a_trace,
    refuse_nothing_learned,
    some_tokens,
)
from ember_mlx.streaming.forward import Forward
from ember_mlx.streaming.glue import Glue
from ember_mlx.streaming.head import StreamedHead
from ember_mlx.streaming.head_module import check_after, find_head
from ember_mlx.streaming.layers import Layers
from ember_mlx.streaming.machines import Machines, Reduce
from ember_mlx.streaming.marks import target_mask
from ember_mlx.streaming.mean_loss import mean_loss
from ember_mlx.streaming.pacing import Pace
from ember_mlx.streaming.rows_apart import rows_apart
from ember_mlx.streaming.shards import Group, Shards
from ember_mlx.streaming.sinks import GlobalNorm, Stepping
from ember_mlx.streaming.table import EmberTable
from ember_mlx.streaming.units import find_units, outputs_of_a_layer, put_back_random_state
from ember_mlx.streaming.updates import Updates
from ember_mlx.streaming.weights import Weights
from ember_mlx.token_tables import find_token_tables

__all__ = ["StepResult", "StreamedStep"]


class StepResult(NamedTuple):
    """What a step came to.

    Attributes:
        loss: The mean of the micro-batches' losses.
        tokens: The number of tokens that count.
        nonfinite: What was not finite: "loss" and nothing has changed, "gradient norm" and nothing has changed, or the
            paths of the weights that were not stepped, the one nearest to the loss first. Empty in a good step.
    """

    loss: float
    tokens: int
    nonfinite: tuple[str, ...]


class StreamedStep:
    """One training step after another, in little more memory than the weights and the optimizer's state.

    Make it when the model is ready to be trained: adapters in it, frozen what is frozen, in training mode. Between two
    calls every weight and all state is evaluated, so that they may be saved. A call that is interrupted leaves half of
    the weights stepped: the model is then no checkpoint.

    Args:
        model (Module): A model of mlx-lm's, or any whose layers stand in lists.
        optimizer (Optimizer): One that looks at one array at a time: most of MLX's, a ``MultiOptimizer`` of such, or
            :class:`ember_mlx.PairedOptimizer`. Token tables under :class:`ember_mlx.Ember` have no whole gradient.
        loss (callable, optional): ``loss(model, *batch)`` returns a scalar, or a tuple of it and the number of tokens.
            Default: mlx-lm's own, the mean cross entropy of tokens from the first to the last of ``lengths``, which
            takes marks too (``marks.py``). That one needs no logits; with another, the head is differentiated as a
            whole.
        clip_norm_pass (bool): Clip by the global norm as ``optimizer.clip_grad_norm`` says: exact, by a backward pass
            more for the norm.
        clip_layer_norm (float, optional): Another rule: the most that the norm of one layer's gradients may be.
        keep_logits (bool, optional): Whether the logits are kept between the passes over the head, or made again.
            Default: by their size, and on a GPU made again.
        block_rows (int, optional): Rows of the head at a time. Default: by its size.
        keep_inputs (int): Of how many layers one keeps its input; the others are made again, for long sequences.
        run_ahead (int, optional): Bytes of new weights and state that a GPU is handed before the first of them must be
            done: more take less time and more memory. Default: 1/64 of the weights, at least 33 MB; twice as much where
            this machine's part of the state is at most 1/8 of them. A CPU is not run ahead. With several machines,
            gradients of about half so many bytes go over the wire together.
        reduce (callable, optional): An array of this machine -> the sum over all machines, as
            ``mx.distributed.all_sum``. Gradients and losses are then means over the machines, and tokens are sums.
            A head under Ember goes over the wire twice a step, in float32; of an embedding the rows go that any
            machine has looked up. All machines give batches of the same shapes.
        group (Group, optional): Beside ``reduce``: each machine keeps a part of the optimizer's state, but for tables
            under Ember. See :mod:`ember_mlx.streaming.shards`; not with ``clip_layer_norm``.

    ``notes`` are the ways in which this model takes more memory than others, in words. ``on_phase``, if set, is called
    with the name of each phase of a step at its end, when all of it is done: forward, loss, head, layers, embedding.

    Raises:
        InputError: (a ``ValueError``) for a model that MLX cannot differentiate, an optimizer that needs all gradients
            at once, clipping by the global norm without ``clip_norm_pass`` and the reverse, an option that has no
            effect, and a call inside ``nn.value_and_grad`` or ``mx.compile``.

    Example:
        >>> step = StreamedStep(model, PairedOptimizer(model, tables=Ember(1e-4), rest=Adafactor()))
        >>> loss, tokens = step(batch, lengths)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: Callable | None = None,
        *,
        clip_norm_pass: bool = False,
        clip_layer_norm: float | None = None,
        keep_logits: bool | None = None,
        block_rows: int | None = None,
        keep_inputs: int = 1,
        run_ahead: int | None = None,
        reduce: Reduce | None = None,
        group: Group | None = None,
    ):
        self.model = model
        self.notes = []
        self.on_phase = None
        self._loss = mean_loss if _is_the_usual(loss) else loss
        self._clip_layer_norm = clip_layer_norm
        check_keep_inputs(keep_inputs)
        check_switch("StreamedStep", "clip_norm_pass", clip_norm_pass)
        check_switch("StreamedStep", "keep_logits", keep_logits, or_none=True)
        check_clip_grad_norm(f"StreamedStep(clip_layer_norm={clip_layer_norm!r})", clip_layer_norm)
        check_model(model)
        check_differentiable(model)
        self._vocabulary = max((table.shape[0] for table in find_token_tables(model)), default=0)
        self._updates = Updates(optimizer, model)
        if self._updates.clip_grad_norm is not None and not clip_norm_pass:
            raise InputError(
                f"StreamedStep(optimizer with clip_grad_norm={self._updates.clip_grad_norm}): the global norm needs a "
                "backward pass of its own: say clip_norm_pass=True, or clip_layer_norm, which is another rule"
            )
        if clip_norm_pass and self._updates.clip_grad_norm is None:
            raise InputError(
                "StreamedStep(clip_norm_pass=True): no effect: the optimizer has no clip_grad_norm; give it one, as "
                "PairedOptimizer takes it, or leave clip_norm_pass out"
            )
        if group is not None and reduce is None:
            raise InputError("StreamedStep(group=...): it goes with reduce, the sum over the same machines; give both")
        self._weights = Weights(model)
        key = mx.random.state[0]
        units = find_units(model, lambda: model(some_tokens()))
        put_back_random_state(key)
        nbytes, of_state = (
            sum(array.nbytes for _, array in tree_flatten(tree) if isinstance(array, mx.array))  # or a number
            for tree in (model.parameters(), optimizer.state)
        )
        of_this_machine = of_state / (group.count if group else 1)
        ahead = bytes_ahead(nbytes, of_this_machine) if run_ahead is None else run_ahead
        self._machines = Machines(reduce, ahead // 2)
        self._pace = Pace(ahead)
        outputs = outputs_of_a_layer(model, units)
        self._head = self._find_head(nbytes, keep_logits, block_rows, outputs)
        if self._head is None and (keep_logits is not None or block_rows is not None):
            raise InputError(
                f"StreamedStep(keep_logits={keep_logits}, block_rows={block_rows}): no effect: {self.notes[-1]}; leave "
                "them out"
            )
        embeddings = self._find_embeddings()
        self.shards = Shards(group, self._updates, self._weights, ahead // 2) if group else None
        if group and clip_layer_norm is not None:
            raise InputError("clip_layer_norm needs whole gradients, which no machine has where state is shared out")
        self._look_through(units, embeddings, keep_inputs)

    def _look_through(self, units, embeddings, keep_inputs):
        """Find what lies between the units; plan the backward pass, or let the first step plan it."""
        key = mx.random.state[0]
        modules = dict(self.model.named_modules())
        units |= {path: modules[path] for path in embeddings if path not in units}
        of_rows = {table.path for table in embeddings.values()}
        if self._head and self._head.table:
            of_rows.add(self._head.table.path)
        layers = Layers(units, self._weights, of_rows)
        elsewhere = of_rows.union(*layers.names.values())
        glue = Glue(units, self._weights, [path for path in self._weights.places if path not in elsewhere])
        self._forward = Forward(layers, glue, embeddings, keep_inputs, self._pace, self.notes)
        self._backward = Backward(self._forward, layers, glue, self._head, embeddings, self._pace, self._phase)
        if self._head:
            self._forward(lambda: self._head.head.hidden(some_tokens()))
            put_back_random_state(key)

    def __call__(self, batch: mx.array, lengths: mx.array | None = None) -> tuple[float, int]:
        """One step on one batch: its loss and the number of its tokens.

        Args:
            batch (array): (B, T + 1) token ids.
            lengths (array, optional): (B, 2), the first and the last that count in each row, as mlx-lm has it: a last
                beyond the row is its end. Or marks (``marks.py``). Default: all count.

        Raises:
            InputError: as :meth:`accumulated` does.
        """
        if lengths is None and getattr(batch, "ndim", 0) > 1:
            lengths = mx.array([[0, batch.shape[1]]] * batch.shape[0])
        result = self.accumulated([(batch, lengths)])
        return result.loss, result.tokens

    def accumulated(self, batches: list[tuple], shares: Sequence[float] | None = None) -> StepResult:
        """One step on several micro-batches: the mean of their gradients, layer by layer, without accumulators.

        Args:
            batches (list): What the loss takes after the model, of each: ``(batch, lengths)``.
            shares (list, optional): How much the loss of each counts in the mean over the machines; default: 1. With 0
                its tokens are not counted.

        Raises:
            InputError: before anything has changed. For a call within a trace; with mlx-lm's loss also for other shapes
                and types, for ids outside the vocabulary, and, without ``shares``, for a batch of which no token
                counts.
        """
        usual, extremes, began = self._loss is mean_loss, [], mx.random.state[0]
        if usual:
            check_batches(batches)
            extremes = extremes_of(batches) if self._vocabulary else []
        refuse_a_trace(self._weights, [*batches, extremes])  # evaluates them, so that a GPU waits once
        if extremes:
            check_ids(extremes, self._vocabulary)
        counted, shares = shares is not None, [1.0] * len(batches) if shares is None else shares
        recordings = [self._forward(self._run_of(batch)) for batch in batches]
        self._phase("forward")
        key = mx.random.state[0]
        try:
            if self._head:
                value, tokens, cotangents = self._loss_by_head(recordings, batches, shares)
            else:
                value, tokens, cotangents = self._loss_as_a_whole(recordings, shares)
            self._phase("loss")
            if self._machines.several:
                value, tokens = self._machines.sum(mx.array([value, tokens], mx.float32)).tolist()
                value, tokens = value / self._machines.count, int(tokens)
            if usual and not counted and not math.isfinite(value):
                refuse_nothing_learned(batches)
            return StepResult(value, tokens, tuple(self._step(recordings, value, cotangents)))
        except InputError:
            key = began
            raise
        finally:
            put_back_random_state(key)
            if self._head:
                self._head.forget()
            self._pace.finish()

    def _step(self, recordings, value, cotangents):
        """Clip and step; what was not finite."""
        if not mx.isfinite(mx.array(value)).item():
            self._updates.count()
            return ["loss"]
        clip = self._updates.clip_grad_norm
        if clip is not None:
            sink = GlobalNorm(self._pace, self._machines)
            self._backward(recordings, list(cotangents), sink)
            norm = sink.norm()
            if not mx.isfinite(norm).item():
                self._updates.count()
                return ["gradient norm"]
            scale = mx.minimum(clip / (norm + 1e-6), 1.0)
            cotangents = [(cotangent * scale).astype(cotangent.dtype) for cotangent in cotangents]
            if self._head:
                self._head.scale(scale)
        self._updates.begin()
        if self.shards:
            self.shards.cut()
        sink = Stepping(self._updates, self._weights, self._pace, self._machines, self._clip_layer_norm, self.shards)
        self._backward(recordings, cotangents, sink)
        mx.eval(self._updates.arrays())
        return self._updates.finish()

    def _phase(self, name):
        self._pace.finish()  # what a phase leaves in flight must not meet what the next one needs
        if self.on_phase is not None:
            self.on_phase(name)

    # The loss

    def _run_of(self, batch):
        if not self._head:
            return lambda: self._loss(self.model, *batch)
        tokens, learned = batch

        def run():
            with rows_apart(self.model, learned):
                return self._head.head.hidden(tokens[:, :-1])

        return run

    def _loss_by_head(self, recordings, batches, shares):
        """The loss, its tokens, and its gradient by the hidden states of each micro-batch."""
        hidden, targets, weights, tokens = [], [], [], 0
        for recording, (batch, learned), share in zip(recordings, batches, shares, strict=True):
            mask = target_mask(batch, learned)
            hidden.append(mx.stop_gradient(recording.result))
            recording.result = None
            targets.append(batch[:, 1:].reshape(-1))
            weights.append((mask / mask.sum() * share / len(batches)).reshape(-1))
            tokens = tokens + (mask.sum() if share > 0 else 0)
        shapes = [array.shape for array in hidden]
        hidden = mx.concatenate([array.reshape(-1, array.shape[-1]) for array in hidden])
        at_once = max(rows * length for rows, length, _ in shapes)
        loss, by_hidden = self._head.loss(hidden, mx.concatenate(targets), mx.concatenate(weights), at_once)
        *ends, _ = itertools.accumulate(rows * length for rows, length, _ in shapes)
        parts = mx.split(by_hidden, ends) if ends else [by_hidden]
        cotangents = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        return loss.item(), int(mx.array(tokens).item()), cotangents

    def _loss_as_a_whole(self, recordings, shares):
        values, tokens = [], 0
        for recording, share in zip(recordings, shares, strict=True):
            value, count = recording.result if isinstance(recording.result, tuple) else (recording.result, 0)
            recording.result = None
            mx.eval(value, count)
            values.append(value)
            tokens += int(mx.array(count).item()) if share > 0 else 0
        pairs = list(zip(values, shares, strict=True))
        cotangents = [mx.array(share / len(pairs)).astype(value.dtype) for value, share in pairs]
        return sum(value.item() * share for value, share in pairs) / len(pairs), tokens, cotangents

    # What is where

    def _find_head(self, nbytes, *settings):
        if self._loss is not mean_loss:
            self.notes.append("the loss is the caller's own: logits and the head's gradient are whole")
            return None
        try:
            head = find_head(self.model)
            check_after(head)
        except InputError as error:
            self.notes.append(f"{error}: logits and the head's gradient are whole")
            return None
        path = next(path for path, module in self.model.named_modules() if module is head.module)
        weight = head.module.trainable_parameters().get("weight")
        table = None
        if isinstance(weight, mx.array):
            table = self._table(f"{path}.weight", head.module)
            if table is None:
                self.notes.append(f"{path}.weight is not trained by Ember: its gradient is whole")
        return StreamedHead(head, path, table, self._pace, nbytes, *settings)

    def _find_embeddings(self):
        """The embeddings whose rows are stepped as they are looked up, by path."""
        modules, found = dict(self.model.named_modules()), {}
        trainable = dict(tree_flatten(self.model.trainable_parameters()))
        for table in find_token_tables(self.model):
            path, module = table.module_path, modules.get(table.module_path)
            if table.role == "head" or table.path not in trainable:
                continue
            alone = type(module).__call__ is nn.Embedding.__call__ and not any(
                part.isdigit() for part in path.split(".")
            )
            streamed_tied = self._head is not None and self._head.path == path
            if alone and (table.role == "embedding" or streamed_tied):
                table = self._head.table if streamed_tied else self._table(table.path, module)
                if table is not None:
                    found[path] = table
        return found

    def _table(self, path, module):
        ember = isinstance(self._updates.leaf(path), Ember)
        return EmberTable(self._updates, path, module, self._pace) if ember else None


def _is_the_usual(loss):
    from mlx_lm.tuner.trainer import default_loss

    return loss in (None, default_loss, mean_loss)
