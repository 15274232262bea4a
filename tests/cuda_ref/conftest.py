"""The Triton kernels run on the GPU; where there is none, in Triton's interpreter, on the CPU."""

import pytest
import torch

from cuda_ref import triton_kernels

TRITON_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(
    params=[
        pytest.param(("eager", "cpu"), id="eager"),
        *([pytest.param(("eager", "cuda"), id="eager-cuda")] if torch.cuda.is_available() else []),
        pytest.param(
            ("triton", TRITON_DEVICE.type),
            id="triton",
            marks=pytest.mark.skipif(not triton_kernels.available(TRITON_DEVICE), reason="Triton is not installed"),
        ),
    ]
)
def implementation(request):
    """The name of an implementation and the device that it is tested on."""
    return request.param
