"""The Triton backend of `patchify` and `resize`, for CUDA tensors.

Nothing here imports Triton before a kernel is wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tempo_kernels.fused import installed, interpreted

IMPLS = ("auto", "triton", "torch")


def use_triton(frames: Tensor, impl: str) -> bool:
    """Whether the kernels take these frames: ``auto`` where they can, ``triton`` or an error, ``torch`` never.

    Raises ValueError for an impl that is not known, or asked for and not possible.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "torch":
        return False
    reason = None
    if not (frames.is_cuda or interpreted()):
        reason = f"the frames are on {frames.device.type}"
    elif not installed():
        reason = "Triton is not installed"
    elif torch.version.hip:  # AMD's devices are "cuda" to torch; nothing was tried there
        reason = "the GPU is not an NVIDIA one"
    if reason and impl == "triton":
        raise ValueError(f"impl='triton' is not possible: {reason}")
    return reason is None
