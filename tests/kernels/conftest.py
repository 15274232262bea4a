import platform
import shutil
from functools import partial

import pytest
from kernels.emulator import EmulatedKernel, cuda_text, metal_text

from ember_mlx.kernels import statistics


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """A kernel without a GPU: emulated("metal" or "cuda", checks, plant=(old, new), module=statistics, **options).

    The options are those of ``EmulatedKernel``. ``plant`` puts a fault where the source, or else a header, of the
    kernel's module has the old text first.
    """
    if shutil.which("g++") is None or platform.system() != "Linux":
        pytest.skip("the emulation needs g++ on Linux; a Mac runs the kernel on its GPU")
    folder = tmp_path_factory.mktemp("emulation")

    def make(language, checks, plant=None, module=statistics, **options):
        with pytest.MonkeyPatch.context() as patch:
            if plant:
                texts = {name: getattr(module, name) for name in ("SOURCE", "METAL_HEADER", "CUDA_HEADER")}
                name = next(name for name, text in texts.items() if plant[0] in text)
                patch.setattr(module, name, texts[name].replace(*plant, 1))
            if language == "metal":
                text = partial(metal_text, module.kernel.__wrapped__("metal"))
            else:
                text = partial(cuda_text, module.SOURCE, module.CUDA_HEADER, module.INPUTS, module.OUTPUTS)
        return EmulatedKernel(module.INPUTS, text, folder, checks, **options)

    return make
