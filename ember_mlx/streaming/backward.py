"""The backward pass: from the loss down to the embedding, one call of a layer at a time, every gradient into a sink."""

from collections.abc import Callable

import mlx.core as mx

from ember_mlx.shared.errors import InputError
from ember_mlx.streaming.embedding import LookedUp
from ember_mlx.streaming.forward import Forward, first_of
from ember_mlx.streaming.glue import Glue
from ember_mlx.streaming.head import StreamedHead
from ember_mlx.streaming.layers import Layers
from ember_mlx.streaming.pacing import Pace
from ember_mlx.streaming.segments import restore_inputs
from ember_mlx.streaming.sinks import GlobalNorm, Stepping
from ember_mlx.streaming.table import EmberTable
from ember_mlx.streaming.units import Recording

__all__ = ["Backward"]


class Backward:
    """The backward passes of one model.

    Args:
        forward: Has recorded what is gone through.
        layers: The units.
        glue: What lies between them.
        head: None where the loss is differentiated as a whole.
        embeddings: The tables whose rows are stepped as they are looked up, by the path of their module.
        pace: Evaluates.
        phase: Is called at the end of each phase.
    """

    def __init__(
        self,
        forward: Forward,
        layers: Layers,
        glue: Glue,
        head: StreamedHead | None,
        embeddings: dict[str, EmberTable],
        pace: Pace,
        phase: Callable[[str], None],
    ):
        self._forward = forward
        self._layers = layers
        self._glue = glue
        self._head = head
        self._embeddings = embeddings
        self._pace = pace
        self._phase = phase

    def __call__(self, recordings: list[Recording], cotangents: list[mx.array], sink: Stepping | GlobalNorm) -> None:
        """Take the recordings back. A sink that steps uses them up.

        Args:
            recordings: One for each micro-batch.
            cotangents: Of what each run gave; emptied.
            sink: What becomes of the gradients.
        """
        head, of_glue = self._head, {}
        looked_up = {path: LookedUp(table.shape[1]) for path, table in self._embeddings.items()}
        if head:
            _add(of_glue, head.gradients_of_others())
            if head.table and head.path not in self._embeddings:
                sink.table(head.table, head, None)
                if not sink.keeps_recordings:
                    head.forget()
            self._phase("head")
        for recording in recordings:
            found = self._glue.vjp(recording, first_of, [cotangents.pop(0)])
            self._share(recording, found, of_glue)
            self._pace.one_behind(*found.values())
            del found
        self._through_the_calls(recordings, sink, of_glue, looked_up)
        self._phase("layers")
        for path, rows in looked_up.items():
            tied = bool(head and head.table and head.path == path)
            sink.table(self._embeddings[path], head if tied else None, rows.rows())
        sink.arrays(of_glue)
        self._phase("embedding")

    def _through_the_calls(self, recordings, sink, of_glue, looked_up):
        paths = [call.path for call in recordings[0].calls]
        if any([call.path for call in recording.calls] != paths for recording in recordings):
            raise InputError("StreamedStep: the model calls its layers in another order in some micro-batches")
        waiting = {}
        for i in reversed(range(len(paths))):
            path = paths[i]
            last = path not in paths[:i]
            for recording in recordings:
                call = recording.calls[i]
                if path in looked_up:
                    cotangent = recording.cotangents.pop((i, 0), None)
                    if cotangent is not None:
                        looked_up[path].add(call.inputs[0], cotangent)
                else:
                    made = sink.bytes_made(self._layers.names[path]) if last and len(recordings) == 1 else 0
                    gradients = self._through_a_call(recording, i, of_glue, made, not sink.keeps_recordings)
                    if gradients is not None:
                        _add(waiting.setdefault(path, {}), gradients)
                        if len(recordings) > 1 or not last:
                            self._pace.one_behind(*waiting[path].values())
                    del gradients
                if not sink.keeps_recordings:
                    call.inputs = call.outputs = None
                else:
                    self._forward.drop_inputs(recording, i)
            if path in waiting and last:
                sink.arrays(waiting.pop(path))

    def _through_a_call(self, recording, i, of_glue, made, forgets):
        """Gradients of the unit's weights by path, lazy, or None; the cotangents go on, evaluated first.

        Where a step follows that makes a few bytes, ``made``, they are evaluated along with it.
        """
        call = recording.calls[i]
        outputs = self._layers.float_outputs(call)
        cotangents = [recording.cotangents.pop((i, j), None) for j in outputs]
        if all(cotangent is None for cotangent in cotangents):
            return None
        if call.dropped:
            restore_inputs(recording, i, self._layers.units, self._pace.one_behind)
        for place, j in enumerate(outputs):
            given, output = cotangents[place], call.outputs[j]
            cotangents[place] = mx.zeros_like(output) if given is None else given.astype(output.dtype)
        direct, indirect = self._forward.plan(recording, i)
        wanted = [*direct, *indirect]
        of_weights, of_inputs = self._layers.vjp(call, wanted, cotangents)
        if forgets:
            call.outputs = None  # they are the inputs of the call above, whose gradients are there
        of_inputs = dict(zip(wanted, of_inputs, strict=True))
        found = {}
        for j, source in direct.items():
            _add(found, {source: of_inputs[j]})
        if indirect:
            pick = lambda leaves: [leaves[j] for j in indirect]  # noqa: E731
            _add(found, self._glue.vjp(recording, pick, [of_inputs[j] for j in indirect], stop_at=i))
        self._share(recording, found, of_glue)
        arrays = [recording.cotangents.get(place, of_glue.get(place)) for place in found]
        if self._pace.takes_together(made):
            self._pace(*arrays)
        else:
            self._pace.one_behind(*arrays)
        return dict(zip(self._layers.names[call.path], of_weights, strict=True))

    def _share(self, recording, found, of_glue):
        """Cotangents of calls stay with their recording; gradients of glue's weights are added up over all."""
        for key, gradient in found.items():
            _add(of_glue if isinstance(key, str) else recording.cotangents, {key: gradient})


def _add(total, found):
    for key, array in found.items():
        total[key] = array if key not in total else total[key] + array
