"""Start ranks of a script of checks: ``sharded_start.py SCRIPT RANK...``.

PyTorch is imported once, then each rank is forked; a GPU is first used after that.
"""

import os
import runpy
import sys
from pathlib import Path

import pytest  # noqa: F401
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401

import cuda_ref  # noqa: F401

sys.path.append(str(Path(__file__).parents[1]))
import triton_interpreter

triton_interpreter.look_once()


def main(script, *ranks):
    for rank in ranks[1:]:
        if os.fork() == 0:
            return as_rank(script, rank)
    as_rank(script, ranks[0])
    return [os.wait() for _ in ranks[1:]]


def as_rank(script, rank):
    """Run the script with its own log."""
    os.environ["RANK"] = rank
    log = os.open(Path(os.environ["CHECK_FOLDER"], f"rank{rank}.log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    runpy.run_path(script, run_name="__main__")


main(*sys.argv[1:])
