"""Several workers: what the mean of their gradients takes, in memory and on the network.

A worker of N has its N-th part of a batch's rows. Its gradients go out as ``ember_mlx.finetune.workers`` sends them:
dtype by dtype, small ones joined up to 32 MiB, and of an untied embedding the rows of the whole batch's tokens. A ring
sends 2 (N - 1) / N of that from each worker. What is sent beside it, to meet and to report, is below 1 kB a step.

A streamed step (ember_mlx.streaming.machines) sends a head under Ember twice in float32, and of an embedding the rows
that any worker looked up, and which these are. A pass for the norm sends all once more.
"""

from collections import Counter
from dataclasses import dataclass

from ember_mlx.planner.evaluation import Array, Operation
from ember_mlx.planner.graph import FLOAT32, Graph
from ember_mlx.planner.sharding import around_tables, sharded_tables
from ember_mlx.shared.sizes_in_memory import GRADIENTS_TOGETHER, sent_together

__all__ = ["LINKS", "Traffic", "average", "part_of", "traffic"]

# Bytes a second, one way. 10GbE: what is left of 1.25e9 by TCP. RDMA over Thunderbolt 5: 5 to 6 GB/s were reported in
# mlx-lm's pull request 955. TCP over Thunderbolt 5: a guess.
LINKS = {"10GbE": 1.1e9, "TB": 3e9, "RDMA": 6e9}


@dataclass(frozen=True)
class Traffic:
    """What one worker sends for one update.

    Args:
        workers (int): In all.
        payload (dict[int, int]): Bytes of gradients, by the bytes of a number: 4 are float32, 2 are 16-bit.
        embedding_rows (int): The most rows that an untied embedding sends; 0 where it sends all, or none.
        around_tables (int): Bytes that leave a worker for sharded tables.
    """

    workers: int
    payload: dict[int, int]
    embedding_rows: int
    around_tables: int = 0

    @property
    def sent(self) -> int:
        """Bytes that leave a worker."""
        return 2 * (self.workers - 1) * sum(self.payload.values()) // self.workers + self.around_tables

    def seconds(self, link: str) -> float:
        """How long that takes, where nothing else goes over the link; one of :data:`LINKS`."""
        return self.sent / LINKS[link]


def traffic(graph: Graph) -> Traffic:
    """What the step of that graph sends."""
    if graph.run.stream:
        return _streamed_traffic(graph)
    rows, payload, sharded = _rows_to_send(graph), Counter(), sharded_tables(graph)
    for name, gradient in graph.gradients.items():
        if name in sharded:
            continue
        numbers = rows[name] * graph.shapes[name][1] if name in rows else gradient.numbers
        payload[int(gradient.width)] += int(numbers * gradient.width)
    return Traffic(graph.run.workers, dict(payload), next(iter(rows.values()), 0), around_tables(graph))


def _streamed_traffic(graph):
    run, payload, sent_rows = graph.run, Counter(), 0
    passes = 2 if run.norm_pass else 1
    tables = {table.name: table for table in graph.model.tables(run.tables) if run.table_optimizer == "ember"}
    for name, gradient in graph.gradients.items():
        table = tables.get(name)
        if table is None:
            payload[int(gradient.width)] += int(passes * gradient.nbytes)
        elif table.role == "embedding":
            sent_rows = min(run.workers * run.micro_batches * run.batch_size * run.length, table.rows)
            payload[FLOAT32] += passes * (sent_rows * table.columns + table.rows) * FLOAT32
        else:
            payload[FLOAT32] += (passes + 1) * table.rows * table.columns * FLOAT32
    return Traffic(run.workers, dict(payload), sent_rows)


def average(graph: Graph) -> None:
    """The gradients become the means over all workers: parts of joined buffers, and of an embedding a new array."""
    if graph.run.workers == 1:
        return
    rows, kinds, sharded = _rows_to_send(graph), {}, sharded_tables(graph)
    for name in (name for name in graph.weights if name in graph.gradients and name not in sharded):
        part = graph.gradients[name]
        if name in rows:
            part = graph.make([part], rows[name] * graph.shapes[name][1], part.width, role="gradients")
        kinds.setdefault((part.width, name in rows), {})[name] = part
    groups = [
        {name: kind[name] for name in names}
        for kind in kinds.values()
        for names in sent_together({name: part.nbytes for name, part in kind.items()}, GRADIENTS_TOGETHER)
    ]
    for group in groups:
        parts = list(group.values())
        if len(parts) > 1:
            parts = [graph.make(parts, sum(part.numbers for part in parts), parts[0].width, role="gradients")]
        mean = graph.elementwise(parts, role="gradients")
        for name, part in group.items():
            graph.gradients[name] = part_of(mean, part.numbers)
            if name in rows:
                sent = graph.gradients[name]
                graph.gradients[name] = graph.make([sent], graph.weights[name].numbers, mean.width, role="gradients")


def part_of(array: Array, numbers: float) -> Array:
    """A view of so many numbers of an array."""
    operation = Operation([array], in_place=False)
    operation.outputs = [Array(numbers, array.width, array.role, operation, base=array)]
    return operation.outputs[0]


def _rows_to_send(graph):
    """Of an untied embedding that trains, where an update has fewer tokens than it has rows; see ``train``'s step."""
    run, rows = graph.run, graph.run.workers * graph.run.batch_size * graph.run.length
    if run.micro_batches > 1:
        rows = 1 << (rows * run.micro_batches - 1).bit_length()
    tables = [table for table in graph.model.tables() if table.role == "embedding" and table.role in run.tables]
    if run.workers == 1 or run.shard_tables:
        return {}
    return {table.name: rows for table in tables if rows < table.rows}
