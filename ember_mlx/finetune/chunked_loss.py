"""Cross entropy that never holds the logits: the head answers for a slice of the vocabulary at a time.

With long sequences the logits, one for each token and each word of the vocabulary, are the peak of a training step.
Here the forward pass keeps one log-sum-exp a token, and the backward pass makes the logits again. The slices are of the
vocabulary and not of the tokens: so the gradient of a row of the head is one matrix product over all tokens, rounded
once, where slices of tokens would need a float32 table to add it up in.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ember_mlx.shared.errors import InputError
from ember_mlx.shared.sizes_in_memory import CHUNKED_LOGITS
from ember_mlx.streaming.head_module import check_after, evaluating, find_head
from ember_mlx.streaming.marks import target_mask
from ember_mlx.streaming.rows_apart import rows_apart

__all__ = ["chunked_loss"]

REMEDY = "train without --chunked-loss"


def chunked_loss(
    model: nn.Module, logits_at_once: int = CHUNKED_LOGITS
) -> Callable[[nn.Module, mx.array, mx.array], tuple[mx.array, mx.array]]:
    """The same loss as ``mlx_lm.tuner.trainer.default_loss``, for mlx-lm's ``train`` and ``evaluate``, in less memory.

    Make it when the model is ready to be trained: adapters in it, tables dequantized. The model is run once here, on
    six tokens, to check that both losses are one.

    Args:
        model (Module): A model of mlx-lm's whose head is a module: a linear, plain, quantized or with an adapter, or
            the embedding when it is tied. The head may train or be frozen.
        logits_at_once (int): How many logits there may be at a time.

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
    except InputError as error:
        raise InputError(f"--chunked-loss: {error}; {REMEDY}") from None
    _check(head)

    def loss(model, batch, learned):
        if model is not head.model:
            raise InputError("chunked_loss: the loss was made for another model: make one for this model")
        inputs, targets = batch[:, :-1], batch[:, 1:]
        mask = target_mask(batch, learned)
        ntoks = mask.sum()
        with rows_apart(model, learned):
            hidden = head.hidden(inputs)
        ce = _cross_entropy(head, hidden, targets, logits_at_once) * mask
        return ce.sum() / ntoks, ntoks

    return loss


def _cross_entropy(head, hidden, targets, logits_at_once):
    """Of each token, (B, T) float32, from the head's input (B, T, D) and the targets (B, T)."""
    width = max(logits_at_once // targets.size // 128, 1) * 128  # whole tiles of a matrix product
    slices = [(first, min(first + width, head.vocabulary)) for first in range(0, head.vocabulary, width)]
    # For all slices at once: mx.compile builds another kernel for each number that stands in it.
    place = targets - mx.arange(0, head.vocabulary, width)[:, None, None]
    inside = (place >= 0) & (place < width)
    place = mx.where(inside, place, 0)[..., None]

    @mx.custom_function
    def ce_and_log_sum_exp(hidden, weights):
        log_sum_exps, chosen = [], mx.zeros(targets.shape)
        for i, (first, last) in enumerate(slices):
            logits = head.logits(hidden, head.rows(weights, first, last), first, last)
            log_sum_exps.append(mx.logsumexp(logits, axis=-1))
            chosen = mx.where(inside[i], mx.take_along_axis(logits, place[i], axis=-1).squeeze(-1), chosen)
            hidden = mx.depends(hidden, [log_sum_exps[-1], chosen])  # one slice after another
        log_sum_exp = mx.logsumexp(mx.stack(log_sum_exps), axis=0)
        return log_sum_exp - chosen, log_sum_exp

    @ce_and_log_sum_exp.vjp
    def gradients(primals, cotangents, outputs):
        hidden, weights = primals
        cotangent, log_sum_exp = cotangents[0][..., None], outputs[1][..., None]

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
        d_weights = [head.joined(w, parts) for w, parts in zip(weights, zip(*d_rows, strict=True), strict=True)]
        return d_hidden.astype(hidden.dtype), d_weights

    return ce_and_log_sum_exp(hidden, head.weights())[0]


def _check(head):
    """Refuse a model for which the slices would give another loss or other gradients than the whole."""
    where = f"--chunked-loss: {type(head.model).__module__}"
    try:
        check_after(head)
    except InputError as error:
        raise InputError(f"--chunked-loss: {error}; {REMEDY}") from None
    tokens = mx.linspace(0, head.vocabulary - 1, 8).astype(mx.int32).reshape(2, 4)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with evaluating(head.model):
        logits = head.model(inputs)
        expected = nn.losses.cross_entropy(logits.astype(mx.float32), targets)
        found = _cross_entropy(head, head.hidden(inputs), targets, targets.size * head.vocabulary // 3)
    # GPUs multiply float32 with 10 bits unless told not to.
    error = max(8 * mx.finfo(logits.dtype).eps, 2.0**-10) * mx.maximum(mx.abs(logits).max(), 1)
    if not mx.all(mx.abs(found - expected) <= error):
        raise InputError(f"{where}: slice by slice, its loss is not what it is as a whole; {REMEDY}")
