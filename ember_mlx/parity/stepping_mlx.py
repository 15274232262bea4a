"""The optimizers of ``ember_mlx`` for the suite. MLX is imported when one is made, not before."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ember_mlx.parity.stepping import Gradients, Stepped, of_weights

__all__ = ["MLXTables", "MLXWeights"]


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

        made = []
        with mx.stream(self.device):
            for zeros, w, state in _steps_of_mlx(self, weights, gradients):
                read = (state["r"], state["c"], zeros, w)
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

        made = []
        with mx.stream(self.device):
            for zeros, w, state in _steps_of_mlx(self, weights, gradients):
                made.append((zeros.astype(mx.float32), w.astype(mx.float32), *state.values()))
                mx.async_eval(made[-1], self.optimizer.state)
            read = [mx.stack(arrays) for arrays in zip(*made, strict=True)]
            mx.eval(read)
        return of_weights(state, map(np.array, read))


def _steps_of_mlx(tables, weights, gradients):
    """The zeros, the weights and their state after each step, not evaluated; all gradients are copied there once."""
    import mlx.core as mx

    w, together = mx.array(weights).astype(tables.dtype), mx.array(np.stack([gradient for gradient, _ in gradients]))
    for values, (_, dtype) in zip(together, gradients, strict=True):
        g = values.astype(getattr(mx, dtype))
        new = tables.optimizer.apply_gradients({"zeros": g, "w": g}, {"zeros": tables.zeros, "w": w})
        w = new["w"]
        yield new["zeros"], w, tables.optimizer.state["w"]
