"""A training step that never holds a whole gradient: every weight is stepped inside the backward pass.

The model runs once as it is, and hooks keep what each layer took and gave. Backwards, one layer is made again at a
time, outside any trace; its cotangent is evaluated, then weight after weight its gradient is made, used and let go of.
Of the head and the embedding, rows are stepped in blocks.
"""

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ember_mlx.optimizers.ember import Ember
from ember_mlx.shared.errors import InputError
from ember_mlx.streaming.call_tree import is_float
from ember_mlx.streaming.embedding import LookedUp
from ember_mlx.streaming.glue import Glue
from ember_mlx.streaming.head import StreamedHead
from ember_mlx.streaming.head_module import check_after, find_head
from ember_mlx.streaming.layers import Layers
from ember_mlx.streaming.pacing import Pace
from ember_mlx.streaming.segments import Segments
from ember_mlx.streaming.sinks import GlobalNorm, Stepping
from ember_mlx.streaming.table import EmberTable
from ember_mlx.streaming.units import find_units, is_leaf, put_back_random_state, record
from ember_mlx.streaming.updates import Updates
from ember_mlx.streaming.weights import Weights
from ember_mlx.token_tables import find_token_tables

__all__ = ["StepResult", "StreamedStep"]

LEAST_AHEAD = 2**25  # bytes that a GPU is run ahead
SHARE_AHEAD = 128  # of the weights
SHARE_OF_LOGITS = 8  # of the weights


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
            Default: mlx-lm's own, the mean cross entropy of tokens from the first to the last of ``lengths``. That one
            needs no logits; with another, the head is differentiated as a whole.
        clip_norm_pass (bool): Clip by the global norm as ``optimizer.clip_grad_norm`` says: exact, by a backward pass
            more for the norm.
        clip_layer_norm (float, optional): Another rule: the most that the norm of one layer's gradients may be.
        keep_logits (bool, optional): Whether the logits are kept between the passes over the head, or made again.
            Default: by their size.
        block_rows (int, optional): Rows of the head at a time. Default: by its size.
        keep_inputs (int): Of how many layers one keeps its input; the others are made again, for long sequences.
        run_ahead (int, optional): Bytes of new weights that a GPU is handed before the first of them must be done: more
            take less time and more memory. Default: 1/128 of the weights, at least 32 MB. A CPU is not run ahead.

    ``notes`` are the ways in which this model takes more memory than others, in words. ``on_phase``, if set, is called
    with the name of each phase of a step at its end, when all of it is done: forward, loss, head, layers, embedding.

    Raises:
        InputError: (a ``ValueError``) for a model that MLX cannot differentiate, an optimizer that needs all gradients
            at once, clipping by the global norm without ``clip_norm_pass``, and a call inside ``nn.value_and_grad`` or
            ``mx.compile``.

    Example:
        >>> step = StreamedStep(model, PairedOptimizer(model, tables=Ember(1e-4), rest=Adafactor()))
        >>> loss, tokens = step(batch, lengths)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer,
        loss=None,
        *,
        clip_norm_pass: bool = False,
        clip_layer_norm: float | None = None,
        keep_logits: bool | None = None,
        block_rows: int | None = None,
        keep_inputs: int = 1,
        run_ahead: int | None = None,
    ):
        self.model = model
        self.notes = []
        self.on_phase = None
        self._loss = None if _is_the_usual(loss) else loss
        _check_differentiable(model)
        self._updates = Updates(optimizer, model)
        if self._updates.clip_grad_norm is not None and not clip_norm_pass:
            raise InputError(
                f"StreamedStep(optimizer with clip_grad_norm={self._updates.clip_grad_norm}): the global norm needs a "
                "backward pass of its own: say clip_norm_pass=True, or clip_layer_norm, which is another rule"
            )
        self._clip_layer_norm = clip_layer_norm
        weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
        self._pace = Pace(max(LEAST_AHEAD, weights // SHARE_AHEAD) if run_ahead is None else run_ahead)
        keep_bytes = {None: weights // SHARE_OF_LOGITS, True: 2**62, False: 0}[keep_logits]
        self._head = self._find_head(keep_bytes, block_rows)
        self._embeddings = self._find_embeddings()
        key = mx.random.state[0]
        units = find_units(model, lambda: model(_some_tokens()))
        put_back_random_state(key)
        modules = dict(model.named_modules())
        units |= {path: modules[path] for path in self._embeddings if path not in units}
        of_rows = {table.path for table in self._embeddings.values()}
        if self._head and self._head.table:
            of_rows.add(self._head.table.path)
        self._weights = Weights(model)
        self._layers = Layers(units, self._weights, of_rows)
        in_units = {name for names in self._layers.names.values() for name in names}
        self._glue = Glue(
            units, self._weights, [name for name in self._weights.places if name not in in_units | of_rows]
        )
        self._plans = {}
        self._segments = Segments(_at_least_one("keep_inputs", keep_inputs))
        if self._head:  # else the first step plans
            self._record(lambda: self._head.head.hidden(_some_tokens()))
            put_back_random_state(key)

    def __call__(self, batch: mx.array, lengths: mx.array | None = None) -> tuple[float, int]:
        """One step on one batch: its loss and the number of its tokens.

        Args:
            batch (array): (B, T + 1) token ids.
            lengths (array, optional): (B, 2), the first and the last that count in each row, as mlx-lm has it.
        """
        lengths = mx.array([[0, batch.shape[1]]] * batch.shape[0]) if lengths is None else lengths
        result = self.accumulated([(batch, lengths)])
        return result.loss, result.tokens

    def accumulated(self, batches: list[tuple]) -> StepResult:
        """One step on several micro-batches: the mean of their gradients, layer by layer, without accumulators.

        Args:
            batches (list): What the loss takes after the model, of each: ``(batch, lengths)``.
        """
        self._refuse_a_trace()
        runs = [self._run_of(batch) for batch in batches]
        recordings = [self._record(run) for run in runs]
        self._phase("forward")
        key = mx.random.state[0]
        try:
            if self._head:
                value, tokens, cotangents = self._loss_by_head(recordings, batches)
            else:
                value, tokens, cotangents = self._loss_as_a_whole(recordings)
            self._phase("loss")
            return StepResult(value, tokens, tuple(self._step(recordings, value, cotangents)))
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
            sink = GlobalNorm(self._pace)
            self._backward(recordings, cotangents, sink)
            norm = sink.norm()
            if not mx.isfinite(norm).item():
                self._updates.count()
                return ["gradient norm"]
            scale = mx.minimum(clip / (norm + 1e-6), 1.0)
            cotangents = [(cotangent * scale).astype(cotangent.dtype) for cotangent in cotangents]
            if self._head:
                self._head.scale(scale)
        self._updates.begin()
        self._backward(
            recordings, cotangents, Stepping(self._updates, self._weights, self._pace, self._clip_layer_norm)
        )
        mx.eval(self._updates.arrays())
        return self._updates.finish()

    # The forward pass

    def _run_of(self, batch):
        if self._head:
            return lambda: self._head.head.hidden(batch[0][:, :-1])
        return lambda: self._loss(self.model, *batch)

    def _record(self, run):
        key = mx.random.state[0]
        recording = record(run, self._layers.units, self._pace.one_behind, not self._plans, self._drop)
        if any(self._plan_key(recording, i) not in self._plans for i in range(len(recording.calls))):
            if self._plans:  # called in another way than before: look again
                put_back_random_state(key)
                recording = record(run, self._layers.units, self._pace.one_behind, True, self._drop)
            self._make_plans(recording)
            put_back_random_state(recording.key_after)
        return recording

    def _drop(self, recording):
        i = len(recording.calls) - 1
        call, plan = recording.calls[i], self._plans.get(self._plan_key(recording, i))
        if i and (plan or call.sources):
            self._segments.drop(recording, i, plan[0] if plan else _direct(call))

    def _plan_key(self, recording, i):
        call = recording.calls[i]
        return i, call.path, len(call.inputs)

    def _make_plans(self, recording):
        """Of each call: its inputs that are outputs of earlier calls, and those that depend on weights by way of glue.

        Below the lowest call with anything to train, no cotangent is wanted.
        """
        direct, indirect = [], []
        for i, call in enumerate(recording.calls):
            floats = [j for j, array in enumerate(call.inputs) if is_float(array)]
            direct.append(_direct(call))
            indirect.append(self._glue.depends(recording, i, [j for j in floats if j not in direct[i]]))
            call.sources = None
        trains = [
            bool(self._layers.names[call.path] or indirect[i]) or call.path in self._embeddings
            for i, call in enumerate(recording.calls)
        ]
        lowest = trains.index(True) if True in trains else len(trains)
        if self._segments.needed is None:
            zeros = mx.zeros_like(_first(recording.result)[0])
            self._segments.needed = frozenset(self._glue.vjp(recording, _first, [zeros]))
            if any(indirect[1:]) and self._segments.keep > 1:
                self.notes.append("arithmetic between the layers reads their outputs: all inputs are kept")
                self._segments.keep = 1
        for i in range(len(recording.calls)):
            wanted = {j: source for j, source in direct[i].items() if source[0] >= lowest}
            self._plans[self._plan_key(recording, i)] = wanted, indirect[i]

    # The loss

    def _loss_by_head(self, recordings, batches):
        """The loss, its tokens, and its gradient by the hidden states of each micro-batch."""
        hidden, targets, weights, tokens = [], [], [], 0
        for recording, (batch, lengths) in zip(recordings, batches, strict=True):
            steps = mx.arange(1, batch.shape[1])
            mask = mx.logical_and(steps >= lengths[:, 0:1], steps <= lengths[:, 1:])
            hidden.append(mx.stop_gradient(recording.result))
            recording.result = None
            targets.append(batch[:, 1:].reshape(-1))
            weights.append((mask / mask.sum() / len(batches)).reshape(-1))
            tokens = tokens + mask.sum()
        shapes = [array.shape for array in hidden]
        hidden = mx.concatenate([array.reshape(-1, array.shape[-1]) for array in hidden])
        loss, by_hidden = self._head.loss(hidden, mx.concatenate(targets), mx.concatenate(weights))
        ends = [sum(shape[0] * shape[1] for shape in shapes[: i + 1]) for i in range(len(shapes) - 1)]
        parts = mx.split(by_hidden, ends) if ends else [by_hidden]
        cotangents = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        return loss.item(), int(tokens.item()), cotangents

    def _loss_as_a_whole(self, recordings):
        values, tokens = [], 0
        for recording in recordings:
            value, count = recording.result if isinstance(recording.result, tuple) else (recording.result, 0)
            recording.result = None
            mx.eval(value, count)
            values.append(value)
            tokens += int(mx.array(count).item())
        cotangents = [mx.array(1 / len(values)).astype(value.dtype) for value in values]
        return sum(value.item() for value in values) / len(values), tokens, cotangents

    # The backward pass

    def _backward(self, recordings, cotangents, sink):
        """From the cotangents of what each run gave, down to the embedding; every gradient goes into the sink."""
        head, of_glue = self._head, {}
        looked_up = {path: LookedUp(table.shape[1]) for path, table in self._embeddings.items()}
        if head:
            _add(of_glue, head.gradients_of_others())
            if head.table and head.path not in self._embeddings:
                sink.head(head)
                if not sink.keeps_recordings:
                    head.forget()
            self._phase("head")
        for recording in recordings:
            found = self._glue.vjp(
                recording, _first, [cotangents.pop(0)] if not sink.keeps_recordings else cotangents[:1]
            )
            if sink.keeps_recordings:
                cotangents = cotangents[1:]
            self._share(recording, found, of_glue)
            self._pace.one_behind(*found.values())
            del found
        self._through_the_calls(recordings, sink, of_glue, looked_up)
        self._phase("layers")
        for path, rows in looked_up.items():
            tied = bool(head and head.table and head.path == path)
            rows = rows.rows()
            if tied:
                sink.head(head, rows)
            elif rows is not None:
                sink.embedding(self._embeddings[path], *rows)
        sink.arrays(of_glue)
        self._phase("embedding")

    def _phase(self, name):
        if self.on_phase is not None:
            self._pace.finish()
            self.on_phase(name)

    def _through_the_calls(self, recordings, sink, of_glue, looked_up):
        numbers = {tuple(call.path for call in recording.calls) for recording in recordings}
        if len(numbers) > 1:
            raise InputError("StreamedStep: the model calls its layers in another order in some micro-batches")
        paths = next(iter(numbers))
        waiting = {}
        for i in reversed(range(len(paths))):
            path = paths[i]
            for recording in recordings:
                call = recording.calls[i]
                if path in looked_up:
                    cotangent = recording.cotangents.pop((i, 0), None)
                    if cotangent is not None:
                        looked_up[path].add(call.inputs[0], cotangent)
                else:
                    gradients = self._through_a_call(recording, i, of_glue)
                    if gradients is not None:
                        _add(waiting.setdefault(path, {}), gradients)
                        if len(recordings) > 1 or path in paths[:i]:
                            self._pace.one_behind(*waiting[path].values())
                    del gradients
                if not sink.keeps_recordings:
                    call.inputs = call.outputs = None
                elif i:
                    self._segments.drop(recording, i, self._plans[self._plan_key(recording, i)][0])
            if path in waiting and path not in paths[:i]:
                sink.arrays(waiting.pop(path))

    def _through_a_call(self, recording, i, of_glue):
        """Gradients of the unit's weights by name, lazy, or None; the cotangents go on, evaluated first."""
        call = recording.calls[i]
        outputs = self._layers.float_outputs(call)
        cotangents = [recording.cotangents.pop((i, j), None) for j in outputs]
        if all(cotangent is None for cotangent in cotangents):
            return None
        if call.dropped:
            self._segments.restore(recording, i, self._layers.units, self._pace.one_behind)
        for place, j in enumerate(outputs):
            given, output = cotangents[place], call.outputs[j]
            cotangents[place] = mx.zeros_like(output) if given is None else given.astype(output.dtype)
        direct, indirect = self._plans[self._plan_key(recording, i)]
        wanted = [*direct, *indirect]
        of_weights, of_inputs = self._layers.vjp(call, wanted, cotangents)
        of_inputs = dict(zip(wanted, of_inputs, strict=True))
        found = {}
        for j, source in direct.items():
            _add(found, {source: of_inputs[j]})
        if indirect:
            pick = lambda leaves: [leaves[j] for j in indirect]  # noqa: E731
            _add(found, self._glue.vjp(recording, pick, [of_inputs[j] for j in indirect], stop_at=i))
        self._share(recording, found, of_glue)
        self._pace.one_behind(*(recording.cotangents.get(place, of_glue.get(place)) for place in found))
        return dict(zip(self._layers.names[call.path], of_weights, strict=True))

    def _share(self, recording, found, of_glue):
        """Cotangents of calls stay with their recording; gradients of glue's weights are added up over all."""
        for key, gradient in found.items():
            _add(of_glue if isinstance(key, str) else recording.cotangents, {key: gradient})

    # What is where

    def _find_head(self, keep_bytes, block_rows):
        if self._loss is not None:
            self.notes.append("the loss is the caller's own: logits and the head's gradient are whole")
            return None
        try:
            head = find_head(self.model)
            check_after(head)
        except InputError as error:
            from mlx_lm.tuner.trainer import default_loss

            self._loss = default_loss
            self.notes.append(f"{error}: logits and the head's gradient are whole")
            return None
        path = next(path for path, module in self.model.named_modules() if module is head.module)
        weight = head.module.trainable_parameters().get("weight")
        table = None
        if isinstance(weight, mx.array):
            table = self._table(f"{path}.weight", head.module)
            if table is None:
                self.notes.append(f"{path}.weight is not trained by Ember: its gradient is whole")
        return StreamedHead(head, path, table, self._pace, keep_bytes, block_rows)

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
        return EmberTable(self._updates, path, module, "weight", self._pace) if ember else None

    def _refuse_a_trace(self):
        """Inside a trace MLX keeps the graph of what is evaluated: this would be a plain step, in more memory."""
        if not tree_flatten(self.model.trainable_parameters()):
            raise InputError("StreamedStep: nothing in the model is trainable: unfreeze something")
        derived = self._weights[next(iter(self._weights.places))].reshape(-1)[:1] * 1
        try:
            mx.eval(derived)
            inside = not is_leaf(derived)
        except (RuntimeError, ValueError):
            inside = True
        if inside:
            raise InputError(
                "StreamedStep: it was called inside nn.value_and_grad, mx.grad or mx.compile, where nothing can be "
                "freed: call it by itself; it makes the gradients and the update"
            )


def _direct(call):
    """The inputs that are outputs of earlier calls themselves."""
    return {j: source for j, source in enumerate(call.sources) if source is not None and is_float(call.inputs[j])}


def _at_least_one(name, value):
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"StreamedStep({name}={value!r}): must be a whole number, 1 or more; leave it out for all")
    return value


def _is_the_usual(loss):
    from mlx_lm.tuner.trainer import default_loss

    return loss is None or loss is default_loss


def _some_tokens():
    return mx.arange(1, 7)[None]


def _check_differentiable(model):
    """Builds the gradients' graph on six tokens and computes nothing of it."""
    key = mx.random.state[0]
    try:
        nn.value_and_grad(model, lambda model: model(_some_tokens()).sum())(model)
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"StreamedStep: MLX cannot differentiate {type(model).__module__} ({reason}): no training step works; "
            "freeze the part, or take another model"
        ) from None
    finally:
        put_back_random_state(key)


def _first(result):
    return [result[0] if isinstance(result, tuple) else result]


def _add(total, found):
    for key, array in found.items():
        total[key] = array if key not in total else total[key] + array
