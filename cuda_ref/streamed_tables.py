"""Token tables stepped by Ember without their gradients: the head in blocks of rows, the embedding by looked-up rows.

The head takes three passes over its rows. The first takes the log-sum-exp and, rescaled along with it, the gradient by
the hidden states. The second takes the means of squares of the head's gradient, all that Ember asks of it. The third
makes that gradient block by block and steps the rows. Kept between them are the logits, or nothing.

The gradient is G = d' H with d (N, V) by the logits and H (N, D). So the mean square of row i is d_i' K d_i with
K = H H' / D, and that of column j is h_j' P h_j with P = d d' / V. Up to N = D / 2 that is cheaper than G.
The functions follow ``ember_mlx/streaming/head.py`` and ``embedding.py``.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_ref.optimizers import Ember
from cuda_ref.optimizers.checks import as_number
from cuda_ref.optimizers.ember import bias_correction, denominator_factors, update_rows, update_second_moment
from cuda_ref.optimizers.stochastic_rounding import DROPPED_BITS, bit_keys
from ember_mlx.shared.errors import InputError

__all__ = [
    "HeadPass",
    "add_up_rows",
    "bias_gradient",
    "fault_of",
    "forward_head",
    "head_mean_squares",
    "make_state",
    "mean_squares_of_rows",
    "no_rows",
    "second_moments",
    "step_head",
    "step_rows",
]

Rule = Callable[[slice | Tensor, Tensor, Tensor], Tensor]  # rows, theirs of weight and gradient -> after the step
LookedUp = tuple[Tensor, Tensor] | None  # ids (U,) and their gradient (U, D), float32

LEAST_ROWS, BLOCKS, MOST_LOGITS = 128, 24, 2**24  # of a block of the head; float32 copies of its logits are alive


@dataclass
class HeadPass:
    """What the first pass over a head leaves for the others: of N tokens that count, this rank's part of the loss.

    Attributes:
        loss: (), float32.
        by_hidden: (N, D), the loss's gradient, in the dtype of ``hidden``.
        hidden, targets: (N, D) and (N,), as given.
        log_sum_exp: (N,), float32.
        kept (list): The logits of each block, (N, n), or empty: they are made again.
        blocks (list of slice): Of the rows.
        count (int): How many tokens of all ranks the loss is the mean of; of one rank alone that is N.
        summed (callable, optional): Of several ranks: an array of this one -> the sum over all.
    """

    loss: Tensor
    by_hidden: Tensor
    hidden: Tensor
    targets: Tensor
    log_sum_exp: Tensor
    kept: list
    blocks: list
    count: int
    summed: Callable[[Tensor], Tensor] | None = None

    def over_ranks(self, x: Tensor) -> Tensor:
        """The sum of what each rank gives."""
        return x if self.summed is None else self.summed(x)


@torch.no_grad()
def forward_head(
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    targets: Tensor,
    keep: bool = False,
    block_rows: int | None = None,
    count: int | None = None,
    summed: Callable[[Tensor], Tensor] | None = None,
) -> HeadPass:
    """Pass 1: the mean cross entropy of ``hidden @ weight.T + bias`` and its gradient by ``hidden``.

    Args:
        weight (Tensor): (V, D).
        bias (Tensor, optional): (V,).
        hidden (Tensor): (N, D), in the dtype of ``weight``.
        targets (Tensor): (N,) token ids.
        keep (bool): Keep the logits for the other passes.
        block_rows (int, optional): Of a block. Default: by the sizes.
        count, summed: Of several ranks, see :class:`HeadPass`.
    """
    n, vocabulary = len(targets), len(weight)
    count = n if count is None else count
    rows = block_rows or max(LEAST_ROWS, min(MOST_LOGITS // count, vocabulary // BLOCKS))
    blocks = [slice(i, min(i + rows, vocabulary)) for i in range(0, vocabulary, rows)]
    largest = torch.full((n,), -torch.inf, device=hidden.device)
    total, chosen = torch.zeros(n, device=hidden.device), torch.zeros(n, device=hidden.device)
    by_hidden, kept = torch.zeros(hidden.shape, device=hidden.device), []
    for block in blocks:
        raw = _logits(weight, bias, hidden, block)
        if keep:
            kept.append(raw)
        logits = raw.to(torch.float32)
        now = torch.maximum(largest, logits.amax(dim=1))
        shrink = torch.exp(largest - now)
        e = torch.exp(logits - now[:, None])
        total = total * shrink + e.sum(dim=1)
        by_hidden = by_hidden.mul_(shrink[:, None]).add_(e.to(weight.dtype) @ weight[block])
        places, here = _places(targets, block)
        chosen += torch.where(here, logits.gather(1, places[:, None])[:, 0], 0.0)
        largest = now
    log_sum_exp = largest + torch.log(total)
    by_hidden = by_hidden.div_(total[:, None]).sub_(weight[targets]).div_(count).to(hidden.dtype)
    loss = (log_sum_exp - chosen).sum() / count
    return HeadPass(loss, by_hidden, hidden, targets, log_sum_exp, kept, blocks, count, summed)


def fault_of(weight: Tensor, hidden: Tensor, targets: Tensor) -> InputError | None:
    """What of ``forward_head``'s arguments cannot be used, if anything."""
    if hidden.dtype != weight.dtype:
        return InputError(
            f"StreamedBackward: hidden states in {hidden.dtype} and a head in {weight.dtype}: convert the model "
            "to one dtype"
        )
    if len(targets) and not bool(((targets >= 0) & (targets < len(weight))).all()):
        return InputError(
            f"StreamedBackward(labels=...): must be token ids from 0 to {len(weight) - 1}, or -100 for a token that "
            "does not count"
        )
    return None


