"""The head in blocks of rows and the embedding by looked-up rows, as ember_mlx.streaming has them, as arrays."""

from ember_mlx.planner.architecture import Architecture, Table
from ember_mlx.planner.evaluation import Array
from ember_mlx.planner.graph import FLOAT32, Graph, Run
from ember_mlx.planner.operations import sizes_of_a_layer
from ember_mlx.planner.streamed_phase import Phase
from ember_mlx.planner.update import rounded
from ember_mlx.shared.sizes_in_memory import (
    TARGETS_AT_ONCE,
    blocks_of_a_head,
    bytes_of_kept_logits,
)

__all__ = ["Head", "step_looked_up"]


class Head:
    """The head of one run.

    Args:
        model, run: Shapes, and what of the options matters.
        table: The head.
        trained: Whether it trains: by blocks under Ember, else whole.
        weights: Bytes of all weights.
        on_a_gpu: Whether blocks are few and large.
    """

    def __init__(self, model: Architecture, run: Run, table: Table, trained: bool, weights: float, on_a_gpu: bool):
        self.table, self.trained, self.by_ember = table, trained, run.table_optimizer == "ember"
        self.width = model.width
        self.tokens = n = run.micro_batches * run.batch_size * run.length
        shape = table.rows, table.columns, model.width, n, weights, on_a_gpu
        sizes = blocks_of_a_head(*shape, **sizes_of_a_layer(model, run))
        self.keeps_gradient = run.workers == 1 and sizes.keeps_gradient
        self.keeps = trained and n * table.rows * model.width <= bytes_of_kept_logits(weights, on_a_gpu)
        self.waiting = sizes.waiting
        self.blocks, self.stepped = (
            [min(rows, table.rows - first) for first in range(0, table.rows, rows)]
            for rows in (sizes.stepped if self.keeps else sizes.rows, sizes.stepped)
        )

    def stands(self, graph: Graph) -> list[Array]:
        """What of the loss is there until the head is stepped: the hidden states, then the logits if they are kept."""
        hidden = graph.exist(self.tokens * self.table.columns, self.width, "activations")
        rows = self.blocks if self.keeps else []
        return [hidden, *(graph.exist(self.tokens * words, self.width, "logits") for words in rows)]

    def loss(self, phase: Phase, hidden: Array) -> None:
        """Pass 1: the loss, and its gradient by the hidden states."""
        graph, n, w = phase.graph, self.tokens, self._weight(phase.graph)
        hidden = graph.make([hidden], n * self.table.columns)
        by_hidden, total = graph.make([], hidden.numbers, FLOAT32), graph.make([], n, FLOAT32)
        for words in self.blocks:
            part = graph.some_rows(w, words, self.table.columns)
            raw = graph.product([hidden, part], n * words, self.table.columns, role="logits")
            logits = graph.float32(raw)
            largest = graph.make([logits], n, FLOAT32)
            if graph.width == FLOAT32:
                e = narrow = graph.elementwise([logits, largest], role="logits")
            else:
                e, narrow = graph.several([logits, largest], [(raw.numbers, FLOAT32), (raw.numbers, graph.width)])
            total = graph.make([e, total], n, FLOAT32)
            product = graph.product([narrow, part], hidden.numbers, words)
            by_hidden = graph.elementwise([by_hidden, product, raw])  # which the caller holds
            kept = [raw] if self.keeps else []
            graph.results += kept
            phase.in_turn(by_hidden, total, *kept)
        by_target = self._by_targets(graph, hidden, w)
        by_hidden = graph.elementwise([graph.elementwise([by_hidden, total, by_target])], width=graph.width)
        graph.results += [by_hidden, hidden]
        phase.one_behind(by_hidden)

    def _by_targets(self, graph, hidden, w):
        """The gradient of the targets' logits: some tokens at a time meet the rows of each other's targets."""
        parts = []
        for first in range(0, self.tokens, TARGETS_AT_ONCE):
            n = min(TARGETS_AT_ONCE, self.tokens - first)
            rows, own = graph.make([w], n * self.table.columns), graph.make([], n * n, FLOAT32)
            parts.append(graph.float32(graph.product([rows, own, hidden], rows.numbers, n)))
        return graph.make(parts, hidden.numbers, FLOAT32)

    def step(self, phase: Phase, looked_up: Array | None = None) -> None:
        """Passes 2 and 3 for Ember, or the whole gradient for another optimizer. ``looked_up`` is a tied table's."""
        graph = phase.graph
        hidden, *kept = self.stands(graph)
        w = self._weight(graph)
        if not self.by_ember:
            parts = []
            for i, words in enumerate(self.blocks):
                d = graph.elementwise([self._logits(graph, hidden, kept, w, i, words)], width=FLOAT32)
                d = graph.elementwise([d], width=graph.width)
                parts.append(graph.product([d, hidden], words * self.table.columns, self.tokens, role="gradients"))
                phase.in_turn(parts[-1])
            graph.results += [hidden, *parts]
            return
        columns, gradients = self._statistics(phase, hidden, kept, w)
        several = graph.run.workers > 1
        if looked_up is not None and not several:
            looked_up = graph.elementwise([looked_up, self._rows_gradient(phase, hidden, w, looked_up)])
            phase.one_behind(columns, looked_up)
        written = []
        for i, words in enumerate(self.stepped):
            if gradients:
                gradient, gradients[i] = gradients[i], None
            else:
                gradient = self._gradient(graph, hidden, kept, w, i, words, FLOAT32 if several else graph.width)
            gradient = phase.mean(gradient)
            written.append(new_rows(graph, gradient, graph.some_rows(w, words, self.table.columns)))
            phase.in_turn(written[-1])
            if sum(array.nbytes for array in written) >= self.waiting:
                phase.finish()
                phase.in_turn(graph.make(written, 1))  # into the table, where they wait no longer
                phase.finish()
                written = []
        graph.results += [hidden, *written]

    def _statistics(self, phase, hidden, kept, w):
        graph, n, features = phase.graph, self.tokens, self.table.columns
        wide = graph.float32(hidden)
        quadratic = n <= features // 2 and graph.run.workers == 1
        gram = graph.product([wide], n * n, features, FLOAT32) if quadratic else wide
        columns = graph.make([], n * n if quadratic else features, FLOAT32)
        gradients = []
        for i, words in enumerate(self.stepped if graph.run.workers > 1 or self.keeps_gradient else self.blocks):
            if self.keeps_gradient:
                gradients.append(self._gradient(graph, hidden, kept, w, i, words, graph.width))
                squares = graph.float32(gradients[-1])
                columns = graph.elementwise([columns, graph.make([squares], features, FLOAT32)])
                of_rows = graph.make([squares], words, FLOAT32)
                phase.in_turn(columns, of_rows, gradients[-1])
                continue
            logits = self._logits(graph, hidden, kept, w, i, words)
            d = graph.elementwise([logits], width=FLOAT32, role="logits")
            if quadratic:
                of_rows = graph.elementwise([graph.product([gram, d], d.numbers, n, FLOAT32), d])
                columns = graph.elementwise([columns, graph.product([d], n * n, words, FLOAT32)])
            else:
                of_rows = graph.elementwise([phase.mean(graph.product([d, wide], words * features, n, FLOAT32))])
                columns = graph.elementwise([columns, graph.make([of_rows], features, FLOAT32)])
            of_rows = graph.make([of_rows], words, FLOAT32)
            phase.in_turn(columns, of_rows)
        graph.results += kept
        return graph.make([columns, wide], features, FLOAT32), gradients

    def _gradient(self, graph, hidden, kept, w, i, words, width):
        """That of a block."""
        d = graph.elementwise([self._logits(graph, hidden, kept, w, i, words)], width=width)
        return graph.product([d, hidden], words * self.table.columns, self.tokens, width, role="gradients")

    def _rows_gradient(self, phase, hidden, w, looked_up):
        """The head's gradient in the rows that were looked up, some at a time."""
        graph, parts = phase.graph, []
        ids = looked_up.numbers // self.table.columns
        for first in range(0, ids, TARGETS_AT_ONCE):
            number = min(TARGETS_AT_ONCE, ids - first)
            gathered = graph.make([w], number * self.table.columns)
            logits = graph.product([hidden, gathered], self.tokens * number, self.table.columns, role="logits")
            one_hot = graph.make([graph.make([], self.tokens * number, 1)], self.tokens * number, FLOAT32)
            d = graph.float32(logits)
            # It is not compiled: less the log-sum-exp, its exponent, less the targets, times weights.
            for _ in range(4):
                d = graph.elementwise([d, one_hot], role="logits")
            parts.append(graph.product([d, graph.float32(hidden)], gathered.numbers, self.tokens, FLOAT32))
            phase.in_turn(parts[-1])
        return graph.make(parts, looked_up.numbers, FLOAT32)

    def _logits(self, graph, hidden, kept, w, i, words):
        if kept:
            return kept[i]
        part = graph.some_rows(w, words, self.table.columns)
        return graph.product([hidden, part], self.tokens * words, self.table.columns, role="logits")

    def _weight(self, graph):
        return graph.weight(self.table.name, (self.table.rows, self.table.columns), False, nbytes=self.table.nbytes)


