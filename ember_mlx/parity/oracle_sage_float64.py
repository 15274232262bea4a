"""What SAGE should do, in float64 NumPy, written from the paper's rule alone. It imports nothing of ``ember_mlx``."""

import numpy as np

__all__ = ["SageOracle", "unisage"]


class SageOracle:
    """SAGE for one table (V, D) or vector (D,), from weights and state of zeros; ``weights`` may be set."""

    def __init__(
        self,
        shape: tuple[int, ...],
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        still_rows: bool = True,
    ):
        self.beta1, self.beta2 = betas
        self.eps = eps
        self.still_rows = still_rows
        self.momentum = np.zeros(shape)
        self.mean_magnitude = np.zeros(shape[-1])
        self.step_number = 0

    quantized = False

    def change(self, gradient: np.ndarray, learning_rate: float) -> np.ndarray:
        """What a step subtracts from decayed weights, where no row stands still."""
        return -self.step(np.zeros(np.shape(gradient)), gradient, learning_rate)

    def step(
        self, weights: np.ndarray, gradient: np.ndarray, learning_rate: float, weight_decay: float = 0.0
    ) -> np.ndarray:
        """The weights after one step."""
        weights, gradient = (np.asarray(values, dtype=np.float64) for values in (weights, gradient))
        self.step_number += 1
        magnitude = np.abs(gradient) if gradient.ndim == 1 else np.abs(gradient).mean(axis=0)
        self.mean_magnitude = self.beta2 * self.mean_magnitude + (1 - self.beta2) * magnitude
        averaged = self.mean_magnitude / (1 - self.beta2**self.step_number)
        slow, instant = (np.sqrt(np.mean(x**2)) / (x + self.eps) for x in (averaged, magnitude))
        damper = np.minimum(np.minimum(slow, instant), 1)
        direction = np.sign(self.beta1 * self.momentum + (1 - self.beta1) * gradient)
        self.momentum = self.beta2 * self.momentum + (1 - self.beta2) * gradient
        new = (1 - learning_rate * weight_decay) * weights - learning_rate * direction * damper
        if self.still_rows:
            silent = ~np.any(gradient != 0, axis=-1, keepdims=True)
            new = np.where(silent, weights, new)
        return new


def unisage(
    weights: np.ndarray,
    gradients: np.ndarray,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
) -> np.ndarray:
    """The weights after all ``gradients`` by the authors' ``UniSAGE``: the momentum takes the gradient first."""
    beta1, beta2 = betas
    momentum, mean = np.zeros_like(weights), np.zeros(weights.shape[-1])
    for t, gradient in enumerate(gradients, start=1):
        magnitude = np.abs(gradient).mean(axis=0)
        mean = beta2 * mean + (1 - beta2) * magnitude
        averaged = mean / (1 - beta2**t)
        momentum = beta2 * momentum + (1 - beta2) * gradient
        dampers = (np.sqrt(np.mean(x**2)) / (x + eps) for x in (averaged, magnitude))
        damper = np.minimum(np.minimum(*dampers), 1)
        weights = weights - learning_rate * np.sign(beta1 * momentum + (1 - beta1) * gradient) * damper
    return weights
