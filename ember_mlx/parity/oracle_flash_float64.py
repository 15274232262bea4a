"""What the Flash optimizers should do, in float64 NumPy, written from the formats alone; nothing of ``ember_mlx`` here.

A state is a dict of ``m``, ``m_scales`` and, for AdamW, ``v`` and ``v_scales``, as FlashOptim stores them: flat groups
of 32. One step goes from a stored state to the next, for a float32 rounding moves a code to its neighbour now and then.
"""

import numpy as np

__all__ = ["FlashLionOracle", "FlashOracle", "decode", "encode", "half_unit", "join", "split_rest", "step"]

GROUP = 32


def decode(codes: np.ndarray, scales: np.ndarray, kind: str) -> np.ndarray:
    """Float64 values (groups, 32) of the codes of ``kind`` ``"m"`` or ``"v"``."""
    codes, scales = codes.astype(np.float64), scales.astype(np.float64)[:, None]
    if kind == "v":
        return (scales * codes / 255) ** 2
    y = codes / 127
    return scales * y / (2 - np.abs(y))


def encode(values: np.ndarray, kind: str, published: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of float64 values (groups, 32)."""
    magnitude = np.sqrt(values) if kind == "v" else np.abs(values)
    scales = np.maximum(magnitude.max(axis=1), 1e-12 if published else 2.0**-126)
    parts = (magnitude if kind == "v" else values) / scales[:, None]
    codes = np.floor((255 * parts if kind == "v" else 127 * 2 * parts / (1 + np.abs(parts))) + 0.5)
    if kind == "v" and not published:
        codes = np.where((magnitude > 0) & (codes == 0), 1, codes)
    return codes.astype(np.int64), scales.astype(np.float16 if published else np.float32)


def half_unit(low: np.ndarray) -> np.ndarray:
    """Half the distance between bfloat16 numbers at each ``low``, above."""
    exponent = np.frexp(np.where(low == 0, 1, low))[1] - 1
    return np.exp2(np.maximum(np.where(low == 0, -126, exponent), -126) - 8.0)


def join(low: np.ndarray, rest: np.ndarray) -> np.ndarray:
    return low + half_unit(low) * rest / 127


def split_rest(exact: np.ndarray, low: np.ndarray) -> np.ndarray:
    """The rest of float64 weights whose bfloat16 is ``low``."""
    scaled = 127 * np.clip((exact - low) / half_unit(low), -1, 1)
    return np.sign(scaled) * np.floor(np.abs(scaled) + 0.5)


def step(
    weights: np.ndarray,
    gradient: np.ndarray,
    state: dict[str, np.ndarray],
    t: int,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    published: bool = False,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The exact weights after step ``t`` from exact ``weights``, in their shape, and the new state."""
    shape, size = weights.shape, weights.size
    pad = -size % GROUP
    w, g = (np.pad(np.asarray(x, np.float64).ravel(), (0, pad)).reshape(-1, GROUP) for x in (weights, gradient))
    beta1, beta2 = betas
    m = decode(state["m"], state["m_scales"], "m")
    decayed = (1 - learning_rate * weight_decay) * w
    if "v" in state:
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * decode(state["v"], state["v_scales"], "v") + (1 - beta2) * g**2
        w = decayed - learning_rate * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
    else:
        w = decayed - learning_rate * np.sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g
    new = dict(zip(("m", "m_scales"), encode(m, "m", published), strict=True))
    if "v" in state:
        new |= dict(zip(("v", "v_scales"), encode(v, "v", published), strict=True))
    return w.ravel()[:size].reshape(shape), new


class FlashOracle:
    """FlashAdamW, or FlashLion without ``second_moment``, from the state that ``load`` was given last."""

    quantized = True
    second_moment = True

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape
        groups = -(-int(np.prod(shape)) // GROUP)
        names = ("m", "v") if self.second_moment else ("m",)
        self.state = {name: np.zeros((groups, GROUP)) for name in names}
        self.state |= {f"{name}_scales": np.zeros(groups) for name in names}
        self.step_number = 0

    def load(self, state: dict[str, np.ndarray]) -> None:
        self.state = {name: np.asarray(state[name]) for name in self.state}

    def change(self, gradient: np.ndarray, learning_rate: float) -> np.ndarray:
        self.step_number += 1
        betas = (0.9, 0.999) if self.second_moment else (0.9, 0.99)
        zeros = np.zeros(self.shape)
        new, self.state = step(zeros, gradient, self.state, self.step_number, learning_rate, betas)
        return -new

    def codes(self) -> dict[str, np.ndarray]:
        return {name: self.state[name] for name in ("m", "v") if name in self.state}


class FlashLionOracle(FlashOracle):
    second_moment = False
