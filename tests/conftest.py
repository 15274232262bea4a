import gc
import os
import shutil
import signal
import sys
from pathlib import Path

import precompiled_header
import processes
import pytest
import quick_products
import torch
import triton_interpreter

if not torch.cuda.is_available():
    # Triton's interpreter then runs the kernels of cuda_ref; it must be known before anything imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"
    triton_interpreter.look_once()

# Two workers share two cores: threads of torch and OpenMP would mostly wait for each other, here and in subprocesses.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# A hundred processes are started, and modules are compiled once for all of them, also where Docker or a shell says no.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# torch.compile would build and load a library for each instruction set of this CPU, to see whether it can.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

# In the background of a script, or under nohup, these are ignored, as they then are in every process started from here.
for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)


# Every save waits until it is on the disk, some thousands of them; in memory none does. A container has little of it.
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


# Now, and not when pytest is configured: the conftests of folders import MLX before that. Workers inherit both.
HEADER = PRODUCTS = None
if "PYTEST_XDIST_WORKER" not in os.environ:
    HEADER, PRODUCTS = precompiled_header.on_the_path(), quick_products.library()
    if PRODUCTS:
        processes.with_quick_products(PRODUCTS)


def pytest_unconfigure():
    gc.unfreeze()  # else libraries say at the end of Python that they leak
    for folder in filter(None, (HEADER, PRODUCTS and PRODUCTS.parent)):
        shutil.rmtree(folder, ignore_errors=True)


def pytest_collection_modifyitems(items):
    """In the order of their names the last files are short, but for one, beside which a worker would be idle."""
    items.sort(key=lambda item: item.path.name != "test_token_tables.py")


@pytest.fixture(scope="module", autouse=True)
def what_is_there_stays():
    """Collections of garbage leave out the million objects of PyTorch, the tests and modules before: 0.4 s each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def eager():
    """For modules whose subject is not the compiled step: on a CPU, g++ builds each fused kernel, and there are many.

    Runs compare with mlx-lm's, resume and leave out steps compiled, as tests/finetune/test_run.py, test_resume.py and
    test_nonfinite.py have them.
    """
    import mlx.core as mx

    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Model folders by name and a data folder; nothing may write into them."""
    from tiny_models import write_data, write_model  # needs MLX, which cuda_ref's tests do without

    root = tmp_path_factory.mktemp("folders")
    return {
        "untied": write_model(root / "untied"),
        "tied": write_model(root / "tied", tied=True),
        "quantized": write_model(root / "quantized", quantized=True),
        "deeper": write_model(root / "deeper", layers=3),
        "data": write_data(root / "data"),
        "text": write_data(root / "text", kind="text"),
    }


@pytest.fixture
def parse(folders, tmp_path):
    """Options of a short run on the tiny model: parse("--iters", 3, ...), with keywords for other folders."""
    from ember_mlx.finetune import options

    def parse(*arguments, model="untied", data="data", adapter="adapters"):
        paths = {"--model": folders[model], "--data": folders[data], "--adapter-path": tmp_path / adapter}
        short = {"--iters": 3, "--batch-size": 2, "--val-batches": 2, "--steps-per-report": 1}
        short["--keep-checkpoints"] = 3  # so that a damaged one has others before it
        return options.parse([str(word) for pair in (paths | short).items() for word in pair] + [*map(str, arguments)])

    return parse
