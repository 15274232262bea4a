"""The implementations of Ember by name, each behind the same few calls, and why one is not here.

Neither MLX nor PyTorch is imported before `implementations` is called. What runs are the public classes,
``ember_mlx.Ember`` and ``cuda_ref.Ember``. NumPy goes in and out: 16-bit values travel as float32, which holds them all
exactly.
"""

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from ember_mlx.shared.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["Implementation", "Stepped", "Tables", "Weights", "implementations", "listed", "select"]


class Stepped(NamedTuple):
    """What one step made, in float64: r (V,), c (D,), the step that it took from zeros (V, D), the weights (V, D)."""

    r: np.ndarray
    c: np.ndarray
    step: np.ndarray
    w: np.ndarray

    @classmethod
    def of(cls, together: np.ndarray, shape: tuple[int, int]) -> "Stepped":
        """From all float32 numbers in one row: to wait for a GPU once a step, and not for each of them."""
        rows, columns = shape
        r, c, step, w = np.split(together.astype(np.float64), np.cumsum([rows, columns, rows * columns]))
        return cls(r, c, step.reshape(shape), w.reshape(shape))


class Tables(Protocol):
    """Two tables of one shape and dtype in one optimizer: the first is zeros at every step, the other gets weights."""

    def start(self) -> None:
        """Forget all steps."""

    def step(self, weights: np.ndarray, gradient: np.ndarray, gradient_dtype: str) -> Stepped:
        """One step of both tables; ``weights`` and ``gradient``, (V, D), hold values of their dtypes exactly."""

    def state(self) -> object:
        """A copy of the optimizer's state."""

    def restore(self, state: object) -> None:
        """Go back to what ``state`` gave."""


class Weights(Protocol):
    """Two weights of one shape and dtype in an optimizer of the body: the first is zeros at every step."""

    def step(self, weights: np.ndarray, gradient: np.ndarray, gradient_dtype: str) -> tuple[np.ndarray, np.ndarray]:
        """One step of both, from nothing on: what it subtracted from zeros, and the new weights, float64."""

    def state(self) -> dict[str, np.ndarray]:
        """The state of the second, by name."""


@dataclass(frozen=True)
class Implementation:
    """One implementation. ``make(shape, dtype, learning_rate, weight_decay, **options)`` gives its `Tables`.

    ``missing`` says in a few words why it is not here, and is None where it is. ``dtypes`` are those that tables may
    have, and ``mixed`` tells whether a gradient may have another dtype than its table.
    ``make_weights(class_name, shape, dtype, learning_rate, weight_decay, **options)`` gives `Weights` for an optimizer
    of the body; None where it does not run those.
    """

    name: str
    missing: str | None
    make: Callable[..., Tables]
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    mixed: bool = True
    make_weights: Callable[..., Weights] | None = None


def implementations() -> list[Implementation]:
    """All of them, those that are not here too."""
    return [*_of_mlx(), *_of_torch()]


def select(names: list[str] | None) -> tuple[list[Implementation], list[Implementation]]:
    """Those to run, and those that are not here: of the ``names``, or of all.

    Raises:
        InputError: for a name that there is not, one that is not here, and where none is here.
    """
    known = {implementation.name: implementation for implementation in implementations()}
    for name in names or ():
        if name not in known:
            raise InputError(f"--implementation {name!r}: unknown name; the names are {', '.join(known)}")
        if known[name].missing:
            raise InputError(f"--implementation {name!r}: cannot run here ({known[name].missing})")
    chosen = [known[name] for name in names] if names else list(known.values())
    here = [implementation for implementation in chosen if not implementation.missing]
    not_here = [implementation for implementation in chosen if implementation.missing]
    if not here:
        raise InputError(f"nothing can be compared here: {listed(not_here)}; install MLX or PyTorch")
    return here, not_here


def listed(not_here: list[Implementation]) -> str:
    """Names with their reasons, the reasons that several share said once."""
    by_reason: dict[str, list[str]] = {}
    for implementation in not_here:
        by_reason.setdefault(implementation.missing, []).append(implementation.name)
    return ", ".join(f"{' and '.join(names)} ({reason})" for reason, names in by_reason.items())


# --- MLX ----------------------------------------------------------------------------------------------------------


