"""Cross entropy that never holds the logits: the head answers for a slice of the vocabulary at a time.

With long sequences the logits, one for each token and each word of the vocabulary, are the peak of a training step.
Here the forward pass keeps one log-sum-exp a token, and the backward pass makes the logits again. The slices are of the
vocabulary and not of the tokens: so the gradient of a row of the head is one matrix product over all tokens, rounded
once, where slices of tokens would need a float32 table to add it up in.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ember_mlx.finetune.one_behind import OneBehind
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.sizes_in_memory import CHUNKED_LOGITS
from ember_mlx.streaming.head_module import Head, check_after, evaluating, find_head
from ember_mlx.streaming.marks import target_mask
from ember_mlx.streaming.rows_apart import rows_apart

__all__ = ["backward_in_slices", "chunked_loss", "forward_in_slices", "loss_of"]


def chunked_loss(
    model: nn.Module, logits_at_once: int = CHUNKED_LOGITS, flag: str = "--chunked-loss", for_validation: bool = False
) -> Callable[[nn.Module, mx.array, mx.array], tuple[mx.array, mx.array]]:
    """The same loss as ``mlx_lm.tuner.trainer.default_loss``, for mlx-lm's ``train`` and ``evaluate``, in less memory.

    Make it when the model is ready to be trained: adapters in it, tables dequantized. The model is run once here, on
    six tokens, to check that both losses are one.

    Args:
        model (Module): A model of mlx-lm's whose head is a module: a linear, plain, quantized or with an adapter, or
            the embedding when it is tied. The head may train or be frozen.
        logits_at_once (int): How many logits there may be at a time.
        flag (str): What asks for it, for errors.
        for_validation (bool): Evaluate slice after slice, which takes less on a GPU; it then has no gradient.

    Returns:
        ``loss(model, batch, learned)``, for this model. ``batch`` is (B, T) token ids and ``learned`` (B, 2) the first
        and the last that count in each row, or marks, see :mod:`ember_mlx.streaming.marks`. It returns their mean loss
        in nats, float32, and their number.

    Raises:
        InputError: (a ``ValueError``) when the hidden states before the head cannot be had, or when what the model does
            after its head mixes the words of the vocabulary or has trainable parameters of its own.
    """
    try:
        head = find_head(model)
        check_after(head)
    except InputError as error:
        raise InputError(f"{flag}: {error}; train without {flag}") from None
    _check(head, flag)
    return loss_of(head, lambda hidden, targets: _cross_entropy(head, hidden, targets, logits_at_once, for_validation))


def loss_of(head: Head, cross_entropy: Callable[[mx.array, mx.array], mx.array]) -> Callable:
    """The loss that :func:`chunked_loss` returns, from the cross entropy of each token.

    Args:
        head: Of the model.
        cross_entropy: From the head's input (B, T, D) and the targets (B, T) to (B, T) float32.
    """

    def loss(model, batch, learned):
        if model is not head.model:
            raise InputError("chunked_loss: the loss was made for another model: make one for this model")
        inputs, targets = batch[:, :-1], batch[:, 1:]
        mask = target_mask(batch, learned)
        ntoks = mask.sum()
        with rows_apart(model, learned):
            hidden = head.hidden(inputs)
        ce = cross_entropy(hidden, targets) * mask
        return ce.sum() / ntoks, ntoks

    return loss


def _cross_entropy(head, hidden, targets, logits_at_once, for_validation=False):
    """Of each token, (B, T) float32, from the head's input (B, T, D) and the targets (B, T)."""
    width = max(logits_at_once // targets.size // 128, 1) * 128  # whole tiles of a matrix product
    slices = [(first, min(first + width, head.vocabulary)) for first in range(0, head.vocabulary, width)]

    if for_validation:
        log_sum_exp, chosen = forward_in_slices(head, hidden, head.weights(), targets, slices, OneBehind())
        return log_sum_exp - chosen

    @mx.custom_function
    def ce_and_log_sum_exp(hidden, weights):
        log_sum_exp, chosen = forward_in_slices(head, hidden, weights, targets, slices)
        return log_sum_exp - chosen, log_sum_exp

    @ce_and_log_sum_exp.vjp
    def gradients(primals, cotangents, outputs):
        d_hidden, d_weights = backward_in_slices(head, *primals, targets, slices, cotangents[0], outputs[1])
        return d_hidden.astype(primals[0].dtype), d_weights

    return ce_and_log_sum_exp(hidden, head.weights())[0]


def forward_in_slices(
    head: Head,
    hidden: mx.array,
    weights: list[mx.array],
    targets: mx.array,
    slices: list[tuple[int, int]],
    after_slice: Callable[[mx.array, mx.array], None] = lambda *_: None,
) -> tuple[mx.array, mx.array]:
    """Each token's log-sum-exp over the head's words, and the logit of its target; (B, T) float32 both.

    Args:
        head: Its words are V.
        hidden, weights: What goes into it, (B, T, D), and its weights that train.
        targets: (B, T) word numbers. One below 0 or from V on is no word of this head: its logit is 0.
        slices: The first and the one after the last word of each, in order.
        after_slice: Called with what is left of each slice.
    """
    # For all slices at once: mx.compile builds another kernel for each number that stands in it.
    firsts, widths = (mx.array(each)[:, None, None] for each in zip(*((a, b - a) for a, b in slices), strict=True))
    place = targets - firsts
    inside = (place >= 0) & (place < widths)
    place = mx.where(inside, place, 0)[..., None]
    log_sum_exps, chosen = [], mx.zeros(targets.shape)
    for i, (first, last) in enumerate(slices):
        logits = head.logits(hidden, head.rows(weights, first, last), first, last)
        log_sum_exps.append(mx.logsumexp(logits, axis=-1))
        chosen = mx.where(inside[i], mx.take_along_axis(logits, place[i], axis=-1).squeeze(-1), chosen)
        hidden = mx.depends(hidden, [log_sum_exps[-1], chosen])  # one slice after another
        after_slice(log_sum_exps[-1], chosen)
    return mx.logsumexp(mx.stack(log_sum_exps), axis=0), chosen


def backward_in_slices(
    head: Head,
    hidden: mx.array,
    weights: list[mx.array],
    targets: mx.array,
    slices: list[tuple[int, int]],
    cotangent: mx.array,
    log_sum_exp: mx.array,
) -> tuple[mx.array, list[mx.array]]:
    """Gradients of :func:`forward_in_slices`'s cross entropy, times ``cotangent`` (B, T), by ``hidden`` and weights.

    ``log_sum_exp``, (B, T), may be over more words than this head's. That by ``hidden`` is float32.
    """
    cotangent, log_sum_exp = cotangent[..., None], log_sum_exp[..., None]

    def stand_in(hidden, rows, first, last):
        """By a logit it has the gradient of the cross entropy: softmax minus one-hot."""
        logits = head.logits(hidden, rows, first, last)
        one_hot = mx.arange(first, last) == targets[..., None]
        return (cotangent * (mx.exp(logits - log_sum_exp) - mx.where(one_hot, logits, 0))).sum()

    d_hidden, d_rows = mx.zeros(hidden.shape), []
    for first, last in slices:
        rows = head.rows(weights, first, last)
        of_hidden, of_rows = mx.grad(stand_in, argnums=(0, 1))(hidden, rows, first, last)
        d_hidden = d_hidden + of_hidden
        d_rows.append(of_rows)
        hidden = mx.depends(hidden, [d_hidden, *of_rows])
    return d_hidden, [head.joined(w, parts) for w, parts in zip(weights, zip(*d_rows, strict=True), strict=True)]


def _check(head, flag):
    """Refuse a model for which the slices would give another loss or other gradients than the whole."""
    tokens = mx.linspace(0, head.vocabulary - 1, 8).astype(mx.int32).reshape(2, 4)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with evaluating(head.model):
        logits = head.model(inputs)
        expected = nn.losses.cross_entropy(logits.astype(mx.float32), targets)
        found = _cross_entropy(head, head.hidden(inputs), targets, targets.size * head.vocabulary // 3)
    # GPUs multiply float32 with 10 bits unless told not to.
    error = max(8 * mx.finfo(logits.dtype).eps, 2.0**-10) * mx.maximum(mx.abs(logits).max(), 1)
    if not mx.all(mx.abs(found - expected) <= error):
        raise InputError(
            f"{flag}: {type(head.model).__module__}: slice by slice, its loss is not what it is as a whole; train "
            f"without {flag}"
        )
