"""The loss of a step and its gradient, with all logits at once or a slice of the vocabulary at a time."""

from ember_mlx.planner.architecture import Table
from ember_mlx.planner.evaluation import Array
from ember_mlx.planner.graph import FLOAT32, Graph
from ember_mlx.planner.sharding import gathered, own_part
from ember_mlx.shared.sizes_in_memory import CHUNKED_LOGITS, words_of_a_sharded_head

__all__ = ["chunked_loss", "loss"]


def loss(graph: Graph, h: Array, head: Table, w: Array, trained: bool) -> Array:
    """Cross entropy of all logits at once, in their type, and its gradient: softmax minus one-hot."""
    n, numbers = graph.tokens, graph.tokens * head.rows
    graph.role = "logits"
    logits = graph.product([h, w], numbers, head.columns)
    if graph.backend == "cpu":
        logits = graph.elementwise([logits, graph.make([logits], n)])  # less their maximum
        graph.losses.append(graph.make([graph.make([logits], n), graph.make([logits], n)], 1))
        softmax = graph.make([logits], numbers, in_place=True)
        one_hot = graph.make([], numbers)
        d_logits = graph.elementwise([softmax, one_hot])
    else:
        losses = graph.make([logits], n, FLOAT32)
        graph.losses.append(graph.make([losses], 1))
        d_logits = graph.make([logits, losses], numbers, in_place=True)
    graph.role = "scratch"
    if trained:
        graph.add_gradient(head.name, graph.product([d_logits, h], w.numbers, n))
    return graph.product([d_logits, w], h.numbers, head.rows)


def chunked_loss(graph: Graph, h: Array, head: Table, w: Array, trained: bool) -> Array:
    """The same, of a slice of the vocabulary at a time; see ember_mlx.finetune.chunked_loss.

    Of a sharded head, of all workers' tokens and the rows here; see ember_mlx.finetune.vocabulary_parallel.
    """
    sharded, rows = graph.run.is_sharded(head), graph.run.rows_here(head)
    n = graph.tokens * (graph.run.workers if sharded else 1)
    h = gathered(graph, h) if sharded else h
    whole_tiles = max(CHUNKED_LOGITS // n // 128, 1) * 128
    words = min(words_of_a_sharded_head(rows, n, graph.run.chunked_loss) if sharded else whole_tiles, rows)
    slices = [min(words, rows - first) for first in range(0, rows, words)]
    graph.role = "logits"
    hidden, chosen, sums = h, graph.make([], n, FLOAT32), []

    for words in slices:
        logits = graph.product([hidden, graph.some_rows(w, words, head.columns)], n * words, head.columns)
        logits = graph.elementwise([logits], width=FLOAT32)
        sums.append(graph.make([logits], n, FLOAT32))
        place, inside = graph.make([], n), graph.make([], n)  # of the targets
        chosen = graph.elementwise([chosen, graph.make([logits, place], n, FLOAT32), inside])
        hidden = graph.view(hidden, after=[sums[-1], chosen])
        graph.parts.append([sums[-1], chosen])
    log_sum_exp = graph.make([graph.make(sums, n * len(sums), FLOAT32)], n, FLOAT32)
    graph.losses.append(graph.make([graph.elementwise([log_sum_exp, chosen])], 1))
    graph.role = "scratch"
    hidden, d_h, parts = h, graph.make([], h.numbers, FLOAT32), []
    for words in slices:
        part = graph.some_rows(w, words, head.columns)
        logits = graph.product([hidden, part], n * words, head.columns, role="logits")
        d_logits = graph.elementwise([logits, log_sum_exp], role="logits")  # one kernel: float32 inside alone
        d_h = graph.elementwise([d_h, graph.product([d_logits, part], h.numbers, words)])
        if trained:
            parts.append(graph.product([d_logits, hidden], words * head.columns, n, role="gradients"))
        hidden = graph.view(hidden, after=[d_h, *parts[-1:]])
    if trained:
        graph.add_gradient(head.name, graph.make(parts, w.numbers))
    d_h = graph.elementwise([d_h], width=graph.width)
    return own_part(graph, graph.make([d_h], d_h.numbers)) if sharded else d_h