class MLXTables:
    """``ember_mlx.Ember`` on the CPU or the GPU of MLX."""

    def __init__(
        self,
        device: str,
        shape: tuple[int, int],
        dtype: str,
        learning_rate: float | Callable[[int], float],
        weight_decay: float,
        **options: Any,
    ):
        import mlx.core as mx

        self.device = getattr(mx, device)
        self.shape = shape
        self.dtype = getattr(mx, dtype)
        self.settings = {"learning_rate": learning_rate, "weight_decay": weight_decay} | options

    def start(self) -> None:
        import mlx.core as mx

        from ember_mlx.optimizers import Ember

        with mx.stream(self.device):
            self.optimizer = Ember(**self.settings)
            self.zeros = mx.zeros(self.shape, self.dtype)
            self.optimizer.init({"zeros": self.zeros, "w": self.zeros})
            mx.eval(self.zeros, self.optimizer.state)

    def step(self, weights: np.ndarray, gradient: np.ndarray, gradient_dtype: str) -> np.ndarray:
        import mlx.core as mx

        with mx.stream(self.device):
            w = mx.array(weights.astype(np.float32)).astype(self.dtype)
            g = mx.array(gradient).astype(getattr(mx, gradient_dtype))
            new = self.optimizer.apply_gradients({"zeros": g, "w": g}, {"zeros": self.zeros, "w": w})
            state = self.optimizer.state["w"]
            read = (state["r"], state["c"], -new["zeros"], new["w"])
            together = mx.concatenate([array.astype(mx.float32).reshape(-1) for array in read])
            mx.eval(together, self.optimizer.state)
            return Stepped.of(np.array(together), self.shape)

    def state(self) -> dict[str, Any]:
        from mlx.utils import tree_map

        return tree_map(lambda array: array, self.optimizer.state)  # new dicts; steps replace arrays in the old ones

    def restore(self, state: dict[str, Any]) -> None:
        from mlx.utils import tree_map

        self.optimizer.state = tree_map(lambda array: array, state)


class MLXWeights:
    """An optimizer of ``ember_mlx.optimizers`` on the CPU or the GPU of MLX."""

    def __init__(
        self,
        device: str,
        class_name: str,
        shape: tuple[int, ...],
        dtype: str,
        learning_rate: float,
        weight_decay: float,
        **options: Any,
    ):
        import mlx.core as mx

        from ember_mlx import optimizers

        self.device, self.dtype = getattr(mx, device), getattr(mx, dtype)
        self.optimizer = getattr(optimizers, class_name)(learning_rate, weight_decay=weight_decay, **options)
        with mx.stream(self.device):
            self.zeros = mx.zeros(shape, self.dtype)
            self.optimizer.init({"zeros": self.zeros, "w": self.zeros})
            mx.eval(self.zeros, self.optimizer.state)

    def step(self, weights: np.ndarray, gradient: np.ndarray, gradient_dtype: str) -> tuple[np.ndarray, np.ndarray]:
        import mlx.core as mx

        with mx.stream(self.device):
            w = mx.array(weights).astype(self.dtype)
            g = mx.array(gradient).astype(getattr(mx, gradient_dtype))
            new = self.optimizer.apply_gradients({"zeros": g, "w": g}, {"zeros": self.zeros, "w": w})
            read = [array.astype(mx.float32) for array in (-new["zeros"], new["w"])]
            mx.eval(read, self.optimizer.state)
        return tuple(np.array(array).astype(np.float64) for array in read)

    def state(self) -> dict[str, np.ndarray]:
        return {name: np.array(array) for name, array in self.optimizer.state["w"].items()}


def _of_mlx():
    try:
        import mlx.core as mx
    except ImportError as error:
        missing = dict.fromkeys(("cpu", "metal", "cuda"), f"MLX: {error}")
    else:
        missing = {
            "cpu": None,
            "metal": None if mx.metal.is_available() else "no Metal",
            "cuda": None if mx.cuda.is_available() else "no CUDA in this MLX",
        }
    return [
        Implementation(f"mlx {backend}", why, _with(MLXTables, mx_device), make_weights=_with(MLXWeights, mx_device))
        for (backend, why), mx_device in zip(missing.items(), ("cpu", "gpu", "gpu"), strict=True)
    ]


# --- PyTorch ------------------------------------------------------------------------------------------------------


class TorchTables:
    """``cuda_ref.Ember`` with one of its implementations on a device, the step compiled or not."""

    def __init__(
        self,
        device: str,
        implementation: str,
        compiled: bool,
        shape: tuple[int, int],
        dtype: str,
        learning_rate: float | Callable[[int], float],
        weight_decay: float,
        **options: Any,
    ):
        import torch

        from cuda_ref import Ember

        self.zeros, self.w = (
            torch.nn.Parameter(torch.zeros(shape, dtype=getattr(torch, dtype), device=device)) for _ in range(2)
        )
        settings = {"lr": learning_rate, "weight_decay": weight_decay, "implementation": implementation} | options
        self.optimizer = Ember([self.zeros, self.w], **settings)
        self.optimizer_step = self.optimizer.step
        if compiled:
            # The compiler keeps what it made for all optimizers in one place, and runs uncompiled once that is full.
            torch.compiler.reset()
            torch._logging.set_logs(dynamo=logging.ERROR)  # it warns of the profiler's mark in every PyTorch optimizer
            self.optimizer_step = torch.compile(self.optimizer.step, fullgraph=True)

    def start(self) -> None:
        for tensor in self._state():
            tensor.zero_()

    def step(self, weights: np.ndarray, gradient: np.ndarray, gradient_dtype: str) -> np.ndarray:
        import torch

        _fill_and_give(self.zeros, self.w, weights, gradient, gradient_dtype)
        self.optimizer_step()
        state = self.optimizer.state[self.w]
        read = (state["r"], state["c"], -self.zeros.detach(), self.w.detach())
        together = torch.cat([tensor.to(torch.float32).flatten() for tensor in read])
        return Stepped.of(together.cpu().numpy(), tuple(self.w.shape))

    def state(self) -> "list[torch.Tensor]":
        return [tensor.clone() for tensor in self._state()]

    def restore(self, state: "list[torch.Tensor]") -> None:
        if not state:  # taken before the first step of all
            self.start()
            return
        # In place: a compiled step holds these very tensors.
        for tensor, before in zip(self._state(), state, strict=True):
            tensor.copy_(before)

    def _state(self):
        """All but the seeds, which are of the tables and not of the steps."""
        states = self.optimizer.state.values()
        return [tensor for state in states for name, tensor in state.items() if name != "seed"]


