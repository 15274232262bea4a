"""What the optimizers here share: they refuse before they write, and their state is stated beforehand or joined."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from cuda_ref import sharding
from cuda_ref.optimizers import checks
from ember_mlx.shared.errors import InputError

__all__ = ["CheckedOptimizer", "State", "WrappingOptimizer"]

State = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Name -> (shape, dtype)."""


class CheckedOptimizer(Optimizer):
    """An optimizer whose subclass says its state, its checks and its step.

    A subclass gives ``state_of(weight, group)``, all of it zeros at the start, and ``_step_weight(weight, group)``. It
    adds to ``_check_group``, which looks at a group's options, and gives ``_check_weight``, which looks at one weight.

    Weights may be sharded by rows, and ``_shards`` has their RowShards. State lies like the weight then, but for what
    ``whole_state_of(weight)`` names, which is the same on every rank. The ranks agree in the first step and after each
    change.
    """

    noun = "weight"  # what errors call a parameter
    options: tuple[str, ...]  # of a group
    kept: tuple[str, ...]  # attributes that a copy has too; those without a _ must be the same on all ranks
    optional_state: ClassVar[State] = {}  # what a saved state may have besides

    def __init__(self, params: ParamsT, defaults: dict[str, Any], implementation: str):
        checks.check_implementation(type(self).__name__, implementation)
        self.implementation = implementation
        self._shards = {}  # of the weights that are sharded
        self._agreed = False  # whether the ranks have been found to agree since the last change
        self._fitted = {}  # weight -> the shape and device that its state was found to fit
        super().__init__(params, defaults)

    def state_of(self, w: torch.Tensor, group: Mapping[str, Any]) -> State:
        """The state of a weight beside its ``step``, of all ranks."""
        raise NotImplementedError

    def whole_state_of(self, w: torch.Tensor) -> tuple[str, ...]:
        """The names of state that every rank has whole, where a weight is sharded."""
        return ()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As PyTorch's; nothing is added when InputError is raised."""
        self._agreed = False
        super().add_param_group(param_group)
        try:
            self._check_new_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every weight that has a gradient; returns what ``closure`` returns."""
        loss = checks.loss_of(closure)
        self._init_group()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    self._step_weight(w, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave, into any process; all state keeps its dtype, also that of 16-bit weights."""
        self._agreed = False  # also where this rank refuses: the others may not
        self._find_shards()
        saved = {}

        def check(_, state_dict):  # what the user's own hooks have made of it
            groups = self._groups_to_load(state_dict)
            saved.update(self._states_to_load(state_dict["state"], groups))
            return state_dict | {"param_groups": groups}

        def keep_dtypes(_):  # PyTorch has cast the state to the dtype of its weight
            for w, (state, wanted) in saved.items():
                self.state[w] = {
                    name: sharding.laid_out(state[name], dtype, w.device, self._shards_of(w, name))
                    for name, (_, dtype) in wanted.items()
                }
                self._fitted[w] = w.shape, w.device

        hooks = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(keep_dtypes, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def __getstate__(self):
        """Of a copy or a pickle; PyTorch's own leaves out what is not of every optimizer."""
        options = {name: getattr(self, name) for name in self.kept}
        return super().__getstate__() | options | {"_shards": {}, "_agreed": False, "_fitted": {}}

    # What is asked before anything is written

    def _init_group(self):
        """Check every group, then make the state of weights that have their first gradient.

        The name is PyTorch's: ``torch.compile`` runs a method of this name as it stands, once.
        """
        if self._agreed:
            self._check_step()
        else:
            self._agree()
        for _, w, group in self._named_weights():
            if w.grad is not None and not self.state[w]:
                for name, (shape, dtype) in self._wanted(w, group).items():
                    self.state[w][name] = sharding.zeros(shape, dtype, w.device, self._shards_of(w, name))
                self._fitted[w] = w.shape, w.device

    def _agree(self):
        """Find the sharded weights, and that all ranks are about to take the same step on them."""
        self._find_shards()
        facts = {name: getattr(self, name) for name in self.kept if not name.startswith("_")}
        fault = checks.fault_of(self._check_step)
        sharding.agree_on_step(self._shards, type(self).__name__, facts, self._facts_of, self._named_weights(), fault)
        self._agreed = True

    def _facts_of(self, w, group):
        """What must be the same on all ranks before a step of a weight, by name. Reads numbers back from the GPU."""
        state = self.state.get(w)
        facts = {"having a gradient": w.grad is not None, "the step": float(state["step"]) if state else 0.0}
        return facts | {option: checks.fact_of(group[option]) for option in self.options}

    def _find_shards(self):
        sharding.find_shards(self._shards, type(self).__name__, self.noun, (w for _, w, _ in self._named_weights()))

    def _shards_of(self, w, name):
        return None if name == "step" or name in self.whole_state_of(w) else self._shards.get(w)

    def _wanted(self, w, group) -> State:
        return {"step": ((), torch.float32)} | self.state_of(w, group)

    def _named_weights(self) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
        for number, group in enumerate(self.param_groups):
            for position, w in enumerate(group["params"]):
                yield f"{checks.name_of(group, position)} (group {number})", w, group

    def _check_step(self):
        for group in self.param_groups:
            self._check_group(group)
        for name, w, group in self._named_weights():
            if w.grad is not None:
                checks.check_gradient(type(self).__name__, self.noun, name, w)
                if self._fitted.get(w) != (w.shape, w.device) and self.state.get(w):
                    self._check_fit(name, w, group)
                    self._fitted[w] = w.shape, w.device

    def _check_fit(self, name, w, group):
        """Refuse a weight that was resized or moved away from its state: 8-bit moments may have the shape of both."""
        wanted, left = self._wanted(w, group), []
        for key, (shape, _) in wanted.items():
            found = self.state[w].get(key)
            if found is not None and (not self._has_shape(found, key, w, shape) or found.device != w.device):
                left.append(f"its {key} shape {tuple(found.shape)} on {found.device}")
        before = self._fitted.get(w, (w.shape,))[0]
        if before != w.shape and len(wanted) > 1:  # beside the number of steps
            left.append(f"its state is of shape {tuple(before)}")
        if left:
            raise self._error(
                f".step: {name} has shape {tuple(w.shape)} on {w.device}, and {left[0]}; resize or move the model "
                "before the first step, or make the optimizer anew"
            )

    def _has_shape(self, found, key, w, shape):
        """Whether state has its shape; of slices that no DTensor describes, rows of this rank are as good as all."""
        shards = self._shards_of(w, key)
        return tuple(found.shape) == shape or (
            shards is not None and shards.mesh is None and tuple(found.shape) == (len(w), *shape[1:])
        )

    def _check_new_group(self, group):
        self._check_group(group)

    def _check_group(self, group):
        checks.check_options(type(self).__name__, group)
        for number, w in enumerate(group["params"]):
            name = checks.name_of(group, number)
            self._check_weight(name, w)
            checks.check_device(type(self).__name__, self.implementation, name, w)

    def _check_weight(self, name, w):
        raise NotImplementedError

    def _groups_to_load(self, state_dict):
        """The groups of a state, checked beside those here."""
        checks.check_keys(type(self).__name__, state_dict)
        saved_groups = state_dict["param_groups"]
        saved, own = ([len(group["params"]) for group in groups] for groups in (saved_groups, self.param_groups))
        if saved != own:
            raise self._error(
                f".load_state_dict: the state is of groups of {saved} {self.noun}s, this optimizer has groups of "
                f"{own}: make it with the groups that were saved"
            )
        loaded = []
        for saved_group, group in zip(saved_groups, self.param_groups, strict=True):
            missing = [option for option in self.options if option not in saved_group]
            if missing:
                raise self._error(
                    f".load_state_dict: a group of the state has no {missing[0]}: load that of {type(self).__name__}"
                )
            loaded.append(self._group_to_load(saved_group, group))
            self._check_group(loaded[-1] | {"params": group["params"]})
        return loaded

    def _group_to_load(self, saved_group, group):
        return saved_group

    def _states_to_load(self, states, saved_groups):
        """Weight -> its saved state, and what of it is to be loaded."""
        found = {}
        for saved_group, group in zip(saved_groups, self.param_groups, strict=True):
            for i, w in zip(saved_group["params"], group["params"], strict=True):
                if state := states.get(i):
                    optional = {name: self.optional_state[name] for name in self.optional_state.keys() & state.keys()}
                    found[w] = state, self._wanted(w, group) | optional
                    self._check_state(w, *found[w])
        return found

    def _check_state(self, w, state, wanted):
        for name, (shape, dtype) in wanted.items():
            found = state.get(name)
            is_tensor = isinstance(found, torch.Tensor)
            if not is_tensor or not self._has_shape(found, name, w, shape) or found.dtype != dtype:
                has = f"{name} of shape {tuple(found.shape)} and {found.dtype}" if is_tensor else f"no tensor {name}"
                alike = " and sharded alike" if w in self._shards else ""
                raise self._error(
                    f".load_state_dict: the state has {has} for a {self.noun} of shape {tuple(w.shape)}, which needs "
                    f"shape {shape} and {dtype}: load the state of this model, made with these options{alike}"
                )
        for name in sorted(state.keys() - wanted.keys()):
            raise self._error(
                f".load_state_dict: the state has {name} for a {self.noun} of shape {tuple(w.shape)}, which needs no "
                f"{name}: load the state of this model, made by {type(self).__name__} with these options"
            )

    def _error(self, what):
        return InputError(f"{type(self).__name__}{what}")


class WrappingOptimizer(Optimizer):
    """An optimizer around others: its ``state_dict`` is joined from theirs, and hooks of it are called as PyTorch's.

    A subclass gives ``param_groups``, ``_joined_state()`` and ``_load_parts(state_dict)``.
    """

    def state_dict(self) -> dict[str, Any]:
        """The ordinary format of PyTorch, joined from what is inside."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        joined = self._joined_state()
        for hook in self._optimizer_state_dict_post_hooks.values():
            joined = hook(self, joined) or joined
        return joined

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave."""
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        checks.check_keys(type(self).__name__, state_dict)
        self._load_parts(state_dict)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)
