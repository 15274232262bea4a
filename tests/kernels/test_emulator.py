"""The emulation itself: each fault, planted into the kernel, is found, and by the check that is there for it."""

import mlx.core as mx
import numpy as np
import pytest
from kernels.emulator import EmulationError
from kernels.views import laid

from ember_mlx.kernels import statistics

SHAPE = (statistics.ROWS + 2, 203)  # two threadgroups of two simdgroups, with rows and columns left over

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SUMS = "row_sums[ROWS][MOST_SIMDGROUPS];"
# The text that is replaced, what stands there instead, and which check finds it, saying what.
FAULTS = {
    "columns written past the end": (
        "if (j + v < columns) column_sums",
        "column_sums",
        {"memory": "heap-buffer-overflow", "races": "data race.*device memory"},
    ),
    "rows written past the end": (
        "row_means[first + i] = ",
        "row_means[first + i + 1] = ",
        {"memory": "heap-buffer-overflow", "races": "data race|out of bounds"},
    ),
    "columns read past the end": (
        "column_step, columns - j, sums",
        "column_step, VECTOR, sums",
        {"memory": "heap-buffer-overflow", "races": "out of bounds.*reads"},
    ),
    "an input written": ("const int rows = ", "*(float*)g = 0; const int rows = ", {"races": "read only"}),
    "threadgroup memory too small": (
        SUMS,
        SUMS.replace("ROWS]", "ROWS - 1]"),
        {"memory": "index 127 out of bounds|global-buffer-overflow"},
    ),
    "threadgroup memory too large": (
        SUMS,
        SUMS + "threadgroup float more[8192]; if (thread_index == 0) more[0] = more[8191] = 0;",
        {"races": "more than 32 KB"},
    ),
    "threadgroup memory read before it is written": (
        "start == 0 ? sum : row_sums[i + of_lane][simdgroup] + sum",
        "row_sums[i + of_lane][simdgroup] + sum",
        {"races": "never written.*threadgroup memory"},
    ),
    "no barrier": (BARRIER, "", {"races": "data race.*threadgroup memory|never written"}),
    "a barrier that orders nothing": (
        BARRIER,
        BARRIER.replace("mem_threadgroup", "mem_none"),
        {"races": "data race.*threadgroup memory"},
    ),
    "a barrier for some threads only": (BARRIER, f"if (lane != 3) {BARRIER}", {"memory": "deadlock"}),
    "two lanes write the same sum": (
        "return lane % (32 / N) == 0",
        "return lane % (16 / N) == 0",
        {"races": "data race.*threadgroup memory"},
    ),
    "two threadgroups write the same columns": (
        "column_sums[group * columns + j + v]",
        "column_sums[j + v]",
        {"races": "data race.*device memory"},
    ),
}
FAULTS_OF_ROWS_TOGETHER = {
    "rows read past the end": (
        "i < rows && columns > 0",
        "columns > 0",
        {"memory": "heap-buffer-overflow", "races": "out of bounds.*reads"},
    ),
    "columns read past the end": (
        "i < rows && columns > 0",
        "i < rows",
        {"memory": "heap-buffer-overflow", "races": "out of bounds.*reads"},
    ),
}
FAULTS_IN_COLUMNS = {
    "rows of a column read past its end": (
        "1, rows - i, x",
        "1, DOWN, x",
        {"memory": "heap-buffer-overflow", "races": "out of bounds.*reads"},
    ),
    "a column too many": (
        "j < columns; j += simdgroups",
        "j <= columns; j += simdgroups",
        {"memory": "heap-buffer-overflow", "races": "out of bounds.*reads|data race.*device memory"},
    ),
}


def run(kernel, way="rows"):
    shape = (SHAPE[0], SHAPE[1] + 1) if way == "rows together" else SHAPE
    g = mx.array(np.random.RandomState(0).uniform(1, 2, size=shape).astype(np.float32))
    g = g if way == "rows together" else laid(way, g)
    outputs = kernel(inputs=[g], **statistics.launch(g))
    return [np.array(output) for output in outputs]


def cases(faults):
    return [
        pytest.param(checks, (old, new), message, id=f"{fault}-{checks}")
        for fault, (old, new, found_by) in faults.items()
        for checks, message in found_by.items()
    ]


@pytest.mark.parametrize(("checks", "plant", "message"), cases(FAULTS))
def test_a_planted_fault_is_found(emulated, checks, plant, message):
    with pytest.raises(EmulationError, match=f"(?s){message}"):
        run(emulated("metal", checks, plant))


@pytest.mark.parametrize(("checks", "plant", "message"), cases(FAULTS_OF_ROWS_TOGETHER))
def test_a_planted_fault_is_found_where_rows_are_read_together(emulated, checks, plant, message):
    with pytest.raises(EmulationError, match=f"(?s){message}"):
        run(emulated("metal", checks, plant), "rows together")


@pytest.mark.parametrize(("checks", "plant", "message"), cases(FAULTS_IN_COLUMNS))
def test_a_planted_fault_is_found_where_the_rows_of_a_column_lie_side_by_side(emulated, checks, plant, message):
    with pytest.raises(EmulationError, match=f"(?s){message}"):
        run(emulated("metal", checks, plant), "columns")


def test_a_vector_read_from_a_misaligned_address_is_found_in_the_cuda_text(emulated):
    plant = ("reinterpret_cast<size_t>(pointer) % sizeof(Together<T, N>) == 0", "true")
    with pytest.raises(EmulationError, match="misaligned address"):
        run(emulated("cuda", "memory", plant))


@pytest.mark.parametrize(
    ("way", "plant"),
    [
        ("rows", ("from[v * step]", "from[0]")),
        ("rows", ("sums[v] += square", "sums[v] += sum")),
        ("rows", ("distance = 16 / N", "distance = 8 / N")),
        ("rows together", ("upper ? sums[k] : sums[k + half]", "sums[k + half]")),
        ("rows", ("sum / columns", "sum / threads")),
        ("columns", ("row_sums[i + v][simdgroup] = sums[v]", "row_sums[i + v][simdgroup] = sums[0]")),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else value,
)
def test_a_wrong_index_or_sum_changes_the_result(emulated, way, plant):
    right, wrong = (run(emulated("metal", "races", plant), way) for plant in (None, plant))
    assert any(not np.allclose(*pair, rtol=1e-5) for pair in zip(right, wrong, strict=True))
