"""Where networks run: each worker loads its own, on the GPU of its rank when there is one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def network_device() -> torch.device:
    """CUDA where torch finds it, else the CPU. Of several GPUs, the one of this process's number on its machine
    (``LOCAL_RANK`` or ``SLURM_LOCALID``)."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    return torch.device("cuda", int(local) % torch.cuda.device_count())
