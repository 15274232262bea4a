"""The memory of a streamed step (ember_mlx.streaming), phase by phase: forward, loss, head, layers, embedding.

Each phase is a graph of its own beside what stands between phases: weights, state, kept inputs, and kept logits. A few
layers stand for all: those nearest to the loss, where every kept input is still there. What is evaluated together, and
what is waited for, is as in ember_mlx.streaming.
"""

from collections import Counter
from dataclasses import replace

from ember_mlx.finetune.optimizer_names import SPLIT
from ember_mlx.planner.architecture import Architecture
from ember_mlx.planner.evaluation import Peak
from ember_mlx.planner.graph import Graph, Run
from ember_mlx.planner.modules import norm
from ember_mlx.planner.step import layer
from ember_mlx.planner.streamed_phase import Phase
from ember_mlx.planner.streamed_tables import Head, step_looked_up

__all__ = ["streamed_phases", "streamed_runs"]

LAYERS = 3  # so many are in flight at most; where adapters train, whose updates are few bytes, there may be more


def streamed_phases(model: Architecture, run: Run, backend: str, step: Graph) -> dict[str, Peak]:
    """The worst moment of each phase of a streamed step, by its name.

    Args:
        model: Its shapes.
        run: What of the options matters.
        backend: "metal", "cuda" or "cpu".
        step: The ordinary step of the same run: what its weights and state are.
    """
    return _Planned(model, run, backend, step).phases()


def streamed_runs(model: Architecture, run: Run) -> list[tuple[str, Run]]:
    """The runs that stream where this one does not, by the flag that each has more than the one before.

    None of what ``train --stream`` would refuse, or would do with the logits and the head's gradient as a whole.
    """
    if run.shard_tables:
        return []
    runs = [("", run)]
    if not run.stream:
        # Only the flash optimizers split weights one array at a time.
        if model.whole_head or (run.optimizer.endswith(SPLIT) and not run.optimizer.startswith("flash")):
            return []
        runs.append(("--stream", replace(run, stream=True)))
    keep = _best_keep_inputs(model.layers)
    if run.keep_inputs == 1 and keep > 1:
        runs.append((f"--keep-inputs {keep}", replace(runs[-1][1], keep_inputs=keep)))
    return runs[1:]


def _best_keep_inputs(layers: int) -> int:
    """The K of ``--keep-inputs`` with which the fewest inputs are there at once: every K-th, and K - 1 made again."""
    return min(range(1, layers + 1), key=lambda k: _inputs(layers + 1, k), default=1)


def _inputs(calls, keep):
    """Inputs and the last output that are there at most, of so many calls."""
    kept = (calls - 1) // keep + 1
    return kept + max((calls - 1) % keep, keep - 3)


class _Planned:
    def __init__(self, model, run, backend, step):
        self.model, self.run, self.backend = model, run, backend
        self.embedding, self.head = model.ends(run.tables)
        self.always = Counter()
        for array in step.existing:
            if array.role in ("weights", "optimizer state"):
                self.always[array.role] += array.nbytes
        by_ember = run.table_optimizer == "ember"
        trained = [table.name for table in model.tables() if table.name in step.gradients]
        self.looked_up = by_ember and self.embedding.name in trained
        self.whole = [] if by_ember else trained
        head_trained = self.head.name in trained
        self.of_head = Head(model, run, self.head, head_trained, self.always["weights"], on_a_gpu=backend != "cpu")
        self.tied_by_ember = self.head.role == "tied" and by_ember
        self.lowest = 0 if self.embedding.name in trained else max(model.layers - run.layers, 0)
        self.norm_trained = run.fine_tune_type == "full" and bool(run.tables)

    def phases(self):
        found = {
            "forward": self._forward(),
            "loss": self._loss(),
            "head": self._head(),
            "layers": self._layers(),
            "embedding": self._embedding(),
        }
        return {name: peak for name, peak in found.items() if peak}

    def _begin(self, *, inputs=True, head_gradient=False, logits=False):
        """A phase, with what stands when it begins."""
        phase = Phase(self.model, self.run, self.backend, self.always)
        calls = self.model.layers + self.looked_up
        number = _inputs(calls, self.run.keep_inputs) + (not self.looked_up)
        phase.inputs = number * self.run.micro_batches if inputs else 0
        if head_gradient:
            phase.graph.exist(self.head.rows * self.head.columns, self.model.width, "gradients")
        if logits:
            self.of_head.stands(phase.graph)
        return phase

    def _forward(self):
        phase = self._begin()
        x = phase.take_input()
        for i in range(max(self.model.layers - LAYERS, 0), self.model.layers):
            x, _ = layer(phase.graph, x, i)
            phase.inputs -= 1
            phase.one_behind(x)
            phase.graph.results.append(x)
        return phase.peak()

    def _loss(self):
        phase = self._begin()
        self.of_head.loss(phase, norm(phase.graph, phase.take_input(), "model.norm", self.model.hidden, False)[0])
        return phase.peak()

    def _head(self):
        if not self.of_head.trained or self.tied_by_ember:
            return None
        phase = self._begin()
        phase.graph.exist(self.run.micro_batches * phase.input, phase.graph.width, "scratch")  # what goes to the layers
        self.of_head.step(phase)
        return phase.peak()

    def _layers(self):
        phase = self._begin(head_gradient=self.head.name in self.whole, logits=self.tied_by_ember)
        graph, model = phase.graph, self.model
        others = self.run.micro_batches - 1
        graph.exist(others * phase.input, graph.width, "scratch")  # their cotangents
        _, back = norm(graph, phase.take_input(), "model.norm", model.hidden, self.norm_trained)
        d = back(graph.exist(phase.input, graph.width, "scratch"))
        graph.gradients.clear()
        phase.one_behind(d)
        layers = LAYERS if self.run.fine_tune_type == "full" else model.layers
        for i in reversed(range(max(self.lowest, model.layers - layers), model.layers)):
            for _ in range(min(self.run.micro_batches, 2)):
                _, back = layer(graph, phase.take_input(), i)
                below = back(d, i > self.lowest or self.embedding.name in self.whole or self.looked_up)
                if below is not None:  # else nothing trains there
                    d = below
                    phase.one_behind(d)
                if others:
                    phase.one_behind(*graph.gradients.values())
            phase.step(sorted(reversed(graph.gradients), key=_place_in_layer, reverse=True))
        if self.embedding.name in self.whole and self.head is not self.embedding:
            numbers = self.embedding.rows * self.embedding.columns
            gradient = graph.make([graph.make([], numbers), d], numbers, in_place=True, role="gradients")
            phase.one_behind(gradient)
            graph.results.append(gradient)
        return phase.peak()

    def _embedding(self):
        if not (self.looked_up or self.whole):
            return None
        phase = self._begin(inputs=False, logits=self.tied_by_ember)
        graph = phase.graph
        if self.looked_up:
            rows = step_looked_up(phase, self.embedding)
            if self.tied_by_ember:
                self.of_head.step(phase, rows)
        for name in self.whole:
            table = self.head if name == self.head.name else self.embedding
            graph.weight(name, (table.rows, table.columns), True)
            graph.add_gradient(name, graph.exist(table.rows * table.columns, graph.width, "gradients"))
        graph.role = "scratch"
        phase.step(list(reversed(graph.gradients)), tables=True)
        return phase.peak()


def _place_in_layer(name):
    """Of a weight among those of its layer, as MLX lists them; those of one module keep their order."""
    return next((i for i, part in enumerate(("self_attn", "mlp")) if f".{part}." in name), 2)
