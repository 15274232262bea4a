"""The implementations of Ember by name, each behind the same few calls, and why one is not here.

Neither MLX nor PyTorch is imported before `implementations` is called. What runs are the public classes,
``ember_mlx.Ember`` and ``cuda_ref.Ember``. NumPy goes in and out: 16-bit values travel as float32, which holds them all
exactly.
"""

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from ember_mlx.shared.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["Gradients", "Implementation", "Stepped", "Tables", "Weights", "implementations", "listed", "select"]


class Stepped(NamedTuple):
    """What T steps made, float64: r (T, V), c (T, D), what each subtracts from zeros (T, V, D), weights (T, V, D)."""

    r: np.ndarray
    c: np.ndarray
    step: np.ndarray
    w: np.ndarray

    @classmethod
    def of(cls, together: np.ndarray, shape: tuple[int, int]) -> "Stepped":
        """From float32 numbers, a row a step, with the zeros after it: a GPU is waited for once, whatever is read."""
        rows, columns = shape
        ends = np.cumsum([rows, columns, rows * columns])
        r, c, zeros, w = np.split(together.astype(np.float64), ends, axis=1)
        return cls(r, c, -zeros.reshape(-1, *shape), w.reshape(-1, *shape))


Gradients = Sequence[tuple[np.ndarray, str]]  # of one step after the other, each with its dtype's name


class Tables(Protocol):
    """Two tables of one shape and dtype in one optimizer: the first is zeros at every step, the other gets weights."""

    def start(self) -> None:
        """Forget all steps."""

    def steps(self, weights: np.ndarray, gradients: Gradients) -> Stepped:
        """Steps of both tables; ``weights`` and gradients, (V, D) float32, hold values of their dtypes exactly."""

    def state(self) -> object:
        """A copy of the optimizer's state."""

    def restore(self, state: object) -> None:
        """Go back to what ``state`` gave."""


class Weights(Protocol):
    """Two weights of one shape and dtype in an optimizer of the body: the first is zeros at every step."""

    def steps(self, weights: np.ndarray, gradients: Gradients) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Steps of both: what each subtracts from zeros, the weights after it, float64, and the second's state."""


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

    def steps(self, weights: np.ndarray, gradients: Gradients) -> Stepped:
        import mlx.core as mx

        with mx.stream(self.device):
            w, made = mx.array(weights).astype(self.dtype), []
            for gradient, dtype in gradients:
                g = mx.array(gradient).astype(getattr(mx, dtype))
                new = self.optimizer.apply_gradients({"zeros": g, "w": g}, {"zeros": self.zeros, "w": w})
                w, state = new["w"], self.optimizer.state["w"]
                read = (state["r"], state["c"], new["zeros"], w)
                made.append(mx.concatenate([array.astype(mx.float32).reshape(-1) for array in read]))
                mx.async_eval(made[-1], self.optimizer.state)  # a step at a time: CUDA graphs alike are built once
            return Stepped.of(np.array(mx.stack(made)), self.shape)

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

    def steps(self, weights: np.ndarray, gradients: Gradients) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        import mlx.core as mx

        with mx.stream(self.device):
            w, made = mx.array(weights).astype(self.dtype), []
            for gradient, dtype in gradients:
                g = mx.array(gradient).astype(getattr(mx, dtype))
                new = self.optimizer.apply_gradients({"zeros": g, "w": g}, {"zeros": self.zeros, "w": w})
                w, state = new["w"], self.optimizer.state["w"]
                made.append((new["zeros"].astype(mx.float32), w.astype(mx.float32), *state.values()))
                mx.async_eval(made[-1], self.optimizer.state)
            read = [mx.stack(arrays) for arrays in zip(*made, strict=True)]
            mx.eval(read)
        return _of_weights(state, map(np.array, read))


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

    def steps(self, weights: np.ndarray, gradients: Gradients) -> Stepped:
        import torch

        made = []
        for _ in _give_each(self.zeros, self.w, weights, gradients):
            self.optimizer_step()
            state = self.optimizer.state[self.w]
            read = (state["r"], state["c"], self.zeros.detach(), self.w.detach())
            made.append(torch.cat([tensor.flatten() for tensor in read]))  # float32, as r and c are
        return Stepped.of(torch.stack(made).cpu().numpy(), tuple(self.w.shape))

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

    def steps(self, weights: np.ndarray, gradients: Gradients) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        import torch

        made = []
        for _ in _give_each(self.zeros, self.w, weights, gradients):
            self.optimizer.step()
            state = self.optimizer.state[self.w]
            read = (self.zeros.detach().float(), self.w.detach().float(), *state.values())
            made.append([tensor.clone() for tensor in read])
        return _of_weights(state, (torch.stack(tensors).cpu().numpy() for tensors in zip(*made, strict=True)))


def _give_each(zeros, w, weights, gradients):
    """Set ``w``, and before each step set ``zeros`` and give both the gradient in its dtype; all is copied there once.

    Each gradient is a tensor of its own: compiled steps and kernels are made for one that begins where all tensors do.
    """
    import torch

    together = torch.from_numpy(np.stack([gradient for gradient, _ in gradients])).to(w.device)
    w.detach().copy_(torch.from_numpy(weights))
    for values, (_, dtype) in zip(together, gradients, strict=True):
        g = values.to(getattr(torch, dtype), copy=True)
        zeros.detach().zero_()
        for table in (w, zeros):
            table.grad = None
            table.grad_dtype = g.dtype  # PyTorch wants that of the table unless told otherwise
            table.grad = g
        yield


def _of_weights(names, read):
    """What `Weights.steps` returns, from the zeros after each step, the weights and the state of those names."""
    zeros, w, *state = read
    return -zeros.astype(np.float64), w.astype(np.float64), dict(zip(names, state, strict=True))


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
