"""Runs the text of a Metal or CUDA kernel without a GPU: g++ compiles it, ``emulation/machine.cpp`` runs its threads.

For Metal the text is what MLX itself generates, signature and all. A kernel is called as ``mx.fast.metal_kernel``'s is.

This is an emulation. It shows that the text is C++, that its indices, barriers and sums are right, and that it touches
no byte it should not. It cannot show that Apple's compiler takes the text (address spaces say nothing here), that a GPU
rounds as a CPU does, or how fast it is.
"""

import os
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

EMULATION = Path(__file__).parent / "emulation"
# One reports accesses outside of an array, misaligned ones and the like; with the other machine.cpp watches for races.
CHECKS = {
    "memory": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "races": ["-fsanitize=thread"],
}
CUDA_TYPES = {mx.float32: "float", mx.bfloat16: "__nv_bfloat16"}


class EmulationError(Exception):
    """What the emulated GPU found: an access out of bounds, a data race, a deadlock, ..."""


class EmulatedKernel:
    """A kernel like ``mx.fast.metal_kernel``'s and ``cuda_kernel``'s, with one 2-D input and float32 outputs.

    Args:
        text (callable): Called with the array and the arguments of the launch; returns the source, with signature.
        folder (Path): For what is compiled.
        checks (str): ``"memory"`` or ``"races"``.
        layout (str): How the input lies in memory, one of ``LAYOUTS``. Default: ``"rows"``.
        backward (bool): Run threads and threadgroups in descending order. Default: ``False``.
    """

    def __init__(self, text, folder, checks, layout="rows", backward=False):
        self.text = text
        self.folder = folder
        self.checks = checks
        self.layout = layout
        self.order = "backward" if backward else "forward"

    def __call__(self, inputs, grid, threadgroup, output_shapes, output_dtypes, template):
        (g,) = inputs
        text = self.text(g, grid=grid, threadgroup=threadgroup, output_shapes=output_shapes,
                         output_dtypes=output_dtypes, template=template)  # fmt: skip
        elements, strides = LAYOUTS[self.layout](np.array(mx.contiguous(g).view(mx.uint8)).view(f"V{g.itemsize}"))
        buffers = {"g": elements, "g_shape": np.array(g.shape, np.int32), "g_strides": np.array(strides, np.int64)}
        command = [compiled(text, self.folder, self.checks), grid[0] // threadgroup[0], threadgroup[0], self.order]
        for name, array in buffers.items():
            (self.folder / name).write_bytes(array.tobytes())
            command += ["r", array.nbytes, self.folder / name]
        outputs = [self.folder / f"output{i}" for i in range(len(output_shapes))]
        for path, shape, dtype in zip(outputs, output_shapes, output_dtypes, strict=True):
            command += ["w", int(np.prod(shape)) * dtype.size, path]
        run(command)
        outputs = zip(outputs, output_shapes, strict=True)
        return [mx.array(np.fromfile(path, np.float32).reshape(shape)) for path, shape in outputs]


def rows_of_a_wider_table(table):
    wider = np.pad(table, ((0, 0), (0, 3)))
    return wider.reshape(-1)[:-3], (wider.shape[1], 1)


def every_second_element(table):
    return np.stack([table, table[::-1]], axis=2).reshape(-1)[:-1], (2 * table.shape[1], 2)


# Each takes a NumPy table and returns the elements in the order in memory, not one too many, and the strides.
LAYOUTS = {
    "rows": lambda table: (table.reshape(-1), (table.shape[1], 1)),
    "columns": lambda table: (table.T.reshape(-1), (1, table.shape[0])),
    "rows of a wider table": rows_of_a_wider_table,
    "every second element": every_second_element,
    "one row for all": lambda table: (table[0], (0, 1)),
}


def metal_text(kernel, g, **launch):
    """What MLX hands to Metal for a call of ``kernel``, an ``mx.fast.metal_kernel``, less its own preamble.

    MLX can record a kernel that it cannot run, in order to export it, and prints it when asked to.
    """
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/printed", "w+") as printed:
        standard_output = os.dup(1)
        os.dup2(printed.fileno(), 1)
        try:
            mx.export_function(f"{folder}/f.mlxfn", lambda g: kernel(inputs=[g], verbose=True, **launch)[0], g)
        finally:
            os.dup2(standard_output, 1)
            os.close(standard_output)
        text = Path(printed.name).read_text().split("```")[1]
    return f'#include "metal_stand_ins.h"\n{text}\n{launcher(text)}'


def launcher(text):
    """``run_thread`` of threads.h: calls the kernel of ``text`` with buffers and attributes, in its own order."""
    instance = re.search(r"decltype\((.*?)\) ", text)[1]
    arguments = []
    for argument in re.search(r"\[\[kernel\]\] void \w+\((.*?)\) \{", text, re.DOTALL)[1].split(",\n"):
        buffer = re.fullmatch(r"\s*((?:const )?)(?:device|constant) (\w+)\* \w+ \[\[buffer\((\d+)\)\]\]", argument)
        attribute = re.fullmatch(r"\s*(\w+) (\w+) \[\[\2\]\]", argument)
        if buffer:
            arguments.append(f"static_cast<{buffer[1]}{buffer[2]}*>(buffers[{buffer[3]}])")
        else:
            arguments.append(f"{attribute[1]}{{here.{attribute[2]}}}")
    return f"void run_thread(void** buffers, const Attributes& here) {{ {instance}({', '.join(arguments)}); }}"


def cuda_text(source, header, g, *, template, **launch):
    """What MLX hands to NVRTC, less its includes, for a kernel with the input ``g`` and two float outputs.

    As ``build_kernel`` writes it in MLX's mlx/backend/cuda/custom_kernel.cpp (read at 055c1ca), which a machine without
    CUDA cannot be asked to do.
    """
    dtype = CUDA_TYPES[g.dtype]
    constants = [f"using {name} = {CUDA_TYPES[value]};" if isinstance(value, mx.Dtype) else
                 f"constexpr int {name} = {value};" for name, value in template]  # fmt: skip
    return f"""
        #include "cuda_stand_ins.h"
        {header}
        __global__ void statistics(
            const {dtype}* g, const __grid_constant__ Shape g_shape, const __grid_constant__ Strides g_strides,
            float* row_means, float* column_sums) {{
            {" ".join(constants)}
            {source}
        }}
        void run_thread(void** buffers, const Attributes&) {{
            const int32_t* lengths = static_cast<const int32_t*>(buffers[1]);
            const int64_t* strides = static_cast<const int64_t*>(buffers[2]);
            statistics(static_cast<const {dtype}*>(buffers[0]), Shape{{{{lengths[0], lengths[1]}}}},
                       Strides{{{{strides[0], strides[1]}}}}, static_cast<float*>(buffers[3]),
                       static_cast<float*>(buffers[4]));
        }}
    """


@cache
def compiled(text, folder, checks):
    """The path of a program that runs the kernel of ``text``."""
    program = folder / f"kernel{len(list(folder.glob('kernel*.cpp')))}"
    program.with_suffix(".cpp").write_text(text)
    options = ["-std=c++17", "-O1", "-g", "-w", "-I", EMULATION]
    run(["g++", *options, *CHECKS[checks], "-c", program.with_suffix(".cpp"), "-o", program.with_suffix(".o")])
    # Not for races: machine.cpp stands where ThreadSanitizer would be linked in.
    linked = CHECKS[checks] if checks == "memory" else []
    run(["g++", *linked, program.with_suffix(".o"), machine_object(folder), "-o", program])
    return program


@cache
def machine_object(folder):
    run(["g++", "-std=c++17", "-O2", "-c", EMULATION / "machine.cpp", "-o", folder / "machine.o"])
    return folder / "machine.o"


def run(command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise EmulationError(done.stderr)
