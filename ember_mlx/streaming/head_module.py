"""The head of a model as a function of some rows of it, and what the model does to the logits after it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ember_mlx.shared.errors import InputError
from ember_mlx.streaming.units import calls_go_to
from ember_mlx.token_tables import find_token_tables

__all__ = ["Head", "check_after", "evaluating", "find_head"]


class Head:
    """The module that turns hidden states into logits, and what the model does to the logits after it.

    Args:
        model (Module): The model.
        module (Module): The head, with V = ``vocabulary`` rows; ``method`` is how the model calls it.
    """

    def __init__(self, model: nn.Module, module: nn.Module, method: str, vocabulary: int):
        self.model = model
        self.module = module
        self.method = method
        self.vocabulary = vocabulary
        some = mx.zeros((1, 1, vocabulary))
        self.is_last = self.after(some) is some

    def hidden(self, inputs: mx.array) -> mx.array:
        """What goes into the head, (B, T, D): the model is run up to there."""

        def stop(_path, _own_call, arguments, _keywords):
            raise _ReachedError(*arguments)

        with calls_go_to({"head": self.module}, stop, self.method):
            try:
                self.model(inputs)
            except _ReachedError as reached:
                return reached.args[0]
        raise NotCalledError

    def after(self, logits: mx.array) -> mx.array:
        """What the model makes of the logits, such as a soft cap: it is run on one token, with these for the head's.

        All before the head is then for nothing, and lazy: MLX never computes it.
        """
        answered = []

        def answer(*call):
            answered.append(call)
            return logits

        # In training mode dropout would draw from the random state, for nothing too.
        with evaluating(self.model), calls_go_to({"head": self.module}, answer, self.method):
            output = self.model(mx.array([[0]]))
        if len(answered) != 1:
            raise NotCalledError
        return output

    def logits(self, hidden: mx.array, rows: list[mx.array], first: int, last: int) -> mx.array:
        """The model's logits of the words from ``first`` to before ``last``, (B, T, last - first) float32.

        ``rows`` are what of the trainable weights belongs to these words.
        """
        names, arrays = zip(*tree_flatten(self.module.parameters()), strict=True)
        now = dict(zip(names, self.rows(arrays, first, last), strict=True))
        trainable = [name for name, _ in tree_flatten(self.module.trainable_parameters())]
        logits = self.raw_logits(hidden, now | dict(zip(trainable, rows, strict=True)))
        return (logits if self.is_last else self.after(logits)).astype(mx.float32)

    def raw_logits(self, hidden: mx.array, parameters: dict[str, mx.array]) -> mx.array:
        """What the module makes of ``hidden`` with these parameters, by name, for its own: some rows of each."""
        own = self.module.parameters()
        self.module.update(tree_unflatten(list(parameters.items())))
        try:
            return getattr(self.module, self.method)(hidden)
        finally:
            self.module.update(own)

    def weights(self) -> list[mx.array]:
        """Those that train."""
        return [weight for _, weight in tree_flatten(self.module.trainable_parameters())]

    def axis(self, array: mx.array) -> int | None:
        """The axis of a parameter that runs over the vocabulary: the first, the last (lora_b), or None (lora_a)."""
        return next((axis for axis in (0, -1) if array.ndim and array.shape[axis] == self.vocabulary), None)

    def index(self, array: mx.array, words: slice | mx.array) -> object:
        """What takes these words, or the words of these ids, out of a parameter."""
        return {0: words, -1: (..., words), None: ...}[self.axis(array)]

    def rows(self, arrays: list[mx.array], first: int, last: int) -> list[mx.array]:
        """Of each parameter, what belongs to these words."""
        return [array[self.index(array, slice(first, last))] for array in arrays]

    def joined(self, weight: mx.array, gradients: Sequence[mx.array]) -> mx.array:
        """The gradient of a weight from those of its slices; every slice adds to that of lora_a."""
        axis = self.axis(weight)
        if axis is not None:
            return mx.concatenate(gradients, axis)
        return sum(gradient.astype(mx.float32) for gradient in gradients).astype(weight.dtype)


class _ReachedError(Exception):
    """The model's forward pass came to its head, with these hidden states."""


class NotCalledError(Exception):
    """The model's forward pass did not call its head once."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, the model is in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def find_head(model: nn.Module) -> Head:
    """The head among the model's token tables: the one that a forward pass calls.

    Raises:
        InputError: for a model whose head is no module, or is not called once.
    """
    modules = dict(model.named_modules())
    for table in find_token_tables(model):
        wrapper = table.module_path.rpartition(".")[0]
        path = wrapper if "lora_a" in modules.get(wrapper, {}) else table.module_path
        method = {"head": "__call__", "tied": "as_linear"}.get(table.role)
        if method and path and hasattr(modules[path], method):
            try:
                return Head(model, modules[path], method, table.shape[0])
            except NotCalledError:
                continue
    raise InputError(
        f"the head of {type(model).__module__} is no module that its forward pass calls once, so the hidden states "
        "before it cannot be had"
    )


def check_after(head: Head) -> None:
    """Refuse a model for which slices of the vocabulary would give another loss or other gradients than the whole."""
    name = type(head.model).__module__
    if not head.is_last:
        rising = mx.linspace(-40, 40, head.vocabulary).reshape(1, 1, -1)
        if not mx.array_equal(head.after(rising), head.after(rising[..., ::-1])[..., ::-1]):
            raise InputError(f"{name} does not treat the logits of all words alike after its head")
        _, gradients = nn.value_and_grad(head.model, lambda _: head.after(rising).sum())(head.model)
        trained = [name for name, gradient in tree_flatten(gradients) if mx.any(gradient != 0)]
        if trained:
            raise InputError(f"{name} trains {trained[0]} on the logits, after its head; freeze it")
    if any(isinstance(module, nn.Dropout) and module._p_1 < 1 for module in head.module.modules()):
        raise InputError(f"{name} has dropout in its head, which would differ in each pass; set it to 0")