@torch.no_grad()
def head_mean_squares(
    weight: Tensor, bias: Tensor | None, head: HeadPass, looked_up: LookedUp = None
) -> tuple[Tensor, Tensor]:
    """Pass 2: means of squares of the table's gradient, over columns (V,) and over rows (D,), float32.

    Args:
        looked_up (tuple, optional): Of a tied table, ids (U,) and their embeddings' gradient, (U, D) float32.
    """
    hidden = head.hidden.to(torch.float32)
    quadratic = head.summed is None and len(hidden) <= hidden.shape[1] // 2
    row_means, columns = [], 0
    with _exact_float32():
        gram = hidden @ hidden.T / hidden.shape[1] if quadratic else None
        for number, block in enumerate(head.blocks):
            d = _by_logits(weight, bias, head, number, block)
            if quadratic:
                row_means.append(((gram @ d) * d).sum(dim=0))
                columns = columns + d @ d.T
            else:
                squares = torch.square(head.over_ranks(d.T @ hidden))
                row_means.append(squares.mean(dim=1))
                columns = columns + squares.sum(dim=0)
        column_sum = ((columns @ hidden) * hidden).sum(dim=0) if quadratic else columns
    row_mean = torch.cat(row_means)
    if looked_up is not None:
        ids, added = looked_up
        of_head = _gradient_of_rows(weight, bias, head, ids)
        row_mean[ids] = torch.square(of_head + added).mean(dim=1)
        column_sum = column_sum + (added * (2 * of_head + added)).sum(dim=0)
    return row_mean, column_sum / len(weight)


@torch.no_grad()
def step_head(weight: Tensor, bias: Tensor | None, head: HeadPass, rule: Rule, looked_up: LookedUp = None) -> None:
    """Pass 3: the table's rows by ``rule``, overwritten; the logits are let go of on the way."""
    if looked_up is not None:
        ids, added = looked_up
        of_ids = rule(ids, weight[ids], _gradient_of_rows(weight, bias, head, ids) + added)
    for number, block in enumerate(head.blocks):
        d = _by_logits(weight, bias, head, number, block)
        if head.kept:
            head.kept[number] = None
        weight[block] = rule(block, weight[block], head.over_ranks(d.to(weight.dtype).T @ head.hidden))
    if looked_up is not None:
        weight[ids] = of_ids


@torch.no_grad()
def bias_gradient(weight: Tensor, bias: Tensor, head: HeadPass) -> Tensor:
    """Of the head's bias, (V,)."""
    parts = [_by_logits(weight, bias, head, number, block).sum(dim=0) for number, block in enumerate(head.blocks)]
    return head.over_ranks(torch.cat(parts)).to(bias.dtype)


def add_up_rows(calls: list[tuple[Tensor, Tensor]], padding_idx: int | None = None) -> tuple[Tensor, Tensor]:
    """Ids (U,), each once, and the float32 sums (U, D) of their gradients, from (ids, gradient) of every look-up."""
    ids = torch.cat([ids.reshape(-1) for ids, _ in calls])
    gradients = torch.cat([gradient.reshape(-1, gradient.shape[-1]).to(torch.float32) for _, gradient in calls])
    if padding_idx is not None:  # its row gets no gradient by the embedding
        gradients = gradients * (ids != padding_idx)[:, None]
    ids, place = torch.unique(ids, return_inverse=True)
    return ids, torch.zeros(len(ids), gradients.shape[1], device=ids.device).index_add_(0, place, gradients)


