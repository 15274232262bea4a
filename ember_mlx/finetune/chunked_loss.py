"""Cross entropy that never holds the logits: the head answers for a slice of the vocabulary at a time.

With long sequences the logits, one for each token and each word of the vocabulary, are the peak of a training step.
Here the forward pass keeps one log-sum-exp a token, and the backward pass makes the logits again. The slices are of the
vocabulary and not of the tokens: so the gradient of a row of the head is one matrix product over all tokens, rounded
once, where slices of tokens would need a float32 table to add it up in.
"""

from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ember_mlx.shared.errors import InputError
from ember_mlx.token_tables import find_token_tables

__all__ = ["chunked_loss"]

LOGITS_AT_ONCE = 2**23  # tokens times words; an array of them is 34 MB in float32
REMEDY = "train without --chunked-loss"


def chunked_loss(model: nn.Module, logits_at_once: int = LOGITS_AT_ONCE):
    """The same loss as ``mlx_lm.tuner.trainer.default_loss``, for mlx-lm's ``train`` and ``evaluate``, in less memory.

    Make it when the model is ready to be trained: adapters in it, tables dequantized. The model is run once here, on
    six tokens, to check that both losses are one.

    Args:
        model (Module): A model of mlx-lm's whose head is a module: a linear, plain, quantized or with an adapter, or
            the embedding when it is tied. The head may train or be frozen.
        logits_at_once (int): How many logits there may be at a time.

    Returns:
        ``loss(model, batch, lengths)``, for this model. ``batch`` is (B, T + 1) token ids and ``lengths`` (B, 2) the
        first and the last that count in each row; it returns their mean loss in nats, float32, and their number.

    Raises:
        InputError: (a ``ValueError``) when the hidden states before the head cannot be had, or when what the model does
            after its head mixes the words of the vocabulary or has trainable parameters of its own.
    """
    head = _find_head(model)
    _check(head)

    def loss(model, batch, lengths):
        if model is not head.model:
            raise InputError("chunked_loss: the loss was made for another model: make one for this model")
        inputs, targets = batch[:, :-1], batch[:, 1:]
        steps = mx.arange(1, targets.shape[1] + 1)
        mask = mx.logical_and(steps >= lengths[:, 0:1], steps <= lengths[:, 1:])
        ntoks = mask.sum()
        ce = _cross_entropy(head, head.hidden(inputs), targets, logits_at_once) * mask
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


class _Head:
    """The module that turns hidden states into logits, and what the model does to the logits after it.

    Args:
        model (Module): The model.
        module (Module): The head, with V = ``vocabulary`` rows; ``method`` is how the model calls it.
    """

    def __init__(self, model, module, method, vocabulary):
        self.model = model
        self.module = module
        self.method = method
        self.vocabulary = vocabulary
        some = mx.zeros((1, 1, vocabulary))
        self.is_last = self.after(some) is some

    def hidden(self, inputs):
        """What goes into the head, (B, T, D): the model is run up to there."""

        def stop(hidden):
            raise _ReachedError(hidden)

        with _in_place_of(self.module, self.method, stop):
            try:
                self.model(inputs)
            except _ReachedError as reached:
                return reached.hidden
        raise _NotCalledError

    def after(self, logits):
        """What the model makes of the logits, such as a soft cap: it is run on one token, with these for the head's.

        All before the head is then for nothing, and lazy: MLX never computes it.
        """
        answered = []

        def answer(hidden):
            answered.append(hidden)
            return logits

        # In training mode dropout would draw from the random state, for nothing too.
        with _evaluating(self.model), _in_place_of(self.module, self.method, answer):
            output = self.model(mx.array([[0]]))
        if len(answered) != 1:
            raise _NotCalledError
        return output

    def logits(self, hidden, rows, first, last):
        """The model's logits of the words from ``first`` to before ``last``, (B, T, last - first) float32.

        ``rows`` are what of the trainable weights belongs to these words.
        """
        own = self.module.parameters()
        names, arrays = zip(*tree_flatten(own), strict=True)
        now = dict(zip(names, self.rows(arrays, first, last), strict=True))
        trainable = [name for name, _ in tree_flatten(self.module.trainable_parameters())]
        now |= dict(zip(trainable, rows, strict=True))
        self.module.update(tree_unflatten(list(now.items())))
        try:
            logits = getattr(self.module, self.method)(hidden)
        finally:
            self.module.update(own)
        return (logits if self.is_last else self.after(logits)).astype(mx.float32)

    def weights(self):
        return [weight for _, weight in tree_flatten(self.module.trainable_parameters())]

    def axis(self, array):
        """The axis of a parameter that runs over the vocabulary: the first, the last (lora_b), or None (lora_a)."""
        return next((axis for axis in (0, -1) if array.ndim and array.shape[axis] == self.vocabulary), None)

    def index(self, array, first, last):
        return {0: slice(first, last), -1: (..., slice(first, last)), None: ...}[self.axis(array)]

    def rows(self, arrays, first, last):
        return [array[self.index(array, first, last)] for array in arrays]

    def joined(self, weight, gradients):
        """The gradient of a weight from those of its slices; every slice adds to that of lora_a."""
        axis = self.axis(weight)
        if axis is not None:
            return mx.concatenate(gradients, axis)
        return sum(gradient.astype(mx.float32) for gradient in gradients).astype(weight.dtype)


