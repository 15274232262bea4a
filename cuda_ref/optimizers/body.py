"""What the optimizers of a model's body share: checked options, state that is stated beforehand, Adam for vectors."""

import reprlib
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from cuda_ref import sharded_weights, sharding, triton_kernels
from cuda_ref.optimizers.checks import DTYPES, by_triton, check_implementation, check_keys, fault_of, loss_of, name_of
from cuda_ref.optimizers.ember import bias_correction, update_second_moment
from ember_mlx.shared.errors import InputError
from ember_mlx.shared.float_formats import ROUNDS_TO_INFINITY, ROUNDS_TO_ONE, SMALLEST_NORMAL

__all__ = ["BodyOptimizer", "adamw_step"]

OPTIONS = ("lr", "betas", "eps", "weight_decay")  # of a group


def adamw_step(
    w: torch.Tensor,
    g: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    t: torch.Tensor,
    learning_rate: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step of AdamW (arXiv 1711.05101) in float32; returns the new ``w`` in its own dtype, ``m`` and ``v``."""
    g = g.to(torch.float32)
    m = update_second_moment(m, g, beta1)
    v = update_second_moment(v, torch.square(g), beta2)
    update = (m / bias_correction(t, beta1)) / (torch.sqrt(v / bias_correction(t, beta2)) + eps)
    new = (1 - learning_rate * weight_decay) * w.to(torch.float32) - learning_rate * update
    return new.to(w.dtype), m, v


class BodyOptimizer(Optimizer):
    """Weights of any shape, decoupled weight decay, ``betas`` and ``eps``; a subclass says its state and its step.

    A subclass gives ``state_of(parameter)``, name -> (shape, dtype), all of it zeros at the start, and
    ``step_weight(parameter, gradient, state, group, shards)``, which writes both. Vectors (norms, biases) get no weight
    decay unless ``decay_vectors``. ``implementation`` is as Ember's.

    Of a weight sharded by FSDP2, ``step_weight`` gets the rows here, and ``shards`` where other ranks have more. State
    lies like the weight, but for what ``whole_state_of(parameter)`` names, which is the same on every rank.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        decay_vectors: bool,
        implementation: str,
    ):
        check_implementation(type(self).__name__, implementation)
        self.decay_vectors = decay_vectors
        self.implementation = implementation
        self._shards = {}  # of the weights that are sharded
        self._agreed = False  # whether the ranks have been found to agree since the last change
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._agreed = False
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except InputError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every weight that has a gradient; returns what ``closure`` returns."""
        loss = loss_of(closure)
        self._init_group()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    state = self.state[w]
                    state["step"].add_(1)
                    (w, g, *of_state), shards = sharding.parts_here((w, w.grad, *state.values()), self._shards.get(w))
                    self.step_weight(w, g, dict(zip(state, of_state, strict=True)), group, shards)
        return loss

    def _init_group(self):
        """Check every group, before anything is written; make the state of weights that have their first gradient.

        The name is PyTorch's: ``torch.compile`` runs a method of this name as it stands, once.
        """
        if self._agreed:
            self._check_step()
        else:
            self._agree()
        for _, w in self._named_weights():
            if w.grad is not None and not self.state[w]:
                self.state[w]["step"] = torch.zeros((), dtype=torch.float32, device=w.device)
                for name, (shape, dtype) in self.state_of(w).items():
                    self.state[w][name] = sharded_weights.zeros(shape, dtype, w.device, self._shards_of(w, name))

    def _agree(self):
        """Find the sharded weights, and that all ranks are about to take the same step on them."""
        self._find_shards()
        facts = {name: getattr(self, name) for name in self.kept if not name.startswith("_")}
        for number, group in enumerate(self.param_groups):
            for option in OPTIONS:
                value = float(group[option]) if isinstance(group[option], torch.Tensor) else group[option]
                facts[f"{option} of group {number}"] = value
        weights = [(name, w, self.state.get(w)) for name, w in self._named_weights()]
        sharded_weights.agree_on_step(self._shards, type(self).__name__, facts, weights, fault_of(self._check_step))
        self._agreed = True

    def _find_shards(self):
        sharded_weights.find_shards(self._shards, type(self).__name__, (w for _, w in self._named_weights()))

    def _check_step(self):
        for group in self.param_groups:
            self._check_group(group)
        for name, w in self._named_weights():
            self._check_gradient(name, w)

    def _named_weights(self):
        for number, group in enumerate(self.param_groups):
            for position, w in enumerate(group["params"]):
                yield f"{name_of(group, position)} (group {number})", w

    def whole_state_of(self, w: torch.Tensor) -> tuple[str, ...]:
        """The names of state that every rank has whole, where a parameter is sharded."""
        return ()

    def _shards_of(self, w, name):
        return None if name == "step" or name in self.whole_state_of(w) else self._shards.get(w)

    def weight_decay_of(self, w: torch.Tensor, group: dict[str, Any]) -> float:
        """The weight decay of a parameter: zero for vectors, unless they are to decay."""
        return group["weight_decay"] if w.ndim > 1 or self.decay_vectors else 0.0

    def by_triton(self, w: torch.Tensor) -> bool:
        """Whether the kernels take this weight."""
        return by_triton(self.implementation, w)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave; all state keeps its dtype, also that of weights of 16 bits."""
        self._agreed = False  # also where this rank refuses: the others may not
        self._find_shards()
        check_keys(type(self).__name__, state_dict)
        saved_groups = state_dict["param_groups"]
        sizes = [[len(group["params"]) for group in groups] for groups in (saved_groups, self.param_groups)]
        if sizes[0] != sizes[1]:
            raise self._error(
                f".load_state_dict: the state is of groups of {sizes[0]} weights, this optimizer has groups of "
                f"{sizes[1]}: make it with the groups that were saved"
            )
        found = {}
        for saved_group, group in zip(saved_groups, self.param_groups, strict=True):
            missing = [option for option in OPTIONS if option not in saved_group]
            if missing:
                raise self._error(f".load_state_dict: a group of the state has no {missing[0]}: load this optimizer's")
            self._check_group(saved_group | {"params": group["params"]})
            for i, w in zip(saved_group["params"], group["params"], strict=True):
                if state := state_dict["state"].get(i):
                    self._check_state(w, state)
                    found[w] = state
        super().load_state_dict(state_dict)
        for w, state in found.items():  # PyTorch has cast it to the dtype of its parameter
            wanted = {"step": torch.float32} | {name: dtype for name, (_, dtype) in self.state_of(w).items()}
            self.state[w] = {
                name: sharded_weights.laid_out(state[name], dtype, w.device, self._shards_of(w, name))
                for name, dtype in wanted.items()
            }

    def __getstate__(self):
        """Of a copy or a pickle; PyTorch's own leaves out what is not of every optimizer."""
        options = {name: value for name, value in self.__dict__.items() if name in self.kept}
        return super().__getstate__() | options | {"_shards": {}, "_agreed": False}

    kept = ("decay_vectors", "implementation")  # options of the optimizer, not of its groups

    def _check_state(self, w, state):
        for name, (shape, dtype) in ({"step": ((), torch.float32)} | self.state_of(w)).items():
            found = state.get(name)
            if not isinstance(found, torch.Tensor) or tuple(found.shape) != shape or found.dtype != dtype:
                is_tensor = isinstance(found, torch.Tensor)
                has = f"{name} of shape {tuple(found.shape)} and {found.dtype}" if is_tensor else f"no tensor {name}"
                raise self._error(
                    f".load_state_dict: the state has {has} for a weight of shape {tuple(w.shape)}, which needs shape "
                    f"{shape} and {dtype}: load the state of this model, made with these options{self._ranks_of(w)}"
                )

    def _ranks_of(self, w):
        return " and sharded alike" if w in self._shards else ""

    def _check_group(self, group):
        lr, betas = group["lr"], group["betas"]
        if isinstance(lr, torch.Tensor):
            if lr.ndim or not lr.is_floating_point():
                raise self._error(f"(lr=...): a tensor of shape {tuple(lr.shape)} and {lr.dtype}: must be one float")
        else:
            self._check("lr", lr, 0, "zero or more and finite in float32")
        self._check("weight_decay", group["weight_decay"], 0, "zero or more and finite in float32")
        self._check("eps", group["eps"], SMALLEST_NORMAL, "a positive number, usually 1e-8")
        in_range = isinstance(betas, tuple | list) and len(betas) == 2
        if not in_range or not all(isinstance(beta, Real) and 0 <= beta < ROUNDS_TO_ONE for beta in betas):
            raise self._error(
                f"(betas={reprlib.repr(betas)}): must be two numbers from 0 to below 1, in float32 too, "
                "usually (0.9, 0.999)"
            )
        for number, w in enumerate(group["params"]):
            if w.dtype not in DTYPES or not w.numel():
                raise self._error(
                    f": {name_of(group, number)} has shape {tuple(w.shape)} and dtype {w.dtype}; it takes weights with "
                    "elements, in float32, bfloat16 or float16: freeze this parameter"
                )
            if self.implementation == "triton" and not triton_kernels.available(w.device):
                raise self._error(
                    f"(implementation='triton'): {name_of(group, number)} is on {w.device}, and Triton needs a CUDA "
                    "device: move the model there before, or take 'auto'"
                )

    def _check_gradient(self, name, w):
        g = w.grad
        if g is not None and (g.layout != torch.strided or g.dtype not in DTYPES or g.shape != w.shape):
            raise self._error(
                f": the gradient of {name} has layout {g.layout}, dtype {g.dtype} and shape {tuple(g.shape)}: must be "
                f"dense, in float32, bfloat16 or float16, of the weight's shape {tuple(w.shape)}"
            )
        if g is not None and sharding.is_dtensor(w) and (w.device_mesh, w.placements) != (g.device_mesh, g.placements):
            raise self._error(
                f": {name} has the placements {w.placements} and its gradient {g.placements}: both must be the same, "
                "as fully_shard leaves them"
            )

    def _check(self, name, value, least, in_words):
        if not isinstance(value, Real) or not least <= value < ROUNDS_TO_INFINITY:
            raise self._error(f"({name}={value!r}): must be {in_words}")

    def _error(self, what):
        return InputError(f"{type(self).__name__}{what}")
