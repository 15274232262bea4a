"""One phase of a streamed step (ember_mlx.streaming): its graph, and what is evaluated and waited for together."""

from collections import Counter

from ember_mlx.planner.architecture import Architecture
from ember_mlx.planner.evaluation import DEVICES, Array, Peak, peak_memory
from ember_mlx.planner.graph import Graph, Run
from ember_mlx.planner.network import part_of
from ember_mlx.planner.update import stepped
from ember_mlx.shared.sizes_in_memory import bytes_ahead

__all__ = ["Phase"]


class Phase:
    """A part of a step: its graph, and the order of evaluation.

    Args:
        model, run, backend: As for the graph.
        always (Counter): Bytes by role that stand in every phase; what the graph has of them is not added.
    """

    def __init__(self, model: Architecture, run: Run, backend: str, always: Counter):
        self.graph = Graph(model, run, backend)
        self.input = self.graph.tokens * model.hidden  # numbers of one
        self.inputs = 0  # kept ones that the graph has not taken
        self._always = always
        ahead = bytes_ahead(always["weights"], always["optimizer state"])
        self._ahead, self._together = 0 if backend == "cpu" else ahead, ahead // 2  # the other: gradients on the wire
        self._done = self._before = 0  # numbers of evaluations
        self._unfinished = []

    def take_input(self) -> Array:
        """One of the kept inputs, to be read."""
        self.inputs -= 1
        return self.graph.exist(self.input, self.graph.width, "activations")

    def one_behind(self, *arrays: Array) -> None:
        """Evaluate these; wait for those before them."""
        self.graph.evaluate(list(arrays), self._done)
        self._done = len(self.graph.evaluations) if not self._ahead else max(self._done, self._before)
        self._before = len(self.graph.evaluations)

    def in_turn(self, *arrays: Array) -> None:
        """Wait for those before; evaluate these."""
        self._done = max(self._done, self._before)
        self.one_behind(*arrays)

    def finish(self) -> None:
        """Wait for all."""
        self._done = len(self.graph.evaluations)
        self._unfinished.clear()

    def step(self, names: list[str], tables: bool = False) -> None:
        """Step these weights, whose gradients are taken from the graph, in this order, a few bytes ahead."""
        if self.graph.run.workers > 1:
            for some in self._buckets(names):
                self._average(some)
                self._step(some, tables)
        else:
            self._step(names, tables)
        self.graph.gradients.clear()

    def mean(self, gradient: Array) -> Array:
        """The mean over all workers of what is evaluated first, as the sum is."""
        if self.graph.run.workers == 1:
            return gradient
        self.one_behind(gradient)
        total = self.graph.make([gradient], gradient.numbers, gradient.width, role="gradients")
        self.one_behind(total)
        return total

    def _buckets(self, names):
        some, nbytes = [], 0
        for name in names:
            more = self.graph.gradients[name].nbytes
            if some and nbytes + more > self._together:
                yield some
                some, nbytes = [], 0
            some.append(name)
            nbytes += more
        if some:
            yield some

    def _average(self, names):
        parts = [self.graph.gradients[name] for name in names]
        if len(parts) > 1:
            parts = [self.graph.make(parts, sum(part.numbers for part in parts), parts[0].width, role="gradients")]
        mean = self.mean(parts[0])
        for name in names:
            self.graph.gradients[name] = part_of(mean, self.graph.gradients[name].numbers)

    def _step(self, names, tables):
        graph, group = self.graph, []
        before, graph.role = graph.role, "scratch"
        for name in names:
            first = len(graph.existing)
            new, state = stepped(graph, name, tables)
            kept = graph.existing[first:]
            if getattr(graph.run, "table_optimizer" if tables else "optimizer") in ("adam", "adamw"):
                # Where a gradient is not finite the old moments stay, so they are read once the new ones are made.
                state = [graph.elementwise([m, old], role=old.role) for m, old in zip(state, kept, strict=True)]
            graph.results += [new, *state]
            group += [new, *state]
            if sum(array.nbytes for array in group) >= self._ahead // 2:
                self._start(group)
                group = []
        self._start(group)
        graph.role = before

    def peak(self) -> Peak:
        """The worst moment."""
        graph = self.graph
        graph.exist(self.inputs * self.input, graph.width, "activations")
        here = Counter()
        for array in graph.existing:
            here[array.role] += array.nbytes
        for role, nbytes in self._always.items():
            graph.exist(nbytes - here[role], 1, role)
        held = [weight for name, weight in graph.weights.items() if name not in graph.shapes]
        return peak_memory(graph.results + held, graph.existing, DEVICES[graph.backend], graph.evaluations, graph.waits)

    def _start(self, group):
        nbytes = sum(array.nbytes for array in group)
        while self._unfinished and sum(size for _, size in self._unfinished) + nbytes > self._ahead:
            self._done = max(self._done, self._unfinished.pop(0)[0])
        self.graph.evaluate(group, self._done)
        self._unfinished.append((len(self.graph.evaluations), nbytes))
        if not self._ahead:
            self.finish()