def step_looked_up(phase: Phase, table: Table) -> Array:
    """The embedding's rows and their gradients added up in float32, at most one for each token; stepped if untied."""
    graph, run = phase.graph, phase.graph.run
    numbers = run.micro_batches * graph.tokens * table.columns
    wide = graph.float32(graph.exist(numbers, graph.width, "scratch"))
    rows = graph.make([wide, graph.make([], numbers, FLOAT32)], min(numbers, table.rows * table.columns), FLOAT32)
    phase.one_behind(rows)
    if table.role == "tied":
        return rows
    if run.workers > 1:
        own = graph.make([rows], min(run.workers * numbers, table.rows * table.columns), FLOAT32)
        rows = phase.mean(own)
    w = graph.weight(table.name, (table.rows, table.columns), False)
    squares = graph.elementwise([rows], role="scratch")
    phase.one_behind(graph.make([squares], table.rows, FLOAT32))
    phase.one_behind(new_rows(graph, rows, graph.make([w], rows.numbers)))
    graph.results.append(rows)
    return rows


def new_rows(graph: Graph, gradient: Array, rows: Array) -> Array:
    """Some rows after Ember's step."""
    if graph.run.stochastic_rounding and rows.width < FLOAT32:
        return rounded(graph, rows, gradient, rows.numbers // graph.model.hidden)
    return graph.elementwise([gradient, rows], width=rows.width, role="scratch")