class TorchWeights:
    """An optimizer of ``cuda_ref.optimizers`` with one of its implementations on a device."""

    def __init__(
        self,
        device: str,
        implementation: str,
        class_name: str,
        shape: tuple[int, ...],
        dtype: str,
        learning_rate: float,
        weight_decay: float,
        **options: Any,
    ):
        import torch

        from cuda_ref import optimizers

        self.zeros, self.w = (
            torch.nn.Parameter(torch.zeros(shape, dtype=getattr(torch, dtype), device=device)) for _ in range(2)
        )
        settings = {"lr": learning_rate, "weight_decay": weight_decay, "implementation": implementation} | options
        self.optimizer = getattr(optimizers, class_name)([self.zeros, self.w], **settings)

    def step(self, weights: np.ndarray, gradient: np.ndarray, gradient_dtype: str) -> tuple[np.ndarray, np.ndarray]:
        import torch

        _fill_and_give(self.zeros, self.w, weights, gradient, gradient_dtype)
        self.optimizer.step()
        read = (-self.zeros.detach(), self.w.detach())
        return tuple(tensor.to(torch.float64, copy=True).cpu().numpy() for tensor in read)

    def state(self) -> dict[str, np.ndarray]:
        return {name: tensor.cpu().numpy() for name, tensor in self.optimizer.state[self.w].items()}


def _fill_and_give(zeros, w, weights, gradient, gradient_dtype):
    """Set both parameters, and give them the gradient in its dtype."""
    import torch

    g = torch.from_numpy(gradient).to(w.device, getattr(torch, gradient_dtype))
    with torch.no_grad():
        w.copy_(torch.from_numpy(weights))
        zeros.zero_()
    for table in (w, zeros):
        table.grad = None
        table.grad_dtype = g.dtype  # PyTorch wants that of the table unless told otherwise
        table.grad = g


def _of_torch():
    missing = dict.fromkeys(("eager cpu", "eager cuda", "compiled cpu", "compiled cuda"))
    missing |= dict.fromkeys(("triton", "triton interpreted"))
    try:
        import torch

        from cuda_ref import triton_kernels
    except ImportError as error:
        missing = dict.fromkeys(missing, f"PyTorch: {error}")
    else:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        no_triton = None if triton_kernels.available() else "Triton is not installed"
        no_cuda = None if torch.cuda.is_available() else "PyTorch sees no CUDA device"
        no_compiler = None if any(map(shutil.which, ("c++", "g++", "clang++"))) else "no C++ compiler"
        missing["eager cuda"] = missing["compiled cuda"] = no_cuda
        missing["compiled cpu"] = no_compiler
        missing["triton"] = no_cuda or no_triton or ("TRITON_INTERPRET=1 is set" if interpreted else None)
        missing["triton interpreted"] = no_triton or (None if interpreted else "needs TRITON_INTERPRET=1")
    how = {
        "eager cpu": ("cpu", "eager", False),
        "eager cuda": ("cuda", "eager", False),
        "compiled cpu": ("cpu", "eager", True),
        "compiled cuda": ("cuda", "eager", True),
        "triton": ("cuda", "triton", False),
        "triton interpreted": ("cpu", "triton", False),
    }
    limits = {
        # PyTorch's compiler cannot trace a gradient of another dtype than its table's.
        "compiled cpu": {"mixed": False},
        "compiled cuda": {"mixed": False},
        # Triton's interpreter cuts float32 off to bfloat16 where a GPU rounds.
        "triton interpreted": {"dtypes": ("float32", "float16")},
    }
    return [
        Implementation(
            name if "triton" in name else f"torch {name}",
            why,
            _with(TorchTables, *how[name]),
            make_weights=None if "compiled" in name else _with(TorchWeights, *how[name][:2]),
            **limits.get(name, {}),
        )
        for name, why in missing.items()
    ]


def _with(tables, *how):
    return lambda *settings, **options: tables(*how, *settings, **options)
