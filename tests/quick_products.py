"""MLX's float32 products by the OpenBLAS that NumPy comes with: 50 times as fast as by the BLAS of MLX's CPU wheel.

Where anything is missing, products are made as ever; a Mac has Accelerate.
"""

import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

# NumPy's takes whole numbers of 64 bits, and has names of its own.
SOURCE = """
#define MATRIX const float*
extern "C" void scipy_cblas_sgemm64_(int, int, int, long, long, long, float, MATRIX, long, MATRIX, long, float, float*,
                                     long);
extern "C" void cblas_sgemm(int order, int a_by, int b_by, int m, int n, int k, float alpha, MATRIX a, int a_step,
                            MATRIX b, int b_step, float beta, float* c, int c_step) {
    scipy_cblas_sgemm64_(order, a_by, b_by, m, n, k, alpha, a, a_step, b, b_step, beta, c, c_step);
}
"""


def library() -> Path | None:
    """A library with MLX's name for the product, in a folder of its own, which is to be removed; or None."""
    compiler, numpy = shutil.which("g++"), find_spec("numpy")
    if sys.platform != "linux" or compiler is None or numpy is None:
        return None
    blas = next(Path(numpy.origin).parents[1].glob("numpy.libs/libscipy_openblas64_*.so"), None)
    if blas is None:
        return None
    folder = Path(tempfile.mkdtemp(prefix="products-"))
    command = [compiler, "-shared", "-fPIC", "-x", "c++", "-", "-x", "none", blas, f"-Wl,-rpath,{blas.parent}"]
    if subprocess.run(
        [*command, "-o", folder / "products.so"], input=SOURCE, text=True, capture_output=True
    ).returncode:
        shutil.rmtree(folder)
        return None
    return folder / "products.so"
