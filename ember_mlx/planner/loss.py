"""The loss of a step and its gradient, with all logits at once or a slice of the vocabulary at a time."""

from ember_mlx.planner.builder import FLOAT32, Builder
from ember_mlx.planner.evaluation import Array

LOGITS_AT_ONCE = 2**23  # of ember_mlx.finetune.chunked_loss


class Loss(Builder):
    def loss(self, h, head, w, trained):
        """Cross entropy of all logits at once, in their type, and its gradient: softmax minus one-hot."""
        n, numbers = self.tokens, self.tokens * head.rows
        self._role = "logits"
        logits = self.product([h, w], numbers, head.columns)
        if self.backend == "cpu":
            logits = self.elementwise([logits, self.make([logits], n)])  # less their maximum
            self.results.append(self.make([self.make([logits], n), self.make([logits], n)], 1))
            softmax = self.make([logits], numbers, in_place=True)
            one_hot = self.make([], numbers)
            d_logits = self.elementwise([softmax, one_hot])
        else:
            losses = self.make([logits], n, FLOAT32)
            self.results.append(self.make([losses], 1))
            d_logits = self.make([logits, losses], numbers, in_place=True)
        self._role = "scratch"
        if trained:
            self.add_gradient(head.name, self.product([d_logits, h], w.numbers, n))
        return self.product([d_logits, w], h.numbers, head.rows)

    def chunked_loss(self, h, head, w, trained):
        """The same, of a slice of the vocabulary at a time; see ember_mlx.finetune.chunked_loss."""
        n = self.tokens
        words = min(max(LOGITS_AT_ONCE // n // 128, 1) * 128, head.rows)
        slices = [min(words, head.rows - first) for first in range(0, head.rows, words)]
        self._role = "logits"
        hidden, chosen, sums = h, self.make([], n, FLOAT32), []

        def part(words):
            return Array(words * head.columns, w.width, w.role, w.made_by, base=w)

        for words in slices:
            logits = self.product([hidden, part(words)], n * words, head.columns)
            logits = self.elementwise([logits], width=FLOAT32)
            sums.append(self.make([logits], n, FLOAT32))
            place, inside = self.make([], n), self.make([], n)  # of the targets
            chosen = self.elementwise([chosen, self.make([logits, place], n, FLOAT32), inside])
            hidden = self.view(hidden, after=[sums[-1], chosen])
        log_sum_exp = self.make([self.make(sums, n * len(sums), FLOAT32)], n, FLOAT32)
        self.results.append(self.make([self.elementwise([log_sum_exp, chosen])], 1))
        self._role = "scratch"
        hidden, d_h, parts = h, self.make([], h.numbers, FLOAT32), []
        for words in slices:
            logits = self.product([hidden, part(words)], n * words, head.columns, role="logits")
            d_logits = self.elementwise([logits, log_sum_exp], role="logits")  # one kernel: float32 inside alone
            d_h = self.elementwise([d_h, self.product([d_logits, part(words)], h.numbers, words)])
            if trained:
                parts.append(self.product([d_logits, hidden], words * head.columns, n, role="gradients"))
            hidden = self.view(hidden, after=[d_h, *parts[-1:]])
        if trained:
            self.add_gradient(head.name, self.make(parts, w.numbers))
        return self.elementwise([d_h], width=self.width)
