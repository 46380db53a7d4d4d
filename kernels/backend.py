"""Which implementation of an op runs: Triton for CUDA tensors, torch for all others.

`KERNELS=torch` or `KERNELS=triton` in the environment forces one of them. Triton runs on CPU tensors only in its
interpreter: set `TRITON_INTERPRET=1` before the first import of triton or of this package. The interpreter is for
tests: slow, correct in fp32, wrong in bf16.
"""

import os

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # no Triton on this platform: every op has its torch form
    triton = None

# Triton decides at decoration, that is at import, whether a kernel is compiled or interpreted.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


# A compiled function calls the ops as they are: torch.compile cannot trace their launches. `torch.compiler.disable` is
# the public name, but it loads torch._dynamo at once, 2 s at every import; this loads it at the first call.
not_compiled = torch._disable_dynamo


def use_triton(x: Tensor) -> bool:
    """True when the Triton form of an op should run on x.

    Raises ValueError when KERNELS names no implementation, or forces Triton where it cannot run.
    """
    choice = os.environ.get("KERNELS", "")
    if choice not in ("", "torch", "triton"):
        raise ValueError(f"KERNELS must be 'torch' or 'triton', got {choice!r}")
    if choice != "triton":
        return choice == "" and x.is_cuda and triton is not None and not INTERPRETED
    if triton is None:
        raise ValueError("KERNELS=triton, but triton is not installed")
    if not x.is_cuda and not INTERPRETED:
        raise ValueError(f"KERNELS=triton on a {x.device.type} tensor: set TRITON_INTERPRET=1 before importing triton")
    return True
