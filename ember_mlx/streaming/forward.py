"""The forward pass of a step, recorded; and, once a model, what the backward pass will ask of each call."""

from collections.abc import Callable, Container

import mlx.core as mx

from ember_mlx.streaming.call_tree import is_float
from ember_mlx.streaming.glue import Glue
from ember_mlx.streaming.layers import Layers
from ember_mlx.streaming.pacing import Pace
from ember_mlx.streaming.segments import drop_direct
from ember_mlx.streaming.units import Recording, put_back_random_state, record

__all__ = ["Forward", "Plan", "first_of"]

Plan = tuple[dict[int, tuple[int, int]], list[int]]
"""Of one call: its inputs that are outputs of earlier calls, by number, and those that depend on weights by glue."""


class Forward:
    """Records runs of one model.

    Args:
        layers: Its units.
        glue: What lies between them.
        embeddings: Paths of the units whose rows are stepped as they are looked up.
        keep_inputs: Of how many calls one keeps its inputs.
        pace: Evaluates.
        notes: Ways in which the model takes more memory than others; one may be added.
    """

    def __init__(
        self, layers: Layers, glue: Glue, embeddings: Container[str], keep_inputs: int, pace: Pace, notes: list[str]
    ):
        self.plans = {}
        self._layers = layers
        self._glue = glue
        self._embeddings = embeddings
        self._pace = pace
        self._notes = notes
        self._keep_inputs = keep_inputs
        self._needed = None  # outputs, by (call, output), that the glue reads; nothing is dropped before they are known

    def __call__(self, run: Callable[[], object]) -> Recording:
        """Run the model, and make plans for what it calls in a new way."""
        key = mx.random.state[0]
        recording = self._record(run, self._layers.call if self.plans else None)
        if any(self._key(recording, i) not in self.plans for i in range(len(recording.calls))):
            if self.plans:  # called in another way than before: look again
                put_back_random_state(key)
                recording = self._record(run, None)
            self._make_plans(recording)
            put_back_random_state(recording.key_after)
        return recording

    def plan(self, recording: Recording, i: int) -> Plan:
        """That of call ``i``."""
        return self.plans[self._key(recording, i)]

    def drop_inputs(self, recording: Recording, i: int) -> None:
        """Let go of the inputs of call ``i`` that are to be made again."""
        if self._needed is None or i % self._keep_inputs == 0:
            return
        call, plan = recording.calls[i], self.plans.get(self._key(recording, i))
        if plan or call.sources:
            drop_direct(recording, i, plan[0] if plan else _direct(call), self._needed)

    def _record(self, run, call_unit):
        after_call = lambda recording: self.drop_inputs(recording, len(recording.calls) - 1)  # noqa: E731
        return record(run, self._layers.units, self._pace.one_behind, after_call, call_unit)

    def _key(self, recording, i):
        call = recording.calls[i]
        return i, call.path, len(call.inputs)

    def _make_plans(self, recording):
        """Below the lowest call with anything to train, no cotangent is wanted."""
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
        if self._needed is None:
            zeros = mx.zeros_like(first_of(recording.result)[0])
            self._needed = frozenset(self._glue.vjp(recording, first_of, [zeros]))
            if any(indirect[1:]) and self._keep_inputs > 1:
                self._notes.append("arithmetic between the layers reads their outputs: all inputs are kept")
                self._keep_inputs = 1
        for i in range(len(recording.calls)):
            wanted = {j: source for j, source in direct[i].items() if source[0] >= lowest}
            self.plans[self._key(recording, i)] = wanted, indirect[i]


def first_of(result: mx.array | tuple) -> list[mx.array]:
    """What of a run's result is differentiated, in a list: all, or the first of several."""
    return [result[0] if isinstance(result, tuple) else result]


def _direct(call):
    """The inputs that are outputs of earlier calls themselves."""
    return {j: source for j, source in enumerate(call.sources) if source is not None and is_float(call.inputs[j])}
