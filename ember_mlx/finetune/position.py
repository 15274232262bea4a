"""Where a run is between two steps, and the random states that belong to it."""

from dataclasses import asdict, dataclass

import mlx.core as mx
import numpy as np

__all__ = ["NUMPY_STATE", "Position", "numpy_random", "set_numpy_random", "set_random"]

NUMPY_STATE = {"keys": str, "position": int, "has_gauss": int, "cached_gaussian": float}


@dataclass(frozen=True)
class Position:
    """Where a run is, after a step that left no gradients accumulated; all of it can be JSON.

    Args:
        step (int): Steps done, as mlx-lm counts them: batches.
        drawn (int): How many of them were drawn in the epoch under way; 0 between two epochs.
        epoch_random (dict): NumPy's random state from which the order of this epoch's batches was drawn.
        numpy_random (dict): NumPy's random state now: evaluations draw from it too.
        mlx_random (list): MLX's random state, two numbers.
        first_evaluation (dict): NumPy's random state from which the first evaluation drew its batches, or None.
        record (dict): What LossHistory keeps.
    """

    step: int
    drawn: int
    epoch_random: dict
    numpy_random: dict
    mlx_random: list
    first_evaluation: dict | None
    record: dict

    TYPES = {  # noqa: RUF012
        "step": int,
        "drawn": int,
        "epoch_random": NUMPY_STATE,
        "numpy_random": NUMPY_STATE,
        "mlx_random": [int],
        "first_evaluation": (dict, type(None)),
        "record": {"losses": dict, "trained_tokens": int, "validations": (dict, type(None))},
    }
    to_json = asdict


def numpy_random() -> dict:
    """NumPy's random state, as JSON can have it."""
    _, keys, position, has_gauss, cached_gaussian = np.random.get_state()
    return {
        "keys": keys.astype("<u4").tobytes().hex(),
        "position": position,
        "has_gauss": has_gauss,
        "cached_gaussian": cached_gaussian,
    }


def set_numpy_random(state: dict) -> None:
    """Raises ValueError for what is no state: NumPy itself would take a position beyond the end of the keys."""
    keys = np.frombuffer(bytes.fromhex(state["keys"]), "<u4")
    if len(keys) != 624 or not 0 <= state["position"] <= 624 or state["has_gauss"] not in (0, 1):
        raise ValueError("no state of NumPy's generator")
    np.random.set_state(("MT19937", keys, state["position"], state["has_gauss"], state["cached_gaussian"]))


def set_random(position: Position) -> None:
    """Put MLX's and NumPy's random states back.

    Raises:
        ValueError: for what is no random state.
    """
    set_numpy_random(position.numpy_random)
    high, low = position.mlx_random
    if not (0 <= high < 2**32 and 0 <= low < 2**32):
        raise ValueError(f"mlx_random {position.mlx_random}: two numbers of 32 bits")
    mx.random.seed(high << 32 | low)  # the seed is the state: its two halves
