import platform
import shutil
from dataclasses import replace
from functools import partial

import mlx.core as mx
import pytest
from kernels.emulator import EmulatedKernel, EmulationError, cuda_text, metal_text

from ember_mlx.kernels import metal_and_cuda, statistics


@pytest.fixture
def emulated(make_emulated):
    """As ``make_emulated``; what MLX itself does in the test it does on the CPU, and arrays lie there as the test says.

    A GPU that MLX finds would lay views out anew before the emulation sees them.
    """
    with mx.stream(mx.cpu):
        yield make_emulated


@pytest.fixture(scope="session")
def make_emulated(tmp_path_factory):
    """A kernel without a GPU: emulated("metal" or "cuda", checks, plant=(old, new), module=statistics, **options).

    The options are those of ``EmulatedKernel``. ``plant`` puts a fault where the source of the kernel's module, its
    functions, or else the header, has the old text first.
    """
    if shutil.which("g++") is None or platform.system() != "Linux":
        pytest.skip("the emulation needs g++ on Linux; a Mac runs the kernel on its GPU")
    folder = tmp_path_factory.mktemp("emulation")

    def make(language, checks, plant=None, module=statistics, **options):
        kernel = module.TEXT
        with pytest.MonkeyPatch.context() as patch:
            if plant and plant[0] in kernel.source + kernel.functions:
                place = "source" if plant[0] in kernel.source else "functions"
                kernel = replace(kernel, **{place: getattr(kernel, place).replace(*plant, 1)})
            elif plant:
                names = {"metal": "METAL", "cuda": "CUDA"}[language], "BOTH"
                name = next(name for name in names if plant[0] in getattr(metal_and_cuda, name))
                patch.setattr(metal_and_cuda, name, getattr(metal_and_cuda, name).replace(*plant, 1))
            if language == "metal":
                text = partial(metal_text, metal_and_cuda.kernel.__wrapped__(kernel, "metal"))
            else:
                text = partial(cuda_text, kernel.source, kernel.header("cuda"), kernel.inputs, kernel.outputs)
        return EmulatedKernel(kernel.inputs, text, folder, checks, kernel.in_rows, **options)

    return make


@pytest.fixture
def found_with(emulated, monkeypatch):
    """found_with(module, old, new, dtypes): what a kernel's check of a machine says with ``new`` for each ``old``."""

    def found(module, old, new, dtypes=(mx.bfloat16, mx.bfloat16)):
        text = module.TEXT
        assert old in text.source + text.functions
        broken = replace(text, source=text.source.replace(old, new), functions=text.functions.replace(old, new))
        monkeypatch.setattr(module, "TEXT", broken)
        kernel = emulated("cuda", "memory", module=module)
        monkeypatch.setattr(module, "kernel", lambda text: kernel)
        try:
            return module.differences(*dtypes)
        except EmulationError as error:
            return str(error)

    return found
