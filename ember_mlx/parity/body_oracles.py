"""What AdamMini and SinkGD should do, in float64 NumPy: plain, slow, and written from the update rules alone.

They share no line with ``ember_mlx`` and import nothing of it. Each keeps its statistics and no weights: a step gets
the weights and gives the new ones back, so that a test may follow its own, or those of the optimizer that it checks.
"""

import numpy as np

__all__ = ["AdamMiniOracle", "AdamOracle", "BodyOracle", "SinkGDOracle", "companded_momentum"]


class BodyOracle:
    """What the oracles have in common: decay first, and then what ``change`` says.

    ``load`` takes the state of an implementation, name -> array, before a step, and ``codes`` says which codes there
    should be in it afterwards: for state of 8 bits, where one flipped code would part two runs.
    """

    quantized = False

    def step(
        self, weights: np.ndarray, gradient: np.ndarray, learning_rate: float, weight_decay: float = 0.0
    ) -> np.ndarray:
        """The weights after one step."""
        return (1 - learning_rate * weight_decay) * weights - self.change(gradient, learning_rate)

    def load(self, state: dict[str, np.ndarray]) -> None:
        raise NotImplementedError

    def codes(self) -> dict[str, np.ndarray]:
        raise NotImplementedError


class AdamOracle(BodyOracle):
    """Adam (arXiv 1412.6980), element by element."""

    def __init__(self, shape: tuple[int, ...], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.beta1, self.beta2 = betas
        self.eps = eps
        self.momentum = np.zeros(shape)
        self.second_moment = 0.0
        self.step_number = 0

    def change(self, gradient: np.ndarray, learning_rate: float) -> np.ndarray:
        """Take the gradient into the moments; return what the step subtracts from the weights."""
        gradient = np.asarray(gradient, dtype=np.float64)
        self.step_number += 1
        self.momentum = self.beta1 * self.momentum + (1 - self.beta1) * gradient
        self.second_moment = self.beta2 * self.second_moment + (1 - self.beta2) * self.squares(gradient)
        first = self.momentum / (1 - self.beta1**self.step_number)
        second = self.second_moment / (1 - self.beta2**self.step_number)
        return learning_rate * first / (np.sqrt(second) + self.eps)

    def squares(self, gradient: np.ndarray) -> np.ndarray:
        return gradient**2


class AdamMiniOracle(AdamOracle):
    """Adam with one second moment a block; ``block_shape`` is a block's, by default a row of the last dimension.

    A vector is one block. With ``momentum="int8"`` each step starts from the momentum that ``load`` was given.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: str = "float32",
        block_shape: tuple[int, ...] | None = None,
    ):
        super().__init__(shape, betas, eps)
        self.quantized = momentum == "int8"
        self.block_shape = block_shape or (*(1,) * (len(shape) - 1), *shape[-1:])

    def squares(self, gradient: np.ndarray) -> np.ndarray:
        """Means of squares over each block, at each of its elements."""
        means = np.empty_like(gradient)
        counts = [length // block for length, block in zip(gradient.shape, self.block_shape, strict=True)]
        for place in np.ndindex(*counts):
            block = tuple(slice(i * b, (i + 1) * b) for i, b in zip(place, self.block_shape, strict=True))
            means[block] = np.mean(gradient[block] ** 2)
        return means

    def load(self, state: dict[str, np.ndarray]) -> None:
        y = state["m"].astype(np.float64) / 127
        values = state["m_scales"].astype(np.float64)[:, None] * y / (2 - np.abs(y))
        self.momentum = values.ravel()[: self.momentum.size].reshape(self.momentum.shape)

    def codes(self) -> dict[str, np.ndarray]:
        return {"m": companded_momentum(self.momentum)}


def companded_momentum(momentum: np.ndarray) -> np.ndarray:
    """The codes (groups, 32) of FlashOptim (arXiv 2602.23349), before they are rounded down to whole numbers."""
    flat = np.pad(momentum.ravel(), (0, -momentum.size % 32)).reshape(-1, 32)
    z = flat / np.maximum(np.abs(flat).max(axis=1, keepdims=True), 2.0**-126)
    return 127 * 2 * z / (1 + np.abs(z)) + 0.5


class SinkGDOracle(BodyOracle):
    """SinkGD by the iteration as published; a vector goes by Adam, and more dimensions are many matrices."""

    def __init__(self, shape: tuple[int, ...], passes: int = 5, eps: float = 1e-8):
        self.passes, self.eps = passes, eps
        self.adam = AdamOracle(shape, eps=eps) if len(shape) < 2 else None

    def change(self, gradient: np.ndarray, learning_rate: float) -> np.ndarray:
        """What the step subtracts from the weights."""
        if self.adam is not None:
            return self.adam.change(gradient, learning_rate)
        x = np.asarray(gradient, dtype=np.float64)
        rows, columns = x.shape[-2:]
        for _ in range(self.passes):
            x = np.sqrt(columns) * x / (np.linalg.norm(x, axis=-1, keepdims=True) + self.eps)
            x = np.sqrt(rows) * x / (np.linalg.norm(x, axis=-2, keepdims=True) + self.eps)
        return learning_rate * x
