"""What a streamed step asks of a model: the input of its head, and its layers one by one for several micro-batches.

Gradients of micro-batches are added up layer by layer. The input of each layer is cut from what made it. So the
backward pass goes through one layer for all micro-batches, and the weights of that layer are stepped before the next.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ember_mlx.shared.errors import InputError

__all__ = ["CutLayers", "head_input", "layers_of", "makes_the_logits"]


def head_input(head: nn.Module, model: nn.Module, input_ids: Tensor, inputs: dict[str, Any]) -> Tensor:
    """What the model gives to its head, (B, T, D); the head itself does not run."""
    reached = []

    def stop(_, arguments):
        reached.append(arguments[0])
        raise _HeadReachedError

    handle = head.register_forward_pre_hook(stop)
    try:
        model(input_ids, **inputs)
    except _HeadReachedError:
        return reached.pop()
    finally:
        handle.remove()


def makes_the_logits(head: nn.Linear, model: nn.Module) -> bool:
    """Whether the model's logits are what the head gives; six tokens are run, and no random number is spent."""
    given = []
    handle = head.register_forward_hook(lambda _, arguments, output: given.append(output))
    devices = [head.weight.device] if head.weight.is_cuda else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            output = model(torch.arange(1, 7, device=head.weight.device)[None] % len(head.weight))
    finally:
        handle.remove()
    logits = output if isinstance(output, Tensor) else output.logits
    return len(given) == 1 and given[0].shape == logits.shape and torch.equal(given[0], logits)


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The list of layers that holds most of the model's numbers; an empty one where there is none."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=nn.ModuleList())


class CutLayers:
    """The layers of a model for one step by several micro-batches.

    Run the model for each inside ``cut()``, giving ``end_run()`` what it came to; then differentiate that of each run,
    which goes as far as the last layer; then ``backward`` goes on from there.

    Raises:
        InputError: (a ``ValueError``) for a model without a ``nn.ModuleList`` of layers; in a run, for layers that are
            not called once each in one order, that take more than their hidden states that needs a gradient, or whose
            input is used beside them, as by a residual that the model adds.
    """

    def __init__(self, model: nn.Module):
        self._layers = layers_of(model)
        if not len(self._layers):
            raise _error(f"{type(model).__name__} has no nn.ModuleList of layers")
        self._runs, self._cuts = [], []

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Within, every layer takes a leaf in the place of its hidden states."""
        layers = list(self._layers)
        try:
            for number, layer in enumerate(layers):
                self._layers[number] = _CutLayer(layer, self._cuts)
            yield
        finally:
            for number, layer in enumerate(layers):
                self._layers[number] = layer

    def end_run(self, output: Tensor) -> None:
        """The run of one micro-batch is over; ``output`` is what will be differentiated."""
        run = self._cuts.copy()
        self._cuts.clear()
        order = [cut.layer for cut in run]
        if not run or len(set(order)) < len(order) or (self._runs and order != [c.layer for c in self._runs[0]]):
            raise _error("its layers are not called once each, in one order")
        if not self._runs and _share_a_node([*(cut.hidden for cut in run), output]):
            raise _error("the input of a layer is used again beside it, as by a residual outside")
        self._runs.append(run)

    def backward(self, step: Callable[[Iterable[nn.Parameter]], None]) -> None:
        """From the last layer, which has its gradients, to what is before the first.

        ``step`` gets the parameters of a layer when their gradients are those of all micro-batches.
        """
        first_user = {}
        for number, cut in enumerate(self._runs[0]):
            for p in cut.layer.parameters():
                first_user.setdefault(p, number)
        while self._runs[0]:
            number = len(self._runs[0]) - 1
            step([p for p, user in first_user.items() if user == number])
            for run in self._runs:
                cut = run.pop()
                if cut.leaf.grad is not None:
                    cut.hidden.backward(cut.leaf.grad)


class _Cut(NamedTuple):
    layer: nn.Module
    hidden: Tensor  # as it was made
    leaf: Tensor  # as the layer took it


class _CutLayer(nn.Module):
    """A layer whose hidden states come as a leaf; the model may read any attribute of the layer."""

    def __init__(self, layer, cuts):
        super().__init__()
        self.layer, self._cuts = layer, cuts

    def forward(self, hidden, *arguments, **options):
        if any(tensor.requires_grad for tensor in _tensors([*arguments, *options.values()])):
            raise _error(f"{type(self.layer).__name__} takes more than its hidden states that needs a gradient")
        leaf = hidden.detach().requires_grad_(hidden.requires_grad)
        self._cuts.append(_Cut(self.layer, hidden, leaf))
        return self.layer(leaf, *arguments, **options)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


class _HeadReachedError(Exception):
    """The model's run came to its head, which is not to be called."""


def _tensors(values):
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _share_a_node(tensors):
    """Whether the graphs of tensors meet before their leaves: one backward pass would free what another needs."""
    seen = set()
    for tensor in tensors:
        of_this, ahead = set(), [tensor.grad_fn]
        while ahead:
            node = ahead.pop()
            if node is None or node in of_this or hasattr(node, "variable"):  # which a leaf's node has
                continue
            if node in seen:
                return True
            of_this.add(node)
            ahead += [following for following, _ in node.next_functions]
        seen |= of_this
    return False


def _error(why):
    return InputError(
        f"StreamedBackward.accumulate: {why}; gradients cannot be added up layer by layer. Give all sequences in one "
        "call, with gradient checkpointing"
    )
