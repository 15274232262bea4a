"""Runs the text of a Metal or CUDA kernel without a GPU: g++ compiles it, ``emulation/machine.cpp`` runs its threads.

For Metal the text is what MLX itself generates, signature and all. A kernel is called as ``mx.fast.metal_kernel``'s is.

This is an emulation. It shows that the text is C++, that its indices, barriers and sums are right, and that it touches
no byte it should not. It cannot show that Apple's compiler takes the text (address spaces say nothing here), that a GPU
rounds as a CPU does, or how fast it is.
"""

import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
from kernels.views import as_mlx_laid_it

EMULATION = Path(__file__).parent / "emulation"
# One reports accesses outside of an array, misaligned ones and the like; with the other machine.cpp watches for races.
CHECKS = {
    "memory": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "races": ["-fsanitize=thread"],
}
# No kernel has Bessel functions and the like, which <cmath> brings: instantiating them is a quarter of a kernel's time.
OPTIONS = ["-std=c++17", "-O0", "-g1", "-w", "-D_GLIBCXX_BITS_SPECFUN_H", "-I", EMULATION]
LINKER = ["-fuse-ld=gold"] if shutil.which("ld.gold") else []  # in a third of the time
CUDA_TYPES = {mx.float32: "float", mx.bfloat16: "__nv_bfloat16", mx.float16: "__half", mx.uint32: "uint32_t",
              mx.int8: "int8_t", mx.uint8: "uint8_t", mx.bool_: "bool"}  # fmt: skip


class EmulationError(Exception):
    """What the emulated GPU found: an access out of bounds, a data race, a deadlock, ..."""


