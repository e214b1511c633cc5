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


def free_bytes(device: torch.device) -> int:
    """Memory that a batch may count on; 0 on a CPU, where larger batches gain nothing."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