class _ReachedError(Exception):
    """The model's forward pass came to its head."""

    def __init__(self, hidden):
        super().__init__()
        self.hidden = hidden


class _NotCalledError(Exception):
    """The model's forward pass did not call its head once."""


@contextmanager
def _in_place_of(module, method, function):
    # A call looks `__call__` up in the class, so a subclass it is; the module stays what and where it was.
    own = type(module)
    module.__class__ = type(own.__name__, (own,), {method: lambda self, *arguments: function(*arguments)})
    try:
        yield
    finally:
        module.__class__ = own


@contextmanager
def _evaluating(model):
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _find_head(model):
    """The head among the model's token tables: the one that a forward pass calls."""
    modules = dict(model.named_modules())
    for table in find_token_tables(model):
        wrapper = table.module_path.rpartition(".")[0]
        path = wrapper if "lora_a" in modules.get(wrapper, {}) else table.module_path
        method = {"head": "__call__", "tied": "as_linear"}.get(table.role)
        if method and path and hasattr(modules[path], method):
            try:
                return _Head(model, modules[path], method, table.shape[0])
            except _NotCalledError:
                continue
    raise InputError(
        f"--chunked-loss: the head of {type(model).__module__} is no module that its forward pass calls once, so the "
        f"hidden states before it cannot be had; {REMEDY}"
    )


def _check(head):
    """Refuse a model for which the slices would give another loss or other gradients than the whole."""
    where = f"--chunked-loss: {type(head.model).__module__}"
    if not head.is_last:
        rising = mx.linspace(-40, 40, head.vocabulary).reshape(1, 1, -1)
        if not mx.array_equal(head.after(rising), head.after(rising[..., ::-1])[..., ::-1]):
            raise InputError(f"{where} does not treat the logits of all words alike after its head; {REMEDY}")
        _, gradients = nn.value_and_grad(head.model, lambda _: head.after(rising).sum())(head.model)
        trained = [name for name, gradient in tree_flatten(gradients) if mx.any(gradient != 0)]
        if trained:
            raise InputError(f"{where} trains {trained[0]} on the logits, after its head; freeze it, or {REMEDY}")
    if any(isinstance(module, nn.Dropout) and module._p_1 < 1 for module in head.module.modules()):
        raise InputError(f"{where} has dropout in its head, which would differ in each pass; set it to 0, or {REMEDY}")
    tokens = mx.linspace(0, head.vocabulary - 1, 8).astype(mx.int32).reshape(2, 4)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with _evaluating(head.model):
        logits = head.model(inputs)
        expected = nn.losses.cross_entropy(logits.astype(mx.float32), targets)
        found = _cross_entropy(head, head.hidden(inputs), targets, targets.size * head.vocabulary // 3)
    # GPUs multiply float32 with 10 bits unless told not to.
    error = max(8 * mx.finfo(logits.dtype).eps, 2.0**-10) * mx.maximum(mx.abs(logits).max(), 1)
    if not mx.all(mx.abs(found - expected) <= error):
        raise InputError(f"{where}: slice by slice, its loss is not what it is as a whole; {REMEDY}")
