"""What accelerators hold and how fast they are on paper."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tempo_fast.errors import InputError


@dataclass(frozen=True)
class Gpu:
    """``memory_gib`` as the driver shows it; dense TFLOP/s in bfloat16 and float32; memory bandwidth in TB/s."""

    name: str
    memory_gib: float
    bf16: float
    fp32: float
    bandwidth: float

    @property
    def cuda(self) -> bool:
        return self.name != "cpu"

    def tflops(self, size: int) -> float:
        """Of elements of so many bytes."""
        return self.bf16 if size == 2 else self.fp32


# NVIDIA's data sheets, dense (half of what is printed "with sparsity"), SXM where there is one; float32 without TF32
_TABLE = (
    Gpu("h100", 79.6, 989.0, 67.0, 3.35),
    Gpu("h800", 79.6, 989.0, 67.0, 3.35),
    Gpu("h200", 140.4, 989.0, 67.0, 4.8),
    Gpu("h20", 95.6, 148.0, 44.0, 4.0),
    Gpu("b200", 179.0, 2250.0, 80.0, 8.0),
    Gpu("a100-80", 79.3, 312.0, 19.5, 2.04),
    Gpu("a100-40", 39.6, 312.0, 19.5, 1.56),
    Gpu("a800", 79.3, 312.0, 19.5, 2.04),
    Gpu("l40s", 44.5, 362.0, 91.6, 0.86),
    Gpu("rtx4090", 23.6, 165.0, 82.6, 1.01),
)
GPUS = {gpu.name: gpu for gpu in _TABLE}
CPU_TFLOPS_PER_CORE = 0.05
"""Assumed: float32 with AVX2 at 3 GHz."""


def find_gpu(name: str) -> Gpu:
    """By name; ``cpu`` is this machine. Raises InputError with the list."""
    if name == "cpu":
        cores = os.cpu_count() or 1
        return Gpu("cpu", _host_gib(), cores * CPU_TFLOPS_PER_CORE, cores * CPU_TFLOPS_PER_CORE, 0.02)
    known = GPUS.get(name.lower().replace("_", "-"))
    if known is None:
        raise InputError(f"--gpu: {name} is none of {', '.join(GPUS)}, cpu")
    return known


def _host_gib() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        return 0.0