def no_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and rows, as of ``add_up_rows``, of a table in which nothing was looked up."""
    ids = torch.empty(0, dtype=torch.int64, device=weight.device)
    return ids, torch.empty(0, weight.shape[1], device=weight.device)


def mean_squares_of_rows(ids: Tensor, rows: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Means of squares of a gradient (V, D) that has these rows and is zero elsewhere: (V,) and (D,)."""
    squares = torch.square(rows)
    row_mean = torch.zeros(vocabulary, device=rows.device)
    row_mean[ids] = squares.mean(dim=1)
    return row_mean, squares.sum(dim=0) / vocabulary


@torch.no_grad()
def step_rows(weight: Tensor, ids: Tensor, rows: Tensor, rule: Rule, decays: bool, block_rows: int = 4096) -> None:
    """Step a table by a gradient that has these rows; the others change by weight decay alone."""
    new = rule(ids, weight[ids], rows)
    for first in range(0, len(weight), block_rows) if decays else ():
        block = slice(first, min(first + block_rows, len(weight)))
        weight[block] = rule(block, weight[block], torch.zeros((), device=weight.device).expand_as(weight[block]))
    weight[ids] = new


def make_state(ember: Ember) -> None:
    """Let Ember check its groups and make the state of tables that have none, before there is any gradient."""
    tables = [w for group in ember.param_groups for w in group["params"]]
    for w in tables:
        w.grad = torch.zeros((), dtype=w.dtype, device=w.device).expand_as(w)  # no memory: Ember asks for its form
    try:
        ember._init_group()
    finally:
        for w in tables:
            w.grad = None


@torch.no_grad()
def second_moments(ember: Ember, w: Tensor, group: dict, row_mean: Tensor, column_mean: Tensor) -> Rule | None:
    """Step ``r`` and ``c`` of a table by a step's means of squares; None, and nothing is written, if not finite.

    Returns:
        callable: ``rule(rows, w_rows, g_rows)`` returns those rows after the step; ``rows`` is a slice or ids.
    """
    if not bool(torch.isfinite(row_mean.sum() + column_mean.sum())):
        return None
    state = ember.state[w]
    t, beta2 = state["step"] + 1, group["beta2"]
    if callable(beta2):
        beta2 = as_number("beta2", beta2(state["step"]), state["step"].device)
        q = state["q"].copy_(update_second_moment(state["q"], 1.0, beta2))
    else:
        q = bias_correction(t, beta2)
    r = update_second_moment(state["r"], row_mean, beta2)
    c = update_second_moment(state["c"], column_mean, beta2)
    a, b = denominator_factors(r, c, q, row_mean, ember.row_clip, ember.row_floor)
    stochastic = ember.rounding == "stochastic" and w.dtype in DROPPED_BITS
    keys = bit_keys(state["seed"], t, *w.shape) if stochastic else None
    for name, new in (("r", r), ("c", c), ("step", t)):
        state[name].copy_(new)

    def rule(rows, w_rows, g_rows):
        row_keys = None if keys is None else (keys[0][rows], keys[1])
        return update_rows(w_rows, g_rows, a[rows], b, group["lr"], group["eps"], group["weight_decay"], row_keys)

    return rule


def _logits(weight, bias, hidden, rows):
    logits = hidden @ weight[rows].T
    return logits if bias is None else logits + bias[rows]


def _places(targets, block):
    """Where the targets stand in a block, and whether they do."""
    places = targets - block.start
    return places.clamp(0, block.stop - block.start - 1), (places >= 0) & (targets < block.stop)


def _by_logits(weight, bias, head, number, block):
    """The loss's gradient by a block of logits, (N, n) float32."""
    logits = head.kept[number] if head.kept else _logits(weight, bias, head.hidden, block)
    d = torch.exp(logits.to(torch.float32) - head.log_sum_exp[:, None])
    places, here = _places(head.targets, block)
    d.scatter_add_(1, places[:, None], -here.to(torch.float32)[:, None])
    return d.div_(head.count)


def _gradient_of_rows(weight, bias, head, ids):
    """The head's gradient in a few rows, (U, D) float32."""
    logits = _logits(weight, bias, head.hidden, ids).to(torch.float32)
    d = torch.exp(logits - head.log_sum_exp[:, None]) - (head.targets[:, None] == ids).to(torch.float32)
    with _exact_float32():
        return head.over_ranks(d.div_(head.count).T @ head.hidden.to(torch.float32))


@contextmanager
def _exact_float32():
    """Statistics lose three digits where products are in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
