"""What ``kernel_times.py`` times, and in which cuts; and the check of each against float64 or plain operations."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from unittest import mock

import numpy as np
from benchmarking import SEED, backend

LEARNING_RATE = 1e-3
# A large matrix and one of a small model, what is checked, and tables of statistics. With --smoke the second of each.
SIZES = {
    "large": ((4096, 12288), (48, 96)),
    "small": ((3072, 1024), (96, 32)),
    "checked": ((192, 12288), (24, 96)),
    "rows": (131_072, 64),
    "copied": (2**29, 2**12),
}
CHECKED_ROWS = 1_003

# By kernel: the module, and by cut the constants in it. The first is the package's.
STATISTICS = "ember_mlx.kernels.statistics"
SINKHORN = "ember_mlx.kernels.sinkhorn"
FLASH = "ember_mlx.optimizers.flash_kernel"
ADAM_MINI = "ember_mlx.optimizers.adam_mini_kernel"
ADAM = "ember_mlx.optimizers.adam_kernel"
SINKGD = "ember_mlx.optimizers.sinkgd_kernel"
CUTS = {
    STATISTICS: {
        "package": {},
        "128 of 4": {"ROWS": 128, "AT_ONCE": 4},
        "64 of 8": {"ROWS": 64, "AT_ONCE": 8},
        "256 of 8": {"ROWS": 256, "AT_ONCE": 8},
    },
    FLASH: {"package": {}, "4 weights": {"VECTOR": 4}},
    ADAM_MINI: {"package": {}, "512 threads": {"CUDA_THREADS": 512, "CUDA_THREADS_INT8": 512}},
    SINKHORN: {
        "package": {},
        "4 lanes": {"ACROSS": 4},
        "512 threads": {"MOST_THREADS": 512},
        "512 threads, 1 line": {"MOST_THREADS": 512, "AT_ONCE": 1},
        "4 lines": {"AT_ONCE": 4},
        "4 ahead": {"AHEAD": 4},
        "16 ahead": {"AHEAD": 16},
    },
    SINKGD: {
        "package": {},
        "2 simdgroups": {"SIMDGROUPS": 2},
        "8 simdgroups": {"SIMDGROUPS": 8},
        "8 blocks down": {"DOWN": 8},
    },
    ADAM: {"package": {}, "4 weights": {"MOST_AT_ONCE": 4}},
}


@dataclass(frozen=True)
class Step:
    """What is timed of an optimizer: its class in ``ember_mlx.optimizers``, or MLX's AdamW, and where gradients lie.

    ``everywhere`` is: in a large matrix and a small one, in rows as the weight, and transposed as they come out of a
    matrix product. Otherwise in a large one in rows.
    """

    name: str
    module: str | None = None
    class_name: str | None = None
    options: dict = field(default_factory=dict, hash=False)
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    rounded: bool = False  # stochastically
    everywhere: bool = False


BASELINE = Step("AdamW")
STEPS = [
    Step("AdamW rounded", ADAM, None, {}, ("bfloat16",), rounded=True, everywhere=True),
    Step("SinkGD 2 passes", SINKHORN, "SinkGD", {"passes": 2}, everywhere=True),
    Step("SinkGD rounded", SINKGD, "SinkGD", {"passes": 2}, ("bfloat16",), rounded=True, everywhere=True),
    Step("FlashAdamW", FLASH, "FlashAdamW"),
    Step("FlashAdamW bf16+int8", FLASH, "FlashAdamW", {"weights": "bf16+int8"}, ("bfloat16",)),
    Step("AdamMini", ADAM_MINI, "AdamMini"),
    Step("AdamMini int8", ADAM_MINI, "AdamMini", {"momentum": "int8"}),
]
PLACES = [(size, transposed) for size in ("large", "small") for transposed in (False, True)]


def size(name):
    return SIZES[name][0]


def made(step):
    """An optimizer."""
    import mlx.optimizers

    from ember_mlx import optimizers
    from ember_mlx.optimizers.rounded import StochasticRounding

    if step.class_name:
        optimizer = getattr(optimizers, step.class_name)(LEARNING_RATE, **step.options)
    else:
        optimizer = mlx.optimizers.AdamW(LEARNING_RATE, bias_correction=True)
    return StochasticRounding(optimizer) if step.rounded else optimizer


class Cut:
    """A context in which a kernel's module has the constants of a cut."""

    def __init__(self, module, name):
        self.patches = [mock.patch(f"{module}.{key}", value) for key, value in CUTS[module][name].items()]

    def __enter__(self):
        self.stack = ExitStack()
        for patch in self.patches:
            self.stack.enter_context(patch)

    def __exit__(self, *_):
        self.stack.close()


