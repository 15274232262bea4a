"""``--shard-tables``: what sharded tables send, and what of all workers one has at a time.

They send no gradients, but what goes into them and comes out, as ``ember_mlx.finetune.vocabulary_parallel`` has it. In
a ring a worker sends what it has to N - 1 others, and twice that for its part of a sum.
"""

from ember_mlx.planner.architecture import Table
from ember_mlx.planner.evaluation import Array
from ember_mlx.planner.graph import FLOAT32, Graph

__all__ = ["around_tables", "gathered", "own_part", "sharded_tables"]


def around_tables(graph: Graph) -> int:
    """Bytes that leave a worker in all batches of an update, and in the update."""
    run, tables = graph.run, sharded_tables(graph).values()
    others, tokens, hidden = run.workers - 1, graph.tokens, graph.tokens * graph.model.hidden * graph.width
    a_batch = an_update = 0
    for table in tables:
        if table.role != "head":  # token ids; rows; their gradients
            a_batch += others * (4 * tokens + (2 + 1) * hidden)
        if table.role != "embedding":  # targets and the loss's gradient; log-sum-exps and logits; hidden, its gradient
            a_batch += others * (8 * tokens + 8 * tokens * run.workers + (1 + 2) * hidden)
        if run.table_optimizer == "ember":  # the columns' means
            an_update += 2 * others * FLOAT32 * table.columns // run.workers
    return int(a_batch) * run.micro_batches + an_update


def gathered(graph: Graph, own: Array) -> Array:
    """What all workers have of it."""
    return graph.make([own], own.numbers * graph.run.workers, own.width)


def own_part(graph: Graph, every: Array) -> Array:
    """A worker's part of what is of all workers."""
    return graph.make([every], every.numbers // graph.run.workers, every.width)


def sharded_tables(graph: Graph) -> dict[str, Table]:
    """Those whose rows the workers share, by name."""
    return {table.name: table for table in graph.model.tables(graph.run.tables) if graph.run.is_sharded(table)}
