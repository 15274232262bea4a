"""The head and the loss in blocks of rows: neither the logits nor the gradient of the head is ever there as a whole.

Three passes. The first takes the log-sum-exp and, rescaled along with it, the gradient by the hidden states. The second
takes the means of squares of the head's gradient, which is all that Ember asks of it. The third makes the gradient
block by block and steps the rows. What is kept between them are the logits, or nothing where they are too many.

The gradient is G = d' H with d (N, V) by the logits and H (N, D). So the mean square of row i is d_i' K d_i with
K = H H' / D, and that of column j is h_j' P h_j with P = d d' / V: below N = D / 2 that is cheaper than G, and more
accurate in 16 bits.
"""

import mlx.core as mx
from mlx.utils import tree_flatten

from ember_mlx.shared.sizes_in_memory import TARGETS_AT_ONCE, rows_of_a_block
from ember_mlx.streaming.head_module import Head
from ember_mlx.streaming.pacing import Pace
from ember_mlx.streaming.table import EmberTable

__all__ = ["StreamedHead"]


class StreamedHead:
    """The head of a model, for one step after another.

    Args:
        head (Head): Its module, and what comes after it.
        path (str): Of that module.
        table (EmberTable, optional): Its weight, where Ember trains it.
        pace (Pace): Evaluates.
        keep_bytes (int): The logits' gradient is kept between the passes up to this size.
        block_rows (int, optional): Of a block.
    """

    def __init__(
        self,
        head: Head,
        path: str,
        table: EmberTable | None,
        pace: Pace,
        keep_bytes: int,
        block_rows: int | None = None,
    ):
        self.head = head
        self.path = path
        self.table = table
        self._pace = pace
        self._keep_bytes = keep_bytes
        self._block_rows = block_rows
        self._on_a_gpu = pace.ahead > 0
        self._names = [name for name, _ in tree_flatten(head.module.parameters())]
        trained = [name for name, _ in tree_flatten(head.module.trainable_parameters())]
        self.others = [name for name in trained if table is None or f"{path}.{name}" != table.path]
        self._forward = mx.compile(self._forward_of)
        self._quadratic = mx.compile(self._quadratic_of)
        self._squares = mx.compile(self._squares_of)
        self._gradient = mx.compile(self._gradient_of)
        self._of_others = mx.compile(self._others_of)

    def loss(self, hidden: mx.array, targets: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        """Pass 1: the loss, float32, and its gradient by the hidden states.

        Args:
            hidden (array): (N, D).
            targets (array): (N,) token ids.
            weights (array): (N,) float32, what the cross entropy of each token counts.
        """
        n = targets.size
        self._hidden, self._targets, self._weights = hidden, targets, weights
        rows = self._block_rows or rows_of_a_block(self.head.vocabulary, n, self._on_a_gpu)
        self.blocks = [slice(i, min(i + rows, self.head.vocabulary)) for i in range(0, self.head.vocabulary, rows)]
        keeps = bool(self.table or self.others) and n * self.head.vocabulary * hidden.itemsize <= self._keep_bytes
        self._kept = []
        largest, total, by_hidden = mx.full((n,), -1e30), mx.zeros((n,)), mx.zeros(hidden.shape)
        for block in self.blocks:
            largest, total, by_hidden, logits = self._forward(hidden, self._rows(block), largest, total, by_hidden)
            if keeps:
                self._kept.append(logits)
            self._pace.in_turn(by_hidden, largest, total, *self._kept[-1:])
        self._log_sum_exp = largest + mx.log(total)
        chosen, by_target = self._at_targets()
        loss = (weights * (self._log_sum_exp - chosen)).sum()
        by_hidden = (weights[:, None] * (by_hidden / total[:, None] - by_target)).astype(hidden.dtype)
        mx.async_eval(loss, by_hidden, self._log_sum_exp)
        return loss, by_hidden

    def scale(self, factor: mx.array) -> None:
        """Of the gradient that is still to be made."""
        self._weights = self._weights * factor

    def statistics(self, looked_up: tuple[mx.array, mx.array] | None = None) -> tuple[mx.array, mx.array]:
        """Pass 2: means of squares of the table's gradient, over columns (V,) and rows (D,), float32.

        Args:
            looked_up (tuple, optional): For a tied table, ids (U,) and their embeddings' gradient, (U, D) float32.
        """
        hidden, vocabulary = self._hidden.astype(mx.float32), self.head.vocabulary
        n, features = hidden.shape
        quadratic = n <= features // 2
        gram = hidden @ hidden.T / features if quadratic else None
        row_means, columns = [], 0
        for number, block in enumerate(self.blocks):
            arguments = self._logits(number), self._log_sum_exp, self._targets - block.start, self._weights
            of_rows, part = self._quadratic(*arguments, gram) if quadratic else self._squares(*arguments, hidden)
            row_means.append(of_rows)
            columns = columns + part
            self._pace.in_turn(columns, of_rows)
        row_mean = mx.concatenate(row_means)
        column_sum = ((columns @ hidden) * hidden).sum(0) if quadratic else columns
        if looked_up is not None:
            ids, added = looked_up
            of_head = self.rows_gradient(ids)
            row_mean[ids] = mx.square(of_head + added).mean(1)
            column_sum = column_sum + (added * (2 * of_head + added)).sum(0)
        return row_mean, column_sum / vocabulary

    def rows_gradient(self, ids: mx.array) -> mx.array:
        """The head's gradient in a few rows, (U, D) float32."""
        logits = self._raw(self._hidden, self._rows(ids))
        tokens = mx.where(self._targets[:, None] == ids, mx.arange(ids.size), 0).sum(1)
        tokens = mx.where((self._targets[:, None] == ids).any(1), tokens, -1)
        return self._by_logits(logits, self._log_sum_exp, tokens, self._weights).T @ self._hidden.astype(mx.float32)

    def step(self, looked_up: tuple[mx.array, mx.array] | None = None) -> None:
        """Pass 3: the table's rows, whose second moments have been stepped. The logits are let go of on the way."""
        if looked_up is not None:
            ids, added = looked_up
            gradient = self.rows_gradient(ids) + added
            of_ids = self.table.new_rows(ids, self.table.weight[ids], gradient)
            mx.eval(of_ids)
            del gradient, added
        let_go = 0 if self._kept else self._pace.ahead  # to make logits again takes more than rows that wait
        for number, block in enumerate(self.blocks):
            logits = self._logits(number)
            if self._kept:
                self._kept[number] = None
                let_go += logits.nbytes
            gradient = self._gradient(
                logits, self._log_sum_exp, self._targets - block.start, self._weights, self._hidden
            )
            new = self.table.new_rows(block, self.table.weight[block], gradient)
            del gradient, logits
            self.table.write(block, new, let_go)
            del new
        if looked_up is not None:
            self.table.write(ids, of_ids)
        self.table.flush()

    def block_gradient(self, number: int) -> mx.array:
        """The head's gradient in one of ``blocks``, (n, D) float32."""
        hidden = self._hidden.astype(mx.float32)
        return self._gradient(
            self._logits(number), self._log_sum_exp, self._targets - self.blocks[number].start, self._weights, hidden
        )

    def gradients_of_others(self) -> dict[str, mx.array]:
        """Of the head's other trainable weights (a bias, an adapter, a table that Ember does not train), by name."""
        if not self.others:
            return {}
        parameters = dict(tree_flatten(self.head.module.parameters()))
        parts = []
        for number, block in enumerate(self.blocks):
            arguments = self._logits(number), self._log_sum_exp, self._targets - block.start, self._weights
            parts.append(self._of_others(*arguments, self._hidden, self._rows(block)))
            self._pace.one_behind(*parts[-1])
        joined = zip(self.others, zip(*parts, strict=True), strict=True)
        return {f"{self.path}.{name}": self.head.joined(parameters[name], blocks) for name, blocks in joined}

    def forget(self) -> None:
        """Let go of what belongs to this step."""
        self._hidden = self._kept = self._log_sum_exp = self._weights = self._targets = None

    def _rows(self, rows):
        """The head's parameters, by name, of a slice or of some ids."""
        parameters = dict(tree_flatten(self.head.module.parameters()))
        index = {0: rows, -1: (..., rows), None: ...}
        return {name: array[index[self.head.axis(array)]] for name, array in parameters.items()}

    def _logits(self, number):
        """Of a block, before what comes after the head: kept or made again."""
        return self._kept[number] if self._kept else self._raw(self._hidden, self._rows(self.blocks[number]))

    def _raw(self, hidden, parameters):
        return self.head.raw_logits(hidden[None], parameters).squeeze(0)

    def _after(self, logits):
        return (logits if self.head.is_last else self.head.after(logits[None]).squeeze(0)).astype(mx.float32)

    def _forward_of(self, hidden, parameters, largest, total, by_hidden):
        raw = self._raw(hidden, parameters)
        logits = self._after(raw)
        # Of 16-bit logits the largest is the same, and a copy of them all in float32 is never there.
        now = mx.maximum(largest, (raw if self.head.is_last else logits).max(-1))
        shrink = mx.exp(largest - now)
        e = mx.exp(logits - now[:, None])
        _, (part,) = mx.vjp(lambda h: [self._after(self._raw(h, parameters))], [hidden], [e])
        total = total * shrink + e.sum(-1)
        return now, total, by_hidden * shrink[:, None] + part.astype(mx.float32), raw

    def _at_targets(self):
        """The logits of the targets, (N,), and their gradients by the hidden states, (N, D) float32."""
        logits, gradients = [], []
        for first in range(0, self._targets.size, TARGETS_AT_ONCE):
            some = slice(first, first + TARGETS_AT_ONCE)
            hidden, parameters = self._hidden[some], self._rows(self._targets[some])
            own = mx.eye(hidden.shape[0])
            function = lambda h, parameters=parameters: [self._after(self._raw(h, parameters))]  # noqa: E731
            (all_pairs,), (gradient,) = mx.vjp(function, [hidden], [own])
            logits.append((all_pairs * own).sum(-1))
            gradients.append(gradient.astype(mx.float32))
        return mx.concatenate(logits), mx.concatenate(gradients)

    def _by_logits(self, raw, log_sum_exp, places, weights):
        """The loss's gradient by a block of logits, (N, n) float32; ``places`` says where the targets are in it."""
        logits = self._after(raw)
        one_hot = places[:, None] == mx.arange(raw.shape[1])
        d = weights[:, None] * (mx.exp(logits - log_sum_exp[:, None]) - one_hot)
        if self.head.is_last:
            return d
        return mx.vjp(lambda z: [self._after(z)], [raw], [d])[1][0].astype(mx.float32)

    def _quadratic_of(self, raw, log_sum_exp, places, weights, gram):
        d = self._by_logits(raw, log_sum_exp, places, weights)
        return ((gram @ d) * d).sum(0), d @ d.T

    def _squares_of(self, raw, log_sum_exp, places, weights, hidden):
        squares = mx.square(self._by_logits(raw, log_sum_exp, places, weights).T @ hidden)
        return squares.mean(1), squares.sum(0)

    def _gradient_of(self, raw, log_sum_exp, places, weights, hidden):
        return self._by_logits(raw, log_sum_exp, places, weights).astype(hidden.dtype).T @ hidden

    def _others_of(self, raw, log_sum_exp, places, weights, hidden, parameters):
        d = self._by_logits(raw, log_sum_exp, places, weights)

        def function(*others):
            return [self._raw(hidden, parameters | dict(zip(self.others, others, strict=True)))]

        return list(mx.vjp(function, [parameters[name] for name in self.others], [d.astype(raw.dtype)])[1])