# --- checks --------------------------------------------------------------------------------------------------------


def as_float64(array):
    import mlx.core as mx

    return np.array(array.astype(mx.float32)).astype(np.float64)


def check_statistics(cut, dtype):
    """The largest relative error of both means against float64, of widths that are read in both ways."""
    import mlx.core as mx

    from ember_mlx.kernels import statistics as kernel

    worst = 0.0
    with Cut(STATISTICS, cut):
        for columns in (576, 3584, 577):
            g = mx.random.normal((CHECKED_ROWS, columns), key=mx.random.key(SEED)).astype(getattr(mx, dtype))
            squares = as_float64(g) ** 2
            for axis, mean in enumerate(kernel.mean_squares(g)):
                worst = max(worst, np.max(np.abs(as_float64(mean) / squares.mean(axis=1 - axis) - 1)))
    return {"error": float(worst), "right": bool(worst < 1e-5)}


def check_rounded(step, cut, dtype):
    """Whether every bit is as that of plain operations."""
    import mlx.core as mx

    from ember_mlx.optimizers import adam_kernel, sinkgd_kernel

    dtype = getattr(mx, dtype)
    with Cut(step.module, cut):
        found = sinkgd_kernel.differences(dtype, dtype) if step.class_name else adam_kernel.differences(*[dtype] * 3)
    return {"right": found is None} | ({"failed": found} if found else {})


def check_step(step, cut, dtype, place):
    """Two steps against the float64 oracle: the error in units in the last place, or of the learning rate; and codes.

    Weights in float32 may be off by 1e-4 of a step, others by half a unit of what they are stored in.
    """
    import mlx.core as mx

    from ember_mlx.optimizers.split_weights import join
    from ember_mlx.parity import body_oracles, oracle_flash_float64

    shape = size("checked" if place[0] == "large" else "small")
    with Cut(step.module, cut):
        optimizer = made(step)
        w = (mx.random.normal(shape, key=mx.random.key(1)) * 0.02).astype(getattr(mx, dtype))
        optimizer.init({"w": w})
        oracle = {
            "FlashAdamW": lambda: oracle_flash_float64.FlashOracle(shape),
            "AdamMini": lambda: body_oracles.AdamMiniOracle(shape, momentum=step.options.get("momentum", "float32")),
            "SinkGD": lambda: body_oracles.SinkGDOracle(shape, step.options.get("passes")),
        }[step.class_name]()
        errors, flipped = [], []
        for number in range(2):
            scale = 10 ** mx.random.uniform(-4, 1, (shape[0], 1), key=mx.random.key(10 + number))
            g = (mx.random.normal(shape, key=mx.random.key(20 + number)) * scale).astype(w.dtype)
            g = mx.contiguous(g.T).T if place[1] else g
            state = optimizer.state["w"]
            exact = as_float64(join(w, state["rest"]) if "rest" in state else w)
            if oracle.quantized:
                oracle.load({key: np.array(array) for key, array in state.items()})
            w = optimizer.apply_gradients({"w": g}, {"w": w})["w"]
            expected = exact - oracle.change(as_float64(g), LEARNING_RATE)
            state = optimizer.state["w"]
            found = as_float64(join(w, state["rest"]) if "rest" in state else w)
            if dtype == "float32":
                errors.append(np.max(np.abs(found - expected)) / LEARNING_RATE / 1e-4)
            else:
                unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(expected), 1e-30))) - (14 if "rest" in state else 7))
                # A bfloat16 is off by half a unit at the most, and by what float32 arithmetic adds.
                allowed = (0.5 if "rest" not in state else 1) * unit + 1e-4 * LEARNING_RATE
                errors.append(np.max(np.abs(found - expected) / allowed))
            if oracle.quantized:
                for key, codes in oracle.codes().items():
                    apart = np.abs(np.array(state[key]).astype(int) - np.floor(codes))
                    flipped.append(np.mean(apart > 0) if apart.max() <= 1 else 1.0)
    error, share = float(max(errors)), float(max(flipped, default=0.0))
    return {"error": error, "flipped": share, "right": bool(error <= 1.02 and share <= 0.02)}


@cache
def checked(step, cut, dtype, place):
    """What the check of a step, or of the statistics for None, says; what goes wrong there ends no process."""
    try:
        if backend() == "cpu" and (step is None or step.rounded):
            return {"right": True}  # their kernels alone are checked
        if step is None:
            return check_statistics(cut, dtype)
        return check_rounded(step, cut, dtype) if step.rounded else check_step(step, cut, dtype, place)
    except Exception as error:  # a cut may need more registers than there are
        return {"right": False, "failed": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
