"""The Triton backend of the loss head: the same functions as the torch one, for CUDA tensors.

Nothing here imports Triton before a kernel is wanted.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (on any device, slowly), as tests without a GPU have it."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def supported(hidden: Tensor, weight: Tensor) -> str | None:
    """None if the kernels take hidden [N, D] and weight [V, D], else why not, as the end of a sentence."""
    if not (weight.is_cuda or interpreted()):
        return f"the head is on {weight.device.type}"
    if not installed():
        return "Triton is not installed"
    if hidden.dtype != weight.dtype:
        return f"hidden states are {hidden.dtype} and the head is {weight.dtype}"
    if weight.dtype == torch.float64 or (weight.dtype == torch.float32 and not interpreted()):
        return f"the head is {weight.dtype}"
    if not weight.is_contiguous():
        return "the head is not contiguous"
    if torch.version.hip:  # AMD's devices are "cuda" to torch, with capabilities that mean something else
        return "the GPU is not an NVIDIA one"
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "the GPU is older than sm_80"
    return None
