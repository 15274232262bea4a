"""A table whose rows lie on several workers: which are here, and what all of them exchange.

The twin of ``RowShards`` in ``cuda_ref/sharding.py``. Worker r of N has the rows from r V / N to before (r + 1) V / N,
rounded down: their numbers differ by one at most.
"""

from dataclasses import dataclass

import mlx.core as mx

__all__ = ["RowShards", "fault_of_sum_scatter", "places_among"]


def fault_of_sum_scatter(size: int) -> RuntimeError | None:
    """What MLX's backend says where it has no ``sum_scatter``, as the ring; all ``size`` workers try it together."""
    try:
        mx.eval(mx.distributed.sum_scatter(mx.zeros(size)))
    except RuntimeError as error:
        return error
    return None


def places_among(ids: mx.array, first_row: int, rows: int) -> tuple[mx.array, mx.array]:
    """Where the ids of a table stand among ``rows`` of its rows from ``first_row`` on, and whether they do.

    Those that do not are spread over the rows: where all of them add their zeros to one, a GPU takes them one by one.
    """
    place = ids - first_row
    return place % rows, (place >= 0) & (place < rows)


@dataclass(frozen=True)
class RowShards:
    """This worker's rows of a table of ``total_rows``.

    Every method that exchanges is called by all workers at the same point; it sends when its result is evaluated.

    Args:
        rank, size (int): This worker, and how many there are, at most ``total_rows``.
        total_rows (int): V, of all workers.
        scatters (bool): Whether the backend has ``sum_scatter``, see :meth:`of`. NCCL and JACCL have; MLX's ring has
            not, and sends twice the bytes for it.
    """

    rank: int
    size: int
    total_rows: int
    scatters: bool = False

    @classmethod
    def of(cls, rank: int, size: int, total_rows: int) -> "RowShards":
        """The rows of this worker. All workers call it together: it tries what the backend can do."""
        return cls(rank, size, total_rows, scatters=fault_of_sum_scatter(size) is None)

    def first_row_of(self, rank: int) -> int:
        """The first row of a worker; of ``size``, that is V."""
        return rank * self.total_rows // self.size

    @property
    def first_row(self) -> int:
        """The first row here."""
        return self.first_row_of(self.rank)

    @property
    def rows(self) -> int:
        """How many are here."""
        return self.first_row_of(self.rank + 1) - self.first_row

    @property
    def most_rows(self) -> int:
        """The most that any worker has."""
        return -(-self.total_rows // self.size)

    def own_rows(self, whole: mx.array) -> mx.array:
        """The rows here of an array (V, ...), as an array of its own that does not keep the others alive."""
        return mx.contiguous(whole[self.first_row : self.first_row + self.rows])

    def gather(self, own: mx.array) -> mx.array:
        """The arrays (B, ...) of all workers, of one shape, by rank: (N * B, ...)."""
        return mx.distributed.all_gather(own)

    def own_part(self, every: mx.array) -> mx.array:
        """This worker's part (B, ...) of what :meth:`gather` gives."""
        batch = every.shape[0] // self.size
        return every[self.rank * batch : (self.rank + 1) * batch]

    def sum_scatter(self, every: mx.array) -> mx.array:
        """This worker's part (B, ...) of the sum over the workers of arrays (N * B, ...)."""
        if self.scatters:
            return mx.distributed.sum_scatter(every)
        return mx.contiguous(self.own_part(mx.distributed.all_sum(every)))  # which lets go of the whole

    def mean_over_all_rows(self, column_mean: mx.array) -> mx.array:
        """The mean over the rows of all workers, from those of each worker, (D,): one all-reduce of D float32."""
        return mx.distributed.all_sum(column_mean * (self.rows / self.total_rows))
