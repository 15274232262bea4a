"""Stochastic rounding of float32 values to the 16 bits of a weight: one kernel, written once for Metal and CUDA.

A model has hundreds of weights, and to hand a kernel to a GPU takes longer than a small weight needs. So there is one
launch a weight: random bits are made of seed, step and place in the kernel, where ``bit_keys`` would take several.
"""

import mlx.core as mx

from ember_mlx.kernels.metal_and_cuda import BYTES_AT_ONCE, MOST_THREADS, Text, kernel, launch_of
from ember_mlx.kernels.rounding import FUNCTIONS
from ember_mlx.kernels.stochastic_rounding import (
    DROPPED_BITS,
    bit_keys,
    random_bits,
    round_stochastically,
    table_seed,
)

__all__ = ["TEXT", "VECTOR", "differences", "launch", "round_weights"]

VECTOR = BYTES_AT_ONCE // mx.float32.size  # elements of a thread

# The body of the kernel, in Metal's words.
SOURCE = """
    const int64_t columns = values_shape[1], size = values_shape[0] * columns;
    const int64_t thread_index = threadgroup_position_in_grid.x * THREADS + thread_position_in_threadgroup.x;
    const int64_t first = thread_index * VECTOR, left = size - first;
    const uint32_t step_key = mix(seed[0] ^ mix(t[0]));
    int64_t row = quotient_of(first, columns), column = first - row * columns;
    uint32_t row_key = mix(step_key ^ static_cast<uint32_t>(row));
    float x[VECTOR];
    read_as_float<VECTOR>(values + first, 1, left, x);
    #pragma unroll
    for (int v = 0; v < VECTOR; v++) {
        x[v] = round_stochastically<DROPPED_BITS>(x[v], mix(row_key ^ mix(static_cast<uint32_t>(column))));
        if (++column == columns) {
            column = 0;
            row_key = mix(step_key ^ static_cast<uint32_t>(++row));
        }
    }
    if (left >= VECTOR) {
        write_together<VECTOR, W>(rounded + first, x);
    } else {
        for (int v = 0; v < left; v++) rounded[first + v] = static_cast<W>(x[v]);
    }
"""

TEXT = Text(
    name="ember_rounding_of_weights",
    inputs=("values", "seed", "t"),
    outputs=("rounded",),
    source=SOURCE,
    functions=FUNCTIONS,
    in_rows=True,
)


def round_weights(values: mx.array, seed: mx.array, t: mx.array, dtype: mx.Dtype) -> mx.array:
    """As ``round_stochastically`` by the ``random_bits`` of the ``bit_keys`` of ``seed`` and ``t``.

    Args:
        values (array): (rows, columns) float32; a transposed one is copied.
        seed, t (array): Of the weight and of this step, uint32, of one element.
        dtype (Dtype): bfloat16 or float16.

    Returns:
        (rows, columns) of that dtype.
    """
    inputs = [values, seed.reshape(1), t.reshape(1)]
    (rounded,) = kernel(TEXT)(inputs=inputs, **launch(values, dtype))
    return rounded


def launch(values: mx.array, dtype: mx.Dtype) -> dict:
    """What the kernel is called with: its constants, the size of its grid, and its output."""
    constants = {"W": dtype, "VECTOR": VECTOR, "THREADS": MOST_THREADS, "DROPPED_BITS": DROPPED_BITS[dtype]}
    groups = -(-values.size // (VECTOR * MOST_THREADS))
    return launch_of(constants, groups, MOST_THREADS, [values.shape], [dtype])


def differences(dtype: mx.Dtype) -> str | None:
    """Where the kernel differs from plain operations in weights of that dtype, in words, or None.

    Values are of all sizes. Rows end inside a thread's elements and between two threads'; so does the whole.
    """
    seed, t = table_seed(0, 1), mx.array(3, mx.uint32)
    for shape in ((9, 2 * MOST_THREADS), (5, 301), (1, 7)):
        normal = mx.random.normal(shape, key=mx.random.key(shape[1]))
        values = normal * 2 ** mx.linspace(-24, 12, shape[1])
        expected = round_stochastically(values, random_bits(*bit_keys(seed, t, *shape)), dtype)
        wrong = (round_weights(values, seed, t, dtype) != expected).sum().item()
        if wrong:
            return f"{wrong} of the {values.size} values of a weight of {shape} are rounded otherwise to {dtype}"
    return None
