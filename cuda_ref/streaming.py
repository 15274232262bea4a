"""A training step that never holds all gradients: each weight is stepped inside the backward pass.

``register_post_accumulate_grad_hook``, PyTorch's own mechanism, steps each weight of the body and frees its gradient as
soon as it is there, last layer first. Of a head and an embedding under Ember, rows are stepped in blocks.
"""

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from cuda_ref import streamed_tables
from cuda_ref.optimizers import Ember
from cuda_ref.streamed_model import CutLayers, head_input, makes_the_logits
from cuda_ref.streamed_optimizer import alone, check_parameter, sides_of
from cuda_ref.streamed_ranks import Ranks, Units
from cuda_ref.token_tables import find_token_tables
from ember_mlx.shared.ember_options import check_switch
from ember_mlx.shared.errors import InputError

__all__ = ["StreamedBackward", "next_token_loss"]

IGNORED = -100  # the label of a token that does not count, as in Hugging Face's models
SHARE_OF_LOGITS = 8  # logits are kept between the passes over a head up to this part of the weights


def next_token_loss(model: nn.Module, input_ids: Tensor, labels: Tensor | None = None, **inputs: Any) -> Tensor:
    """The mean cross entropy of each next token, float32, in which a label of -100 does not count; logits are whole."""
    output = model(input_ids, **inputs)
    logits = output if isinstance(output, Tensor) else output.logits
    targets = (input_ids if labels is None else labels)[:, 1:]
    return cross_entropy(logits[:, :-1].flatten(0, 1).to(torch.float32), targets.flatten(), ignore_index=IGNORED)


