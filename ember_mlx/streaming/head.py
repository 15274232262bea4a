"""The head and the loss in blocks of rows: neither the logits nor the gradient of the head is ever there as a whole.

Three passes. The first takes the log-sum-exp and, rescaled along with it, the gradient by the hidden states. The second
takes the means of squares of the head's gradient, which is all that Ember asks of it. The third makes the gradient
block by block and steps the rows. What is kept between them are the logits, or nothing where they are too many. In long
batches a layer takes more than the head's gradient: there it is kept from the second pass to the third. What a block
needs is one compiled function in each pass: a GPU waits for the host, which hands it one block after another.

The gradient is G = d' H with d (N, V) by the logits and H (N, D). So the mean square of row i is d_i' K d_i with
K = H H' / D, and that of column j is h_j' P h_j with P = d d' / V: below N = D / 2 that is cheaper than G, and more
accurate in 16 bits.
"""

from functools import partial

import mlx.core as mx
from mlx.utils import tree_flatten

from ember_mlx.shared.sizes_in_memory import (
    TARGETS_AT_ONCE,
    blocks_of_a_head,
    bytes_of_kept_logits,
)
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
        nbytes (int): Of all weights of the model.
        keep_logits (bool, optional): Whether the logits are kept between the passes. Default: by their size.
        block_rows (int, optional): Of a block.
        outputs_of_a_layer (int): As :func:`~ember_mlx.streaming.units.outputs_of_a_layer` gives it.

    Attributes:
        blocks (list[slice]): Of a step, the rows that are stepped together; the same on all machines.
    """

    def __init__(
        self,
        head: Head,
        path: str,
        table: EmberTable | None,
        pace: Pace,
        nbytes: int,
        keep_logits: bool | None,
        block_rows: int | None,
        outputs_of_a_layer: int,
    ):
        self.head = head
        self.path = path
        self.table = table
        self._pace = pace
        self._nbytes = nbytes
        self._keep_logits = keep_logits
        self._block_rows = block_rows
        self._outputs_of_a_layer = outputs_of_a_layer
        trained = [name for name, _ in tree_flatten(head.module.trainable_parameters())]
        self.others = [name for name in trained if table is None or f"{path}.{name}" != table.path]
        self._forward = mx.compile(self._forward_of)
        self._quadratic = mx.compile(self._quadratic_of)
        self._squares = mx.compile(self._squares_of)
        self._gradient = mx.compile(partial(self._gradient_of, mx.float32))
        self._kept_gradient = mx.compile(self._kept_gradient_of)
        self._new_rows = mx.compile(self._new_rows_of)
        self._of_others = mx.compile(self._others_of)
        self._of_targets = mx.compile(self._targets_of)

    def loss(self, hidden: mx.array, targets: mx.array, weights: mx.array, at_once: int) -> tuple[mx.array, mx.array]:
        """Pass 1: the loss, float32, and its gradient by the hidden states.

        Args:
            hidden (array): (N, D).
            targets (array): (N,) token ids.
            weights (array): (N,) float32, what the cross entropy of each token counts.
            at_once (int): Tokens of the largest micro-batch.
        """
        n = targets.size
        self._hidden, self._targets, self._weights = hidden, targets, weights
        self._ids = mx.arange(self.head.vocabulary)
        keeps = self._cut(at_once)
        self._kept, self._gradients = [], []
        largest, total, by_hidden = mx.full((n,), -1e30), mx.zeros((n,)), mx.zeros(hidden.shape)
        for block in self._read:
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

    def statistics(
        self, looked_up: tuple[mx.array, mx.array] | None = None, *, step_follows: bool = False
    ) -> tuple[mx.array, mx.array]:
        """Pass 2: means of squares of the table's gradient, over columns (V,) and rows (D,), float32.

        Args:
            looked_up (tuple, optional): For a tied table, ids (U,) and their embeddings' gradient, (U, D) float32.
            step_follows (bool): At once, so that the gradient may be kept for it.
        """
        hidden, vocabulary = self._hidden.astype(mx.float32), self.head.vocabulary
        n, features = hidden.shape
        quadratic = n <= features // 2
        function, factor = (self._quadratic, hidden @ hidden.T / features) if quadratic else (self._squares, hidden)
        row_means, columns = [], mx.zeros((n, n) if quadratic else (features,))
        if keeps := step_follows and self._may_keep_gradient:
            function, factor = self._kept_gradient, None
        for number, block in enumerate(self.blocks if keeps else self._read):
            columns, of_rows, *gradient = function(columns, factor, *self._of_block(number, block))
            row_means.append(of_rows)
            self._gradients += gradient
            if self._kept and keeps:
                self._kept[number] = None
            self._pace.in_turn(columns, of_rows, *gradient)
        row_mean = mx.concatenate(row_means)
        column_sum = ((columns @ hidden) * hidden).sum(0) if quadratic else columns
        if looked_up is not None:
            ids, added = looked_up
            of_head = self.rows_gradient(ids)
            row_mean[ids] = mx.square(of_head + added).mean(1)
            column_sum = column_sum + (added * (2 * of_head + added)).sum(0)
        return row_mean, column_sum / vocabulary

    def rows_gradient(self, ids: mx.array) -> mx.array:
        """The head's gradient in the rows of ids, (U, D) float32."""
        parts = []
        for first in range(0, ids.size, TARGETS_AT_ONCE):
            some = ids[first : first + TARGETS_AT_ONCE]
            parts.append(self._gradient_of(mx.float32, self._rows(some), some, *self._of_tokens()))
            self._pace.in_turn(parts[-1])
        return mx.concatenate(parts)

    def step(self, looked_up: tuple[mx.array, mx.array] | None = None) -> None:
        """Pass 3: the table's rows, whose second moments have been stepped. The logits are let go of on the way."""
        if looked_up is not None:
            ids, added = looked_up
            gradient = self.rows_gradient(ids) + added
            of_ids = self.table.new_rows(ids, gradient)
            mx.eval(of_ids)
            del gradient, added
        room = self._waiting
        let_go = self._gradients or self._kept
        for number, block in enumerate(self.blocks):
            if self._gradients:
                new = self.table.new_rows(block, self._gradients[number])
            else:
                new = self._new_rows(self.table.read_by(block), *self._of_block(number, block))
            if let_go:
                room += let_go[number].nbytes
                let_go[number] = None
            self.table.write(block, new, room)
            del new
        if looked_up is not None:
            self.table.write(ids, of_ids)
        self.table.flush()

    def block_gradient(self, number: int) -> mx.array:
        """The head's gradient in one of ``blocks``, (n, D) float32."""
        return self._gradient(*self._of_block(number, self.blocks[number]))

    def gradients_of_others(self) -> dict[str, mx.array]:
        """Of the head's other trainable weights (a bias, an adapter, a table that Ember does not train), by name."""
        if not self.others:
            return {}
        parameters = dict(tree_flatten(self.head.module.parameters()))
        parts = []
        for number, block in enumerate(self._read):
            parts.append(self._of_others(self._rows(block), *self._of_block(number, block)))
            self._pace.in_turn(*parts[-1])
        joined = zip(self.others, zip(*parts, strict=True), strict=True)
        return {f"{self.path}.{name}": self.head.joined(parameters[name], blocks) for name, blocks in joined}

    def forget(self) -> None:
        """Let go of what belongs to this step."""
        self._hidden = self._log_sum_exp = self._weights = self._targets = self._ids = None
        self._kept = self._gradients = None

    def _cut(self, at_once):
        """Cut the head for these tokens; say whether the logits are kept, which then have the blocks of the step."""
        vocabulary, (n, features) = self.head.vocabulary, self._hidden.shape
        on_a_gpu, width = self._pace.ahead > 0, self._hidden.itemsize
        of_layers = {"tokens_of_a_layer": at_once, "outputs_of_a_layer": self._outputs_of_a_layer}
        sizes = blocks_of_a_head(vocabulary, features, width, n, self._nbytes, on_a_gpu, **of_layers)
        keeps = self._keep_logits
        if keeps is None:
            keeps = n * vocabulary * width <= bytes_of_kept_logits(self._nbytes, on_a_gpu)
        keeps = keeps and bool(self.table or self.others)
        self._may_keep_gradient = sizes.keeps_gradient
        self._waiting = sizes.waiting
        stepped = self._block_rows or sizes.stepped
        read = stepped if keeps else self._block_rows or sizes.rows
        self.blocks, self._read = (
            [slice(i, min(i + rows, vocabulary)) for i in range(0, vocabulary, rows)] for rows in (stepped, read)
        )
        return keeps

    def _rows(self, rows):
        """The head's parameters, by name, of a slice or of some ids."""
        parameters = dict(tree_flatten(self.head.module.parameters()))
        return {name: array[self.head.index(array, rows)] for name, array in parameters.items()}

    def _of_block(self, number, block):
        """What its gradient is made of: kept logits, before what comes after the head, or what makes them again."""
        return self._kept[number] if self._kept else self._rows(block), self._ids[block], *self._of_tokens()

    def _of_tokens(self):
        return self._hidden, self._targets, self._log_sum_exp, self._weights

    def _raw_of(self, source, hidden):
        return self._raw(hidden, source) if isinstance(source, dict) else source

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
            of_some, gradient = self._of_targets(self._hidden[some], self._rows(self._targets[some]))
            logits.append(of_some)
            gradients.append(gradient)
        return mx.concatenate(logits), mx.concatenate(gradients)

    def _targets_of(self, hidden, parameters):
        own = mx.eye(hidden.shape[0])
        (all_pairs,), (gradient,) = mx.vjp(lambda h: [self._after(self._raw(h, parameters))], [hidden], [own])
        return (all_pairs * own).sum(-1), gradient.astype(mx.float32)

    def _by_logits(self, source, ids, hidden, targets, log_sum_exp, weights):
        """The loss's gradient by a block of logits, (N, n) float32: those of the ids, (n,)."""
        raw = self._raw_of(source, hidden)
        logits = self._after(raw)
        one_hot = targets[:, None] == ids
        d = weights[:, None] * (mx.exp(logits - log_sum_exp[:, None]) - one_hot)
        if self.head.is_last:
            return d
        return mx.vjp(lambda z: [self._after(z)], [raw], [d])[1][0].astype(mx.float32)

    def _quadratic_of(self, columns, gram, *block):
        d = self._by_logits(*block)
        return columns + d @ d.T, ((gram @ d) * d).sum(0)

    def _squares_of(self, columns, hidden, *block):
        squares = mx.square(self._by_logits(*block).T @ hidden)
        return columns + squares.sum(0), squares.mean(1)

    def _kept_gradient_of(self, columns, _, *block):
        _, _, hidden, *_ = block
        gradient = self._gradient_of(hidden.dtype, *block)
        squares = mx.square(gradient.astype(mx.float32))
        return columns + squares.sum(0), squares.mean(1), gradient

    def _gradient_of(self, dtype, *block):
        _, _, hidden, *_ = block
        return self._by_logits(*block).astype(dtype).T @ hidden.astype(dtype)

    def _new_rows_of(self, of_table, *block):
        _, _, hidden, *_ = block
        return self.table.stepped(self._gradient_of(hidden.dtype, *block), *of_table)

    def _others_of(self, parameters, *block):
        source, _, hidden, *_ = block
        d = self._by_logits(*block).astype(self._raw_of(source, hidden).dtype)

        def function(*others):
            return [self._raw(hidden, parameters | dict(zip(self.others, others, strict=True)))]

        return list(mx.vjp(function, [parameters[name] for name in self.others], [d])[1])
