"""MLX's header as g++ reads it once: on a CPU MLX compiles each fused kernel anew, and 0.6 of its 0.7 s are the header.

What is read before is still instantiated anew for each kernel, so streams are left out, which <complex> brings, and
special functions, which <cmath> brings: no kernel has any. They run for a moment, so they are optimized less:
the arithmetic is the same. Where anything is missing, kernels are compiled as ever.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

HEADER = "mlx/backend/cpu/compiled_preamble.h"
FLAGS = ("-std=c++17", "-O3", "-Wall", "-fPIC")  # as MLX has them; with others g++ reads the header itself
# -O1 takes a quarter less time; -O0 takes more, to write longer code. A kernel calls functions of libm alone: what else
# g++ links with takes the linker a sixth of the time.
QUICK = ("-O1", "-nostdlib", "-fno-use-linker-plugin")
WRAPPER = """#!/bin/sh
case " $* " in
" {flags} -shared "*) set -- "$@" {quick} -lm ;;
esac
exec "{compiler}" -I "{include}" "$@"
"""
# libstdc++'s names for having read a header; elsewhere they do nothing. <complex> names one constant of the streams.
SHORTER = """
#include <iosfwd>
#include <limits>
#define _GLIBCXX_SSTREAM 1
#define _GLIBCXX_BITS_SPECFUN_H 1
namespace std { struct ios_base { static const int failbit = 4; }; }
"""


def on_the_path() -> Path | None:
    """Put a g++ first on PATH, for this process and those it starts, that looks for the compiled header first.

    Returns the folder that is to be removed afterwards, or None.
    """
    compiler, mlx = shutil.which("g++"), find_spec("mlx")
    if sys.platform != "linux" or compiler is None or mlx is None:
        return None
    headers = next((Path(each) / "include" for each in mlx.submodule_search_locations), None)
    if headers is None or not (headers / HEADER).exists():
        return None
    folder = Path(tempfile.mkdtemp(prefix="mlx-header-"))
    compiled, wrapper = folder / "include" / f"{HEADER}.gch", folder / "bin" / "g++"
    compiled.parent.mkdir(parents=True)
    wrapper.parent.mkdir()
    text = folder / "text.h"
    command = [compiler, *FLAGS, *QUICK, "-I", headers, "-x", "c++-header", text, "-o", compiled]
    for shorter in (SHORTER, ""):
        text.write_text(f'{shorter}#include "{headers / HEADER}"\n')
        if subprocess.run(command, capture_output=True).returncode == 0:
            break
    else:
        shutil.rmtree(folder)
        return None
    words = {"flags": " ".join(FLAGS), "quick": " ".join(QUICK), "compiler": compiler}
    wrapper.write_text(WRAPPER.format(**words, include=folder / "include"))
    wrapper.chmod(0o755)
    os.environ["PATH"] = f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}"
    return folder