class StreamedBackward:
    """Forward, backward and update in one call, in little more memory than weights, optimizer state and activations.

    Make it after freezing, adapters and the optimizer. Learning rate schedulers step after each call, as ever. After a
    call no parameter has a gradient. A call that is interrupted leaves some of the weights stepped.

    Args:
        model (nn.Module): The model; it takes token ids (B, T) first and returns logits or an output with ``.logits``.
        optimizer (Optimizer): One of ``torch.optim`` or ``cuda_ref`` that looks at one array at a time, or a
            :class:`cuda_ref.PairedOptimizer` of such. Only tables under :class:`cuda_ref.Ember` have no whole gradient.
        loss (callable, optional): ``loss(model, *batch)`` returns a scalar. Logits and table gradients are then whole.
            Default: the next token's cross entropy, of which neither is.
        keep_logits (bool, optional): Keep the logits between the passes over the head. Default: by their size.
        block_rows (int, optional): Rows of the head at a time. Default: by its size.
        group (ProcessGroup, optional): Of several ranks, each with its own rows of a batch. It is then one step with
            all rows: gradients are summed unit by unit before each update. All start with rank 0's weights.

    Attributes:
        refused (tuple of str): What was not finite in the last call: ``"loss"``, and nothing has changed, or the
            weights that were not stepped for their gradients, that nearest to the loss first. Empty in a good step.
        nonfinite_steps (int): Calls so far in which something was not.
        notes (list of str): In which ways this model takes more memory than others.

    Gradients of several micro-batches add up in :meth:`accumulate`. There is no ``clip_grad_norm_`` or ``GradScaler``:
    gradients never stand beside each other. Step hooks of the optimizers run once a weight.

    Raises:
        InputError: (a ``ValueError``) for an optimizer that needs all gradients at once, a trainable parameter that the
            optimizer lacks, a DTensor (FSDP2), a head under Ember that cannot be cut, and an option that has no effect.
            In a call for autocast, ``no_grad``, gradients that are there already and labels out of range; nothing is
            written then.

    Example:
        >>> optimizer = PairedOptimizer(model, tables=partial(Ember, lr=1e-4), rest=partial(SGD, lr=1e-2))
        >>> streamed = StreamedBackward(model, optimizer)
        >>> for input_ids, labels in batches:
        ...     loss = streamed(input_ids, labels)
        ...     scheduler.step()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: Callable[..., Tensor] | None = None,
        *,
        keep_logits: bool | None = None,
        block_rows: int | None = None,
        group: "torch.distributed.ProcessGroup | None" = None,
    ):
        if not isinstance(model, nn.Module) or isinstance(model, nn.parallel.DistributedDataParallel):
            raise InputError(
                f"StreamedBackward(model={type(model).__name__}): must be a torch.nn.Module on one device, not "
                "wrapped: of a DistributedDataParallel give its .module, and group="
            )
        check_switch("StreamedBackward", "keep_logits", keep_logits, or_none=True)
        self.model, self.optimizer = model, optimizer
        self.refused, self.nonfinite_steps, self.notes = (), 0, []
        self._loss, self._block_rows = loss or next_token_loss, block_rows
        self._side_of = sides_of(optimizer)
        self._names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        for p, name in self._names.items():
            check_parameter(name, p, self._side_of)
        self._head = None if loss else self._find_head()
        if self._head is None and (keep_logits is not None or block_rows is not None):
            why = self.notes[-1] if self.notes else "the logits are those of the caller's own loss"
            given = f"keep_logits={keep_logits}, block_rows={block_rows}"
            raise InputError(f"StreamedBackward({given}): no effect: {why}; leave them out")
        self._embeddings = [] if loss else self._find_embeddings()
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        self._device = next(model.parameters(), torch.empty(0)).device
        self._ranks = Ranks(group)
        self._ranks.share_model(model)
        by_rows = {id(x) for x in (*(m.weight for m in self._embeddings), *(self._head or nn.Identity()).parameters())}
        self._units = Units(self._ranks, model, [p for p in self._names if id(p) not in by_rows])
        self._keep_bytes = {None: weights // SHARE_OF_LOGITS, True: 2**62, False: 0}[keep_logits]

    def __call__(self, *batch: Any, **inputs: Any) -> Tensor:
        """One step; ``input_ids, labels=None, **inputs of the model``, or what ``loss`` takes. Returns the loss, ()."""
        return self._step([(batch, inputs)])

    def accumulate(self, micro_batches: Iterable[tuple[Any, ...]]) -> Tensor:
        """One step by several micro-batches as if they were one batch, in the memory of one layer's gradients.

        The backward pass takes each layer for all micro-batches before the next, so gradients are added up exactly and
        nowhere kept. Activations of all are there: with gradient checkpointing only the inputs of the layers.

        Args:
            micro_batches (iterable): Of each a tuple of what a call takes, inputs of the model as a dict at its end.

        Returns:
            Tensor: (), the mean over all tokens that count; with a ``loss`` of one's own, of the losses.
        """
        batches = [(each[:-1], each[-1]) if isinstance(each[-1], dict) else (each, {}) for each in micro_batches]
        if not batches:
            raise InputError("StreamedBackward.accumulate: there is no micro-batch: give one or more")
        return self._step(batches, CutLayers(self.model))

    def _step(self, batches, layers=None):
        self._check_call()
        for side in {id(side): side for side, _ in self._side_of.values() if isinstance(side, Ember)}.values():
            streamed_tables.make_state(side)
        refused = []
        self._units.begin(lambda p: self._step_parameter(p, refused))
        with self._gradients_freed(), layers.cut() if layers else self._each_stepped_in_backward():
            loss = (self._cut_step if self._head else self._whole_step)(refused, batches, layers)
        self.refused = tuple(refused)
        self.nonfinite_steps += bool(refused)
        self.optimizer._opt_called = True  # what learning rate schedulers ask, lest they warn
        return loss

    def _whole_step(self, refused, batches, layers):
        losses = []
        with self._look_ups() as looked_up:
            shares = self._shares(batches)
            for (batch, inputs), share in shares or ():
                loss = self._loss(self.model, *batch, **inputs) * share
                losses.append(loss.detach())
                if not bool(torch.isfinite(loss)):
                    break
                if layers:
                    layers.end_run(loss)
                    loss.backward()  # as far as the last layer, before the logits of the next
        if shares is None:
            refused.append("loss")
            return torch.tensor(torch.nan)
        value = self._ranks.sum(torch.stack(losses).sum() if losses else torch.zeros((), device=self._device))
        if not bool(torch.isfinite(value)):
            refused.append("loss")
            return value
        if layers:
            self._go_on_backwards(layers)
        elif losses:
            loss.backward()
        self._units.finish()
        self._step_embeddings(looked_up, refused)
        return value

    def _shares(self, batches):
        """Pairs of a micro-batch and the part of the loss that it is; None where no token of any rank counts."""
        counts = [1] * len(batches)
        if self._loss is next_token_loss:
            counts = [int((_tokens(*batch, **inputs)[1][:, 1:] != IGNORED).sum()) for batch, inputs in batches]
        total = self._ranks.count(sum(counts), None, self._device)
        pairs = zip(batches, counts, strict=True)
        return [(batch, count / total) for batch, count in pairs if count] if total else None

    def _cut_step(self, refused, batches, layers):
        module, weight, bias = self._head, self._head.weight, self._head.bias
        outputs, targets = [], []
        with self._look_ups() as looked_up:
            for batch, inputs in batches:
                input_ids, labels, inputs = _tokens(*batch, **inputs)
                outputs.append(head_input(module, self.model, input_ids, inputs))
                targets.append(labels[:, 1:].reshape(-1))
                if layers:
                    layers.end_run(outputs[-1])
        counts = [of_one != IGNORED for of_one in targets]
        used = [h.detach()[:, :-1].flatten(0, 1)[count] for h, count in zip(outputs, counts, strict=True)]
        used, targets = torch.cat(used), torch.cat(targets)[torch.cat(counts)]
        count = self._ranks.count(len(targets), streamed_tables.fault_of(weight, used, targets), used.device)
        if not count:
            refused.append("loss")
            return torch.full((), torch.nan, device=used.device)
        trains = weight in self._names or bias in self._names
        keep = trains and used.shape[0] * len(weight) * used.element_size() <= self._keep_bytes
        summed = self._ranks.sum if self._ranks.several else None
        head = streamed_tables.forward_head(weight, bias, used, targets, keep, self._block_rows, count, summed)
        head.loss = self._ranks.sum(head.loss)
        if not bool(torch.isfinite(head.loss)):
            refused.append("loss")
            return head.loss
        of_bias = streamed_tables.bias_gradient(weight, bias, head) if bias in self._names else None
        tied = any(module.weight is weight for module in self._embeddings)
        if weight in self._names and not tied:
            self._step_head(head, None, refused)
        if outputs[0].requires_grad:
            cotangents = head.by_hidden.split([int(count.sum()) for count in counts])
            if not tied:
                head = _only_loss(head)
            while outputs:
                _differentiate(outputs.pop(0), counts.pop(0), cotangents[0])
                cotangents = cotangents[1:]
            if layers:
                self._go_on_backwards(layers)
        self._units.finish()
        self._step_embeddings(looked_up, refused, head if tied else None)
        if of_bias is not None:
            bias.grad = of_bias
            self._step_parameter(bias, refused)
        return head.loss

    def _go_on_backwards(self, layers):
        """Through the cut layers; then step what is in none of them."""

        def step(parameters):
            for p in parameters:
                if p in self._names and p.grad is not None:
                    self._units.arrived(p)

        layers.backward(step)
        step(self._names)

    # Weights of the body

    @contextmanager
    def _each_stepped_in_backward(self):
        handles = [p.register_post_accumulate_grad_hook(self._units.arrived) for p in self._names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _gradients_freed(self):
        try:
            yield
        finally:
            for p in self._names:
                p.grad = None

    def _step_parameter(self, p, refused):
        """Step one weight by its gradient, if that is finite, and free it."""
        wide = torch.promote_types(p.dtype, torch.float32)
        if bool(torch.isfinite(torch.linalg.vector_norm(p.grad, dtype=wide))):
            side, group = self._side_of[p]
            with alone(side, group, p):
                side.step()
        else:
            refused.append(self._names[p])
        p.grad = None

    # Token tables

    def _step_head(self, head, looked_up, refused):
        weight, bias = self._head.weight, self._head.bias
        means = streamed_tables.head_mean_squares(weight, bias, head, looked_up)
        rule = streamed_tables.second_moments(*self._ember_of(weight), *means)
        if rule is None:
            refused.append(self._names[weight])
        else:
            streamed_tables.step_head(weight, bias, head, rule, looked_up)

    def _step_embeddings(self, looked_up, refused, head=None):
        for module, calls in looked_up.items():
            weight = module.weight
            calls = [(ids, leaf.grad) for ids, leaf in calls if leaf.grad is not None]
            rows = streamed_tables.add_up_rows(calls, module.padding_idx) if calls else streamed_tables.no_rows(weight)
            rows = self._ranks.all_rows(*rows)
            if head is not None and weight is self._head.weight:
                self._step_head(head, rows, refused)
            elif len(rows[0]):
                means = streamed_tables.mean_squares_of_rows(*rows, len(weight))
                rule = streamed_tables.second_moments(*self._ember_of(weight), *means)
                if rule is None:
                    refused.append(self._names[weight])
                else:
                    decays = bool(self._side_of[weight][1]["weight_decay"])
                    streamed_tables.step_rows(weight, *rows, rule, decays)

    def _ember_of(self, weight):
        side, group = self._side_of[weight]
        return side, weight, group

    @contextmanager
    def _look_ups(self):
        """Each call of a streamed embedding: module -> list of its ids and a leaf that gets the gradient."""
        calls = {module: [] for module in self._embeddings}

        def cut(module, arguments, output):
            leaf = output.detach().requires_grad_()
            calls[module].append((arguments[0], leaf))
            return leaf.clone()  # which the model may write to

        handles = [module.register_forward_hook(cut) for module in self._embeddings]
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    # What is where

    def _find_head(self):
        """The head's module, where its loss is made in blocks; None where its logits are whole."""
        tables = [table for table in find_token_tables(self.model) if table.role in ("head", "tied")]
        if not tables:
            self.notes.append("no head was found: the logits are whole")
            return None
        path, parameters = tables[-1].path, dict(self.model.named_parameters())
        weight = parameters[path]
        if weight in self._names and not self._by_ember(weight):
            self.notes.append(f"{path} is not trained by Ember: its gradient and the logits are whole")
            return None
        modules = [m for m in self.model.modules() if type(m) is nn.Linear and m.weight is weight]
        looks_up = [m for m in self.model.modules() if isinstance(m, nn.Embedding) and m.weight is weight]
        if len(modules) != 1 or len(tables) > 1:
            fault = f"{path} is not the weight of just one nn.Linear, as the only head"
        elif any(not _is_plain(module) for module in looks_up):
            fault = f"its tied embedding is no plain nn.Embedding but {type(looks_up[0]).__name__}"
        elif not makes_the_logits(modules[0], self.model):
            fault = "the model does something to its logits, or does not call it once"
        else:
            return modules[0]
        raise InputError(
            f"StreamedBackward: the head of {type(self.model).__name__} cannot be cut: {fault}; pass "
            "loss=cuda_ref.streaming.next_token_loss, which takes the memory of the logits and of its gradient"
        )

    def _find_embeddings(self):
        """Modules whose weight Ember steps by looked-up rows."""
        plain = [m for m in self.model.modules() if isinstance(m, nn.Embedding) and m.weight in self._names]
        plain = [m for m in plain if _is_plain(m) and self._by_ember(m.weight)]
        used = [m.weight for m in self.model.modules() if isinstance(m, nn.Module) and hasattr(m, "weight")]
        return [
            m
            for m in plain
            if sum(w is m.weight for w in used) == 1 + (self._head is not None and self._head.weight is m.weight)
        ]

    def _by_ember(self, weight):
        return isinstance(self._side_of[weight][0], Ember)

    def _check_call(self):
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            raise InputError("StreamedBackward: called under no_grad or inference_mode: call it outside")
        device = next(iter(self._names), torch.empty(0)).device.type
        if torch.is_autocast_enabled(device):
            raise InputError("StreamedBackward: called under autocast: convert the model, model.to(torch.bfloat16)")
        for p, name in self._names.items():
            if p.grad is not None:
                raise InputError(
                    f"StreamedBackward: {name} has a gradient already; it makes and applies all of them itself: "
                    "call optimizer.zero_grad() before, no loss.backward(), and accumulate() for micro-batches"
                )


def _is_plain(module):
    return type(module) is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq


def _tokens(input_ids, labels=None, **inputs):
    """Ids and labels, both (B, T), and what else the model takes."""
    return input_ids, input_ids if labels is None else labels, inputs


def _differentiate(hidden, counts, cotangent):
    """Go back from hidden states (B, T, D) by the loss's gradient of the tokens that count, (N, D)."""
    of_all = torch.zeros_like(hidden[:, :-1].flatten(0, 1))
    of_all[counts] = cotangent
    hidden.backward(nn.functional.pad(of_all.unflatten(0, (hidden.shape[0], -1)), (0, 0, 0, 1)))


def _only_loss(head):
    """Without what the other passes needed."""
    return streamed_tables.HeadPass(head.loss, *[None] * 4, [], [], head.count)
