"""What was recorded elsewhere: gradients of a real training run, and what implementations made of streams on a GPU.

``python -m ember_mlx.parity.record`` writes both files. Neither holds pickled objects.
"""

import json
import zipfile
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from ember_mlx.shared.errors import InputError

__all__ = ["REAL_STREAMS", "RESULTS", "Recording", "read_results", "real_streams", "write_results"]

FOLDER = Path(__file__).parent
REAL_STREAMS = FOLDER / "real_streams.npz"
RESULTS = FOLDER / "gpu_results.npz"

# Of one step, in this order: r (V,), c (D,), the step from zeros, the weights before and after it, each (V, D).
PARTS = ("r", "c", "step", "before", "w")


@dataclass(frozen=True)
class Recording:
    """What one implementation made on one machine.

    ``results`` maps (stream, shape, dtype, number of the step) to a dict of the arrays that `PARTS` names, float64.
    ``about`` says on which machine, with which versions, when and with which settings.
    """

    implementation: str
    about: dict
    results: dict[tuple[str, tuple[int, int], str, int], dict[str, np.ndarray]]

    @property
    def name(self) -> str:
        return f"recorded {self.implementation} on {self.about['device']}"

    def at(self, stream: str, shape: tuple[int, int], dtype: str, step: int) -> dict[str, np.ndarray] | None:
        """The result of that step, or None where it was not recorded."""
        return self.results.get((stream, shape, dtype, step))


@cache
def real_streams() -> dict[str, np.ndarray]:
    """The recorded gradients by name, (T, V, D) float32; none where the file is not there."""
    if not REAL_STREAMS.exists():
        return {}
    arrays = _load(REAL_STREAMS)
    return {name: array for name, array in arrays.items() if array.ndim == 3}


def write_results(path: Path, recordings: list[Recording]) -> None:
    """Write recordings, exactly: each part of all results in one array a dtype, since each array costs 400 bytes."""
    arrays, about = {}, []
    for recording in recordings:
        index = list(recording.results)
        about.append({"implementation": recording.implementation, "about": recording.about, "index": index})
        for dtype in dict.fromkeys(key[2] for key in index):
            results = [result for key, result in recording.results.items() if key[2] == dtype]
            for part in PARTS:
                values = np.concatenate([result[part].ravel() for result in results]).astype(np.float32)
                held = dtype if part in ("step", "before", "w") else "float32"
                arrays[f"{recording.implementation} {dtype} {part}"] = _pack(values, held)
    np.savez_compressed(path, about=np.array(json.dumps(about)), **arrays)


def read_results(path: Path = RESULTS) -> list[Recording]:
    """The recordings of a file; none where the file is not there.

    Raises:
        InputError: for a file that is damaged or of another kind.
    """
    if not path.exists():
        return []
    arrays = _load(path)
    try:
        return [_recording(entry, arrays) for entry in json.loads(str(arrays["about"]))]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: holds no recorded results ({error!r}); {_AGAIN}") from error


_AGAIN = "get the file again, or record anew with python -m ember_mlx.parity.record"


def _recording(entry, arrays):
    results, taken = {}, {}
    for stream, (rows, columns), dtype, step in entry["index"]:
        result = {}
        for part, shape in zip(PARTS, ((rows,), (columns,), *[(rows, columns)] * 3), strict=True):
            name = f"{entry['implementation']} {dtype} {part}"
            first = taken.get(name, 0)
            taken[name] = first + int(np.prod(shape))
            held = dtype if part in ("step", "before", "w") else "float32"
            result[part] = _unpack(arrays[name][first : taken[name]], held).reshape(shape).astype(np.float64)
        results[stream, (rows, columns), dtype, step] = result
    return Recording(entry["implementation"], entry["about"], results)


def _pack(values, dtype):
    """float32 values that ``dtype`` holds exactly, in as many bytes; bfloat16 as the upper halves of float32."""
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return values.astype(dtype)


def _unpack(values, dtype):
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values


def _load(path):
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}); {_AGAIN}") from error