class EmulatedKernel:
    """A kernel like ``mx.fast.metal_kernel``'s and ``cuda_kernel``'s, called with arrays of MLX or with ``Laid`` ones.

    Args:
        names (list of str): Of the inputs, which the kernel reads where they lie, with their strides.
        text (callable): Called with the inputs and the arguments of the launch; returns the source, with signature.
        folder (Path): For what is compiled.
        checks (str): ``"memory"`` or ``"races"``.
        in_rows (bool): Whether inputs that lie otherwise are copied, as MLX does it. Default: ``False``.
        backward (bool): Run threads and threadgroups in descending order. Default: ``False``.
    """

    def __init__(self, names, text, folder, checks, in_rows=False, backward=False):
        self.names = names
        self.text = text
        self.folder = folder
        self.checks = checks
        self.in_rows = in_rows
        self.order = "backward" if backward else "forward"

    def __call__(self, inputs, grid, threadgroup, output_shapes, output_dtypes, template):
        inputs = [mx.contiguous(array) for array in inputs] if self.in_rows else inputs
        inputs = [as_mlx_laid_it(array) if isinstance(array, mx.array) else array for array in inputs]
        arrays = [table.as_mlx() for table in inputs]
        text = self.text(*arrays, grid=grid, threadgroup=threadgroup, output_shapes=output_shapes,
                         output_dtypes=output_dtypes, template=template)  # fmt: skip
        command = [compiled(text, self.folder, self.checks), grid[0] // threadgroup[0], threadgroup[0], self.order]
        for name, table in zip(self.names, inputs, strict=True):
            memory, offset, first, strides = as_it_lies(table.bits)
            facts = {f"{name}_shape": per_axis(table.shape, np.int32), f"{name}_strides": per_axis(strides, np.int64)}
            facts = {fact: values for fact, values in facts.items() if fact in text}
            for fact, values in ({name: memory} | facts).items():
                (self.folder / fact).write_bytes(values.tobytes())
                command += ["r", values.nbytes, *((offset, first) if fact == name else (0, 0)), self.folder / fact]
        outputs = [self.folder / f"output{i}" for i in range(len(output_shapes))]
        for path, shape, dtype in zip(outputs, output_shapes, output_dtypes, strict=True):
            command += ["w", int(np.prod(shape)) * dtype.size, 0, 0, path]
        run(command)
        outputs = zip(outputs, output_shapes, output_dtypes, strict=True)
        return [mx.array(np.fromfile(path, np.uint8)).view(dtype).reshape(shape) for path, shape, dtype in outputs]


def as_it_lies(view):
    """The memory from an array's first byte to its last; how many bytes beyond a multiple of 16 it begins, as it would
    where allocations begin at such; where in it the element of index 0 is, in bytes; and the strides, in elements."""
    size = view.itemsize
    strides = [step // size for step in view.strides]
    ends = [stride * (length - 1) for stride, length in zip(strides, view.shape, strict=True)]
    first = -sum(min(end, 0) for end in ends)
    ascending = view[tuple(slice(None, None, -1 if stride < 0 else 1) for stride in strides)]
    memory = np.lib.stride_tricks.as_strided(ascending, (first + sum(max(end, 0) for end in ends) + 1,), (size,))
    allocated = view
    while isinstance(allocated.base, np.ndarray):
        allocated = allocated.base
    return memory, (address(ascending) - address(allocated)) % 16, first * size, strides


def per_axis(numbers, dtype):
    """Of two axes at least, as the emulated launch reads them."""
    return np.array([*numbers, *[0] * (2 - len(numbers))], dtype)


def address(array):
    return array.__array_interface__["data"][0]


def metal_text(kernel, *inputs, **launch):
    """What MLX hands to Metal for a call of ``kernel``, an ``mx.fast.metal_kernel``, less its own preamble.

    MLX can record a kernel that it cannot run, in order to export it, and prints it when asked to.
    """
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/printed", "w+") as printed:
        standard_output = os.dup(1)
        os.dup2(printed.fileno(), 1)
        try:
            call = lambda *inputs: kernel(inputs=list(inputs), verbose=True, **launch)[0]  # noqa: E731
            mx.export_function(f"{folder}/f.mlxfn", call, *inputs)
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


def cuda_text(source, header, names, output_names, *inputs, template, output_dtypes, **launch):
    """What MLX hands to NVRTC, less its includes, for a kernel with inputs and outputs of those names.

    As ``build_kernel`` writes it in MLX's mlx/backend/cuda/custom_kernel.cpp (read at 055c1ca), which a machine without
    CUDA cannot be asked to do.
    """
    constants = [f"using {name} = {CUDA_TYPES[value]};" if isinstance(value, mx.Dtype) else
                 f"constexpr int {name} = {value};" for name, value in template]  # fmt: skip
    signature, arguments = [], []

    def add(parameter, argument):
        signature.append(parameter)
        arguments.append(argument.format(f"buffers[{len(arguments)}]"))

    for name, array in zip(names, inputs, strict=True):
        dtype = CUDA_TYPES[array.dtype]
        add(f"const {dtype}* {name}", f"static_cast<const {dtype}*>({{}})")
        for kind, number in (("Shape", "int32_t"), ("Strides", "int64_t")):
            if f"{name}_{kind.lower()}" in source:
                add(
                    f"const __grid_constant__ {kind} {name}_{kind.lower()}",
                    f"per_axis<{kind}, {number}, {array.ndim}>({{}})",
                )
    for name, dtype in zip(output_names, output_dtypes, strict=True):
        add(f"{CUDA_TYPES[dtype]}* {name}", f"static_cast<{CUDA_TYPES[dtype]}*>({{}})")
    return f"""
        #include "cuda_stand_ins.h"
        {header}
        __global__ void emulated({", ".join(signature)}) {{
            {" ".join(constants)}
            {source}
        }}
        template <typename PerAxis, typename Number, int AXES>
        PerAxis per_axis(const void* buffer) {{
            PerAxis numbers = {{}};
            for (int i = 0; i < AXES; i++) numbers.numbers[i] = static_cast<const Number*>(buffer)[i];
            return numbers;
        }}
        void run_thread(void** buffers, const Attributes&) {{ emulated({", ".join(arguments)}); }}
    """


@cache
def compiled(text, folder, checks):
    """The path of a program that runs the kernel of ``text``."""
    program = folder / f"kernel{len(list(folder.glob('kernel*.cpp')))}"
    program.with_suffix(".cpp").write_text(text)
    header = re.search(r'#include "(\w+\.h)"', text)[1]
    options = ["-I", compiled_header(header, folder, checks), *OPTIONS, *CHECKS[checks]]
    run(["g++", *options, "-c", program.with_suffix(".cpp"), "-o", program.with_suffix(".o")])
    # Not for races: machine.cpp stands where ThreadSanitizer would be linked in.
    linked = CHECKS[checks] if checks == "memory" else []
    run(["g++", *LINKER, *linked, program.with_suffix(".o"), machine_object(folder), "-o", program])
    return program


@cache
def compiled_header(name, folder, checks):
    """The folder with a header that g++ has read, which is half of what it does for a kernel."""
    place = folder / checks
    place.mkdir(exist_ok=True)
    run(["g++", *OPTIONS, *CHECKS[checks], "-x", "c++-header", EMULATION / name, "-o", place / f"{name}.gch"])
    return place


@cache
def machine_object(folder):
    run(["g++", "-std=c++17", "-O2", "-c", EMULATION / "machine.cpp", "-o", folder / "machine.o"])
    return folder / "machine.o"


def run(command):
    # A library that the environment preloads would come before AddressSanitizer, which refuses that.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise EmulationError(done.stderr)
