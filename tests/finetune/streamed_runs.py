"""Runs of test_workers.py, of one worker there and of two in worker_checks.py."""

from contextlib import contextmanager

import mlx.core as mx

SHORT = ["--iters", "4", "--val-batches", "1", "--sample-tokens", "1"]
STREAMED = {  # runs by name, and their options
    "streamed": [*SHORT, "--stream", "--grad-accumulation-steps", "2", "--clip-grad-norm", "0.5"],
    "streamed_full": [*SHORT, "--stream", "--fine-tune-type", "full"],
}


@contextmanager
def without_compilation():
    """A CPU compiles each fused kernel for half a second."""
    mx.disable_compile()
    yield
    mx.enable_compile()
