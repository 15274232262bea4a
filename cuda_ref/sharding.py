"""Tables whose rows lie on several ranks: what this rank holds, and the one sum that all of them need."""

from dataclasses import dataclass

import torch.distributed as dist

__all__ = ["RowShards"]


@dataclass(frozen=True)
class RowShards:
    """How the rows of one table lie on the ranks of ``group``: ``rows`` here, ``total_rows`` on all of them."""

    group: dist.ProcessGroup
    rows: int
    total_rows: int

    def mean_over_all_rows(self, column_mean):
        """The mean over the rows of all ranks, from those of each rank: one all-reduce of D float32 numbers."""
        column_sum = column_mean * self.rows if self.rows else column_mean.zero_()
        dist.all_reduce(column_sum, group=self.group)
        return column_sum / self.total_rows
